"""The hash does not depend on how the bytes were handed over, and on every one of them."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from exactune.export import hashing
from exactune.export.hashing import Digest, file_hash


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 50_000])
@pytest.mark.parametrize("step", [1, 7, 1000, 60_000])
def test_pieces_of_any_size_hash_as_the_file(tmp_path, monkeypatch, size, step):
    monkeypatch.setattr(hashing, "BLOCK", 1000)
    data = bytes(i * 31 % 251 for i in range(size))
    (tmp_path / "file").write_bytes(data)
    with ThreadPoolExecutor(2) as pool:
        digest = Digest(pool)
        for start in range(0, size, max(step, size // 100)):
            digest.add(data[start : start + max(step, size // 100)])
            digest.wait()
        found = digest.hexdigest()
    assert found == file_hash(tmp_path / "file")
    for place in {0, size // 2, size - 1} & set(range(size)):
        (tmp_path / "file").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert file_hash(tmp_path / "file") != found
