"""Hold the experts of a mixture in NF4: transformers' quantisation takes linear layers only, and experts are fused parameters.

bitsandbytes does it, by a parametrization of the module that holds them: the packed data stands where the parameter did, and reading the
parameter unpacks it. The fused experts read the packed data themselves.
"""

from __future__ import annotations

from torch import nn

from exactune.errors import DeviceError, ModelError
from exactune.lora.experts import Packed, held_by, wrappers_of
from exactune.models.anatomy.experts import holds_experts


def _holders(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if not hasattr(module, "base_layer") and holds_experts(module)]


def quantise_experts(model: nn.Module) -> int:
    """Put every fused parameter of the model's experts in NF4, with nested statistics; returns how many there were.

    Raises:
        DeviceError: bitsandbytes is not installed.
        ModelError: the experts have adapters, which PEFT cannot keep on packed parameters.
    """
    try:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit
    except ImportError as error:
        raise DeviceError("Experts in 4 bits need bitsandbytes, 0.49 or later.", "Run `pip install -U bitsandbytes`.") from error
    if any(wrappers_of(module) for module in model.modules()):
        raise ModelError("These experts have adapters, and PEFT can adapt 16-bit experts only.", "Adapt attention alone, or keep 16 bits.")
    count = 0
    for holder in _holders(model):
        for name, held in held_by(holder).items():
            if len(held.shape) == 3 and isinstance(held, nn.Parameter):
                replace_parameter_4bit(holder, name, compress_statistics=True, quant_type="nf4")
                count += 1
    return count


def unpack_experts(model: nn.Module) -> None:
    """Give every fused parameter held in NF4 back as the values that it stands for, of the same dtype as before."""
    for holder in _holders(model):
        packed = {name: held.detach() for name, held in held_by(holder).items() if isinstance(held, Packed)}
        if packed and packed.keys() == set(getattr(holder, "parametrizations", {})):
            # Not torch's remove_parametrizations: that edits the holder's class, which copies of it share.
            del holder.parametrizations
            holder.__class__ = type(holder).__bases__[0]
            for name, values in packed.items():
                holder.register_parameter(name, nn.Parameter(values, requires_grad=False))
