"""TRL's SFT trainer, with checkpoints that are whole or not there, adapters kept in float32, and held-out loss of our own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import SFTTrainer

from exactune.evaluate import held_out_loss
from exactune.train.grouping import LengthGroupedSampler
from exactune.train.run_folder import RunFolder
from exactune.train.writing import replace_folder, staging_folder


class RunTrainer(SFTTrainer):
    """`SFTTrainer` that writes its checkpoints into a run folder.

    `held_out`: encoded rows whose loss is logged as `eval_loss` every `every` updates; none without them.
    `group_by_length`: put rows of like length into one batch.
    """

    def __init__(
        self,
        run: RunFolder,
        *,
        held_out: Sequence[dict[str, Any]] = (),
        every: int | None = None,
        group_by_length: bool = False,
        **arguments: Any,
    ):
        self._run = run
        self._group_by_length = group_by_length
        self._held_out = held_out
        self._every = every
        self._checkpoints = run.checkpoints
        with _adapters_as_they_are(arguments["model"]):
            super().__init__(**arguments)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._every and self._held_out and "loss" in logs and self.state.global_step % self._every == 0:
            # Left to the trainer's own evaluation this would be a mean of batch means, and would move the random state.
            model: Any = self.model
            logs["eval_loss"] = held_out_loss(model, self._held_out, batch_size=self.args.per_device_eval_batch_size).mean
        super().log(logs, start_time)

    def sequences(self) -> int:
        """Sequences in one pass over the data, after packing."""
        return len(self.train_dataset)  # type: ignore[arg-type]

    def restore(self, checkpoint: Path) -> None:
        """The weights of `checkpoint`, for a run whose last step was taken already."""
        self._load_from_checkpoint(str(checkpoint))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The run's report takes the place of TRL's card."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self._group_by_length:
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        return LengthGroupedSampler([len(ids) for ids in rows["input_ids"]], self.args.per_device_train_batch_size, self.args.seed)

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
