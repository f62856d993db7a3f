"""What a training run is made of: one model of every setting, the source of the YAML file's fields and of the command's flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from exactune.errors import ConfigError
from exactune.memory.budget import parse_bytes
from exactune.memory.job import OPTIMIZERS
from exactune.train.config_errors import explain

Schedule = Literal[
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
]
Objective = Literal["sft", "pretrain", "dpo", "ipo", "orpo", "simpo", "kto", "reward", "grpo"]
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


def _field(default: Any, description: str, section: str, **limits: Any) -> Any:
    """A field with the text its flag shows under `--help`, and the panel it shows it in."""
    return Field(default, description=description, json_schema_extra={"section": section}, **limits)


class TrainConfig(BaseModel):
    """Every setting of a training run; `TrainConfig(**values)` raises `ConfigError` with a mend for each wrong one."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_name: str = _field(..., "Local folder or hub name of the model to fine-tune.", "Model")
    revision: str | None = _field(None, "Branch, tag or commit of the hub model.", "Model")
    method: Literal["lora", "qlora", "full"] = _field(
        "lora", "lora: adapter on a 16/32-bit base; qlora: adapter on a 4-bit (NF4) base; full: every weight.", "Model"
    )
    objective: Objective = _field("sft", "What is learned: sft, pretrain, dpo, ipo, orpo, simpo, kto, reward or grpo.", "Model")
    load_in_4bit: bool = _field(False, "Keep the base model in 4 bits (NF4); the same as method qlora.", "Model")
    dtype: Literal["float32", "bfloat16", "float16"] | None = _field(
        None, "Number format of the base weights; left out, the machine's native one.", "Model"
    )
    max_seq_length: int = _field(2048, "Longest row, in tokens; longer rows are cut.", "Model", ge=8)
    trust_remote_code: bool = _field(False, "Run Python code that comes with the model. Only for sources you trust.", "Model")

    r: int = _field(16, "Rank of the adapter.", "Adapter", ge=1)
    lora_alpha: int = _field(16, "Scale of the adapter: its product counts lora_alpha / r times.", "Adapter", gt=0)
    lora_dropout: float = _field(0.0, "Share of the adapter's inputs dropped while training.", "Adapter", ge=0, lt=1)
    target_modules: list[str] | str | None = _field(
        None, "Linear layers that get an adapter: names, 'all-linear' or a regular expression; left out, attention and MLP.", "Adapter"
    )
    modules_to_save: list[str] | None = _field(None, "Layers trained whole beside the adapter, such as embed_tokens.", "Adapter")
    use_rslora: bool = _field(False, "Scale by lora_alpha / sqrt(r), for high ranks.", "Adapter")
    use_dora: bool = _field(False, "Learn each weight's magnitude apart from its direction (DoRA).", "Adapter")

    init_lora_weights: str = _field(
        "default", "How the adapter starts: default, gaussian, pissa, pissa_niter_N, olora, orthogonal or loftq.", "Adapter"
    )
    layers_to_transform: list[int] | None = _field(None, "Decoder layers that get an adapter, counted from 0; left out, all.", "Adapter")

    dataset: str | list[str] = _field(
        ..., "Training rows: JSONL, JSON, CSV or Parquet file, a datasets folder, or a hub name; or several of them.", "Data"
    )
    dataset_weights: list[float] | None = _field(
        None, "Share of the rows that each data set gives (any scale); left out, all rows of all are used.", "Data"
    )
    dataset_split: str | None = _field(None, "Split of a datasets folder or hub dataset.", "Data")
    eval_dataset: str | None = _field(None, "Held-out rows: scored before and after training.", "Data")
    eval_split: str | None = _field(None, "Split of the held-out dataset.", "Data")
    val_size: float = _field(0, "Without eval_dataset: how many of the rows to hold out, or which share when below 1.", "Data", ge=0)
    format: str | None = _field(None, "Layout of the rows; left out, it is detected and shown.", "Data")
    train_on: Literal["auto", "assistant", "last_turn", "all"] = _field(
        "auto", "Which tokens count in the loss: the answers (auto, assistant), the last answer, or all.", "Data"
    )
    masked_blocks: list[Literal["thinking", "tool_calls"]] = _field(
        [], "Parts of answers that are read and not learned: thinking, tool_calls.", "Data"
    )
    skip_bad_rows: bool = _field(False, "Leave out rows that cannot be read instead of stopping.", "Data")
    streaming: bool = _field(False, "Read the rows while training, for files and hub sets larger than memory; needs max_steps.", "Data")
    packing: bool = _field(False, "Put several short rows into one sequence, kept apart by their positions.", "Data")

    per_device_train_batch_size: int = _field(2, "Rows in one forward pass.", "Training", ge=1)
    group_by_length: bool = _field(False, "Put rows of like length into one batch, so that less is padding.", "Training")
    gradient_accumulation_steps: int = _field(4, "Forward passes for one update.", "Training", ge=1)
    learning_rate: float = _field(2e-4, "Peak learning rate.", "Training", gt=0)
    embedding_learning_rate: float | None = _field(
        None, "Learning rate of embedding and head, which are then trained whole; a tenth of learning_rate is usual.", "Training", gt=0
    )
    loraplus_lr_ratio: float | None = _field(None, "LoRA+: the adapter's B learns so many times faster than its A.", "Training", gt=0)
    lr_scheduler_type: Schedule = _field("linear", "Course of the learning rate.", "Training")
    lr_scheduler_kwargs: dict[str, Any] | None = _field(None, "What the schedule needs beside, such as {min_lr: 1e-5}.", "Training")
    warmup_steps: float = _field(0, "Updates over which the learning rate rises, or their share when below 1.", "Training", ge=0)
    weight_decay: float = _field(0.0, "Decay of the trained weights.", "Training", ge=0)
    max_grad_norm: float = _field(1.0, "Gradients are scaled down to this norm; 0 leaves them.", "Training", ge=0)
    optim: str = _field("adamw_torch", "Optimizer: adamw_torch, adamw_8bit, paged_adamw_8bit, ...", "Training")
    neftune_noise_alpha: float | None = _field(None, "NEFTune: noise on the embedded tokens while training; 5 is usual.", "Training", gt=0)
    num_train_epochs: float = _field(1.0, "Times every row is seen.", "Training", gt=0)
    max_steps: int = _field(-1, "Updates in all; -1 lets num_train_epochs decide.", "Training", ge=-1)
    seed: int = _field(3407, "Seed of the adapter, the order of the rows and dropout.", "Training", ge=0)
    bf16: bool | None = _field(None, "Compute in bfloat16 (autocast); left out, on a GPU that has it.", "Training")
    use_gradient_checkpointing: bool | Literal["auto", "unsloth"] = _field(
        "auto", "Recompute activations in the backward pass to save memory: auto (a plan decides), true, false or unsloth.", "Training"
    )
    memory_budget: str = _field("auto", "Memory of the GPU that the plan may use, such as 24GiB; auto: the card's.", "Training")
    optimizer_in_backward: bool = _field(
        False, "method full: take the optimizer's step for each weight in the backward pass, and free its gradient.", "Training"
    )
    accelerate: bool = _field(True, "Use the fast exact parts where they prove equal to the stock model (GPU).", "Training")
    cuda_graphs: bool = _field(True, "Record small batches that come again in one shape, and replay them (GPU).", "Training")
    deterministic: bool = _field(False, "Only attention kernels that give the same bits twice (GPU; slower).", "Training")

    beta: float | None = _field(
        None,
        "Strength of the method's term; left out, 0.1 (dpo, ipo, orpo, kto), 2 (simpo), 0 (grpo).",
        "Method",
        ge=0,
    )
    simpo_gamma: float = _field(0.5, "SimPO: the margin by which the chosen answer is to be more likely.", "Method", ge=0)
    desirable_weight: float = _field(1.0, "KTO: weight of the good answers' loss.", "Method", ge=0)
    undesirable_weight: float = _field(1.0, "KTO: weight of the bad answers' loss.", "Method", ge=0)
    reward_functions: list[str] = _field([], "GRPO: valid_json, exact_match, or FILE.py:FUNCTION; their rewards are added up.", "Method")
    reward_weights: list[float] | None = _field(None, "GRPO: weight of each reward function; left out, 1 each.", "Method")
    num_generations: int = _field(8, "GRPO: answers to one prompt, compared with each other.", "Method", ge=2)
    max_completion_length: int = _field(256, "GRPO: longest answer, in tokens.", "Method", ge=1)
    temperature: float = _field(1.0, "GRPO: temperature of the answers.", "Method", gt=0)

    per_device_eval_batch_size: int = _field(8, "Held-out rows in one forward pass.", "Evaluation", ge=1)
    eval_steps: int | None = _field(None, "Measure the held-out loss every so many updates, too.", "Evaluation", ge=1)
    generate_rows: int = _field(32, "Held-out rows to answer before and after training.", "Evaluation", ge=0)
    max_new_tokens: int = _field(256, "Longest answer, in tokens.", "Evaluation", ge=1)

    output_dir: str | None = _field(None, "Run folder; left out, runs/<dataset>-<time>.", "Output")
    overwrite: bool = _field(False, "Replace the run folder if there is one.", "Output")
    save_steps: int = _field(100, "Updates between two checkpoints.", "Output", ge=1)
    save_total_limit: int | None = _field(2, "Checkpoints to keep.", "Output", ge=1)
    report_to: list[str] = _field([], f"Trackers: {', '.join(TRACKERS)}.", "Output")
    run_name: str | None = _field(None, "Name of the run in the trackers.", "Output")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain(error, list(type(self).model_fields)) from None

    @model_validator(mode="before")
    @classmethod
    def _agree_on_the_method(cls, values: Any) -> Any:
        """`method: qlora` and `load_in_4bit: true` say the same; either alone sets the other."""
        if not isinstance(values, dict):
            return values
        method, four_bit = values.get("method"), values.get("load_in_4bit")
        if method == "qlora" and four_bit is None:
            return {**values, "load_in_4bit": True}
        if method in (None, "lora") and four_bit in (True, "true", "True"):
            return {**values, "method": "qlora"}
        return values

    @field_validator("memory_budget", mode="before")
    @classmethod
    def _an_amount_of_memory(cls, value: Any) -> Any:
        """Text, also where a file says a bare number of GiB."""
        if value in (None, "auto"):
            return "auto"
        parse_bytes(value)
        return str(value)

    @model_validator(mode="after")
    def _memory_goes_together(self) -> TrainConfig:
        if self.memory_budget != "auto" and self.use_gradient_checkpointing != "auto":
            raise ValueError("memory_budget is for the plan of use_gradient_checkpointing auto: leave out one of the two")
        if self.memory_budget != "auto" and not self.accelerate:
            raise ValueError("memory_budget is for a plan of the fast parts, and accelerate is false: choose one")
        if not self.optimizer_in_backward:
            return self
        if self.method != "full":
            raise ValueError(f"optimizer_in_backward frees the gradients of all weights, and method {self.method} has few: use method full")
        if self.max_grad_norm or self.gradient_accumulation_steps > 1:
            raise ValueError(
                "optimizer_in_backward never has all gradients together: it needs max_grad_norm 0 and gradient_accumulation_steps 1"
            )
        if self.optim not in OPTIMIZERS:
            raise ValueError(f"optimizer_in_backward cannot step {self.optim} weight by weight: use one of {', '.join(OPTIMIZERS)}")
        return self

    @model_validator(mode="after")
    def _no_contradictions(self) -> TrainConfig:
        if self.method == "full" and self.load_in_4bit:
            raise ValueError("method full trains every weight and load_in_4bit freezes them in 4 bits: choose one")
        if self.method == "qlora" and not self.load_in_4bit:
            raise ValueError("method qlora keeps the base in 4 bits, and load_in_4bit is false: choose one")
        if self.max_steps == 0:
            raise ValueError("max_steps 0 trains nothing: give a number of updates, or -1 for num_train_epochs")
        if self.dataset_weights is not None and len(self.dataset_weights) != len(self.sources()):
            raise ValueError(
                f"dataset names {len(self.sources())} sources and dataset_weights {len(self.dataset_weights)}: they go together"
            )
        if self.dataset_weights is not None and min(self.dataset_weights) <= 0:
            raise ValueError("dataset_weights have to be above 0: leave out a source that is not to be used")
        if unknown := sorted(set(self.report_to) - set(TRACKERS)):
            raise ValueError(f"report_to does not know {', '.join(unknown)}: the trackers are {', '.join(TRACKERS)}")
        return self

    def sources(self) -> list[str]:
        """The training data sets, one or several."""
        return [self.dataset] if isinstance(self.dataset, str) else list(self.dataset)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: dict[str, Any] | None = None) -> TrainConfig:
        """The settings in the YAML file at `path`; `overrides` (the flags) win over the file.

        Raises:
            ConfigError: the file is missing, is not YAML, or has a field that is unknown or ill-typed.
        """
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"There is no config file {path}.", "Check the path, or give the settings as flags.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"The config file {path} cannot be read: {error}.") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {error}", "Each line reads `field: value`, such as `learning_rate: 2e-4`.") from None
        if values is not None and not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}, not fields.", "Each line reads `field: value`.")
        return cls(**{**(values or {}), **(overrides or {})})

    def to_yaml(self) -> str:
        """Every setting as YAML, in the order of this class; `from_yaml` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
