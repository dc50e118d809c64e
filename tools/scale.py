"""How far the server scales on paper: docs/results/scale.json, from a simulation (fleet.py) fed with measured times.

    python -m tools.scale            runs it: minutes of one core; `make results` renders docs/scale.md from what is
                                     committed

A replica is an H200 that serves Qwen3-8B with so much memory: step times of docs/results/h200*.json (a line through
them: a step without cache, and each token that a row holds), the rate at which prompts are read, blocks from the code's
own arithmetic. The load is prompts that begin with one of many documents, asked for as Zipf's law says.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import cache

import numpy as np

from minioscar.cache import cache_bytes
from minioscar.config import Config
from minioscar.oscar import SCHEMES, WINDOW
from tools.committed import QWEN3_8B, RESULTS, load
from tools.fleet import Card, Fleet, Load, Request

KINDS = ("bf16", "int2")
BUDGET = 24e9  # bytes of a card: weights, work and cache
SLOTS = 48
CHUNK = 1024
LOAD = Load(prefixes=100_000, zipf=1.0, prefix=2048, own=512, new=256.0)
COUNTS = (1, 10, 100, 1000)
WARM, LONG, LEAST = 300, 100, 3000  # answers of each replica before the figures, and for them; these at least
USE = 0.7  # of what a fleet can answer
MEASURED = ("h200", "h200-batch")
CONFIG = Config.from_dict(QWEN3_8B)


def steps(kv: str) -> tuple[float, float]:
    """Seconds of a step without a cache, and of a token that a row holds: a line through what was measured."""
    rows = [row for name in MEASURED for row in load(name)["decode"] + load(name).get("throughput", []) if is_ours(row)]
    points = [(row["batch"] * row["context"], row["ms"] / 1e3) for row in rows if row["kv"] == kv]
    slope, base = np.polyfit(*np.array(points).T, 1)
    return float(base), float(slope)


def is_ours(row: dict) -> bool:
    return row["model"] == "qwen3-8b" and row["context"] == 4096


@cache
def read_tokens_s() -> float:
    return next(row["tokens_per_s"] for row in load("h200")["prefill"] if row["tokens"] == 4096)


def block_bytes(kv: str) -> int:
    """Of 128 packed tokens, all layers."""
    scheme = SCHEMES[kv]
    return cache_bytes(CONFIG, scheme, 1, 2 * WINDOW) - cache_bytes(CONFIG, scheme, 1, WINDOW)


def slot_bytes(kv: str) -> int:
    """What a row has beside its blocks: sinks and the window."""
    return cache_bytes(CONFIG, SCHEMES[kv], 1, WINDOW) - block_bytes(kv)


def card(kv: str) -> Card:
    row = next(one for one in load("h200")["throughput"] if one["kv"] == kv and one["budget_gb"] * 1e9 == BUDGET)
    room = BUDGET - row["weight_bytes"] - row["outside_bytes"] - SLOTS * slot_bytes(kv)
    base, token = steps(kv)
    return Card(SLOTS, int(room // block_bytes(kv)), base, token, read_tokens_s(), CHUNK)


# --- what comes of a run


def figures(fleet: Fleet, done: list[Request]) -> dict[str, float]:
    """Of the answers of a window."""
    seconds = done[-1].ended - done[0].ended
    first = [one.begun - one.came for one in done]
    between = [(one.ended - one.begun) / one.new for one in done]
    per_replica = np.bincount([one.replica for one in done], minlength=len(fleet.replicas))
    prompt = fleet.load.prefix + fleet.load.own
    return {
        "requests_per_s": len(done) / seconds,
        "tokens_per_s": sum(one.new for one in done) / seconds,
        "hit_rate": sum(one.cached for one in done) / (prompt * len(done)),
        "first_p50_s": float(np.percentile(first, 50)), "first_p99_s": float(np.percentile(first, 99)),
        "between_p99_ms": float(np.percentile(between, 99)) * 1e3,
        "busiest": float(per_replica.max() / per_replica.mean()),
    }  # fmt: skip


def saturated(kv: str, count: int, route: str) -> dict[str, float]:
    """As many clients as there are slots and a quarter more, each of which asks again at once."""
    fleet = Fleet(card(kv), LOAD, count, route, seed=1)
    fleet.run(max(WARM * count, LEAST), clients=count * SLOTS * 5 // 4)
    return figures(fleet, fleet.run(max(LONG * count, LEAST)))


def at_rate(kv: str, count: int, route: str, rate: float) -> dict[str, float]:
    fleet = Fleet(card(kv), LOAD, count, route, seed=2)
    fleet.run(max(WARM * count, LEAST), rate=rate)
    return figures(fleet, fleet.run(max(LONG * count, LEAST), rate=rate))


def rows() -> list[dict]:
    """Cache by cache and fleet by fleet; the other ways to route for 100 replicas."""
    found = []
    for count in COUNTS:
        for kv in KINDS:
            for route in ("known", "hash", "load") if count == 100 else ("known",):
                full = saturated(kv, count, route)
                calm = at_rate(kv, count, route, USE * full["requests_per_s"])
                found.append({"replicas": count, "kv": kv, "route": route, "full": full, "calm": calm})
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def costs() -> dict[str, dict[str, float]]:
    """Bytes, and what they are against reading the prompt again."""
    found = {}
    for kv in KINDS:
        of_block = block_bytes(kv)
        again = WINDOW / read_tokens_s()
        found[kv] = {
            "block_bytes": of_block, "slot_bytes": slot_bytes(kv), "blocks": card(kv).blocks,
            "read_again_s": again, "even_gb_s": of_block / again / 1e9,
            "prompt_bytes": cache_bytes(CONFIG, SCHEMES[kv], 1, 4096),
            "store_bytes": LOAD.prefixes * LOAD.prefix // WINDOW * of_block,
        }  # fmt: skip
    return found


def main() -> int:
    meta = {"measured": [f"docs/results/{name}.json" for name in MEASURED], "budget_bytes": BUDGET, "use": USE}
    report = {"meta": meta, "load": asdict(LOAD), "cards": {kv: asdict(card(kv)) for kv in KINDS}, "costs": costs()}
    report["rows"] = rows()
    (RESULTS / "scale.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
