"""What a run shows while it works: a banner, a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from exactune.train.callbacks import Meter, memory_gib
from exactune.train.scores import Scored, before_and_after

EXAMPLE_CHARACTERS = 1200
PLAIN_LINES = 20  # lines of progress in a log file, for a whole run


def show_facts(console: Console, facts: dict[str, str]) -> None:
    """The banner: one fact a line."""
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(Text(name, style="bold"), Text(value))
    console.print(table)


def show_example(console: Console, spans: Sequence[tuple[str, bool]]) -> None:
    """One rendered row: what is learned in green (between ⟦ ⟧ where there are no colours), what is only read in grey."""
    text = Text()
    left = EXAMPLE_CHARACTERS
    marks = console.color_system is None
    for piece, trained in spans:
        shown = piece[:left] + ("…" if len(piece) > left else "")
        text.append(f"⟦{shown}⟧" if trained and marks else shown, style="green" if trained else "bright_black")
        left -= len(piece)
        if left <= 0:
            break
    console.print(Text(f"One row as the model sees it ({'between ⟦ ⟧' if marks else 'in green'}: what it learns)", style="bold"))
    console.print(text, soft_wrap=True)


def show_scores(console: Console, before: Scored, after: Scored) -> None:
    """The before/after table on the terminal."""
    table = Table("held-out rows", "before", "after")
    for row in before_and_after(before, after):
        table.add_row(*row)
    console.print(table)


class ProgressCallback(TrainerCallback):
    """Step, loss, learning rate, tokens a second, memory and time left."""

    def __init__(self, console: Console):
        self.console = console
        self.meter = Meter()
        self.bar: Progress | None = None
        self.speed = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.meter.start(state.num_input_tokens_seen)
        if not self.console.is_terminal:
            return
        columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"), TimeRemainingColumn())
        self.bar = Progress(TextColumn("training"), *columns, console=self.console)
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, facts="")
        self.bar.start()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        rate = self.meter.rate(state.num_input_tokens_seen)
        # Batches differ in length: a smoothed rate can be read.
        self.speed = rate if not self.speed else 0.9 * self.speed + 0.1 * rate
        watched = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        held_out = "".join(f"  held-out {'' if name == 'loss' else name + ' '}{value:.4f}" for name, value in watched.items())
        reward = f"  reward {logs['reward']:.3f}" if "reward" in logs else ""
        facts = (
            f"loss {logs['loss']:.4f}{reward}{held_out}  lr {logs['learning_rate']:.2e}  {self.speed:,.0f} tok/s  {memory_gib():.2f} GiB"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, facts=facts)
        elif watched or state.global_step in (1, state.max_steps) or state.global_step % max(1, state.max_steps // PLAIN_LINES) == 0:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {facts}", soft_wrap=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar off the terminal; also after an error, when the trainer says nothing."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
