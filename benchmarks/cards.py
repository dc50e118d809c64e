"""Times of launches in which several cards take part; and what one of several has to do, timed on one card.

    python -m benchmarks.cards qwen3-8b --gpus 1,2 --shapes 1x4096,1x131072,48x4096 --tokens 32768 --json share.json

The share of one of N cards runs by itself: what it would write into the others' memory it writes into its own, and
waits for that. Sums and gathers have their launches and their waits then, but no link; the sums of a prompt, which are
NCCL's, are left out. So a step of N cards takes longer than this by what the links add, and by the wait for the
slowest.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks import models, presets, quantized
from benchmarks.measure import LAUNCHES, ceilings, median_and_spread, replayed
from benchmarks.runs import POSITIONS, numbers
from minioscar.app import cli
from minioscar.arguments import scheme_named
from minioscar.config import Config
from minioscar.engine import Engine
from minioscar.ops import backend
from minioscar.ops.cuda import Cuda
from minioscar.oscar import Scheme
from minioscar.parallel import loading, shares
from minioscar.parallel.collectives import Links, Sum
from minioscar.parallel.cuda import SplitCuda, captured, on_streams
from minioscar.parallel.ranks import Ranks
from minioscar.parallel.together import launch_graphs
from minioscar.storage import strict_json as json
from minioscar.storage.files import replacing


def graph_time(ops: SplitCuda, launches: Sequence[Callable[[], None]], replays: int = 25) -> tuple[float, float]:
    """`measure.graph_time` of calls that launch on every card; timed on the first, behind a replay of all."""
    import cupy

    count, streams = max(LAUNCHES, len(launches)), ops.new_streams(len(ops.ranks))

    def synchronize() -> None:
        ops.each(lambda _: cupy.cuda.Device().synchronize())

    synchronize()  # what filled the buffers may still run on another stream
    with on_streams(ops, streams):
        for launch in launches:
            launch()
    synchronize()
    graphs = captured(ops, streams, lambda: [launches[i % len(launches)]() for i in range(count)])

    def once() -> float:
        with ops.on(0):
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
        for event in (start, end):
            launch_graphs(graphs, streams, ops.on, ops.threads)
            with ops.on(0):
                event.record(streams[0])
        synchronize()
        return cupy.cuda.get_elapsed_time(start, end) * 1e3 / count

    return median_and_spread(replayed(once, count, replays))


class Looped(Links):
    """Of one card, whose words for the others are in its own inbox where theirs would be."""

    def _inboxes(self, i: int) -> Ranks:
        return Ranks([self.inbox.values[0][:, i:]])

    def _everywhere(self, x: Ranks) -> list[Ranks]:
        of_card = x.values[0]
        return [Ranks([of_card[:, rank:] if x is self.flags else of_card]) for rank in range(self.cards)]

    def sum_beside(self, arrays: Ranks) -> None:
        """Left out."""

    join = sum = sum_beside


class Share(SplitCuda):
    """The first of `cards` cards."""

    def __init__(self, config: Config, cards: int):
        super().__init__([Cuda()], config)
        self.cards, self.local = cards, shares.local(config, cards, Ranks([np.int32(0)]))
        self.share, firsts = shares.vocabulary(config, cards)
        self.first_tokens, self.links = firsts[:1], Looped(self.xp, cards, self.on)

    def all_heads(self, x: Any, heads: int) -> np.ndarray:
        own = self.numpy(x)
        return np.concatenate([own] * (heads // own.shape[1]), axis=1)

    def cache_bytes(self, config: Config, *rest: Any) -> int:
        return self.ranks[0].cache_bytes(shares.local(config, self.cards, 0), *rest)

    def run(self, launch: Any) -> None:
        if not isinstance(launch, Sum):
            super().run(launch)

    def _gathered(self, parts: Ranks) -> Ranks:
        """The other cards' logits are 0, where there was nothing before."""
        out = self.xp.zeros((len(parts), self.config.vocab_size), np.float32)
        self.run(self.links.gather(parts, out, self.first_tokens))
        return out


def engine_of(config: Config, scheme: Scheme, cards: int) -> Engine:
    """Of a whole model with random weights, or of the share of one of several cards."""
    if cards == 1:
        return presets.load(config, scheme.name, "cuda")
    ops = Share(config, cards)
    weights = loading.prepared(presets.random_shares(config, ops, 0, scheme.rotate), config, ops, scheme)
    return Engine(config, weights, None, scheme, ops)


def rows(args: argparse.Namespace, limits: dict[str, float]) -> Iterator[tuple[str, dict]]:
    config = quantized.config_with(presets.config_of(args.preset), args.weights)
    config = replace(config, max_positions=POSITIONS, window=None)
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes.split(",")]
    for kv in args.kv.split(","):
        for cards in numbers("--gpus", args.gpus):
            e = engine_of(config, scheme_named(kv), cards)
            about = {"gpus": cards, "share": f"one of {cards}"} | ({"weights": args.weights} if args.weights else {})
            for shape in shapes:
                row = models.decode(e, args.preset, *shape, limits, args.steps)
                yield "decode", row | about
            for tokens in numbers("--tokens", args.tokens) if kv != "bf16" else ():
                row = models.prefill(e, args.preset, tokens, limits, 2)
                yield "prefill", row | about | {"fraction_of_limit": None}
            ops = e.ops
            del e
            gc.collect()
            ops.release()


def run(argv: list[str]) -> None:
    import bench

    parser = cli.Parser(prog="python -m benchmarks.cards")
    parser.add_argument("preset")
    for name, default in (("gpus", "1,2"), ("kv", "int2"), ("shapes", "1x4096"), ("tokens", None), ("json", None)):
        parser.add_argument(f"--{name}", default=default)
    parser.add_argument("--weights", choices=quantized.NAMES)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args(argv)
    ops = backend("cuda")
    limits = ceilings(ops)
    ops.release()
    about = bench.meta(ops, argparse.Namespace(quick=False, gpus=1), argv, parser.prog)
    report: dict[str, Any] = {"meta": about, "ceilings": limits, "decode": [], "prefill": []}
    for section, row in rows(args, limits):
        report[section].append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if args.json is not None:
            with replacing(args.json) as path:
                path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(cli.run("benchmarks.cards", run, None, cli.explained))
