"""Shared set-up: no network, one deterministic torch."""

import os

# The tests must not reach for a hub; these are read by huggingface_hub and datasets, not by exactune.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
