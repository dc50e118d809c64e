"""How long a running answer waits for a token beside a long prompt, on a card that is made of sleeps."""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import pytest

from minioscar.decoding import Decoder
from minioscar.engine import Engine
from minioscar.options import Options

from .test_serve_scheduler import Asked, idle, prompt, running, submit
from .tiny import talker, write_talker

STEP, PIECE, LAUNCH = 0.02, 0.3, 0.05  # seconds of the card, of the same, and of the host to launch a piece
PIECES = 8


class Card:
    """Does what it is given in order; whoever waits for something sleeps until it is done."""

    def __init__(self) -> None:
        self.free = time.monotonic()

    def begin(self, seconds: float) -> float:
        self.free = max(self.free, time.monotonic()) + seconds
        return self.free

    @staticmethod
    def wait(until: float) -> None:
        time.sleep(max(until - time.monotonic(), 0))


class Queued(Decoder):
    """One step may be launched before the one before it is read, as on a card."""

    ahead = 1

    def __init__(self, *args, card: Card):
        super().__init__(*args)
        self.card, self.launched = card, deque()

    def launch(self, slots) -> None:
        super().launch(slots)
        self.launched.append((self.card.begin(STEP), self.newest))

    def read(self):
        until, found = self.launched.popleft()
        self.card.wait(until)
        return found[0], None

    def join(self, slot, row, logits, allowed=None) -> int:
        self.card.wait(self.card.free)  # the first token is drawn behind all that was launched
        return super().join(slot, row, logits, allowed)

    def drain(self) -> None:
        self.card.wait(self.card.free)
        self.launched.clear()


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    return talker(write_talker(tmp_path_factory.mktemp("m") / "m", 3, num_hidden_layers=1), "int2")


def on_card(scheduler, monkeypatch) -> list[float]:
    """The scheduler's passes and steps take a card's time; when each pass was launched."""
    card, passes, step = Card(), [], scheduler.model.step

    def read(ids, cache, batch, draw):
        if max(batch.counts) > 1:
            time.sleep(LAUNCH)
            card.begin(PIECE)
            passes.append(time.monotonic())
        return step(ids, cache, batch, draw)

    monkeypatch.setattr(scheduler.model, "step", read)
    scheduler.decoder = Queued(scheduler.model, scheduler.cache, None, card=card)
    return passes


def test_no_token_waits_for_two_pieces(engine, seed, monkeypatch):
    """Neither while a prompt is read, nor when its own first token is drawn: that waits for the whole card."""
    rng, times = np.random.default_rng(seed), {}
    with running(engine, slots=3, context=128 * (PIECES + 1), chunk=128) as scheduler:
        passes = on_card(scheduler, monkeypatch)
        streams = [Asked(prompt(rng, 4), Options(900, ignore_eos=True)) for _ in range(2)]
        for number, one in enumerate(streams):
            tell, times[number] = one.job.tell, []
            one.job.tell = lambda event, tell=tell, of=times[number]: (of.append(time.monotonic()), tell(event))
        submit(scheduler, *streams)
        while min(map(len, times.values())) < 5:
            time.sleep(0.01)
        before = len(passes)
        start = time.monotonic()
        long = submit(scheduler, Asked(prompt(rng, 128 * PIECES - 60), Options(4, ignore_eos=True)))[0].wait()
        scheduler.cancel([one.job for one in streams])
        idle(scheduler)
    assert len(passes) - before == PIECES and len(long.answers()[0][0]) == 4
    for of in times.values():
        waits = [b - a for a, b in zip(of, of[1:], strict=False) if b > start]
        assert max(waits) < 2 * PIECE + STEP + LAUNCH, [round(wait, 3) for wait in waits]  # this machine computes, too
