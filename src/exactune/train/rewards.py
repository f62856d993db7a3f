"""Rewards that can be verified: functions of TRL's own kind, some ready-made, others from a file of the user's.

A reward function takes `completions` and, by name, the other columns of the rows, and returns one number for each completion.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exactune.errors import ConfigError
from exactune.evaluate.answers import is_json, same

RewardFunction = Callable[..., list[float | None]]


def said(completion: Any) -> str:
    """The text of a completion: of its last message, where it is a conversation."""
    return completion if isinstance(completion, str) else str(completion[-1].get("content") or "")


def valid_json(completions: list[Any], **columns: Any) -> list[float | None]:
    """1 for an answer that is a JSON object or list and nothing else, 0 otherwise."""
    return [float(is_json(said(completion))) for completion in completions]


def exact_match(completions: list[Any], answer: list[str], **columns: Any) -> list[float | None]:
    """1 for an answer that equals the reference in the column `answer` (as JSON, where that is JSON), 0 otherwise."""
    return [float(same(said(completion), reference)) for completion, reference in zip(completions, answer, strict=True)]


READY_MADE: dict[str, RewardFunction] = {"valid_json": valid_json, "exact_match": exact_match}


def reward_function(name: str) -> RewardFunction:
    """The reward function called `name`: a ready-made one, or `FILE.py:FUNCTION`.

    Raises:
        ConfigError: there is none of that name, or the file does not have it.
    """
    if name in READY_MADE:
        return READY_MADE[name]
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise ConfigError(f"reward_functions: there is none called {name!r}.", f"Use {', '.join(READY_MADE)}, or FILE.py:FUNCTION.")
    if not Path(path).is_file():
        raise ConfigError(f"reward_functions: there is no file {path}.", "Check the path: FILE.py:FUNCTION.")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code: whatever it raises is the finding
        raise ConfigError(f"reward_functions: {path} cannot be run ({type(error).__name__}: {error}).", "Mend the file.") from error
    found = getattr(module, function, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"reward_functions: {path} has no function {function}.", f"It has: {', '.join(names) or 'none'}.")
    return found
