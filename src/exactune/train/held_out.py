"""Which rows train and which are held out, read before a model is loaded so that a bad row costs no wait."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exactune.data import Prepared, Rows, prepare, read_rows
from exactune.data.mixture import mix
from exactune.errors import ConfigError
from exactune.train.config import TrainConfig

if TYPE_CHECKING:
    from exactune.train.objectives.base import Objective


@dataclass(frozen=True)
class Sources:
    """Raw rows to train on, to hold out (None where no rows are), and of the further data sets that are mixed in."""

    train: Rows
    held_out: Rows | None
    further: list[Rows]


def read_sources(config: TrainConfig) -> Sources:
    """The rows that `config` names. `val_size` is held out of the first source: the one that is to be learned.

    Raises:
        DataError: they are missing, empty or unreadable.
        ConfigError: more rows are to be held out than there are.
    """
    first, *others = config.sources()
    if config.streaming:
        held_out = None
        if config.eval_dataset:
            held_out = read_rows(config.eval_dataset, split=config.eval_split, skip_bad_rows=config.skip_bad_rows)
        return Sources(Rows([], [], first), held_out, [])
    train = read_rows(first, split=config.dataset_split, skip_bad_rows=config.skip_bad_rows)
    further = [read_rows(name, split=config.dataset_split, skip_bad_rows=config.skip_bad_rows) for name in others]
    if config.eval_dataset:
        return Sources(train, read_rows(config.eval_dataset, split=config.eval_split, skip_bad_rows=config.skip_bad_rows), further)
    if config.eval_split:
        return Sources(train, read_rows(first, split=config.eval_split, skip_bad_rows=config.skip_bad_rows), further)
    if not config.val_size:
        return Sources(train, None, further)
    return Sources(*split(train, config.val_size, config.seed), further)


def prepare_sources(config: TrainConfig, objective: Objective, sources: Sources, tokenizer: Any) -> Prepared:
    """The rows of every source as the objective's trainer takes them, mixed by `dataset_weights`."""
    if config.streaming:
        return objective.stream(tokenizer)
    prepared = [objective.prepare(rows, tokenizer) for rows in (sources.train, *sources.further)]
    return mix(prepared, config.sources(), config.dataset_weights, config.seed)


def reading(config: TrainConfig) -> dict[str, Any]:
    """How an objective that imitates reads rows: arguments of `prepare` and `prepare_stream`."""
    return {
        "max_length": config.max_seq_length,
        "format": config.format,
        "skip_bad_rows": config.skip_bad_rows,
        "train_on": config.train_on,
        "masked": config.masked_blocks,
    }


def prepare_rows(config: TrainConfig, rows: Rows, tokenizer: Any, *, split_long: bool = False) -> Prepared:
    """`rows` as token ids and labels, as an objective that imitates learns them."""
    return prepare(rows, tokenizer, split_long=split_long, **reading(config))


def split(rows: Rows, val_size: float, seed: int) -> tuple[Rows, Rows]:
    """(rows to train on, rows to hold out): `val_size` of `rows` (a share when below 1), chosen by `seed`, in the source's order."""
    count = round(val_size if val_size >= 1 else max(1, val_size * len(rows)))
    if count >= len(rows):
        raise ConfigError(f"val_size {val_size:g} holds out all of the {len(rows)} rows.", "Hold out fewer.")
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return rows.keep([i for i in range(len(rows)) if i not in chosen]), rows.keep(sorted(chosen))


def describe(source: str, prepared: Prepared) -> dict[str, Any]:
    """What data.json says of one set of rows."""
    lengths = sorted(prepared.lengths)
    return {
        "source": source,
        "format": prepared.format,
        "rows": len(prepared.rows),
        "sequences": len(prepared.lengths),
        "fingerprint": prepared.fingerprint,
        "tokens": prepared.tokens,
        "trained_tokens": prepared.learned_tokens,
        "lengths": {"shortest": lengths[0], "median": lengths[len(lengths) // 2], "longest": lengths[-1]},
        "truncated": prepared.truncated,
        "skipped": [list(entry) for entry in prepared.skipped],
        "dropped": [list(entry) for entry in prepared.dropped],
    }
