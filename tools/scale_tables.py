"""The tables and the figure of docs/scale.md, and what docs/serving.md says of replicas over Ray."""

from __future__ import annotations

from matplotlib.figure import Figure

from minioscar.serve.cluster.names import BLOCK, sizes
from minioscar.tables import markdown
from tools.committed import load
from tools.fleet import PERIOD
from tools.plot import BLUE, RED, figure

COLORS = {"bf16": RED, "int2": BLUE}
ROUTES = {"known": "where its beginning is", "hash": "the ring alone", "load": "the least loaded of three"}
LINKS = {"10 Gbit/s": 1.25, "100 Gbit/s": 12.5, "400 Gbit/s": 50.0}  # GB/s
NAME = 8  # bytes of a name


def rows(**wanted: object) -> list[dict]:
    return [row for row in load("scale")["rows"] if all(row[key] == value for key, value in wanted.items())]


def cells(row: dict) -> list[str]:
    full, calm = row["full"], row["calm"]
    return [
        f"{full['tokens_per_s']:,.0f}", f"{full['tokens_per_s'] / row['replicas']:,.0f}", f"{full['hit_rate']:.0%}",
        f"{full['busiest']:.2f}", f"{calm['first_p50_s']:.2f}", f"{calm['first_p99_s']:.2f}",
        f"{calm['between_p99_ms']:.1f}",
    ]  # fmt: skip


HEAD = ["tokens/s", "of a replica", "hits", "busiest", "first token p50 (s)", "p99 (s)", "between tokens p99 (ms)"]


def scale() -> str:
    """Fleets of all sizes, each with both caches."""
    report = load("scale")
    table = [[f"{row['replicas']:,}", f"`{row['kv']}`", *cells(row)] for row in rows(route="known")]
    cards = "; ".join(
        f"`{kv}`: {card['blocks']:,} blocks, a step {card['step_s'] * 1e3:.2f} ms and {card['token_s'] * 1e9:.1f} ns "
        f"for each token held" for kv, card in report["cards"].items()
    )  # fmt: skip
    card, meta = report["cards"]["int2"], report["meta"]
    note = (
        f"A replica has {meta['budget_bytes'] / 1e9:.0f} GB and {card['slots']} slots, and reads "
        f"{card['read_tokens_s']:,.0f} tokens/s; {cards}. Tokens/s, hits (share of the prompts' tokens that were in a "
        f"cache) and *busiest* (answers of the replica that has most, over the mean) with a quarter more clients than "
        f"slots; times at {meta['use']:.0%} of that rate, requests at random times."
    )
    return "\n".join([*markdown(["replicas", "`--kv`", *HEAD], table), "", note])


def scale_routes() -> str:
    """Three ways to choose a replica."""
    table = [[f"`{row['kv']}`", ROUTES[row["route"]], *cells(row)] for row in rows(replicas=100)]
    return "\n".join(markdown(["`--kv`", "a prompt goes to", *HEAD], table))


def scale_costs() -> str:
    """A block over a wire, against reading its tokens again."""
    costs, load_ = load("scale")["costs"], load("scale")["load"]
    table = []
    for kv, cost in costs.items():
        times = [f"{cost['block_bytes'] / speed / 1e6:.2f} ms" for speed in LINKS.values()]
        table.append([
            f"`{kv}`", f"{cost['block_bytes'] / 1e6:.2f} MB", f"{cost['read_again_s'] * 1e3:.2f} ms", *times,
            f"{cost['even_gb_s']:.2f} GB/s", f"{cost['prompt_bytes'] / 1e6:,.0f} MB",
            f"{cost['store_bytes'] / 1e12:.1f} TB",
        ])  # fmt: skip
    head = ["`--kv`", "block", "reading it again", *LINKS, "worth it from", "a prompt of 4,096", "all documents"]
    note = (
        f"Qwen3-8B, a block of {BLOCK} tokens in all layers; the rate of reading is the measured one of 4,096 tokens. "
        f"*All documents*: {load_['prefixes']:,} of {load_['prefix']:,} tokens. A wire at its nominal speed."
    )
    return "\n".join([*markdown(head, table), "", note])


def scale_reports() -> str:
    """What replicas say of their caches, in bytes a second."""
    report = load("scale")
    table, document = [], report["load"]["prefix"] // BLOCK
    for kv, card in report["cards"].items():
        names = card["blocks"] // document * len(sizes(document))
        cells_ = [f"{names * NAME * count / PERIOD / 1e6:,.2f} MB/s" for count in (1, 100, 1000)]
        table.append([f"`{kv}`", f"{names:,}", *cells_])
    return "\n".join(markdown(["`--kv`", "names", "to each door: 1 replica", "100", "1,000"], table))


def ray() -> str:
    """tests/cluster.py."""
    report = load("ray")
    meta, single, many, killed = (report[key] for key in ("meta", "single", "cluster", "killed"))
    ends = killed["ended"]
    cpu = report["passing"]["cpu_us_per_chunk"]
    ended = f"{ends['whole']} whole, {ends['error']} with an error event"
    later = f"{killed['later']}, of which {killed['later_ended'].get('whole', 0)} were answered"
    hits = f"{many['hit_rate']:.1%}, of one server with as many slots {single['hit_rate']:.1%}"
    lines = [
        ["ready after", f"{many['ready_s']:.0f} s"],
        ["prompts' tokens in the cache", f"{hits}: {report['hits_of_single']:.0%} of them"],
        ["a client that leaves frees its slot after", f"{many['left_s']:.2f} s"],
        [f"{killed['streams']} streams run, one replica is killed", ended],
        ["requests after that", later],
        ["two replicas again after", f"{killed['back_after_s']:.1f} s"],
        ["`--replicas 1:2`, work for both: the second answers after", f"{report['grown']['second_after_s']:.0f} s"],
        ["CPU time of a chunk, idle work included", f"{cpu['proxy']} µs in Ray's proxy, {cpu['door']} µs in a door"],
    ]
    size = report["load"]
    note = (
        f"{report['model']}, {many['replicas']} replicas of {many['slots']} slots on {meta['cores']} cores that had "
        f"other work; {size['agents']} agents with {size['turns']} turns each: {size['system']} tokens that all have "
        f"in common, {size['task']} of their own, answers of {size['new']} and results of {size['result']}. Ray "
        f"{meta['ray']}, {meta['date']}."
    )
    return "\n".join([*markdown(["", ""], lines), "", note])


def drawn(numbers: dict) -> Figure:
    """Tokens/s of a replica, hits and the time to the first token, by size of the fleet."""
    found = figure(900, 340, "Fleets of 1 to 1,000 replicas with both caches")
    parts = (
        ("tokens/s of a replica", lambda row: row["full"]["tokens_per_s"] / row["replicas"]),
        ("prompt tokens in a cache (%)", lambda row: 100 * row["full"]["hit_rate"]),
        ("first token, p99 (s)", lambda row: row["calm"]["first_p99_s"]),
    )
    for axes, (title, value) in zip(found.subplots(1, 3), parts, strict=True):
        for kv, color in COLORS.items():
            points = [(row["replicas"], value(row)) for row in rows(kv=kv, route="known")]
            axes.plot(*zip(*points, strict=True), color=color, marker="o", ms=4, lw=1.4, label=kv)
        axes.set(title=title, xlabel="replicas", xscale="log", ylim=(0, None))
        axes.grid(axis="y")
    found.axes[0].legend(loc="best")
    return found


TABLES = {"scale": scale, "scale_routes": scale_routes, "scale_costs": scale_costs, "scale_reports": scale_reports}
TABLES |= {"ray": ray}
