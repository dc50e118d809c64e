"""Fills the tables of README.md and docs/ from docs/results/*.json and from the code's own arithmetic: `make results`.

A figure is never typed by hand. A table stands between `<!-- results: NAME -->` and `<!-- end of results -->`; NAME
is a function below.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from minioscar.cache import cache_bytes
from minioscar.config import Config
from minioscar.evaluation.baselines import Kvarn, OscarCov, Ott, StepOnly, TurboQuant
from minioscar.evaluation.fidelity import standard_error, with_error
from minioscar.oscar import SCHEMES
from minioscar.storage.files import replacing
from minioscar.tables import markdown
from tools import bench_tables, harness, scale_tables, weight_tables
from tools.committed import RESULTS, ROOT, load

BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)

PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("reading", "method", "using", "fidelity", "kernels", "weights")),
    *(f"docs/{name}.md" for name in ("serving", "scale", "benchmarks", "pictures", "parallel")),
    "docs/results/README.md",
)


def fidelity() -> str:
    """eval --json of SmolLM2-135M."""
    report = load("eval-smollm2-135m")
    rows = []
    for row in report["results"]:
        kl = f"{row['kl']:.4f}" if row["kv"] == "bf16" else f"{row['kl']:.4f} ± {row['kl_se']:.4f}"
        rows.append(
            [f"`{row['kv']}`", f"{row['bits_per_element']:.3f}", kl, f"{row['dnll']:+.4f}", f"{row['top1']:.1%}"]
        )
    lines = [*markdown(["`--kv`", "bits/element", "KL to BF16", "ΔNLL", "same top token"], rows), ""]
    where = f"({report['device']}); mean and standard error of {report['windows']} windows of the default text"
    lines.append(f"{report['prefill']} tokens prefilled, then {report['decode']} decoded teacher-forced {where}.")
    return "\n".join(lines)


MODELS = {
    "SmolLM2-135M": "eval-smollm2-135m",
    "with key biases": "eval-smollm2-135m-key-biases",
    "with those of Qwen2.5": "eval-smollm2-135m-qwen2.5-biases",
}


def models() -> str:
    """The same for all models, and what an allocated cache takes, window and sinks included."""
    reports = {model: load(name) for model, name in MODELS.items()}
    first = reports["SmolLM2-135M"]
    whole = first["prefill"] + first["decode"]
    by_model = [{row["kv"]: row for row in report["results"]} for report in reports.values()]
    table = []
    for name, row in by_model[0].items():
        cells = [f"`{name}`", f"{row['bits_per_element']:.3f}", f"{everything(name, whole):.2f}"]
        for rows, report in zip(by_model, reports.values(), strict=True):
            cells += compared(rows.get(name), report)
        table.append(cells)
    head = [cell for model in reports for cell in (f"{model}: KL", "of `oscar`'s")]
    sizes = (
        f"{model}: {r['prefill']:,} tokens prefilled and {r['decode']:,} decoded teacher-forced in {r['windows']} "
        f"windows (NLL unquantized {r['results'][0]['nll']:.3f})"
        for model, r in reports.items()
    )
    return "\n".join([
        *markdown(["`--kv`", "bits/element", "all of it", *head], table),
        "",
        f"{'; '.join(sizes)}; mean and standard error. *All of it*: bits per element of the whole allocated cache "
        f"at {whole:,} tokens, with norms, sinks and the window in BF16, which weigh less the longer the "
        "context is.",
    ])  # fmt: skip


def compared(row: dict | None, report: dict) -> list[str]:
    """KL, and that over oscar's; nothing where it was not measured."""
    if row is None:
        return ["", ""]
    if row["kv"] == "bf16":
        return ["0", "0"]
    (oscar,) = (other["kl"] for other in report["results"] if other["kv"] == "oscar")
    return ["{kl:.4f} ± {kl_se:.4f}".format(**row), f"{row['kl'] / oscar:.2f}"]


def everything(kv: str, context: int) -> float:
    """Bits per element of an allocated cache of SmolLM2-135M."""
    return 16 * cache_bytes(smollm2(), SCHEMES[kv], 1, context) / cache_bytes(smollm2(), SCHEMES["bf16"], 1, context)


def ideas() -> str:
    """tools/ideas.py on both models."""
    reports = [load("ideas-smollm2-135m"), load("ideas-smollm2-135m-key-biases")]
    table = []
    for rows in zip(*(report["results"] for report in reports), strict=True):
        name = f"`{rows[0]['kv']}`" if rows[0]["kv"] in ("oscar", "int2") else rows[0]["kv"]
        table.append(
            [name, f"{rows[0]['bits_per_element']:.3f}", *("{kl:.4f} ± {kl_se:.4f}".format(**row) for row in rows)]
        )
    lines = markdown(["idea", "bits/element", "SmolLM2-135M: KL", "with key biases: KL"], table)
    plain, biased = (f"{report['results'][0]['nll'] - report['results'][0]['dnll']:.3f}" for report in reports)
    size = (
        f"{reports[0]['prefill']:,} tokens prefilled, {reports[0]['decode']:,} decoded; {reports[0]['windows']} windows"
    )
    lines += ["", f"{size}, the same for both models, whose unquantized NLLs there are {plain} and {biased}."]
    return "\n".join(lines)


def head_norms() -> str:
    """tools/ideas.py on three models: sinks, and a norm per kv head."""
    names = {"SmolLM2-135M": "", "with key biases": "-key-biases", "with those of Qwen2.5": "-qwen2.5-biases"}
    reports = [load(f"ideas-heads-smollm2-135m{name}") for name in names.values()]
    each = [{row["kv"]: row for row in report["results"]} for report in reports]
    table = []
    for name in each[0]:
        plain = "shaped" if name.startswith("shaped") else "int2"
        cells = []
        for rows in each:
            more = np.subtract(rows[name]["kl_by_window"], rows[plain]["kl_by_window"])
            change = "" if name in ("oscar", plain) else f" ({more.mean():+.4f} ± {standard_error(more):.4f})"
            cells.append(f"{rows[name]['kl']:.4f}{change}")
        table.append([f"`{name}`" if name in SCHEMES else name, *cells])
    about = f"{reports[0]['prefill']:,} tokens prefilled, {reports[0]['decode']:,} decoded; {reports[0]['windows']}"
    note = f"{about} windows (CPU). In brackets: more than `int2`, or than shaped, mean over the windows' differences."
    return "\n".join([*markdown(["idea", *(f"{name}: KL" for name in names)], table), "", note])


def images() -> str:
    """eval --images of the reader."""
    from minioscar.evaluation import reading

    report = load("eval-images-reader")
    found = report["images"]
    packed = {row["kv"]: " / ".join(f"{n:,}" for n in row["packed"]) for row in found["results"]}
    note = f"{sum(found['questions']):,} questions ({report['device']}). Tokens that were packed behind the sinks, at "
    note += f"each size: `oscar` {packed['oscar']}, `int2` {packed['int2']}."
    return "\n".join([reading.table(found), "", note])


def same_window() -> str:
    """eval --window of every model that has a file: what is rounding and what is the window."""
    cells, sizes = [], []
    for path in sorted(RESULTS.glob("eval-window-*.json")):
        report, model = load(path.stem), path.stem.removeprefix("eval-window-")
        paper = next(row for row in report["results"] if row["kv"] == "oscar")
        where = {"cuda": "H200"}.get(report["device"], "CPU")
        size = f"{report['prefill']:,} tokens read, {report['decode']:,} decoded teacher-forced"
        sizes.append(f"`{model}`: {size}, {report['windows']} windows ({where})")
        for row in report["results"][1:]:
            window = "{} / {}".format(*report["window"])
            share = f"{row['kl'] / paper['kl']:.2f}"
            cells.append([f"`{model}`", f"`{row['kv']}`", window, with_error(row, "kl"), share])
    head = ["model", "`--kv`", "packed at a time / kept", "KL", "of `oscar`'s"]
    return "\n".join([*markdown(head, cells), "", f"{'; '.join(sizes)}. Mean and standard error over the windows."])


def prefix_hits() -> str:
    """tools.prefix_hits: the window of a cached prompt, kept or fed again."""
    report, cells = load("prefix-hits-smollm2-135m"), []
    for row in report["results"]:
        more = f"{row['more']:+.4f} ± {row['more_se']:.4f}"
        cells.append([f"`{row['kv']}`", with_error(row, "kept"), with_error(row, "again"), more])
    size = f"prompts of {report['prompt']:,} tokens and more, {report['decode']} decoded teacher-forced"
    note = f"SmolLM2-135M: {size}, {report['windows']} windows. Mean and standard error over the windows."
    head = ["`--kv`", "KL, window kept", "KL, fed again", "more, window by window"]
    return "\n".join([*markdown(head, cells), "", note])


def pieces() -> str:
    """eval --pieces of every model that has a file."""
    cells, sizes = [], {}
    for path in sorted(RESULTS.glob("eval-pieces-*.json")):
        report, model = load(path.stem), path.stem.removeprefix("eval-pieces-")
        where = {"cuda": "H200"}.get(report["device"], "CPU")
        size = f"{report['prefill']:,} tokens read, {report['decode']:,} decoded teacher-forced"
        sizes.setdefault(f"{size}, {report['windows']} windows ({where})", []).append(f"`{model}`")
        for row in report["results"]:
            whole = with_error(row, "kl")
            for one in row.get("pieces", ()):
                more = f"{one['more']:+.4f} ± {one['more_se']:.4f}"
                name = f"`{model}`", f"`{row['kv']}`", f"{one['tokens']:,}"
                cells.append([*name, whole, with_error(one, "kl"), more])
    head = ["model", "`--kv`", "pieces of", "KL, read whole", "KL, in pieces", "more, window by window"]
    notes = "; ".join(f"{', '.join(models)}: {size}" for size, models in sizes.items())
    return "\n".join([*markdown(head, cells), "", f"{notes}. Mean and standard error over the windows."])


def server_tests() -> str:
    """Other servers' tests, run against ours: how many pass, and why the others do not."""
    report, sums, rows = load("server-tests"), [], []
    for suite in report["suites"]:
        found, name = suite["tests"], suite["name"]
        cases = sum(one["cases"] for one in found)
        sums.append([name, suite["from"], f"{cases}", f"{sum(one['passed'] for one in found)}"])
        rows += [
            [name, f"`{one['test']}`", f"{one['passed']} of {one['cases']}", one["why"]]
            for one in found if one["passed"] < one["cases"]
        ]  # fmt: skip
        rows += [[name, one["test"], "not run", one["why"]] for one in suite["not_run"]]
    lines = markdown(["of", "from", "cases that were run", "passed"], sums)
    return "\n".join([*lines, "", *markdown(["of", "test", "passed", "why not"], rows), "", report["note"]])


def drift() -> str:
    """eval --drift --json."""
    from minioscar.evaluation import drift as part

    report = load("drift-smollm2-135m")
    where = (
        f"After prompts of {report['prefill']:,} tokens, {report['windows']} windows of the default text, SmolLM2-135M."
    )
    return f"{where} {part.table(report['drift'])}"


def needle() -> str:
    """eval --needle --json."""
    from minioscar.evaluation import needle as part

    return part.table(load("needle-smollm2-135m")["needle"]) + "\n\nSmolLM2-135M; the haystack is the default text."


def tool_calls() -> str:
    """eval --tools --json."""
    from minioscar.evaluation import tool_calls as part

    return part.table(load("tools-smollm2-135m")["tools"]) + "\n\nSmolLM2-135M; the context is the default text."


def bias_pairs() -> str:
    """tools/bias_pairs.py."""
    report = load("bias-pairs-smollm2-135m")
    by_layer = {row["layer"]: row["norm"] for row in report["results"]}
    names = list(report["results"][0]["errors"])
    rows = []
    for pair in dict.fromkeys(row["pair"] for row in report["results"]):
        found = [row for row in report["results"] if row["pair"] == pair]
        turn = "no bias" if pair is None else f"{found[0]['turn']:.1g}"
        rows.append([turn, *(f"{row['errors'][name]:.2f}" for row in found for name in names)])
    head = [f"layer {layer}, {norm}: `{name}`" for layer, norm in by_layer.items() for name in names]
    note = (
        f"Error of a logit in nats. SmolLM2-135M, {report['tokens']} tokens, a bias of the norm that Qwen2.5-7B has "
        "there, in one RoPE pair of each kv head."
    )
    return "\n".join([*markdown(["radians a token", *head], rows), "", note])


def texts() -> str:
    """tools/texts.py: KL on texts that repeat themselves."""
    report = load("texts-smollm2-135m")
    names = [row["kv"] for rows in report["texts"].values() for row in rows[1:]]
    by_text = {text: {row["kv"]: row for row in rows} for text, rows in report["texts"].items()}
    rows = []
    for text, found in by_text.items():
        kls = ("{kl:.4f} ± {kl_se:.4f}".format(**found[name]) for name in dict.fromkeys(names))
        rows.append([text, f"{found['bf16']['nll']:.2f}", *kls])
    head = ["text", "NLL unquantized", *(f"`{name}`: KL" for name in dict.fromkeys(names))]
    size = f"{report['prefill']:,} tokens prefilled, {report['decode']} decoded, {report['windows']} windows"
    note = f"SmolLM2-135M ({report['device']}); {size}; where one token is repeated, each window has another one."
    return "\n".join([*markdown(head, rows), "", note])


def dither() -> str:
    """tools/ideas.py on one token and on the default text: values that are dithered."""
    reports = {text: load(f"ideas-{name}-smollm2-135m") for text, name in DITHER.items()}
    by_text = [{row["kv"]: row for row in report["results"]} for report in reports.values()]
    rows = []
    for name in dict.fromkeys(name for found in by_text for name in found):
        cells = ("{kl:.4f} ± {kl_se:.4f}".format(**found[name]) if name in found else "" for found in by_text)
        rows.append([f"`{name}`" if name in SCHEMES else name, *cells])
    sizes = "; ".join(
        f"{text}: {r['prefill']:,} tokens prefilled, {r['decode']} decoded, {r['windows']} windows"
        for text, r in reports.items()
    )
    return "\n".join([*markdown(["idea", *(f"{text}: KL" for text in reports)], rows), "", f"SmolLM2-135M. {sizes}."])


DITHER = {"one token": "one-token", "default text": "dither"}


def size() -> str:
    """du -sm of site-packages after pip install into an empty environment."""
    report = load("installed-size")
    lines = markdown(["installed with", "MB"], ([f"`{row['command']}`", f"{row['mb']:,}"] for row in report["rows"]))
    return "\n".join([*lines, "", report["note"]])


# --- the arithmetic of SmolLM2-135M, for docs/reading.md


def smollm2() -> Config:
    shape = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    rest = {"vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}
    return Config.from_dict({"model_type": "llama", **shape, **rest})


def reading_weights() -> str:
    c = smollm2()
    qkv = c.q_size + 2 * c.kv_size
    arrays = [
        ("embedding, also the last projection", 1, (c.vocab_size, c.hidden_size)),
        ("qkv", c.num_layers, (qkv, c.hidden_size)),
        ("o", c.num_layers, (c.hidden_size, c.q_size)),
        ("gate and up", c.num_layers, (2 * c.intermediate_size, c.hidden_size)),
        ("down", c.num_layers, (c.hidden_size, c.intermediate_size)),
    ]
    rows, total = [], 0
    for name, times, shape in arrays:
        numbers = times * shape[0] * shape[1]
        total += numbers
        rows.append([f"{f'{times} x ' if times > 1 else ''}{name}", f"{list(shape)}", f"{2 * numbers / 1e6:.1f}"])
    norms = (2 * c.num_layers + 1) * c.hidden_size
    assert total + norms == c.parameters()
    rows.append(["norms", f"{2 * c.num_layers + 1} x [{c.hidden_size}]", f"{2 * norms / 1e6:.1f}"])
    rows.append(["all of it", f"{c.parameters():,} numbers", f"{2 * c.parameters() / 1e6:.1f}"])
    lines = [*markdown(["weights", "shape", "MB in BF16"], rows), ""]
    lines.append(
        "On a GPU the weights are kept in BF16, 2 bytes a number; on a CPU in float32, because NumPy multiplies "
        "nothing smaller, so "
        "twice as much."
    )
    return "\n".join(lines)


def per_token(config: Config, kv: str) -> int:
    """Bytes that one more token costs in all layers, window and sinks aside."""
    return (cache_bytes(config, SCHEMES[kv], 1, 8192) - cache_bytes(config, SCHEMES[kv], 1, 4096)) // 4096


def reading_cache() -> str:
    c = smollm2()
    head, rows = ["`--kv`", "a token, one layer", f"a token, {c.num_layers} layers"], []
    head.append(f"{c.max_positions:,} tokens, window and sinks included")
    for kv in ("bf16", "oscar", "int2", "int2-compact"):
        token, whole = per_token(c, kv), cache_bytes(c, SCHEMES[kv], 1, c.max_positions)
        rows.append([f"`{kv}`", f"{token / c.num_layers:.1f} B", f"{token:,} B", f"{whole / 1e6:.1f} MB"])
    lines = [
        *markdown(head, rows),
        "",
        f"SmolLM2-135M: {c.num_kv_heads} kv heads of {c.head_dim} channels, keys and values.",
    ]
    return "\n".join(lines)


def reading_step() -> str:
    c, weights, rows = smollm2(), 2 * smollm2().parameters(), []
    for context in (512, 2048, 8192):
        kept = [cache_bytes(c, SCHEMES[kv], 1, context) for kv in ("bf16", "int2")]
        sizes = weights, *kept, *(weights + size for size in kept)
        rows.append([f"{context:,}", *(f"{size / 1e6:.1f} MB" for size in sizes)])
    lines = [
        *markdown(
            ["tokens in the cache", "weights", "cache in `bf16`", "cache in `int2`", "step: `bf16`", "step: `int2`"],
            rows,
        ),
        "",
        "SmolLM2-135M, one sequence, weights in BF16. With 32 sequences at once the weights are read once for "
        "all of them, and the "
        "cache 32 times: then it is nearly all that counts.",
    ]
    return "\n".join(lines)


def schemes() -> str:
    """The switches of every scheme, for docs/method.md."""
    rows = []
    for name, s in SCHEMES.items():
        if not s.quantized:
            rows.append([f"`{name}`", "as they are", "", "as they are", "everything", f"{s.bits_per_element(128):.3f}"])
            continue
        switches = {
            "rotated": s.rotate and not s.calibrated,
            "rotated after calibration on the model's own samples": s.calibrated,
            "rotated at random, Lloyd-Max levels": isinstance(s, TurboQuant),
            "divided by the token's norm": s.scale,
            f"range x {s.shrink}": s.shrink < 1,
            "pairs scaled": s.pair_scaled,
            "errors steered": s.shaped,
            "a scale a token and a channel": isinstance(s, Kvarn),
            "4 % clipped at each end": isinstance(s, OscarCov),
        }
        words = ", ".join(word for word, on in switches.items() if on)
        keys = "; ".join([f"{s.key_bits} bits", words]).removesuffix("; ")
        along = (
            f"{s.group} tokens of one channel"
            if s.key_axis == "token"
            else f"{s.value_group(128)} channels of one token"
        )
        step = "step only" if s.symmetric_values or isinstance(s, StepOnly) else "step and min"
        step += f", range x {s.value_shrink}" if s.value_shrink not in (None, s.shrink) else ""
        step = f"a scale a token and a channel, {step}" if isinstance(s, Kvarn) else step
        step = f"8 % clipped at each end, {step}" if isinstance(s, OscarCov) else step
        values = f"{'rotated, ' if s.rotate or isinstance(s, TurboQuant) else ''}{step}, groups of {s.value_group(128)}"
        values += ", dithered where they repeat" * s.dithered
        values = values if s.key_bits == s.value_bits else f"{s.value_bits} bits; {values}"
        kept = [f"newest {s.keep} … {s.ring - 1}"] + [f"first {s.sinks} tokens"] * bool(s.sinks)
        kept += [f"{s.outliers} tokens a block"] if isinstance(s, Ott) else []
        rows.append([f"`{name}`", keys, along, values, ", ".join(kept), f"{s.bits_per_element(128):.3f}"])
    lines = markdown(["`--kv`", "keys", "groups of keys", "values", "kept in BF16", "bits/element"], rows)
    lines += [
        "",
        "At head_dim 128. Norms, 4 bytes a token and layer, come on top.",
    ]
    return "\n".join(lines)


def prompt_cache() -> str:
    """tools/prompt_cache.py."""
    report = load("prompt-cache")
    rows, meta = report["rows"], report["meta"]
    largest = rows[0]["file_bytes"]
    head = ["`--kv`", "file", "smaller than `bf16`", "read the document", "load the file"]
    head += ["first token: from the file", "without it"]
    times = "read_s", "load_s", "first_token_from_cache_s", "first_token_without_s"
    cells = []
    for row in rows:
        sizes = f"{row['file_bytes'] / 1e6:.1f} MB", f"{largest / row['file_bytes']:.2f}x"
        cells.append([f"`{row['kv']}`", *sizes, *(f"{row[key]:.2f} s" for key in times)])
    lines = markdown(head, cells)
    where = (
        f"{meta['model']}, {rows[0]['tokens']:,} tokens of the default text and a question of "
        f"{rows[0]['question_tokens']}"
    )
    lines += ["", f"{where}; {meta['device']}, {meta['threads']} thread{'s' * (meta['threads'] > 1)}, processor time."]
    return "\n".join(lines)


def soak() -> str:
    """tests/soak.py: the fuzz, then hours of requests, and of a server."""
    report = load("soak")
    meta, fuzz, runs = report["meta"], report["fuzz"], report["soak"]
    codes = {code: sum(kind.get(code, 0) for kind in fuzz["exit_codes"].values()) for code in ("0", "1", "2")}
    fates = f"{codes['0']:,} answered, {codes['2']:,} refused as wrong input, {codes['1']:,} failed in one line"
    broken = f"{len(fuzz['failures'])} tracebacks, hangs, crashes or files opened outside; {fates}"
    rows = [["mutated model folders, prompt caches and prompts", f"{fuzz['cases']:,} cases", broken]]
    for run in runs:
        quarters = " → ".join(f"{mb:.0f}" for mb in run["resident_mb_by_quarter"])
        flat = (
            f"resident memory by quarter {quarters} MB, {run['growth_mb_per_hour']:+.1f} MB an hour in the second half"
        )
        rows.append(
            ["random requests to one process", f"{run['requests']:,} in {run['seconds'] / 60:.0f} minutes", flat]
        )
    again, equal = (sum(run[key] for run in runs) for key in ("fresh_processes", "equal_in_fresh_processes"))
    rows.append(["of them, each again in a fresh process", f"{again}", f"{equal} equal bit for bit"])
    for run in load("soak-served")["serve"]:
        quarters = " → ".join(f"{mb:.0f}" for mb in run["resident_mb_by_quarter"])
        how = f"{run['connections']:,} connections in {run['seconds'] / 60:.0f} minutes"
        counted = f"{run['answered']:,} answered, {run['cancelled_total']:,} broken off, {run['failed_total']} failed"
        which = "a tiny model" if run["model"] == "tiny" else run["model"]
        rows.append([f"a server with {which}", how, f"{counted}; resident memory by quarter {quarters} MB"])
    kinds = Counter()
    for run in runs:
        kinds.update(run["kinds"])
    where = (
        f"two processes at a time, one thread each; {meta['cpu']}, Python {meta['python']}, NumPy "
        f"{meta['numpy']}, {meta['date']}"
    )
    asked = ", ".join(f"{n:,} {kind}" for kind, n in sorted(kinds.items()))
    lines = markdown(["what", "how much", "result"], rows)
    return "\n".join([*lines, "", f"SmolLM2-135M, `{runs[0]['kv']}`; {where}. Requests: {asked}."])


def scaled_pairs() -> str:
    """tools/pair_scales.py."""
    report, found = load("pair-scales"), {}
    for row in report["results"]:
        found.setdefault(row["kv"], {})[row["scales"]] = row
    rows = []
    for kv, by_scales in found.items():
        for name, row in by_scales.items():
            saved = 1 - row["attention"] / by_scales["none"]["attention"]
            rows.append([f"`{kv}`", name, f"{row['logits']:.3f}", f"{row['attention']:.4f}", f"{saved:.1%}"])
    head = ["keys as `--kv`", "a factor for", "error of logits", "divergence of attention", "less than without"]
    note = f"SmolLM2-135M, {report['tokens']:,} tokens of the default text, mean over the layers; nats."
    return "\n".join([*markdown(head, rows), "", note])


def on_a_card() -> str:
    """One eval on both back ends."""
    report = load("eval-card-smollm2-135m")
    meta, head = (
        report["meta"],
        "back end | `--kv` | NLL | KL to BF16 | same top token | passkeys found | greedy: first difference | KL",
    )
    rows = []
    for where, name in (("cuda", meta["card"]), ("cpu", "CPU, NumPy")):
        found = report[where]
        for row, trials, text in zip(
            found["results"], found["needle"]["results"], found["drift"]["results"], strict=True
        ):
            first = text["first_difference"][0]
            cells = [f"{row['nll']:.4f}", f"{row['kl']:.4f}", f"{row['top1']:.1%}", f"{trials['exact_match']:.0%}"]
            cells += ["none" if first is None else f"{first}", f"{sum(text['kl']) / len(text['kl']):.4f}"]
            rows.append([name, f"`{row['kv']}`", *cells])
    needle, drift = (report["cuda"][part] for part in ("needle", "drift"))
    asked = (
        f"{len(needle['depths']) * needle['repeats']} passkeys in {needle['lengths'][0]} tokens; "
        f"{drift['tokens']} greedy tokens"
    )
    size = f"{report['cuda']['prefill']:,} tokens prefilled, {report['cuda']['decode']} decoded; {asked}"
    note = f"SmolLM2-135M, one window: {size}. Driver {meta['driver']}, commit `{meta['commit']}`."
    return "\n".join([*markdown(head.split(" | "), rows), "", note])


TABLES = {
    "on_a_card": on_a_card,
    "fidelity": fidelity,
    "size": size,
    "models": models,
    "ideas": ideas,
    "head_norms": head_norms,
    "pieces": pieces,
    "prefix_hits": prefix_hits,
    "same_window": same_window,
    "server_tests": server_tests,
    "drift": drift,
    "images": images,
    "needle": needle,
    "tool_calls": tool_calls,
    "bias_pairs": bias_pairs,
    "scaled_pairs": scaled_pairs,
    "texts": texts,
    "dither": dither,
}
TABLES |= {"reading_weights": reading_weights, "reading_cache": reading_cache, "reading_step": reading_step}
TABLES |= {"schemes": schemes, "prompt_cache": prompt_cache, "soak": soak} | bench_tables.TABLES | weight_tables.TABLES
TABLES |= scale_tables.TABLES | harness.TABLES


def rendered(text: str) -> str:
    return BLOCK.sub(lambda block: block[1] + TABLES[block[2]]() + "\n" + block[3], text)


if __name__ == "__main__":
    for page in (ROOT / name for name in PAGES):
        text = rendered(page.read_text())
        with replacing(page) as partial:
            partial.write_text(text)
