"""What a run adds to any of TRL's trainers: checkpoints that are whole or not there, adapters kept in float32, scores of our own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from exactune.memory.in_backward import StepInBackward
from exactune.train.memory import RunMemory
from exactune.train.optimizer_groups import LearningRates, in_backward, split_groups
from exactune.train.run_folder import RunFolder
from exactune.train.writing import replace_folder, staging_folder


def _on_one_gpu(arguments: TrainingArguments) -> None:
    """Train on the first of several GPUs: transformers would give each batch to all of them by `nn.DataParallel`, which TRL refuses.

    There is no public way to say so; transformers' trainer does the same for a model that is split across devices.
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1


class InRunFolder(Trainer):
    """To be put before a trainer of TRL's among a class's bases.

    `watch`: measures held-out rows; called every `every` updates, its values are logged beside the loss. `learning_rates`: those
    of single weights. May be set before training: `memory`, which takes the steps under a plan, and `optimizer_in_backward`, with which
    each weight is stepped as soon as its gradient is known.
    """

    memory: RunMemory | None = None
    optimizer_in_backward = False
    token_masks: tuple[str, ...] = ()  # inputs whose ones count as tokens seen, where transformers cannot tell by itself

    def __init__(
        self,
        run: RunFolder,
        *,
        learning_rates: LearningRates,
        watch: Callable[[], dict[str, float]] | None = None,
        every: int | None = None,
        **arguments: Any,
    ):
        self._run = run
        self._watch = watch
        self._every = every
        self._learning_rates = learning_rates
        self._checkpoints = run.checkpoints
        _on_one_gpu(arguments["args"])
        with _adapters_as_they_are(arguments["model"]):
            super().__init__(**arguments)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._watch and self._every and "loss" in logs and self.state.global_step % self._every == 0:
            # Left to the trainer's own evaluation this would be a mean of batch means, and would move the random state.
            logs |= self._watch()
        if self.memory is not None and self.memory.retries:
            logs["memory_retries"] = self.memory.retries
        if self.optimizer_in_backward:
            logs.pop("grad_norm", None)  # no gradient is left to be measured
        super().log(logs, start_time)

    def create_optimizer(self, model: Any = None) -> Any:
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if new and self._learning_rates.differ:
            split_groups(optimizer, self.model if model is None else model, self._learning_rates)
        if new and self.optimizer_in_backward:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer = in_backward(optimizer, kind, settings)
        return optimizer

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        take: Any = functools.partial(super().training_step, **kwargs)
        return take(model, inputs, *args) if self.memory is None else self.memory.step(self, take, model, inputs, *args)

    def batch_of_longest(self, lengths: Sequence[int]) -> dict[str, Any] | None:
        """The longest rows as one batch, given the tokens of each row (the first, where the trainer packed them); None for a stream."""
        if not hasattr(self.train_dataset, "__len__"):
            return None
        dataset: Any = self._remove_unused_columns(self.train_dataset, description="training")
        order: Sequence[int] = range(len(dataset))
        if len(lengths) == len(dataset):
            order = sorted(order, key=lambda row: -lengths[row])
        return self.data_collator([dataset[row] for row in order[: self.args.per_device_train_batch_size]])

    def no_optimizer_steps(self) -> AbstractContextManager[None]:
        """Inside, a backward pass changes no weight."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer.paused() if isinstance(optimizer, StepInBackward) else nullcontext()

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.token_masks and model.training:
            self.state.num_input_tokens_seen += sum(int(inputs[name].sum()) for name in self.token_masks if name in inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def sequences(self) -> int:
        """Sequences in one pass over the data, after packing."""
        return len(self.train_dataset)  # type: ignore[arg-type]

    def restore(self, checkpoint: Path) -> None:
        """The weights of `checkpoint`, for a run whose last step was taken already."""
        self._load_from_checkpoint(str(checkpoint))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The run's report takes the place of TRL's card."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoints)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        final = self._run.checkpoints / name
        with staging_folder(final) as staging:
            self._checkpoints = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._checkpoints = self._run.checkpoints
            # Pickled settings that nobody should have to trust, and PEFT's empty card.
            for unwanted in ("training_args.bin", "README.md"):
                (staging / name / unwanted).unlink(missing_ok=True)
            replace_folder(staging / name, final)
        rotate_checkpoints(str(self._run.checkpoints), self.args.save_total_limit)


@contextmanager
def _adapters_as_they_are(model: Any) -> Iterator[None]:
    """Undo TRL's rounding of adapters on a quantised base to bfloat16, where an update below 2^-8 of a weight is lost."""
    before = {}
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    yield
    for name, weight in model.named_parameters():
        if name in before and weight.dtype != before[name].dtype:
            weight.data = before[name].to(weight.device)
