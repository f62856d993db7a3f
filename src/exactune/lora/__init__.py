"""Fused adapter maths: hand-derived forward and backward passes over the live layers of PEFT.

`live` reads one projection off the model, `stacked` holds a group of projections as one extended matrix, `group` multiplies
with it in both directions, `mlp_part` and `attention_part` compose groups with the kernels, and `decoder_layer` chains them into
the one autograd Function of a decoder layer, which keeps what `exactune.memory.policy` says. `experts` and
`experts_function` do the same for the fused parameters of a mixture of experts.
"""
