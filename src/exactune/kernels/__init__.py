"""Triton kernels, one file an op, each specified by plain torch in `exactune.kernels.reference`.

Every host function takes any row stride (the last dimension contiguous), writes into `out=` if given, accumulates in float32 and is
deterministic. A public function named like the op dispatches by device: kernels on a GPU, the reference elsewhere.
"""
