"""The server that `bench.py serve` asks: a process of its own, which first measures what its engine does without HTTP.

    python -m benchmarks.serve_target '{"target": {"model": "smollm2-135m", ...}, "clients": [1, 8], "prompt": 64, ...}'

It is ready when it says so on stderr, in a line of JSON: the port, the vocabulary, and what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.runs import model_of
from minioscar.app import cli
from minioscar.arguments import scheme_named
from minioscar.cache import blocks_of_row
from minioscar.decoding import Decoder
from minioscar.engine import Engine
from minioscar.sampling import RowSampling, Sampling
from minioscar.serve import server
from minioscar.serve.pooled import PooledCache
from minioscar.serve.warm_up import passes, warm_up
from minioscar.storage.hub import resolve
from minioscar.tokenizer import Tokenizer

QUEUE = 1 << 16  # prompts that may wait: none is refused
GRACE = 5  # seconds
Array = Any


@dataclass(frozen=True)
class Target:
    """What is served: a model, or a preset with random weights; slots, context and chunk as in `minioscar serve`."""

    model: str
    random_weights: str | None
    weights: str | None
    kv: str
    device: str
    slots: int
    context: int
    chunk: int
    gpus: int = 1


def load(target: Target) -> Engine:
    _, loaded = model_of(argparse.Namespace(**asdict(target)))
    e = loaded(scheme_named(target.kv))
    folder = None if target.random_weights else resolve(target.model)
    has_words = folder is not None and (folder / "tokenizer.json").exists()
    words = Tokenizer(folder) if has_words else made_tokenizer(e.config.vocab_size)
    return Engine(e.config, e.model.weights, words, e.scheme, e.ops)


def made_tokenizer(vocab: int) -> Tokenizer:
    """As many tokens as the model has: single bytes, then words. Text needs no more than that all of them are there."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = [*letters, *(f"Ġ{i}" for i in range(len(letters), vocab))][:vocab]
    library = Library(models.BPE({text: i for i, text in enumerate(texts)}, []))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    with TemporaryDirectory() as folder:
        library.save(str(Path(folder) / "tokenizer.json"))
        return Tokenizer(folder)


# --- the engine without HTTP


class Chain:
    """Prompts and decode steps in a row, over as many rows, with the calls of the server's scheduler."""

    def __init__(self, e: Engine, slots: int, context: int, chunk: int):
        self.model, self.vocab, self.chunk = e.model, e.config.vocab_size, min(chunk, context)
        blocks = slots * blocks_of_row(e.scheme, context)
        self.cache: PooledCache = e.new_cache(slots, context, partial(PooledCache, blocks=blocks))
        e.ops.prepare(e.model, self.cache, passes(self.cache, self.chunk), None, False)
        self.decoder: Decoder = e.ops.decoder(e.model, self.cache, None)
        warm_up(e.model, self.cache, self.decoder, self.chunk)

    def seconds(self, rows: int, prompt: int, new: int) -> float:
        """`rows` prompts are read, short ones several in a pass, and each gets `new` tokens."""
        ids = np.random.default_rng(rows).integers(0, self.vocab, (rows, prompt))
        slots, at_once = list(range(rows)), max(self.chunk // prompt, 1)
        self._begin(slots, prompt + new)
        before = time.perf_counter()
        for first in range(0, rows, at_once):
            self._read(slots[first : first + at_once], ids[first : first + at_once])
        launched = 0
        for done in range(new - 1):
            while launched < new - 1 and launched - done <= self.decoder.ahead:
                self.decoder.launch(slots)
                launched += 1
            self.decoder.read()
        return time.perf_counter() - before

    def piece_seconds(self, prompt: int) -> float:
        """Of a piece of this prompt: the median."""
        ids, seconds = np.random.default_rng(0).integers(0, self.vocab, prompt), []
        self._begin([0], prompt)
        for first in range(0, prompt, self.chunk):
            before = time.perf_counter()
            with self.decoder.ordered():
                self.model.ops.numpy(self._pass([0], [ids[first : first + self.chunk]]))
            seconds.append(time.perf_counter() - before)
        return float(np.median(seconds))

    def _begin(self, slots: Sequence[int], tokens: int) -> None:
        """Rows are empty, and these have room for so many tokens."""
        for slot in range(len(self.cache.lengths)):
            self.cache.reset(slot)
        with self.decoder.ordered():
            for slot in slots:
                self.cache.reserve(slot, tokens)

    def _read(self, slots: Sequence[int], ids: Array) -> None:
        with self.decoder.ordered():
            for first in range(0, ids.shape[1], self.chunk):
                logits = self._pass(slots, ids[:, first : first + self.chunk])
            for slot, of_row in zip(slots, logits, strict=True):
                self.decoder.join(slot, RowSampling(), of_row)

    def _pass(self, slots: Sequence[int], ids: Iterable[Array]) -> Array:
        batch = self.cache.batch_for(slots, map(len, ids))
        return self.model.step(np.concatenate(list(ids)), self.cache, batch, lambda logits: logits)[1]


def without_http(e: Engine, target: Target, clients: Sequence[int], prompt: int, new: int, long: int) -> dict[str, Any]:
    """tokens/s of a chain for each number of clients (as many rows, at most all slots) and of one that has one slot
    alone; seconds of a piece of a long prompt."""
    rows = {n: min(n, target.slots) for n in clients}
    chain = Chain(e, target.slots, prompt + new, target.chunk)
    for count in rows.values():
        chain.seconds(count, prompt, 2)  # what a pass of this size does once
    rates = {n: count * new / chain.seconds(count, prompt, new) for n, count in rows.items()}
    del chain
    e.ops.release()
    alone = Chain(e, 1, max(long, prompt + new), target.chunk)
    alone.seconds(1, prompt, 2)
    found = {"chain": rates, "alone": new / alone.seconds(1, prompt, new), "piece_s": alone.piece_seconds(long)}
    del alone
    e.ops.release()
    return found


def end_with_parent() -> None:
    """It holds stdin open as long as it lives."""
    os.read(0, 1)
    os._exit(1)


def run(argv: list[str]) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    asked = json.loads(argv[0])
    target = Target(**asked.pop("target"))
    plan = server.Plan(target.slots, target.context, target.chunk, QUEUE, "bench")
    plan.check()
    bound = server.listening("127.0.0.1", 0)
    e = load(target)
    with np.errstate(all="ignore"):
        found = without_http(e, target, **asked)
    app, scheduler = server.assemble(e, plan, Sampling())
    ready = {"port": bound.getsockname()[1], "vocab": e.config.vocab_size, **found}
    server.serve(app, scheduler, bound, GRACE, lambda seconds: json.dumps({**ready, "warm_up_s": seconds}))


if __name__ == "__main__":
    sys.exit(cli.run("server", run, None, cli.explained))
