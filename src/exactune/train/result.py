"""What a run leaves behind, for the program that started it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """What a run left. `adapter_dir` (lora, qlora) or `model_dir` (full) holds the result; both None if it was interrupted.

    `before` and `after` are the scores that the objective measures; None without held-out rows.
    """

    run_dir: Path
    adapter_dir: Path | None = None
    model_dir: Path | None = None
    before: Any = None
    after: Any = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    signum: int | None = None

    @property
    def interrupted(self) -> bool:
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        """What a command should end with: 0, or 128 and the signal's number (130 for Ctrl-C, 143 for SIGTERM)."""
        return 0 if self.signum is None else 128 + self.signum
