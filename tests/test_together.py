"""Launches on several cards that wait for each other: what may come between them, and in which order streams have them;
with stand-ins for cards, streams and CuPy."""

from __future__ import annotations

import gc
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from minioscar.config import Config
from minioscar.errors import Failure, UserError
from minioscar.oscar import SCHEMES
from minioscar.parallel import cards, cuda
from minioscar.parallel.collectives import Links, Sum
from minioscar.parallel.cuda import SplitCuda
from minioscar.parallel.ranks import Namespace, Ranks
from minioscar.parallel.together import launch_graphs, undivided

from .tiny import CONFIG


class Error(RuntimeError):
    def __init__(self, status: int):
        super().__init__(f"error {status}")
        self.status = status


class Graph:
    """Its launch returns when all have been launched, as one does that waits for what it launches."""

    def __init__(self, work=lambda: None, launched: threading.Barrier | None = None):
        self.work, self.launched = work, launched

    def launch(self, stream: object) -> None:
        self.work()
        if self.launched:
            self.launched.wait(10)


class Stream:
    def __init__(self, name: str, log: list, capturing: bool = False):
        self.name, self.log, self.capturing, self.ptr = name, log, capturing, 0

    def is_capturing(self) -> bool:
        return self.capturing

    def record(self, event: object) -> str:
        return self.name

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} after {event}")


@pytest.fixture
def fake(monkeypatch):
    """`cupy.cuda` of two cards; statuses: what each card says when it is asked how it is."""
    found = SimpleNamespace(statuses=[0, 0], current=[0], now=[None, None])

    class Device:
        def __init__(self, number: int):
            self.number = number

        def __enter__(self) -> None:
            self.before, found.current[0] = found.current[0], self.number

        def __exit__(self, *_: object) -> None:
            found.current[0] = self.before

    def query(_: int) -> int:
        status = found.statuses[found.current[0]]
        if status == 1:  # some calls return what others raise
            raise Error(700)
        return status

    runtime = SimpleNamespace(CUDARuntimeError=Error, CUDADriverError=Error, streamQuery=query,
                              getDeviceCount=lambda: 2, runtimeGetVersion=lambda: 13000)  # fmt: skip
    library = SimpleNamespace(Device=Device, runtime=runtime, driver=runtime, Event=lambda **_: None,
                              get_current_stream=lambda device=None: found.now[found.current[0] if device is None
                                                                               else device],
                              nccl=SimpleNamespace(available=True, NcclError=Error))  # fmt: skip
    found.library = library
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=library))
    monkeypatch.setitem(sys.modules, "cupy.cuda", library)
    return found


def of_two_cards() -> SplitCuda:
    ops = SplitCuda.__new__(SplitCuda)
    ops.devices, ops.streams, ops.last, ops.ranks, ops.recorded = [0, 1], [None] * 2, [None] * 2, [], None
    ops.cards = 2
    return ops


# --- nothing comes between


def test_ctrl_c_and_garbage_collection_wait_until_all_cards_have_their_launch():
    done = []
    with pytest.raises(KeyboardInterrupt), undivided():
        assert not gc.isenabled()
        signal.raise_signal(signal.SIGINT)
        with undivided():
            done.append(gc.isenabled())
        done.append(gc.isenabled())
    assert done == [False, False] and gc.isenabled()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_ones_own_hears_of_ctrl_c_once_and_stays():
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append("handler"))
    try:
        with undivided():
            signal.raise_signal(signal.SIGINT)
            heard.append("launched")
        assert heard == ["launched", "handler"] and signal.getsignal(signal.SIGINT)() is None
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(ValueError, match="other"), undivided():
        raise ValueError("other")
    assert gc.isenabled()


def test_other_threads_leave_signals_alone():
    found = []
    with undivided():
        mine = signal.getsignal(signal.SIGINT)
        thread = threading.Thread(target=lambda: found.append(_within(lambda: signal.getsignal(signal.SIGINT))))
        thread.start()
        thread.join()
        assert found == [mine]


def _within(look):
    with undivided():
        return look()


def test_a_collective_launch_is_made_on_all_cards_before_ctrl_c_counts(fake, monkeypatch):
    ops, log = of_two_cards(), []
    fake.now = [Stream("a", []), Stream("b", [])]

    def run(launch) -> None:
        log.append(fake.current[0])
        if fake.current[0] == 0:
            signal.raise_signal(signal.SIGINT)

    ops.ranks = [SimpleNamespace(run=run)] * 2
    monkeypatch.setattr(cuda, "kernel", lambda *_: log.append("loaded"))
    launch = cuda.Launch("parallel/all_reduce.cu", "all_reduce", (), (1,), 256, ())
    with pytest.raises(KeyboardInterrupt):
        ops.run(launch)
    assert log == ["loaded", "loaded", 0, 1]


def test_a_sum_by_nccl_is_a_whole_group_and_its_failure_one_line(fake):
    log, nccl = [], fake.library.nccl
    nccl.groupStart, nccl.groupEnd, nccl.NCCL_SUM = lambda: log.append("start"), lambda: log.append("end"), 0

    def all_reduce(*_: object) -> None:
        log.append(fake.current[0])
        signal.raise_signal(signal.SIGINT)

    fake.now = [Stream("a", []), Stream("b", [])]
    communicators = [SimpleNamespace(allReduce=all_reduce)] * 2
    nccl.NcclCommunicator = SimpleNamespace(initAll=lambda devices: communicators)
    xp = Namespace([SimpleNamespace(zeros=lambda *_: None)] * 2, lambda rank: nullcontext())
    links = Links(xp, 2, lambda rank: fake.library.Device(rank))
    arrays = Ranks([SimpleNamespace(data=SimpleNamespace(ptr=0), shape=(2, 4))] * 2)
    with pytest.raises(KeyboardInterrupt):
        links.sum(arrays)
    assert log == ["start", 0, 1, "end"]

    def fails() -> None:
        raise Error(1)

    nccl.groupEnd = fails
    communicators[:] = [SimpleNamespace(allReduce=lambda *_: None)] * 2
    with pytest.raises(Failure, match=r"NCCL cannot sum over the cards \(error 1\); NCCL_DEBUG=WARN says more"):
        links.sum(arrays)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_graphs_are_launched_side_by_side(count):
    """Each launch waits for the others here, as cudaGraphLaunch may."""
    launched, log = threading.Barrier(count), []
    graphs = [Graph(lambda rank=rank: log.append(rank), launched) for rank in range(count)]
    with ThreadPoolExecutor(max(count - 1, 1)) as threads:
        launch_graphs(graphs, [None] * count, lambda rank: nullcontext(), threads)
    assert sorted(log) == list(range(count))


def test_a_graph_that_cannot_be_launched_says_so_once_the_others_are():
    def fails() -> None:
        raise Failure("GPU 1 of 2 has failed")

    log: list[str] = []
    good, bad = Graph(lambda: log.append("other")), Graph(fails)
    for graphs in ([bad, good], [good, bad]):
        with ThreadPoolExecutor(1) as threads, pytest.raises(Failure, match="GPU 1 of 2"):
            launch_graphs(graphs, [None, None], lambda rank: nullcontext(), threads)
    assert log == ["other"] * 2 and gc.isenabled()


# --- one sum after the other


def test_sums_on_one_stream_come_after_those_on_another(fake):
    """An answer of another run may be under way: all have the same inboxes and counters."""
    ops, log = of_two_cards(), []
    prompt, steps, capturing = ([Stream(f"{name}{i}", log, name == "c") for i in range(2)] for name in "psc")
    fake.now = prompt
    ops.follow()
    ops.follow()
    assert log == []
    fake.now = capturing  # what is captured comes after nothing: it has not been launched
    ops.follow()
    assert log == [] and ops.last == prompt
    ops.follow(steps)
    assert log == ["s0 after p0", "s1 after p1"]
    fake.now = prompt
    ops.links = SimpleNamespace(sum=lambda arrays: log.append("sum"))
    ops.run(Sum(Ranks([None, None])))
    assert log[2:] == ["p0 after s0", "p1 after s1", "sum"]


# --- who has failed


@pytest.mark.parametrize(
    ("raised", "statuses", "named"),
    [
        (719, [719, 700], r"GPU 1 of 2 has failed \(error 700\)"),  # the first has waited for it in vain
        (719, [719, 1], r"GPU 1 of 2 has failed \(error 700\)"),
        (719, [719, 0], r"GPU 0 of 2 has failed \(error 719\)"),
        (719, [719, 600], r"GPU 0 of 2 has failed \(error 719\)"),
        (719, [719, 719], r"GPU 0 of 2 has failed \(error 719\)"),
        (700, [700, 719], r"GPU 0 of 2 has failed \(error 700\)"),
    ],
)
def test_the_card_that_failed_is_named_and_not_the_one_that_waited_for_it(raised, statuses, named, fake):
    fake.statuses = statuses
    with pytest.raises(Failure, match=named), of_two_cards().on(0):
        raise Error(raised)
    assert fake.current == [0]


# --- what cards need


def test_what_lets_no_card_wait_is_refused_in_one_line(fake, monkeypatch):
    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            cards.over(2, SimpleNamespace(name="cuda"), Config.from_dict(CONFIG), SCHEMES["int2"])

    fake.library.nccl.available = False
    refused(r"--gpus 2: NCCL, which sums prompts over GPUs, is not found; pip install 'minioscar\[gpus13\]' brings it")
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    refused("--gpus 2: CUDA_LAUNCH_BLOCKING lets no card wait for another's launch; unset it")
