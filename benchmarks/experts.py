"""`bench.py kernel` on a card: a layer of experts in the shape of Qwen3-30B-A3B, beside the bytes of the experts that
are taken, or the operations of a prompt. The router's logits are random: other experts in every launch."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import cupy
import numpy as np

from benchmarks.dense import EPS, row, together
from benchmarks.kernels import random_bf16
from benchmarks.measure import graph_time
from minioscar.cache import BF16
from minioscar.config import Experts
from minioscar.experts import plans as experts
from minioscar.experts.plans import FEW, Product, Routes
from minioscar.experts.reference import route
from minioscar.ops.launch import Card, Launch, run
from minioscar.plans import BATCH_TOKENS

Array = Any
SHAPE, HIDDEN, INTER = Experts(128, 8, True), 2048, 768
TOKENS, ROUTERS = (1, 8, 48, 128, 256, 8192), 8  # that choose in turn, so that the L2 does not hold their experts


def measure(copy_rate: float, matmul_rate: float, quick: bool) -> Iterator[dict]:
    rng, e = cupy.random.default_rng(0), SHAPE
    layer = SimpleNamespace(
        gate_up=random_bf16((e.count, 2 * INTER, HIDDEN), rng), down=random_bf16((e.count, HIDDEN, INTER), rng)
    )
    for tokens in TOKENS[:1] if quick else TOKENS:
        kinds = launches(layer, tokens, rng)
        taken = float(np.mean([len(np.unique(chosen)) for chosen in kinds.pop("chosen")]))
        for name, made in kinds.items():
            us, spread = graph_time([together(of_router) for of_router in made], replays=5 if tokens > 256 else 25)
            work = {"experts up": 4 * INTER * HIDDEN, "experts down": 2 * INTER * HIDDEN}.get(name, 0)
            if work and tokens <= BATCH_TOKENS:
                shape = f"{taken:.1f} of {e.count} experts"
                yield row(name, shape, tokens, us, spread, round(taken * work), copy_rate)
            elif work:
                operations = 2 * tokens * e.per_token * work // 2
                yield row(name, f"{e.per_token} of {e.count} experts", tokens, us, spread, operations, matmul_rate)
            else:
                moved = sum(a.nbytes for a in made[0][0].args if getattr(a, "ndim", 0))
                yield row(name, f"{e.per_token} of {e.count} experts", tokens, us, spread, moved, copy_rate)


def launches(layer: SimpleNamespace, tokens: int, rng: Any) -> dict[str, list]:
    """Kind -> the launches of each router; "chosen": their choices, on the host."""
    e, card, found = SHAPE, Card.current(), {}
    x, norm = random_bf16((tokens, HIDDEN), rng), (cupy.ones(HIDDEN, BF16), EPS)
    h = cupy.empty((tokens * e.per_token, INTER), BF16)
    parts = None if tokens <= FEW else cupy.empty((len(h), HIDDEN), np.float32)
    for _ in range(ROUTERS if tokens <= BATCH_TOKENS else 1):
        logits = rng.standard_normal((tokens, e.count), dtype=np.float32)
        made: dict[str, list[Launch]] = {}
        if tokens <= FEW:
            up, down = Product(x, layer.gate_up, h, True, norm=norm), Product(h, layer.down, x, False, residual=x)
            choices: experts.Choices = logits
        else:
            choices = Routes.allocate(cupy, tokens, e, card)
            made = {launch.name: [launch] for launch in choices.launches(logits, e)}
            of_pairs = x
            if choices.of_warpgroups:
                of_pairs = cupy.empty((len(h), HIDDEN), BF16)
                made["gather"] = [experts.gather(x, choices, e, of_pairs, h)]
            up, down = Product(of_pairs, layer.gate_up, h, True), Product(h, layer.down, parts, False)
        made |= {"experts up": [up.launch(choices, e, card)], "experts down": [down.launch(choices, e, card)]}
        made |= {} if parts is None else {"combine": [experts.combine(parts, x, e)]}
        for name, of_kind in made.items():
            for launch in of_kind:
                run(launch)  # what the next ones read is there
            found.setdefault(name, []).append(of_kind)
        found.setdefault("chosen", []).append(route(cupy.asnumpy(logits), e)[0])
    return found
