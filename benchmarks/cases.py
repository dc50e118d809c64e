"""What `bench.py kernel` measures: the shapes, the bytes that each must move, and how time grows over them. Only
arithmetic: no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.measure import copies_of, line
from minioscar.cache import cache_bytes
from minioscar.config import Config
from minioscar.errors import UserError
from minioscar.ops import attention
from minioscar.oscar import SCHEMES, Scheme
from minioscar.pages import PAGE_TOKENS, page_bytes, unsupported
from minioscar.tables import size

CHUNK = 1 << 26  # random numbers that are drawn at once, in float32 first


@dataclass(frozen=True)
class Case:
    """Decode attention of `batch` sequences with `context` packed tokens each."""

    kv: str
    batch: int
    context: int
    heads: attention.Heads = attention.Heads(32, 8, 128)
    peers: bool = False  # measure the other kernels on the same shape
    group: int | None = None  # another group size than the scheme's own

    @property
    def scheme(self) -> Scheme:
        scheme = SCHEMES[self.kv]
        return scheme if self.group is None else replace(scheme, group=self.group)

    @property
    def window(self) -> int:
        """Tokens after the packed ones, the new one too: those that are kept, and half of what is flushed at a time."""
        return self.scheme.keep + self.scheme.flush // 2


# --- on a card

HEADLINES = [(1, 131072), (48, 4096), (1, 32768)]
SHAPES = [(40, 8, 128), (64, 8, 128), (28, 4, 128), (16, 8, 128), (12, 2, 128), (9, 3, 64)]
SHOWN = ("bf16", "int2", "oscar", "int2-compact", "k3v2", "k3v3", "k4v2")
SWEPT = ("bf16", "int2", "oscar", "int2-compact", "k3v3", "k4v2", "int4")
OTHER_GROUP = {32: 64, 64: 32, 128: 64}


def check_kernels(kvs: Sequence[str]) -> None:
    """Raises UserError for a scheme without kernels."""
    for kv in kvs:
        if reason := unsupported(SCHEMES[kv], 128):
            raise UserError(f"{reason}: there is nothing to measure; leave it out of --kv")


def headlines(shapes: list[tuple[int, int]], kvs: Sequence[str]) -> list[Case]:
    return [Case(kv, *shape, peers=kv == "bf16") for shape in shapes for kv in kvs]


def cases(quick: bool, kvs: Sequence[str] | None = None) -> list[Case]:
    """kvs: the schemes; None: those that are shown, and more shapes."""
    found = headlines(HEADLINES, kvs or SHOWN)
    if quick:
        return found[:2]
    if kvs:
        return found
    found += [Case(kv, 1, 131072) for kv in ("k4v4", "int4", "kivi")]
    found += [Case("int2", 256, 4096), Case("int2", 8, 32768)]
    return found + [
        Case("int2", 2 * (8 // heads[1]) if heads[2] == 128 else 12, 131072, attention.Heads(*heads))
        for heads in SHAPES
    ]


def sustained(kvs: Sequence[str] | None = None) -> list[Case]:
    """One long sequence and a batch, once more, without the rests between replays."""
    return headlines(HEADLINES[:2], kvs or SHOWN)


def sweep(quick: bool, kvs: Sequence[str] | None = None) -> list[Case]:
    """Context 1K to 256K at batch 1; batch 1 to 256 at 4K; at 1 x 128K every scheme that has kernels, and another group
    size. kvs: the schemes; None: those that are swept."""
    schemes, step = (kvs or SWEPT[:2], 4) if quick else (kvs or SWEPT, 1)
    contexts = [Case(kv, 1, 1024 << i) for kv in schemes for i in range(0, 9, step)]
    batches = [Case(kv, 1 << i, 4096) for kv in schemes for i in range(0, 9, step)]
    packed = [kv for kv, s in SCHEMES.items() if s.quantized and unsupported(s, 128) is None and not quick]
    packed = [kv for kv in packed if kv in (kvs or packed)]
    others = [Case(kv, 1, 131072) for kv in packed]
    groups = [Case(kv, 1, 131072, group=OTHER_GROUP[SCHEMES[kv].group]) for kv in packed]
    return list(dict.fromkeys(contexts + batches + others + groups))


@dataclass(frozen=True)
class Matrix:
    """A linear layer, and what stands around it."""

    name: str
    size: int
    rows: int
    norm: bool = False
    silu: bool = False
    residual: bool = False
    float32: bool = False


DENSE = [  # of Qwen3-8B
    Matrix("norm, qkv", 4096, 6144, norm=True),
    Matrix("o, residual", 4096, 4096, residual=True),
    Matrix("norm, gate and up, silu", 4096, 24576, norm=True, silu=True),
    Matrix("down, residual", 12288, 4096, residual=True),
    Matrix("norm, head", 4096, 151936, norm=True, float32=True),
]
PREFILLS = [(0, 4096), (0, 32768), (131072, 512)]  # tokens before, and new


def pairs(past: int, new: int) -> int:
    """(query, key that it sees) of one head."""
    return new * past + new * (new + 1) // 2


# --- without one: NumPy, small shapes

SMALL = attention.Heads(8, 2, 64)


def small_cases(quick: bool, kvs: Sequence[str] | None = None) -> list[Case]:
    shapes = [(1, 256)] if quick else [(1, 1024), (1, 4096), (8, 1024)]
    return [Case(kv, *shape, SMALL) for shape in shapes for kv in kvs or SHOWN]


def small_sweep(quick: bool, kvs: Sequence[str] | None = None) -> list[Case]:
    schemes, most = (kvs or SWEPT[:2], 3) if quick else (kvs or SWEPT, 5)
    contexts = [Case(kv, 1, 128 << i, SMALL) for kv in schemes for i in range(most)]
    return list(dict.fromkeys(contexts + [Case(kv, 1 << i, 256, SMALL) for kv in schemes for i in range(most)]))


# --- bytes


def moved_bytes(case: Case) -> int:
    """What a step must read of the cache: pages (or BF16), norms, sinks and the window."""
    scheme, h = case.scheme, case.heads
    token = h.kv_heads * h.head_dim * 2 * 2
    if not scheme.quantized:
        return case.batch * (case.context + case.window) * token
    pages = case.context // PAGE_TOKENS * h.kv_heads * page_bytes(scheme, h.head_dim)
    return case.batch * (pages + 4 * case.context * scheme.scale + (scheme.sinks + case.window) * token)


def layer(heads: attention.Heads) -> Config:
    """A model of one attention layer with these heads."""
    shape = {"num_attention_heads": heads.q_heads, "num_key_value_heads": heads.kv_heads, "head_dim": heads.head_dim}
    rest = {
        "hidden_size": heads.q_heads * heads.head_dim,
        "intermediate_size": 1,
        "vocab_size": 1,
        "num_hidden_layers": 1,
    }
    return Config.from_dict({"model_type": "llama", **shape, **rest})


def allocated_bytes(case: Case) -> int:
    """The caches that a measurement rotates through, and what fills the first."""
    h = case.heads
    one = cache_bytes(layer(h), case.scheme, case.batch, case.context + case.scheme.ring)
    drawn = 2 * case.context * h.kv_heads * h.head_dim * 2
    return copies_of(moved_bytes(case)) * one + drawn + 6 * CHUNK


def too_large(case: Case, free: int) -> str | None:
    """Why a case cannot be measured in `free` bytes, or None."""
    need = allocated_bytes(case)
    return None if need <= free else f"needs {size(need)}, but {size(free)} are free"


# --- rows


def entry(op: str, case: Case, us: float, spread: float, size: int, copy_rate: float) -> dict:
    """A row of bench.py's JSON."""
    h = case.heads
    group = case.scheme.group if case.scheme.quantized else None
    shape = {"q_heads": h.q_heads, "kv_heads": h.kv_heads, "head_dim": h.head_dim, "group": group}
    times = {"us": us, "us_spread": spread, "bytes": size, "fraction_of_copy": size / (us * 1e-6) / copy_rate}
    return {"op": op, "kv": case.kv, "batch": case.batch, "context": case.context, **shape, **times}


def growth(rows: Sequence[dict], copy_rate: float) -> list[dict]:
    """Least squares through the rows of a sweep: microseconds per 1,000 tokens and at none, beside the bytes' own time.

    Tokens are those of all sequences: over contexts at batch 1, over batches at the context that most of them have.
    worst_error: of the line, as a fraction of the time measured.
    """
    found = []
    own = [row for row in rows if row["group"] in (None, SCHEMES[row["kv"]].group)]
    alone = [row for row in own if row["batch"] == 1]
    contexts = [row["context"] for row in own if row["batch"] > 1]
    together = [row for row in own if contexts and row["context"] == contexts[0]]
    for over, group in (("context", alone), ("batch", together)):
        for kv in dict.fromkeys(row["kv"] for row in group):
            points = [row for row in group if row["kv"] == kv]
            tokens = [row["batch"] * row["context"] / 1000 for row in points]
            if len(set(tokens)) < 2:
                continue
            slope, intercept, worst = line(tokens, [row["us"] for row in points])
            moved = line(tokens, [row["bytes"] for row in points])[0] / copy_rate * 1e6
            fit = {"us_per_1000_tokens": slope, "us_at_0_tokens": intercept, "worst_error": worst}
            limit = {"bytes_us_per_1000_tokens": moved, "times_the_bytes": slope / moved}
            found.append({"over": over, "kv": kv, "points": len(points), **fit, **limit})
    return found
