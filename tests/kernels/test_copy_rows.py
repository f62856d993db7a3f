"""Copied rows are the same bits, wherever they lie, and nothing beside them is touched."""

import pytest
import torch

from exactune.kernels.copy_rows import copy_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 63), (3, 2048), (5, 4097)])
def test_copy(device, rows, width, dtype):
    x = torch.randn(rows, width + 5, device=device).to(dtype)[:, 2 : width + 2]
    out = torch.full((rows, width + 16), float("nan"), device=device, dtype=dtype)
    assert copy_rows(x, out[:, :width]).data_ptr() == out.data_ptr()
    assert torch.equal(out[:, :width], x)
    assert out[:, width:].isnan().all()


def test_what_it_cannot_copy_is_refused(device):
    x = torch.zeros(4, 6, device=device)
    for wrong in (torch.zeros(4, 5, device=device), torch.zeros(4, 6, device=device).half(), torch.zeros(6, 4, device=device).t()):
        with pytest.raises(ValueError, match="cannot copy rows"):
            copy_rows(x, wrong)


def test_no_rows(device):
    assert copy_rows(torch.zeros(0, 6, device=device), torch.zeros(0, 6, device=device)).shape == (0, 6)
