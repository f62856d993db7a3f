"""Our settings as the arguments that all of TRL's trainers take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from exactune.train.config import TrainConfig


def common_arguments(config: TrainConfig, model: Any, output_dir: Path) -> dict[str, Any]:
    """What `SFTConfig`, `DPOConfig` and their kin have in common, for a run of `config` on `model`. Every step is logged: losses
    logged over windows would depend on where a run was interrupted."""
    on_gpu = model.device.type == "cuda"
    bf16, fp16 = reduced_precision(model, config.bf16)
    choice = config.use_gradient_checkpointing
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "per_device_eval_batch_size": config.per_device_eval_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "lr_scheduler_kwargs": config.lr_scheduler_kwargs,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": config.optim,
        "neftune_noise_alpha": config.neftune_noise_alpha,
        "num_train_epochs": config.num_train_epochs,
        "max_steps": config.max_steps,
        "seed": config.seed,
        "data_seed": config.seed,
        # Memory is what a GPU lacks; a CPU has more of it than time.
        "gradient_checkpointing": on_gpu if choice == "auto" else bool(choice),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": config.save_total_limit,
        "report_to": config.report_to or "none",
        "run_name": config.run_name,
        "disable_tqdm": True,
        "dataloader_pin_memory": on_gpu,
        "bf16": bf16,
        "fp16": fp16,
    }


def reduced_precision(model: Any, bf16: bool | None) -> tuple[bool, bool]:
    """(`bf16`, `fp16`) for the trainer: autocast in the base's own 16-bit format on a GPU, none elsewhere unless asked for."""
    if bf16 is not None:
        return bf16, False
    on_gpu = model.device.type == "cuda"
    dtypes = {weight.dtype for weight in model.parameters()}
    return on_gpu and torch.bfloat16 in dtypes, on_gpu and torch.float16 in dtypes and torch.bfloat16 not in dtypes
