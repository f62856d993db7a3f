"""A run's folder: what is in it, and how it is written so that a kill or a full disk never spoils what was whole before.

config.yaml        every setting, resolved       metrics.jsonl   one line for each update
environment.json   machine and versions          scores.json     held-out scores before and after, with answers
data.json          the rows and their hash       memory.json     the memory plan, where there is one
loss.png, report.md, report.html
checkpoints/       checkpoint-N, whole ones only adapter/ or model/   the result
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from exactune.errors import ConfigError, OutputError
from exactune.train.config import TrainConfig
from exactune.train.writing import replace_folder, staging_folder, whole_json_lines, write_atomically, writing

CONFIG = "config.yaml"


def default_output_dir(dataset: str) -> str:
    """`runs/<dataset>-<time>`: a name that is free."""
    return str(Path("runs") / f"{Path(dataset).stem}-{datetime.now():%Y%m%d-%H%M%S}")


class RunFolder:
    """Paths and writers of one run's folder. Making this object touches nothing; `claim` and `create` do."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def is_run(self) -> bool:
        return (self.path / CONFIG).is_file()

    def is_finished(self) -> bool:
        """The report is written last."""
        return (self.path / "report.md").is_file()

    def claim(self, overwrite: bool) -> None:
        """Raise `OutputError` unless this folder can be written: it is new or empty, or a run that may be replaced."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise OutputError(f"{self.path} is a file, and a run needs a folder.", "Choose another --output-dir.")
        if not any(self.path.iterdir()):
            return
        if not self.is_run():
            raise OutputError(f"{self.path} holds files that are not a run's; they are left alone.", "Choose another --output-dir.")
        if not overwrite:
            raise OutputError(
                f"{self.path} already holds a run.",
                f"Go on with it (`exactune train --resume {self.path}`), choose another --output-dir, or replace it with --overwrite.",
            )

    def create(self, config: TrainConfig) -> None:
        """Make the folder, in place of the run that `claim` allowed to replace, and write the settings into it."""
        with writing(self.path):
            if self.is_run():
                shutil.rmtree(self.path)
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.write_text(CONFIG, config.to_yaml())

    def config(self) -> TrainConfig:
        """The settings this run was started with."""
        if not self.is_run():
            raise ConfigError(f"{self.path} is not a run folder: it has no {CONFIG}.", "Give the folder that `exactune train` wrote.")
        return TrainConfig.from_yaml(self.path / CONFIG)

    def write_bytes(self, name: str, content: bytes) -> None:
        write_atomically(self.path / name, content)

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> Any:
        """The value in `name`; None where the run has not written it yet."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def append_metrics(self, values: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl. A line cut short by a kill is dropped when the run resumes."""
        with writing(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(values) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl."""
        if not self.metrics_file.is_file():
            return []
        return whole_json_lines(self.metrics_file.read_text(encoding="utf-8"))

    def trim_metrics(self, last_step: int) -> None:
        """Drop the lines past `last_step`: the steps after a checkpoint that a resumed run takes again."""
        kept = [line for line in self.read_metrics() if line["step"] <= last_step]
        self.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint of the latest step; only whole ones carry the name (see `new_folder`)."""
        found = {}
        for path in self.checkpoints.glob("checkpoint-*"):
            step = path.name.removeprefix("checkpoint-")
            if step.isdigit() and (path / "trainer_state.json").is_file():
                found[int(step)] = path
        return found[max(found)] if found else None

    @contextmanager
    def new_folder(self, final: Path) -> Iterator[Path]:
        """A folder to fill beside `final`, which takes its name (and replaces it) once the block ends without error.

        Raises:
            OutputError: the disk is full or not writable; what was at `final` is untouched, and the half-filled folder is gone.
        """
        with staging_folder(final) as staging:
            yield staging
            replace_folder(staging, final)

    def sweep(self) -> None:
        """Remove the half-written folders and files that a killed run left."""
        for leftover in [*self.path.glob(".*.partial"), *self.checkpoints.glob(".*.partial")]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
