"""RUN_OR_MODEL on the command line: a run folder, an adapter folder, a model folder or a hub name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exactune.errors import ModelError


def open_model(target: str, *, load_in_4bit: bool | None = None) -> tuple[Any, Any]:
    """The model and tokenizer that `target` names, ready to answer.

    A run's adapter is put on its base as it was trained, in 4 bits or 16; `load_in_4bit` decides otherwise.

    Raises:
        ModelError: there is no such run or model, or the run has not written its result yet.
    """
    from exactune.models.load import load_model
    from exactune.models.modes import for_inference

    run = Path(target)
    if (run / "config.yaml").is_file():
        from exactune.train import RunFolder

        folder = RunFolder(run)
        trained = next((result for result in (folder.adapter, folder.model) if result.is_dir()), None)
        if trained is None:
            raise ModelError(f"The run {run} has not written a model yet.", f"Finish it first: exactune train --resume {run}")
        if load_in_4bit is None:
            load_in_4bit = folder.config().load_in_4bit
        target = str(trained)
    model, tokenizer = load_model(target, max_seq_length=None, load_in_4bit=bool(load_in_4bit))
    return for_inference(model), tokenizer
