"""ops/upload.py without a card: what fills the buffers. That the bytes arrive there, tests/test_gpu.py shows."""

from __future__ import annotations

import numpy as np
import pytest

from minioscar.cache import BF16
from minioscar.errors import UserError
from minioscar.ops.upload import _reader


def mapped(path, x: np.ndarray) -> np.ndarray:
    path.write_bytes(b"head" + x.tobytes())
    return np.memmap(path, np.uint8, "r")[4:].view(x.dtype).reshape(x.shape)


def read(x: np.ndarray, piece: int) -> bytes:
    fill, found = _reader(x), b""
    for at in range(0, x.nbytes, piece):
        buffer = np.empty(min(piece, x.nbytes - at), np.uint8)
        fill(buffer, at)
        found += buffer.tobytes()
    return found


@pytest.mark.parametrize("dtype", [np.float16, np.float32, BF16])
def test_a_part_of_a_mapped_file_and_its_copies_are_read_as_they_are(dtype, tmp_path, seed):
    x = np.random.default_rng(seed).standard_normal((30, 50)).astype(dtype)
    there = mapped(tmp_path / "x", x)
    for source in (there, there[7:19], there.astype(np.float64), np.asarray(there), x, x.T):
        assert read(source, 1000) == source.tobytes()


def test_a_file_that_became_shorter_is_named(tmp_path):
    there = mapped(tmp_path / "x", np.arange(100_000))
    (tmp_path / "x").write_bytes(b"head")
    with pytest.raises(UserError, match="x became shorter"):
        read(there, 1000)
