"""Fused adapter maths: hand-derived forward and backward passes over the live layers of PEFT.

`live` reads one projection off the model, `stacked` holds a group of projections as one extended matrix, `group` multiplies
with it in both directions, `mlp_block` and `attention_block` compose groups with the kernels, and `layer` chains blocks into
the one autograd Function of a decoder layer.
"""
