"""What happens at each step beside the training itself: metrics to the run folder, and the end of the run where it was asked for."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from exactune.errors import ExactuneError
from exactune.train.run_folder import RunFolder
from exactune.train.stopping import StopRequests

_KEPT = ("loss", "learning_rate", "grad_norm", "mean_token_accuracy", "epoch", "reward", "reward_std", "kl", "accuracy", "margin")
_KEPT_GROUPS = ("eval_", "rewards/", "logps/", "completions/mean_length", "nll_loss", "memory_retries")


def memory_gib() -> float:
    """Peak GPU memory that torch allocated in this process; without a GPU, the process's memory now."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


class Meter:
    """Tokens per second between two logs."""

    def __init__(self) -> None:
        self.tokens = 0
        self.at = time.perf_counter()

    def start(self, tokens: int) -> None:
        self.tokens, self.at = tokens, time.perf_counter()

    def rate(self, tokens: int) -> float:
        now = time.perf_counter()
        rate = (tokens - self.tokens) / max(now - self.at, 1e-9)
        self.tokens, self.at = tokens, now
        return rate


class MetricsCallback(TrainerCallback):
    """Writes one line to metrics.jsonl for each update; `tokens` are those seen since the start of the run, padding apart."""

    def __init__(self, run: RunFolder):
        self.run = run
        self.meter = Meter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.meter.start(state.num_input_tokens_seen)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return  # the trainer's closing summary, which a resumed run would write twice
        tokens = state.num_input_tokens_seen
        kept = [name for name in _KEPT if name in logs] + [name for name in logs if name.startswith(_KEPT_GROUPS)]
        line = {"step": state.global_step, **{name: logs[name] for name in kept}, "tokens": tokens}
        line |= {"tokens_per_second": round(self.meter.rate(tokens), 1), "memory_gib": round(memory_gib(), 3)}
        # JSON has no NaN: a plot or a reader of the file meets null.
        self.run.append_metrics({key: value if math.isfinite(value) else None for key, value in line.items()})
        if not math.isfinite(logs["loss"]):
            raise ExactuneError(
                f"The loss of step {state.global_step} is not a finite number, so training was stopped; earlier checkpoints are whole.",
                "Lower learning_rate, lengthen warmup_steps, or compute in bfloat16 or float32 instead of float16.",
            )


class StopCallback(TrainerCallback):
    """Ends the run after the step in which a signal came, with a checkpoint."""

    def __init__(self, requests: StopRequests):
        self.requests = requests

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.requests.signum is not None:
            control.should_save = True
            control.should_training_stop = True
