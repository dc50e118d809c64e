"""Launches on several cards that wait for each other: what may come between them, and in which order streams have them;
with stand-ins for cards, streams and CuPy."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from minioscar.config import Config
from minioscar.errors import Failure, UserError
from minioscar.ops.launch import Address
from minioscar.oscar import SCHEMES
from minioscar.parallel import cards, cuda
from minioscar.parallel.collectives import Gather, Links, Sum
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


def test_nccl_outlives_the_graphs_that_have_its_sums_where_one_collection_takes_both(fake, monkeypatch):
    """Destroyed before, a communicator waits for them for ever."""
    died: list[str] = []

    def plain(name: str) -> np.ndarray:
        """Of no interest to the collector, as CuPy's communicators are: it dies with the last reference to it."""
        made = np.zeros(1)
        weakref.finalize(made, died.append, name)
        return made

    monkeypatch.setattr(cuda, "captured", lambda *_: [plain("graph"), plain("graph")])
    monkeypatch.setattr(cuda, "pinned", lambda *_: None)
    links = SimpleNamespace(communicators=[plain("communicator"), plain("communicator")])
    ops = SimpleNamespace(ranks=[0, 1], links=links, each=lambda _: None, on=fake.library.Device)
    ops.itself, ops.new_streams = ops, lambda count: [None] * count
    queue = cuda.SplitQueue(SimpleNamespace(tokens=[0]), {1: lambda: None}, True, ops)
    queue.itself = queue  # the collector clears what is older first
    del queue, ops, links
    gc.collect()
    assert died == ["graph", "graph", "communicator", "communicator"]


# --- one sum after the other


def test_sums_on_one_stream_come_after_those_on_another(fake, monkeypatch):
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
    for what in ("sum", "gather_shares", "place_shares"):
        monkeypatch.setattr(Links, what, lambda *_, what=what: log.append(what))
    ops.links, nothing = Links.__new__(Links), Ranks([None, None])
    ops.run(Sum(nothing))
    assert log[2:] == ["p0 after s0", "p1 after s1", "sum"]
    ops.follow(steps)
    ops.run(Gather(nothing, nothing, nothing, [0, 0]))
    assert log[7:] == ["p0 after s0", "p1 after s1", "gather_shares", "place_shares"]


def test_a_recorded_gather_keeps_no_array_and_copies_where_they_lay(fake):
    """Of two shares of 3 logits of a vocabulary of 5, two tokens."""
    copies, begin = [], {"arrays": 1000, "shares": 2000, "out": 3000}
    shapes = {"arrays": (2, 3), "shares": (2, 2, 3), "out": (2, 5)}

    def array(name: str, rank: int) -> SimpleNamespace:
        mem = SimpleNamespace(ptr=begin[name] + 500 * rank)
        return SimpleNamespace(data=SimpleNamespace(ptr=mem.ptr, mem=mem), shape=shapes[name], nbytes=0)

    recording = cuda.SplitRecording()
    recording.own = {at + 500 * rank for at in begin.values() for rank in range(2)}
    recording.append(Gather(*(Ranks([array(name, rank) for rank in range(2)]) for name in begin), [0, 2]))
    (gather,) = recording.launches
    assert {type(x) for ranks in (gather.arrays, gather.shares, gather.out) for x in ranks.values} == {Address}
    fake.now = [Stream("a", []), Stream("b", [])]
    fake.library.runtime.memcpy2DAsync = lambda *args: copies.append((fake.current[0], *args))
    links = Links.__new__(Links)
    links.cards, links.on = 2, fake.library.Device
    links.place_shares(gather.shares, gather.out, gather.firsts)
    one = [(3000, 20, 2000, 12, 12, 2, 3, 0), (3008, 20, 2024, 12, 12, 2, 3, 0)]
    assert copies == [(rank, to + 500 * rank, a, of + 500 * rank, *b) for rank in range(2) for to, a, of, *b in one]


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


@pytest.mark.parametrize(
    ("unreached", "setting", "why"),
    [
        ((), None, None), ((), "0", None), ((), "", None), ((), "1", "NCCL_P2P_DISABLE is set"),
        ([(2, 1)], None, "GPUs 2 and 1 do not reach each other's memory"),  # one pair is enough
    ],
)  # fmt: skip
def test_cards_reach_each_other_all_of_them_or_none(unreached, setting, why, fake, monkeypatch):
    enabled, runtime = [], fake.library.runtime
    runtime.deviceCanAccessPeer = lambda device, other: (device, other) not in unreached

    def enable(other: int) -> None:
        enabled.append((fake.current[0], other))
        if len(enabled) == 1:
            raise Error("PeerAccessAlreadyEnabled")

    runtime.deviceEnablePeerAccess = enable
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    if setting is not None:
        monkeypatch.setenv("NCCL_P2P_DISABLE", setting)
    assert cards._apart(3) == why
    assert enabled == ([] if why else [(a, b) for a in range(3) for b in range(3) if a != b])
