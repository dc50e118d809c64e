"""The tables that bench.py prints: a column is a title, a width (negative: to the left), and what it shows of a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from minioscar.tables import aligned

Column = tuple[str, int, Callable[[dict], str]]


def text(title: str, width: int, key: str) -> Column:
    return title, width, lambda row: str(row[key])


def number(title: str, width: int, key: str, form: str) -> Column:
    return title, width, lambda row: "-" if row[key] is None else format(row[key], form)


def megabytes(title: str, key: str) -> Column:
    return title, 10, lambda row: f"{row[key] / 1e6:,.2f}"


def shape(row: dict) -> str:
    return f"{row['batch']} x {row['context']:,}"


def heads(row: dict) -> str:
    return f"{row['q_heads']}/{row['kv_heads']} d{row['head_dim']}"


def peers(row: dict) -> str:
    return ", ".join(
        f"{name} {us:.1f}" if isinstance(us, float) else f"{name}: {us}" for name, us in row.get("peers", {}).items()
    )


def beside(row: dict) -> str:
    """What only one kind of load has."""
    said = {
        "one_slot_tokens_per_s": "without HTTP and other slots {:.1f} tokens/s",
        "requests_per_s": "{:.2f} requests/s",
        "shared_tokens": "{:,} tokens in common",
        "first_share": "first token in {:.1%} of the first turn's time",
        "times_a_piece": "longest wait of a token {:.2f} pieces",
    }
    return ", ".join(text.format(row[key]) for key, text in said.items() if key in row)


KV, SHAPE = text("kv", -20, "kv"), ("batch x tokens", 15, shape)
SPREAD = number("spread", 7, "spread", ".0%")
KERNEL: list[Column] = [
    text("operation", -24, "op"), KV, number("group", 5, "group", "d"), SHAPE, ("heads", 11, heads),
    number("µs", 10, "us", ".2f"),
    number("spread", 7, "us_spread", ".1%"), megabytes("MB moved", "bytes"),
    number("of copy", 8, "fraction_of_copy", ".1%"),
    ("peers, µs", -1, peers),
]  # fmt: skip
COLUMNS: dict[str, list[Column]] = {
    "kernel": KERNEL,
    "sustained": KERNEL,
    "sweep": KERNEL,
    "dense": [
        text("operation", -24, "op"), text("shape", -40, "shape"), number("tokens", 9, "tokens", ",d"),
        number("µs", 10, "us", ".2f"),
        number("spread", 7, "us_spread", ".1%"), number("of limit", 9, "fraction_of_limit", ".1%"),
    ],
    "growth": [
        text("over", -8, "over"), KV, number("points", 7, "points", "d"),
        number("µs per 1,000 tokens", 20, "us_per_1000_tokens", ".3f"),
        number("their bytes' µs", 16, "bytes_us_per_1000_tokens", ".3f"), number("times", 7, "times_the_bytes", ".2f"),
        number("µs at none", 11, "us_at_0_tokens", ".2f"), number("worst error", 12, "worst_error", ".0%"),
    ],
    "skipped": [text("operation", -24, "op"), KV, SHAPE, text("  skipped", -1, "skipped")],
    "decode": [
        KV, SHAPE, number("ms", 10, "ms", ".2f"), SPREAD, number("tokens/s", 10, "tokens_per_s", ".1f"),
        megabytes("MB read", "bytes"),
        number("of limit", 9, "fraction_of_limit", ".1%"), ("peers, ms", -1, peers),
    ],
    "breakdown": [
        KV, SHAPE, text("  kernel", -34, "kernel"), number("launches", 8, "launches", "d"),
        number("µs each", 9, "us", ".2f"),
        number("µs a step", 10, "us_a_step", ".0f"),
        ("of all", 7, lambda row: f"{row['share']:.1%}" if "share" in row else ""), megabytes("MB each", "bytes"),
        number("of limit", 9, "fraction_of_limit", ".1%"),
    ],
    "prefill": [
        KV, number("tokens", 15, "tokens", ",d"), number("s", 10, "s", ".3f"), SPREAD,
        number("tokens/s", 10, "tokens_per_s", ".1f"),
        number("of limit", 9, "fraction_of_limit", ".1%"), ("peers, tokens/s", -1, peers),
    ],
    "throughput": [
        number("budget, GB", 10, "budget_gb", ".3f"), KV, number("tokens each", 12, "context", ",d"),
        number("largest batch", 14, "batch", "d"), number("ms", 10, "ms", ".2f"), SPREAD,
        number("tokens/s", 10, "tokens_per_s", ".1f"), megabytes("MB cache", "cache_bytes"),
    ],
    "load": [
        text("model", -24, "model"), number("layers", 8, "layers", "d"), megabytes("MB", "bytes"),
        number("s", 8, "s", ".3f"), SPREAD,
        number("first, s", 9, "first_s", ".3f"), number("GB/s", 8, "gb_s", ".2f"),
        number("copy, GB/s", 11, "copy_gb_s", ".2f"),
        number("of copy", 8, "fraction_of_copy", ".1%"),
    ],
    "start": [
        text("model", -24, "model"), KV, number("starts", 8, "starts", "d"), number("s", 8, "s", ".2f"), SPREAD,
        number("first, s", 9, "first_s", ".2f"),
    ],
    "serve": [
        text("load", -12, "load"), KV, number("clients", 8, "clients", "d"), number("requests", 9, "requests", "d"),
        number("first token, ms", 16, "first_p50_ms", ".1f"), number("p99", 9, "first_p99_ms", ".1f"),
        number("between, ms", 12, "between_p50_ms", ".2f"), number("p99", 9, "between_p99_ms", ".2f"),
        number("tokens/s", 10, "tokens_per_s", ".1f"), number("of one", 7, "times_one", ".2f"),
        number("of chain", 9, "of_chain", ".1%"), number("hit tokens", 11, "hit_tokens", ",d"),
        ("idle", 7, lambda row: format(row["idle_share"], ".1%") if "idle_share" in row else "-"),
        ("  beside", -1, lambda row: f"  {beside(row)}"),
    ],
    "memory": [
        KV, SHAPE, megabytes("MB cache", "cache_bytes"), megabytes("predicted", "predicted_bytes"),
        number("bf16 / this", 12, "ratio_to_bf16", ".2f"), number("codes alone", 12, "ratio_of_codes", ".2f"),
        megabytes("MB peak", "peak_bytes"), megabytes("predicted", "predicted_peak_bytes"),
        megabytes("MB prefill", "prefill_peak_bytes"), megabytes("predicted", "predicted_prefill_peak_bytes"),
    ],
}  # fmt: skip


def line(section: str, row: dict) -> str:
    return aligned([(show(row), width) for _, width, show in COLUMNS[section]])


def table(section: str, rows: Sequence[dict]) -> Iterator[str]:
    """A heading and a line a row; nothing where there are no rows."""
    if rows:
        yield f"\n{section}"
        yield aligned([(title, width) for title, width, _ in COLUMNS[section]])
    yield from (line(section, row) for row in rows)
