"""The rows that `exactune export` measures on and weighs columns by: those the user names, or the run's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from exactune.errors import ConfigError, DataError, ExactuneError

if TYPE_CHECKING:
    from exactune.data import Rows
    from exactune.train import RunFolder

TRAINING_ROWS = "train"  # what --imatrix is given to weigh by the run's own training rows
IMPORTANCE_ROWS = 128
MAX_LENGTH = 2048


def run_of(target: str) -> RunFolder | None:
    """The run that `target` is, or whose adapter or model it is."""
    from exactune.train import RunFolder

    return next((run for run in map(RunFolder, (Path(target), Path(target).absolute().parent)) if run.is_run()), None)


def held_out_rows(run: RunFolder | None, tokenizer: Any, count: int) -> tuple[dict[str, Any] | None, str]:
    """Arguments for `compression_cost` from a run's first `count` held-out rows; None, and why, where there are none to be had."""
    if run is None:
        return None, "not measured what compression cost: no run says which rows were held out (--evaluate FILE names some)"
    try:
        config, rows = run.config(), _sources(run).held_out
        if rows is None:
            return None, "not measured what compression cost: the run held no rows out (--evaluate FILE names some)"
        return {
            "rows": _prepared(run, _first(rows, count), tokenizer),
            "source": Path(config.eval_dataset).name if config.eval_dataset else "",
            "generate_rows": config.generate_rows,
            "max_new_tokens": config.max_new_tokens,
        }, ""
    except ExactuneError as error:  # the export itself needs no rows
        return None, f"not measured what compression cost: {error.problem}"


def named_rows(file: str, run: RunFolder | None, count: int) -> dict[str, Any]:
    """Arguments for `compression_cost` from the first `count` rows of `file`.

    Raises:
        DataError: they cannot be read, or have nothing to learn.
    """
    from exactune.data import read_rows

    rows = _first(read_rows(file), count)
    if run is None:
        return {"rows": rows, "source": Path(file).name, "max_length": MAX_LENGTH}
    config = run.config()
    found = {"generate_rows": config.generate_rows, "max_new_tokens": config.max_new_tokens, "max_length": config.max_seq_length}
    return {"rows": rows, "source": Path(file).name, **found}


def check_importance_source(source: str | None, run: RunFolder | None) -> None:
    """Find a mistake in --imatrix before a model is loaded.

    Raises:
        DataError: there is no such file.
        ConfigError: training rows are asked for, and there is no run.
    """
    if source == TRAINING_ROWS and run is None:
        raise ConfigError("--imatrix train takes the training rows of a run, and this is not one.", "Name a text file instead.")
    if source not in (None, TRAINING_ROWS) and not Path(str(source)).is_file():
        mend = "Name a text file with one sample a line, or say `--imatrix train` for the run's own rows."
        raise DataError(f"There is no file {source}.", mend)


def importance_samples(source: str, run: RunFolder | None, tokenizer: Any) -> list[str] | list[list[int]]:
    """Lines of a text file, or token ids of the run's first training rows."""
    if source != TRAINING_ROWS or run is None:
        return [line for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
    return list(_prepared(run, _first(_sources(run).train, IMPORTANCE_ROWS), tokenizer).dataset["input_ids"])


def _sources(run: RunFolder) -> Any:
    from exactune.train.held_out import read_sources

    return read_sources(run.config())


def _prepared(run: RunFolder, rows: Rows, tokenizer: Any) -> Any:
    from exactune.train.held_out import prepare_rows

    return prepare_rows(run.config(), rows, tokenizer)


def _first(rows: Rows, count: int) -> Rows:
    return rows.keep(list(range(min(count, len(rows)))))
