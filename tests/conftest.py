"""Shared set-up: no network, one deterministic torch."""

import os

# The tests must not reach for a hub; these are read by huggingface_hub and datasets, not by exactune.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Without a GPU the kernels run in Triton's interpreter, which each kernel picks when it is decorated: so before anything imports Triton.
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
