"""Arguments of a launch as the driver gets them, without a card."""

from __future__ import annotations

import ctypes
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from minioscar.ops import launch
from minioscar.ops.launch import Launch
from minioscar.sm90 import launch as sm90
from minioscar.sm90.launch import TensorMap


class Driver:
    """Stand-in for cuLaunchKernelEx: reads what it is given, as the driver does, before it returns."""

    def __init__(self, code: int = 0):
        self.code, self.seen = code, []

    def __call__(self, config, function, pointers, extra) -> int:
        self.seen.append((config, function, [ctypes.string_at(at, 8) if at else b"" for at in pointers]))
        return self.code


@pytest.fixture
def driver(monkeypatch) -> Driver:
    found = Driver()
    stream = SimpleNamespace(ptr=77)
    error = type("CUDADriverError", (Exception,), {})
    cuda = SimpleNamespace(get_current_stream=lambda: stream, driver=SimpleNamespace(CUDADriverError=error))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(sm90, "_driver", lambda name: found)
    monkeypatch.setattr(sm90, "_tensor_map", lambda *of: (MAP, MAP.ctypes.data))
    return found


MAP = np.frombuffer(b"a tensor map in 128 bytes".ljust(128), np.uint8).copy()
ARRAY = SimpleNamespace(data=SimpleNamespace(ptr=2**63 + 5), shape=(4, 4), nbytes=32)
ARGS = (
    ARRAY, None, np.int32(-5), np.int32(2**31 - 1), np.float32(0.1), np.uint64(2**64 - 1), TensorMap(ARRAY, 8),
    np.int64(-2), np.float64(1e300), launch.Address(9, (1,), 4),
)  # fmt: skip
WANT = [
    np.uint64(2**63 + 5), np.uint64(0), np.int32(-5), np.int32(2**31 - 1), np.float32(0.1), np.uint64(2**64 - 1), None,
    np.int64(-2), np.float64(1e300), np.uint64(9),
]  # fmt: skip


def check(words: list[bytes], args: tuple, want: list) -> None:
    for word, a, value in zip(words, args, want, strict=False):
        if isinstance(a, TensorMap):
            assert word == b"a tensor"
        else:
            assert word.startswith(value.tobytes()) and not any(word[value.nbytes :])


def test_each_argument_is_in_eight_bytes_of_its_own(driver):
    """And a launch finds nothing of the one before it, a tensor map's place neither."""
    for args, want in ((ARGS, WANT), (ARGS[::-1], WANT[::-1]), (ARGS[:3], WANT[:3]), ((), [])):
        sm90.launch_overlapping(5, Launch("a.cu", "a", (), (3, 2), 64, args, 1024))
        config, function, words = driver.seen[-1]
        check(words, args, want)
        sizes = (config.grid_x, config.grid_y, config.grid_z, config.block_x, config.block_y, config.block_z)
        assert sizes == (3, 2, 1, 64, 1, 1) and (config.shared, config.stream, function) == (1024, 77, 5)
        attribute = config.attributes[0]
        assert config.attribute_count == 1 and attribute.id == 6 and attribute.value == 1


def test_threads_do_not_share_the_bytes(driver):
    found = []

    def work(number: int) -> None:
        for _ in range(200):
            sm90.launch_overlapping(number, Launch("a.cu", "a", (), (1,), 32, (np.int32(number),) * 20))
        found.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for _, number, words in driver.seen:
        assert words[:20] == [np.int64(number).tobytes()] * 20


def test_what_the_driver_refuses_is_an_error_and_spoils_nothing(driver):
    driver.code = 1
    with pytest.raises(Exception, match="1"):
        sm90.launch_overlapping(5, Launch("a.cu", "a", (), (1,), 32, ARGS))
    driver.code = 0
    sm90.launch_overlapping(5, Launch("a.cu", "a", (), (1,), 32, (np.int32(3),) * 8))
    assert driver.seen[-1][2][6] == np.int64(3).tobytes()
