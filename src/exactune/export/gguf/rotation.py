"""The one known place where llama.cpp rotates otherwise than transformers: YaRN's ramp, whose ends it always rounds to whole dims."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch

from exactune.export.gguf.metadata import rotation_of


def differs(config: Any) -> bool:
    """Whether this model's ramp begins between dims (`truncate: false`, as gpt-oss has it)."""
    rope = rotation_of(config)
    return rope.get("rope_type") == "yarn" and rope.get("truncate") is False


@contextlib.contextmanager
def as_in_llama_cpp(base: Any) -> Iterator[None]:
    """Within the block `base` rotates as llama.cpp does, so that everything else can be compared exactly."""
    config = base.config.get_text_config()
    if not differs(config):
        yield
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rounded = copy.deepcopy(config)
    rotation_of(rounded)["truncate"] = True
    frequencies, _ = ROPE_INIT_FUNCTIONS["yarn"](rounded, torch.device("cpu"))
    buffers = [module.inv_freq for module in base.modules() if isinstance(getattr(module, "inv_freq", None), torch.Tensor)]
    kept = [buffer.clone() for buffer in buffers]
    try:
        for buffer in buffers:
            buffer.copy_(frequencies)
        yield
    finally:
        for buffer, values in zip(buffers, kept):
            buffer.copy_(values)
