"""Every op in plain torch, differentiable, on any device: the specification, the CPU path and the tests' oracle.

Each follows the Hugging Face modelling code, cast for cast. Where that computes in float32, these compute in at least float32
(`at_least_float32`), so that float64 inputs give the float64 oracle.
"""

from exactune.kernels.reference.dropout import dropout
from exactune.kernels.reference.gated import gated, gated_lora_backward
from exactune.kernels.reference.norm import add_rms_norm, layer_norm, rms_norm
from exactune.kernels.reference.rotary import rotary

__all__ = ["add_rms_norm", "dropout", "gated", "gated_lora_backward", "layer_norm", "rms_norm", "rotary"]
