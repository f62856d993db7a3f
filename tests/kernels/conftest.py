"""Where kernels run in these tests: on the GPU if there is one, else in Triton's interpreter on the CPU (see tests/conftest.py)."""

import importlib.util

import pytest
import torch

# Triton is published for Linux only; elsewhere the references run, and they are tested through the models.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def working_dtypes() -> list[torch.dtype]:
    """The interpreter computes bfloat16 wrongly (numpy has none), so bf16 parity needs a GPU."""
    return [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


@pytest.fixture(params=working_dtypes(), ids=lambda d: str(d).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param
