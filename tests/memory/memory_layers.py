"""Fused decoder layers of any shape on a CPU, for counting their bytes."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from exactune.lora.decoder_layer import run_layer
from exactune.lora.parts import Batch
from exactune.memory.offload import HostStore
from exactune.memory.policy import Policy, Tiling
from exactune.models.accelerate import accelerate
from families import tiny_model, with_lora


def fused_layers(family: str, r: int | None = 4, lora_dropout: float = 0.0, **sizes: Any) -> tuple[Any, list[Any]]:
    """(model, the fused layers in order); adapters of rank `r` on every projection, or none and everything trained."""
    model = tiny_model(family, torch.float32, **sizes)
    model = model.train() if r is None else with_lora(model, r=r, lora_dropout=lora_dropout)
    accelerate(model, verify=False)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = [layer.__dict__["forward"] for layer in base.model.layers]
    for layer in layers:
        layer.parts.bound(torch.float32)  # the weights move into their buffers with room
    return model, layers


def batch_of(config: Any, rows: int, tokens: int, tiling: Tiling) -> Batch:
    config = config.get_text_config()
    angles = torch.rand(1, tokens, config.head_dim)
    return Batch(rows, tokens, angles.cos(), angles.sin(), tiling=tiling)


def run(layers: list[Any], batch: Batch, x: torch.Tensor, policies: list[Policy], store: HostStore) -> torch.Tensor:
    for layer, policy in zip(layers, itertools.cycle(policies)):
        x = run_layer(layer.parts.bound(x.dtype), batch, x, policy, store)
    return x
