"""What a run asks of its objective, with what most of them have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from exactune.data import Prepared, Rows
from exactune.errors import ConfigError
from exactune.train.arguments import common_arguments
from exactune.train.config import TrainConfig
from exactune.train.optimizer_groups import LearningRates
from exactune.train.run_folder import RunFolder
from exactune.train.scores import Scored
from exactune.train.settings import unused_settings


class Objective(ABC):
    """One way to train. Subclasses say how rows are prepared, which trainer learns from them, and how held-out rows are scored."""

    uses: tuple[str, ...] = ()  # the settings that this objective reads and not every other does
    asks_and_answers = False  # whether the result is a model to talk to
    curve: Mapping[str, str] = MappingProxyType({"value": "loss", "label": "loss"})  # what the report draws over the steps

    def __init__(self, config: TrainConfig):
        self.config = config

    def check(self) -> None:
        """Raise `ConfigError` for settings that this objective cannot honour, before anything is loaded."""
        unused = unused_settings(self.config, self.uses)
        if unused:
            raise ConfigError(
                f"{', '.join(unused)}: objective {self.config.objective} does not use {'it' if len(unused) == 1 else 'them'}.",
                "Leave out what has no effect, or choose the objective it belongs to.",
            )

    def load(self) -> tuple[Any, Any]:
        """(model, tokenizer) before any adapter."""
        from exactune.models.load import load_model

        config = self.config
        return load_model(
            config.model_name,
            max_seq_length=config.max_seq_length,
            dtype=config.dtype,
            load_in_4bit=config.load_in_4bit,
            full_finetuning=config.method == "full",
            trust_remote_code=config.trust_remote_code,
            revision=config.revision,
            random_state=config.seed,
        )

    @abstractmethod
    def prepare(self, rows: Rows, tokenizer: Any) -> Prepared:
        """`rows` as this objective's trainer takes them."""

    def stream(self, tokenizer: Any) -> Prepared:
        """The rows of the configuration's sources, read while training."""
        raise ConfigError(f"objective {self.config.objective} reads its rows before training, not during it.", "Leave out streaming.")

    def adapt(self, model: Any) -> Any:
        """`model` with what is trained on it: an adapter, or every weight."""
        from exactune.models.adapters import DEFAULT_TARGETS, add_adapter
        from exactune.models.checkpointing import apply_checkpointing

        config = self.config
        if config.method == "full":
            apply_checkpointing(model, config.use_gradient_checkpointing)
            return model
        return add_adapter(
            model,
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.target_modules or DEFAULT_TARGETS,
            layers_to_transform=config.layers_to_transform,
            modules_to_save=self.trained_whole(model),
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            init_lora_weights=True if config.init_lora_weights == "default" else config.init_lora_weights,
            # What PEFT asks of LoftQ: the bits of the quantised weights that the adapter is to make up for.
            loftq_config={"loftq_bits": 4, "loftq_iter": 1} if config.init_lora_weights == "loftq" else None,
            use_gradient_checkpointing=config.use_gradient_checkpointing,
            random_state=config.seed,
        )

    def trained_whole(self, model: Any) -> list[str] | None:
        """`modules_to_save`, with embedding and head where they have a learning rate of their own."""
        config = self.config
        if config.embedding_learning_rate is None:
            return config.modules_to_save
        ends = {id(end) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
        if model.config.get_text_config().tie_word_embeddings:
            ends = {id(model.get_input_embeddings())}  # one matrix: it is trained once
        names = [name.rpartition(".")[2] for name, module in model.named_modules() if id(module) in ends]
        return list(dict.fromkeys([*(config.modules_to_save or []), *names]))

    @abstractmethod
    def trainer(self, run: RunFolder, model: Any, tokenizer: Any, rows: Prepared, held_out: Prepared | None, callbacks: list[Any]) -> Any:
        """TRL's trainer for this objective, writing into `run`."""

    def run_arguments(self, run: RunFolder, model: Any, tokenizer: Any, held_out: Prepared | None) -> dict[str, Any]:
        """Keyword arguments that `InRunFolder` takes beside those of TRL's trainer."""
        config = self.config
        watched = held_out if config.eval_steps else None
        return {
            "run": run,
            "every": config.eval_steps,
            "watch": (lambda: self.watch(model, tokenizer, watched)) if watched is not None else None,
            "learning_rates": LearningRates(config.learning_rate, config.embedding_learning_rate, config.loraplus_lr_ratio),
        }

    def common_arguments(self, run: RunFolder, model: Any) -> dict[str, Any]:
        """Arguments that every trainer's config takes."""
        return common_arguments(self.config, model, run.path)

    @abstractmethod
    def watch(self, model: Any, tokenizer: Any, held_out: Prepared) -> dict[str, float]:
        """What is measured on held-out rows every `eval_steps` updates, by the names that metrics.jsonl gives them."""

    @abstractmethod
    def score(self, model: Any, tokenizer: Any, held_out: Prepared) -> Scored:
        """How `model` does on held-out rows."""

    @abstractmethod
    def scores_from(self, values: dict[str, Any]) -> Scored:
        """The scores whose `as_dict` gave `values`."""

    def rows_unit(self) -> str:
        """What a batch is made of, in the banner."""
        return "rows"
