import torch

from exactune.layout import padded, roomy_width


def test_every_slice_starts_on_16_bytes_and_every_row_on_128():
    for rank in range(70):
        assert rank <= padded(rank) < rank + 8 and padded(rank) * torch.bfloat16.itemsize % 16 == 0
    for width in (64, 100, 6144):
        for room in (0, 8, 24, 96):
            columns = roomy_width(width, room)
            assert width + room <= columns < width + room + 64 and columns * torch.bfloat16.itemsize % 128 == 0
