"""A reward model: a decoder with one number for a head, and how to load, adapt and ask it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exactune.errors import ConfigError
from exactune.infer.decode import decoding, device_of
from exactune.train.config import TrainConfig


def load_reward_model(config: TrainConfig) -> tuple[Any, Any]:
    """(model, tokenizer): the decoder of `config.model_name` with a head of one output, new unless the checkpoint has one.

    Raises:
        ConfigError, ModelError, DeviceError: as `exactune.models.load.load_model`.
    """
    from transformers import AutoModelForSequenceClassification

    from exactune.models.plainly import said_plainly
    from exactune.models.precision import choose_device_map, choose_precision
    from exactune.models.seeding import seeded
    from exactune.models.source import find_source
    from exactune.models.tokenizer import load_tokenizer

    full = config.method == "full"
    precision = choose_precision(
        dtype=config.dtype, load_in_4bit=config.load_in_4bit, load_in_8bit=False, load_in_16bit=False, full_finetuning=full
    )
    quantization = precision.quantization_config()
    source = find_source(config.model_name, revision=config.revision, token=None)
    if source.adapter:
        raise ConfigError(f"{source.adapter} is an adapter, and a reward model starts from a whole one.", "Merge the adapter first.")
    hub: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    more = {"quantization_config": quantization} if quantization is not None else {}
    with said_plainly(source.name), seeded(config.seed):
        model = AutoModelForSequenceClassification.from_pretrained(
            source.name,
            num_labels=1,
            dtype=precision.dtype,
            device_map=choose_device_map(None),
            revision=source.revision,
            **hub,
            **more,
        )
        tokenizer = load_tokenizer(source.name, revision=source.revision, token=None, **hub)
    # The last token that is not padding carries the reward.
    model.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return model, tokenizer


def add_reward_adapter(model: Any, config: TrainConfig) -> Any:
    """LoRA on the decoder; the head is trained whole, since it starts from nothing."""
    from peft import LoraConfig, get_peft_model

    from exactune.models.checkpointing import apply_checkpointing
    from exactune.models.seeding import seeded
    from exactune.models.targets import choose_targets

    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=choose_targets(model, config.target_modules),
        layers_to_transform=config.layers_to_transform,
        modules_to_save=list(dict.fromkeys([*(config.modules_to_save or []), "score"])),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=True if config.init_lora_weights == "default" else config.init_lora_weights,  # type: ignore[arg-type]
    )
    with seeded(config.seed):
        adapted = get_peft_model(model, lora)
    apply_checkpointing(adapted, config.use_gradient_checkpointing)
    return adapted


def rewards(model: Any, sequences: list[list[int]], pad_token_id: int, batch_size: int) -> Tensor:
    """The reward of each sequence of ids, [sequences], float32."""
    found = torch.zeros(len(sequences))
    order = sorted(range(len(sequences)), key=lambda k: len(sequences[k]), reverse=True)
    with decoding(model, None), torch.no_grad():
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = len(sequences[batch[0]])
            ids = torch.tensor([sequences[k] + [pad_token_id] * (width - len(sequences[k])) for k in batch], device=device_of(model))
            mask = torch.tensor([[1] * len(sequences[k]) + [0] * (width - len(sequences[k])) for k in batch], device=device_of(model))
            found[batch] = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float().cpu()
    return found
