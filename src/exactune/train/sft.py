"""`train`: start a training run, or go on with one."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from exactune.errors import ConfigError, OutputError
from exactune.train.config import TrainConfig
from exactune.train.quiet import quiet
from exactune.train.result import RunResult
from exactune.train.run import Run
from exactune.train.run_folder import RunFolder, default_output_dir
from exactune.train.stopping import Stopped, StopRequests


def train(config: TrainConfig | None = None, *, resume: str | Path | None = None, console: Console | None = None) -> RunResult:
    """Fine-tune as `config` says, into its run folder; or go on with the run in the folder `resume`, bit for bit as if it had
    never stopped. A resumed run takes its own settings: `config` may be left out, and must be theirs otherwise.

    Ctrl-C or SIGTERM ends the current step, saves a checkpoint and returns a result with `interrupted` set.

    Raises:
        ConfigError, DataError, ModelError, DeviceError: settings, rows, model or machine will not do; nothing was written.
        OutputError: the run folder is taken, or the disk is full; earlier checkpoints are whole.
    """
    if config is None and resume is None:
        raise ConfigError("There is nothing to train: neither settings nor a run to resume was given.")
    console = console or Console()
    start = time.perf_counter()
    folder = RunFolder(resume or config.output_dir or default_output_dir(config.sources()[0]))  # type: ignore[union-attr]
    run = _resumed(folder, config) if resume else _new(folder, config)  # type: ignore[arg-type]
    try:
        with StopRequests() as requests, quiet():
            result = Run(folder, run, requests, console, resumed=resume is not None).go(start)
    except Stopped as stopped:
        result = RunResult(folder.path, seconds=time.perf_counter() - start, signum=stopped.signum)
    except OutputError as error:
        raise OutputError(error.problem, f"{error.mend} Then go on with: exactune train --resume {folder}") from error
    if result.interrupted:
        goes_on = folder.is_run() and not folder.is_finished()
        console.print(f"\nStopped. Go on with: exactune train --resume {folder}" if goes_on else "\nStopped; nothing was written yet.")
    return result


def _new(folder: RunFolder, config: TrainConfig) -> TrainConfig:
    folder.claim(config.overwrite)
    # Saved without `overwrite`: running the folder's own config.yaml must not replace the folder.
    return config.model_copy(update={"output_dir": str(folder), "overwrite": False})


def _resumed(folder: RunFolder, config: TrainConfig | None) -> TrainConfig:
    saved = folder.config()
    given = config.model_dump() if config else {}
    differing = [name for name, value in given.items() if name not in ("output_dir", "overwrite") and value != getattr(saved, name)]
    if differing:
        changes = ", ".join(f"{name} ({getattr(saved, name)!r}, now {given[name]!r})" for name in differing)
        raise ConfigError(
            f"{folder} was started with other settings: {changes}.", "A resumed run keeps its own settings; start a new run for others."
        )
    if folder.is_finished():
        raise ConfigError(f"{folder} is finished; there is nothing to resume.", f"Its report is {folder.path / 'report.md'}.")
    folder.sweep()
    return saved
