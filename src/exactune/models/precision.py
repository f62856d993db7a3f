"""Which format the weights are held in: one decision, made before anything is read from disk."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from exactune import device
from exactune.errors import ConfigError, DeviceError
from exactune.models.arguments import Unstated, stated

if TYPE_CHECKING:
    import torch

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


@dataclasses.dataclass(frozen=True)
class Precision:
    """How the base model is held. `bits` counts those of the linear weights; `dtype` is that of everything else."""

    bits: Literal[4, 8, 16]
    dtype: torch.dtype
    full_finetuning: bool

    def quantization_config(self) -> Any:
        """transformers' BitsAndBytesConfig, or None where the weights are kept in `dtype`.

        Raises:
            DeviceError: bitsandbytes is not installed.
        """
        if self.bits == 16:
            return None
        from transformers import BitsAndBytesConfig
        from transformers.utils import is_bitsandbytes_available

        if not is_bitsandbytes_available():
            raise DeviceError(
                f"Loading in {self.bits} bits needs bitsandbytes, which is not installed here.",
                "Run `pip install bitsandbytes`, or pass load_in_4bit=False.",
            )
        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=self.dtype
        )


def choose_precision(
    *, dtype: Any, load_in_4bit: bool | Unstated, load_in_8bit: bool, load_in_16bit: bool, full_finetuning: bool
) -> Precision:
    """What the arguments ask for together; `load_in_4bit` left at its default gives way to any other.

    Raises:
        ConfigError: two of them exclude each other, or `dtype` is no floating-point format.
    """
    asked = {"load_in_4bit": bool(stated(load_in_4bit)), "load_in_8bit": load_in_8bit, "load_in_16bit": load_in_16bit}
    chosen = [name for name, value in asked.items() if value]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(f'{name}=True' for name in chosen)} exclude each other.", "Keep one of them.")
    if full_finetuning and chosen and chosen[0] != "load_in_16bit":
        raise ConfigError(
            f"full_finetuning=True trains every weight, and {chosen[0]}=True holds them in a format that cannot be trained.",
            f"Pass {chosen[0]}=False to train all weights, or full_finetuning=False to train adapters.",
        )
    bits: Literal[4, 8, 16] = 4 if load_in_4bit else 16
    if full_finetuning or load_in_16bit:
        bits = 16
    elif load_in_8bit:
        bits = 8
    return Precision(bits, _choose_dtype(dtype, sixteen=load_in_16bit, full_finetuning=full_finetuning), full_finetuning)


def _choose_dtype(dtype: Any, *, sixteen: bool, full_finetuning: bool) -> torch.dtype:
    import torch

    if dtype is not None and dtype != "auto":
        name = str(dtype).removeprefix("torch.")
        found = getattr(torch, _DTYPES.get(name, name), None)
        if found not in (torch.bfloat16, torch.float16, torch.float32):
            raise ConfigError(
                f"dtype={dtype!r} is not a format to train in.", "Use bfloat16, float16, float32, or None to choose by device."
            )
        if sixteen and found is torch.float32:
            raise ConfigError("load_in_16bit=True and dtype=float32 exclude each other.", "Keep one of them.")
        return found
    chosen = device.default_dtype()
    if full_finetuning and chosen is torch.float16:
        return torch.float32  # float16 gradients cannot be unscaled: the trainer keeps float32 weights under autocast
    return torch.bfloat16 if sixteen and chosen is torch.float32 else chosen


def choose_device_map(device_map: Any) -> Any:
    """`device_map` for transformers; None means the one GPU, or the CPU where there is none.

    Raises:
        DeviceError: it names a GPU that is not there.
    """
    import torch

    if device_map is None:
        return {"": device.default_device()}
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    for place in places:
        _check_place(place)
    named = isinstance(device_map, (int, torch.device)) or str(device_map).split(":")[0] in ("cuda", "cpu", "mps")
    return {"": device_map} if named and not isinstance(device_map, dict) else device_map


def _check_place(place: Any) -> None:
    import torch

    kind, _, index = str(place).partition(":")
    if kind.isdigit():
        kind, index = "cuda", kind
    if kind != "cuda":
        return
    if not device.has_cuda():
        raise DeviceError(
            f"device_map asks for {place}, and torch sees no CUDA GPU on this machine.",
            "Leave device_map out to run on the CPU, or install what `exactune doctor` says is missing.",
        )
    if index and int(index) >= torch.cuda.device_count():
        raise DeviceError(
            f"device_map asks for GPU {index}, and this machine has {torch.cuda.device_count()}, counted from 0.",
            "Name a GPU that is there, or leave device_map out.",
        )
