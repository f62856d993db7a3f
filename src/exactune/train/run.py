"""A training run, step by step. TRL trains, the objective says what; this prepares, watches, saves and scores."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console

import exactune
from exactune.errors import DataError
from exactune.train.checks import check_before_loading
from exactune.train.config import TrainConfig
from exactune.train.environment import environment
from exactune.train.held_out import describe, prepare_sources, read_sources
from exactune.train.objectives import objective_of
from exactune.train.plot import loss_png
from exactune.train.progress import ProgressCallback, show_example, show_facts, show_scores
from exactune.train.reference import as_it_came
from exactune.train.report import Facts, card, markdown, page
from exactune.train.result import RunResult
from exactune.train.run_folder import RunFolder
from exactune.train.scores import Scored, held_out_loss_of
from exactune.train.stopping import StopRequests
from exactune.train.writing import write_atomically


class Run:
    """One run, step by step: the parts that several steps need are its fields."""

    def __init__(self, folder: RunFolder, config: TrainConfig, requests: StopRequests, console: Console, *, resumed: bool):
        self.folder = folder
        self.config = config
        self.requests = requests
        self.console = console
        self.resumed = resumed
        self.objective = objective_of(config)

    def go(self, start: float) -> RunResult:
        self._prepare()
        fast = self._make_trainable()
        self._plan_memory()
        self._open_folder()
        with as_it_came(self.model):
            before = self._score("before")
        trainer = self._trainer()
        trainer.memory, trainer.optimizer_in_backward = self.memory, self.config.optimizer_in_backward
        self._banner(fast)
        self._train(trainer)
        if self.requests.signum is not None:
            return self._result(start, before, signum=self.requests.signum)
        saved = self._save(trainer)
        after = self._score("after")
        self._report(before, after, saved, time.perf_counter() - start)
        return self._result(start, before, after, saved)

    def _prepare(self) -> None:
        """Rows and model. Nothing is written: whatever is wrong with either leaves no folder behind."""
        config = self.config
        check_before_loading(config)
        self.objective.check()
        sources = read_sources(config)
        self.model, self.tokenizer = self.objective.load()
        self.rows = prepare_sources(config, self.objective, sources, self.tokenizer)
        self.held_out = self.objective.prepare(sources.held_out, self.tokenizer) if sources.held_out else None

    def _open_folder(self) -> None:
        """The run folder, with what is known before training."""
        config = self.config
        data = {"train": describe(", ".join(config.sources()), self.rows)}
        if self.held_out:
            data["held_out"] = describe(config.eval_dataset or config.sources()[0], self.held_out)
        if not self.resumed:
            self.folder.create(config)
        if self.memory is not None and not self.folder.read_json("memory.json"):
            self.memory.record(self.memory.as_dict())
        recorded = self.folder.read_json("data.json")
        if recorded is None:
            self.folder.write_json("environment.json", environment())
            self.folder.write_json("data.json", data)
        elif differing := [facts["source"] for part, facts in data.items() if recorded[part]["fingerprint"] != facts["fingerprint"]]:
            raise DataError(
                f"The rows of {' and '.join(differing)} have changed since the run {self.folder} began.",
                "Put them back, or start a new run.",
            )

    def _score(self, when: str) -> Scored | None:
        """Held-out scores, measured once a run: a resumed run takes those that were written."""
        if self.held_out is None:
            return None
        scores = self.folder.read_json("scores.json") or {}
        if when in scores:
            return self.objective.scores_from(scores[when])
        self.console.print(f"Scoring {len(self.held_out.rows)} held-out rows {when} training")
        measured = self.objective.score(self.model, self.tokenizer, self.held_out)
        self.folder.write_json("scores.json", {**scores, when: measured.as_dict()})
        return measured

    def _make_trainable(self) -> str:
        """Put the adapter on (or free every weight) and swap in what is fast; a line that says what was."""
        from exactune import device
        from exactune.models.notes import notes_of

        config = self.config
        notes_of(self.model).memory_budget = config.memory_budget
        self.model = self.objective.adapt(self.model)
        on_gpu = device.kernels_run_on(self.model.device)
        budgeted = config.memory_budget != "auto"
        if not config.accelerate or not (on_gpu or budgeted or config.objective == "sft"):
            return "nothing: stock torch" + ("" if config.accelerate else " (accelerate is false)")
        from exactune.errors import ModelError
        from exactune.models.accelerate import accelerate

        try:
            if not on_gpu and not budgeted:
                accelerate(self.model, layers=False)
                return "the loss, without logits of what is not learned; stock torch otherwise"
            return accelerate(self.model, deterministic=config.deterministic, cuda_graphs=config.cuda_graphs).summary()
        except ModelError as error:  # no decoder under its head
            return f"nothing: stock torch ({error.problem.rstrip('.')})"

    def _plan_memory(self) -> None:
        """The plan of the largest batch, in force before any step; a resumed run takes the one that was written."""
        from exactune.train.memory import plan_run

        recorded = self.folder.read_json("memory.json") if self.resumed else None
        self.memory, self.memory_line = plan_run(self.config, self.model, self.rows, recorded)
        if self.memory is not None:
            self.memory.record = lambda values: self.folder.write_json("memory.json", values)
            self.memory.say = lambda line: self.console.print(line, soft_wrap=True)

    def _trainer(self) -> Any:
        from transformers import PrinterCallback

        from exactune.train.callbacks import MetricsCallback, StopCallback

        config = self.config
        self.progress = ProgressCallback(self.console)
        callbacks = [MetricsCallback(self.folder), StopCallback(self.requests), self.progress]
        trainer = self.objective.trainer(self.folder, self.model, self.tokenizer, self.rows, self.held_out, callbacks)
        trainer.remove_callback(PrinterCallback)
        if config.max_steps > 0:
            self.total_steps = config.max_steps
        else:
            batches = math.ceil(trainer.sequences() / config.per_device_train_batch_size)
            self.total_steps = math.ceil(config.num_train_epochs * math.ceil(batches / config.gradient_accumulation_steps))
        return trainer

    def _banner(self, fast: str) -> None:
        config = self.config
        trained = sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
        total = parameters(self.model)
        rows, passes, unit = config.per_device_train_batch_size, config.gradient_accumulation_steps, self.objective.rows_unit()
        facts = {
            "Exactune": f"{exactune.__version__}, {config.objective} ({config.method}) of {config.model_name} on {self.model.device}",
            "trains": f"{trained:,} of {total:,} parameters ({trained / total:.2%})",
            "accelerated": fast,
            "memory": self.memory_line,
            "data": self.rows.summary(),
            "held out": self.held_out.summary() if self.held_out else "no rows (give eval_dataset or val_size to measure the gain)",
            "batch": f"{rows} {unit} x {passes} passes = {rows * passes} {unit} an update",
            "steps": f"{self.total_steps:,}",
            "run folder": str(self.folder),
        }
        show_facts(self.console, facts)
        for note in self.rows.notes:
            self.console.print(note)
        show_example(self.console, self.rows.example)

    def _train(self, trainer: Any) -> None:
        checkpoint = self.folder.latest_checkpoint() if self.resumed else None
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        if self.resumed:
            self.folder.trim_metrics(step)
            self.console.print(f"Going on from step {step:,} of {self.total_steps:,}")
        if checkpoint and step >= self.total_steps:
            trainer.restore(checkpoint)
            trainer.state.global_step = step
            return
        self.requests.in_steps = True
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            self.requests.in_steps = False
            self.progress.stop()
        self._say_what_ran_stock()

    def _say_what_ran_stock(self) -> None:
        """Fast parts that met inputs they do not take, and handed them to the stock ones: never a silent fallback."""
        from exactune.models.accelerate import report_of

        report = report_of(self.model)
        for reason, calls in report.stock_calls.items() if report else ():
            self.console.print(f"{calls:,} calls ran the stock code: {reason}", soft_wrap=True)

    def _save(self, trainer: Any) -> Path:
        """The result under its name: `adapter/`, or `model/` for full fine-tuning."""
        final = self.folder.model if self.config.method == "full" else self.folder.adapter
        with self.folder.new_folder(final) as staging:
            trainer.model.save_pretrained(staging)
            self.tokenizer.save_pretrained(staging)
        return final

    def _report(self, before: Scored | None, after: Scored | None, saved: Path, seconds: float) -> None:
        metrics = self.folder.read_metrics()
        png = loss_png(metrics, held_out_loss_of(before), held_out_loss_of(after), **self.objective.curve)
        if png:
            self.folder.write_bytes("loss.png", png)
        result = {
            "result": str(saved),
            "steps": str(self.total_steps),
            "time": f"{seconds:.0f} s" + (" since it was resumed" * self.resumed),
        }
        data, machine = self.folder.read_json("data.json"), self.folder.read_json("environment.json")
        talks = self.objective.asks_and_answers
        facts = Facts(str(self.folder), self.config, machine, data, result, before, after, png is not None, talks)
        text = markdown(facts)
        write_atomically(saved / "README.md", card(facts).encode())
        self.folder.write_text("report.html", page(text, f"Exactune: {self.folder}", png))
        self.folder.write_text("report.md", text)
        if before and after:
            show_scores(self.console, before, after)
        self.console.print(f"Result {saved}, report {self.folder.path / 'report.md'}", soft_wrap=True)

    def _result(
        self, start: float, before: Scored | None, after: Scored | None = None, saved: Path | None = None, signum: int | None = None
    ) -> RunResult:
        full = self.config.method == "full"
        return RunResult(
            run_dir=self.folder.path,
            adapter_dir=None if full else saved,
            model_dir=saved if full else None,
            before=before,
            after=after,
            metrics=self.folder.read_metrics(),
            seconds=time.perf_counter() - start,
            signum=signum,
        )


def parameters(model: Any) -> int:
    """Parameters of `model` as it was before it was packed into 4 bits, shared ones once."""
    counted = getattr(model, "num_parameters", None)
    return int(counted()) if counted else sum(weight.numel() for weight in model.parameters())
