"""storage/upload.py and aio.py without a card: chunks, reads, errors, end. test_gpu.py shows that the bytes arrive on
one."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.presets import arrays
from minioscar import weights
from minioscar.arguments import with_weights
from minioscar.cache import BF16
from minioscar.config import Config
from minioscar.errors import UserError
from minioscar.ops.reference import Reference
from minioscar.oscar import SCHEMES
from minioscar.storage import aio, upload
from minioscar.storage.aio import Read
from minioscar.storage.checkpoint import Tensor, _tensors
from minioscar.storage.upload import Buffer, Upload

from .quantized_files import write_quantized
from .tiny import write_model


class Event:
    """What a stream of a card does, as late as it may: a copy is made when it is waited for."""

    def __init__(self):
        self.queued: list = []

    def record(self, stream: Stream) -> None:
        self.queued, stream.queued = stream.queued, []
        stream.events.append(self)

    @property
    def done(self) -> bool:
        return not self.queued

    def synchronize(self) -> None:
        with np.errstate(invalid="ignore"):  # the gaps between a chunk's segments can be anything
            for target, numbers in self.queued:
                target[...] = numbers.astype(target.dtype)
        self.queued = []


class Stream:
    def __init__(self):
        self.queued, self.events = [], []

    def synchronize(self) -> None:
        for event in self.events:
            event.synchronize()


class OnHost(Upload):
    def _empty(self, count: int) -> np.ndarray:
        self.stream = Stream()
        return np.zeros(count, self.dtype)

    def _slice(self, first: int, shape: tuple[int, ...]) -> np.ndarray:
        return self.slab[first : first + math.prod(shape)].reshape(shape)

    def _buffer(self) -> Buffer:
        return Buffer(np.empty(upload.CHUNK, np.uint8), Event())

    def _copy(self, numbers: np.ndarray, offset: int) -> None:
        self.stream.queued.append((self.slab[offset : offset + numbers.size], numbers))


try:
    aio._library()
except (OSError, AttributeError) as error:  # a C library that is not glibc
    pytest.skip(f"POSIX.1's asynchronous reads as glibc has them: {error}", allow_module_level=True)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Chunks that no tensor is a multiple of, as many buffers as there can be. Nothing stays open."""
    monkeypatch.setattr(upload, "CHUNK", 1000)
    monkeypatch.setattr(upload, "CHUNKS_PER_BUFFER", 1)
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


def opened(stack: ExitStack, path: Path) -> dict[str, Tensor]:
    return dict(_tensors(stack.enter_context(open(path, "rb", buffering=0))))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, BF16])
def test_tensors_come_one_below_the_other_in_the_dtype_of_the_back_end(dtype, tmp_path, seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": (30, 50), "b": (7, 50), "c": (1, 50), "bias": (13,), "large": (301, 77)}
    tensors = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "x")
    told = []
    with ExitStack() as stack:
        file = opened(stack, tmp_path / "x")
        groups = [[file[name] for name in names] for names in ("abc", ["bias"], ["large"], "a")]
        with OnHost(BF16, told.append, sum(groups, [])) as put:
            found = [put(group) for group in groups]
    wanted = [np.concatenate([tensors[n] for n in "abc"]), tensors["bias"], tensors["large"], tensors["a"]]
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == BF16 and x.tobytes() == y.astype(BF16).tobytes()
    assert sum(told) == sum(x.nbytes for x in wanted) and max(told) <= 1000


def test_arrays_are_parts_of_one_allocation_that_begin_at_multiples_of_512_bytes_and_do_not_overlap(tmp_path):
    sizes = (13, 256, 1, 257, 700, 13)
    save_file({str(i): np.full(size, 1 + i, np.float32) for i, size in enumerate(sizes)}, tmp_path / "x")
    with ExitStack() as stack:
        file = opened(stack, tmp_path / "x")
        with OnHost(BF16, lambda _: None, list(file.values())) as put:
            found = [put([file[str(i)]]) for i in range(6)]
    begins = [array.ctypes.data - put.slab.ctypes.data for array in found]
    assert begins == [0, 512, 1024, 1536, 2560, 4096] and put.slab.nbytes == 4608
    for i, (array, size) in enumerate(zip(found, sizes, strict=True)):
        assert np.shares_memory(array, put.slab) and array.flags.c_contiguous
        assert array.shape == (size,) and (array == 1 + i).all()


def test_asking_for_more_than_was_announced_is_an_error_and_reads_nothing_of_it(tmp_path):
    save_file({"a": np.ones(2560, np.float32), "b": np.ones(1, np.float32)}, tmp_path / "x")
    told = []
    with ExitStack() as stack:
        file = opened(stack, tmp_path / "x")
        with pytest.raises(ValueError, match="more is asked for"), OnHost(BF16, told.append, [file["a"]]) as put:
            put([file["a"]])
            put([file["b"]])
    assert put.chunks == 10 and told == [1000] * len(told) and len(told) <= 10  # of `a` there are 10.24 chunks
    assert [(s.begin, s.count) for s in put.segments] == [(file["a"].begin, 2560)]


@pytest.mark.parametrize("turn", range(3))
def test_dtypes_can_be_mixed_within_one_array(turn, tmp_path, seed):
    """Each as if it were alone, rounding and overflow of F16 and F32 to BF16 included, in any order in the file."""
    rng, kinds = np.random.default_rng(seed), [np.float16, BF16, np.float32]
    tensors = {n: (rng.standard_normal((37, 50)) * 1e4).astype(kinds[(i + turn) % 3]) for i, n in enumerate("qkvgu")}
    save_file(tensors, tmp_path / "x")
    with ExitStack() as stack:
        file = opened(stack, tmp_path / "x")
        with OnHost(BF16, lambda _: None, list(file.values())) as put:
            found = [put([file[n] for n in names]) for names in ("qkv", "gu")]
    for array, names in zip(found, ("qkv", "gu"), strict=True):
        assert array.tobytes() == np.concatenate([tensors[n].astype(BF16) for n in names]).tobytes()


def test_small_tensors_share_a_chunk(tmp_path, seed):
    rng = np.random.default_rng(seed)
    dtypes = [BF16] * 9 + [np.float32, np.float16, np.float16, np.float32, BF16, BF16]
    tensors = {str(i): rng.standard_normal(13).astype(dtype) for i, dtype in enumerate(dtypes)}
    save_file(tensors, tmp_path / "x")
    cases = (list(tensors)[:9], 2, [2, 2, 2, 2, 1]), (list(tensors), 4, [1] * 15)  # 256 numbers for each tensor
    for names, width, shared in cases:
        with ExitStack() as stack:
            file = opened(stack, tmp_path / "x")
            with OnHost(BF16, lambda _: None, [file[name] for name in names]) as put:
                found = {name: put([file[name]]) for name in names}
            assert put.width == width and [len(put._segments_of(chunk)) for chunk in range(put.chunks)] == shared
        for name, array in found.items():
            assert array.tobytes() == tensors[name].astype(BF16).tobytes(), name


def test_what_is_adjacent_in_the_file_and_in_the_slab_is_one_segment(tmp_path):
    save_file({name: np.full(256, i, np.float32).astype(BF16) for i, name in enumerate("abcde")}, tmp_path / "x")
    with ExitStack() as stack:
        file = opened(stack, tmp_path / "x")
        with OnHost(BF16, lambda _: None, list(file.values())) as put:
            found = {name: put([file[name]]) for name in "ab"} | {
                "dc": put([file["d"], file["c"]]),
                "e": put([file["e"]]),
            }
    assert [(segment.offset, segment.count) for segment in put.segments] == [
        (0, 512),
        (512, 256),
        (768, 256),
        (1024, 256),
    ]
    for name, array in found.items():
        assert array.tolist() == sum(([float("abcde".index(letter))] * 256 for letter in name), [])


class HostOps(Reference):
    dtype = BF16

    def __init__(self):
        self.buffers = upload.Buffers()

    def loading(self, advance, tensors, dtype=None):
        return OnHost(dtype or self.dtype, advance, tensors, self.buffers)


@pytest.mark.parametrize("kv", ["int2", "bf16"])
def test_a_model_in_one_allocation_is_the_reference_s_and_is_rotated_in_place(tmp_path, kv):
    folder, plain = write_model(tmp_path / "m", 3, attention_bias=True), Reference()
    plain.dtype = BF16
    config = Config.from_folder(folder)
    ours, wanted = (weights.load(folder, config, ops) for ops in (HostOps(), plain))
    before = [array.__array_interface__["data"] for array in arrays(ours)]
    both = (ours, HostOps()), (wanted, plain)
    if SCHEMES[kv].rotate:
        rotated = [weights.rotate_values(loaded, config, ops, in_place=True) for loaded, ops in both]
    else:
        rotated = [ours, wanted]
    assert [array.__array_interface__["data"] for array in arrays(rotated[0])] == before
    for x, y in zip(*map(arrays, rotated), strict=True):
        assert x.shape == y.shape and x.tobytes() == y.tobytes()


@pytest.mark.parametrize(
    ("kind", "mode"), [("awq-gemm", None), ("fp8", None), ("ct-int4-zeros", "int8"), (None, "int4")]
)
def test_quantized_matrices_come_layer_by_layer_through_buffers_that_all_layers_share(tmp_path, kind, mode):
    """What is unpacked are bytes that have arrived, though a copy is made when it is waited for."""
    if kind is None:
        write_model(tmp_path, 3)
    else:
        write_quantized(tmp_path, kind, 3)
    config, plain, ops = with_weights(Config.from_folder(tmp_path), mode), Reference(), HostOps()
    plain.dtype = BF16
    wanted, ours = (weights.load(tmp_path, config, which) for which in (plain, ops))
    for x, y in zip(*map(arrays, (ours, wanted)), strict=True):
        assert x.shape == y.shape and x.tobytes() == y.tobytes()
    assert 0 < len(ops.buffers.buffers) <= upload.BUFFERS and ops.buffers.nbytes > 1000 * upload.BUFFERS
    with pytest.raises(KeyboardInterrupt):  # while a layer is unpacked, whose next one is being read
        ops.quantized = lambda _: (_ for _ in ()).throw(KeyboardInterrupt)
        weights.load(tmp_path, config, ops)


def test_a_file_that_became_shorter_is_named(tmp_path):
    save_file({"a": np.arange(100_000, dtype=np.float32)}, tmp_path / "x")
    with ExitStack() as stack:
        file = opened(stack, tmp_path / "x")
        (tmp_path / "x").write_bytes(b"head")
        with pytest.raises(UserError, match="x became shorter while it was read; fetch the model again"):
            with OnHost(BF16, lambda _: None, [file["a"]]) as put:
                put([file["a"]])


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    save_file({"a": np.arange(100_000, dtype=np.float32)}, tmp_path / "x")
    with ExitStack() as stack:
        tensor = opened(stack, tmp_path / "x")["a"]
        tensor.file = stack.enter_context(open(tmp_path / "x", "ab", buffering=0))
        with pytest.raises(UserError, match=r"x cannot be read \(Bad file descriptor\); fetch the model again"):
            with OnHost(BF16, lambda _: None, [tensor]) as put:
                put([tensor])


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("when", ["while tensors are asked for", "while chunks are read"])
def test_after_whatever_ends_the_loading_nothing_is_read_or_written(error, when, tmp_path, monkeypatch):
    save_file({"a": np.arange(1_000_000, dtype=np.float32)}, tmp_path / "x")
    begun = []

    def advance(_: int) -> None:
        raise error

    monkeypatch.setattr(upload, "Read", lambda *args: begun.append(args) or Read(*args))
    with ExitStack() as stack:
        tensor = opened(stack, tmp_path / "x")["a"]
        with pytest.raises(error), OnHost(BF16, advance, [tensor]) as put:
            put([tensor])
            if when == "while tensors are asked for":
                raise error
        copies = [buffer.memory.copy() for buffer in put.buffers]
        time.sleep(0.02)
        assert all((buffer.memory == memory).all() for buffer, memory in zip(put.buffers, copies, strict=True))
    assert 0 < len(begun) <= upload.BUFFERS + 1


@pytest.mark.parametrize(("chunks_per_buffer", "buffers"), [(1, 20), (100, 11), (1000, 2), (5000, 1)])
def test_however_few_the_buffers_are_all_chunks_arrive_and_no_buffer_is_read_into_before_it_is_copied(
    chunks_per_buffer, buffers, tmp_path, monkeypatch, seed
):
    monkeypatch.setattr(upload, "CHUNKS_PER_BUFFER", chunks_per_buffer)
    numbers, told = np.random.default_rng(seed).standard_normal(263_000, np.float32), []
    save_file({"a": numbers}, tmp_path / "x")
    with ExitStack() as stack:
        tensor = opened(stack, tmp_path / "x")["a"]
        with OnHost(np.dtype(np.float32), told.append, [tensor]) as put:
            found = put([tensor])
    assert found.tobytes() == numbers.tobytes() and sum(told) == numbers.nbytes
    assert len(put.buffers) <= buffers and put.num_buffers == buffers


# --- aio.py


def numbers(path: Path, count: int, seed: int) -> np.ndarray:
    data = np.random.default_rng(seed).integers(0, 256, count, np.uint8)
    path.write_bytes(data)
    return data


def test_reads_are_what_stands_in_the_file_however_many_there_are_at_once(tmp_path, seed):
    data, found = numbers(tmp_path / "x", 100_000, seed), np.zeros(100_000, np.uint8)
    with open(tmp_path / "x", "rb") as file:
        reads = [Read(file, at, found.ctypes.data + at, min(999, 100_000 - at)) for at in range(0, 100_000, 999)]
        for read in reads:
            read.start()
        for read in reads:
            read.finish()
            assert read.done()
            read.abandon()  # too late, and nothing happens
    assert (found == data).all()


def test_many_reads_share_the_file_s_own_descriptor(tmp_path, monkeypatch, seed):
    """As of a model with thousands of tensors of a few bytes, more than a process may have files open."""
    monkeypatch.setattr(aio, "MAX_OPEN", 3)
    data, found = numbers(tmp_path / "x", 5000, seed), np.zeros(5000, np.uint8)
    before = len(os.listdir("/proc/self/fd"))
    with open(tmp_path / "x", "rb") as file:
        reads = [Read(file, at, found.ctypes.data + at, 1) for at in range(5000)]
        for read in reads:
            read.start()
        assert len(os.listdir("/proc/self/fd")) == before + 4
        for read in reads[:4000]:
            read.finish()
        for read in reads[4000:]:
            read.abandon()
        assert (found[:4000] == data[:4000]).all() and Read.opened == 0
        assert file.read(10) == data[:10].tobytes()  # it is still open


class Library:
    """The C library's, but for what a test gives."""

    def __init__(self, **functions):
        self.__dict__ |= functions

    def __getattr__(self, name):
        return getattr(self.real, name)

    real = aio._library()


def test_what_the_system_did_not_give_at_once_is_read_next(tmp_path, monkeypatch, seed):
    data, found, counts = numbers(tmp_path / "x", 1000, seed), np.zeros(1000, np.uint8), []

    def a_third(block: ctypes.Structure) -> int:
        """Of what was read, and it alone."""
        count = Library.real.aio_return(block)
        counts.append(-(-count // 3))
        ctypes.memset(block.address + counts[-1], 0, count - counts[-1])
        return counts[-1]

    monkeypatch.setattr(aio, "_library", lambda: Library(aio_return=a_third))
    with open(tmp_path / "x", "rb") as file:
        read = Read(file, 100, found.ctypes.data, 900)
        read.start()
        read.finish()
    assert (found[:900] == data[100:]).all() and not found[900:].any() and counts[:3] == [300, 200, 134]


def test_a_read_that_was_not_started_can_be_abandoned(tmp_path, seed):
    numbers(tmp_path / "x", 10, seed)
    with open(tmp_path / "x", "rb") as file:
        Read(file, 0, 0, 10).abandon()


def test_a_read_that_cannot_even_begin_says_why(tmp_path, monkeypatch, seed):
    numbers(tmp_path / "x", 10, seed)

    def refused(_: ctypes.Structure) -> int:
        ctypes.set_errno(11)
        return -1

    monkeypatch.setattr(aio, "_library", lambda: Library(aio_read=refused))
    refusal = pytest.raises(UserError, match=r"x cannot be read \(Resource temporarily unavailable\)")
    with open(tmp_path / "x", "rb") as file, refusal:
        Read(file, 0, np.zeros(10, np.uint8).ctypes.data, 10).start()


def test_ctrl_c_ends_a_wait(tmp_path, monkeypatch, seed):
    data, found = numbers(tmp_path / "x", 10, seed), np.zeros(10, np.uint8)

    def waiting(*_: object) -> None:
        """As a read that takes for ever: only a signal ends it."""
        threading.Timer(0.05, signal.pthread_kill, [threading.get_ident(), signal.SIGINT]).start()
        time.sleep(10)

    with open(tmp_path / "x", "rb") as file:
        read = Read(file, 0, found.ctypes.data, 10)
        read.start()
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            stuck = Library(aio_error=lambda _: aio.EINPROGRESS, aio_suspend=waiting)
            patched.setattr(aio, "_library", lambda: stuck)
            read.finish()
        read.abandon()
    assert (found == data).all()
