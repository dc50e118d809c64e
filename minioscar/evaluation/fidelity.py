"""Fidelity of a KV scheme: teacher-forced decoding of a real text, compared with the unquantized run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import gpus_of, scheme_named, with_weights
from ..config import Config
from ..engine import Engine
from ..errors import UserError
from ..key_shaping import shape_keys
from ..ops import backend
from ..ops.reference import Reference
from ..oscar import Scheme
from ..pages import PAGE_TOKENS, check_scheme
from ..parallel.cards import over
from ..parallel.loading import load_for_each
from ..parallel.shares import check
from ..quantized.weights import quantize
from ..storage.hub import resolve
from ..tables import markdown
from ..tokenizer import Tokenizer
from ..weights import Weights, rotate_values
from ..weights import load as load_weights
from . import drift, needle, tool_calls
from .teacher_forcing import Done, divergence, log_softmax, teacher_forced

BASELINE = "bf16"


@dataclass
class Row:
    """One scheme: means over the decoded positions, in nats."""

    kv: str
    bits_per_element: float
    nll: float  # of the true next token
    ppl: float  # exp(nll)
    dnll: float  # nll minus the unquantized run's
    kl: float  # KL(unquantized || this)
    top1: float  # share of positions whose likeliest token is the unquantized run's
    dnll_se: float | None  # standard errors of dnll and kl over the windows; None for a single one
    kl_se: float | None
    weights: str | None = None  # the mode in which they are quantized; None: they are not


def default_text() -> str:
    """The topics of CPython's built-in help: real English of about 465,000 characters, on every machine that has
    Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@dataclass(frozen=True)
class Lengths:
    """How much of a text is evaluated, in tokens. Raises UserError for a number out of range.

    Each of `windows` stretches is prefilled by `prefill` tokens, then `decode` true tokens are fed; the prediction at
    each of those positions counts. needles: also retrieve passkeys from haystacks of these lengths. tools: also copy
    tool calls from contexts of these. continued: also follow a greedy continuation of each prompt for so many tokens.
    emptied: also run every scheme as `emptied` has it. pieces: also read the prompts in pieces of these sizes.
    """

    prefill: int = 1024
    decode: int = 512
    windows: int = 1
    needles: Sequence[int] = ()
    continued: int = 0
    tools: Sequence[int] = ()
    emptied: bool = False
    pieces: Sequence[int] = ()

    def __post_init__(self) -> None:
        least = {"prefill": 1, "decode": 1, "windows": 1, "needle": needle.SHORTEST, "tools": needle.SHORTEST}
        least["pieces"] = 1
        asked = {"prefill": self.prefill, "decode": self.decode, "windows": self.windows}
        for name, lengths in (("needle", self.needles), ("tools", self.tools), ("pieces", self.pieces)):
            asked |= {name: min(lengths)} if lengths else {}
        for name, value in asked.items():
            if value < least[name]:
                raise UserError(f"--{name} {value} is out of range; it must be at least {least[name]}")
        if self.continued < 0:
            raise UserError(f"--drift {self.continued} is out of range; it must be at least 0")

    @property
    def window(self) -> int:
        """Tokens of a stretch: the last one is only predicted."""
        return self.prefill + self.decode + 1

    @property
    def haystack(self) -> int:
        """Of passkeys or tool calls: the longest."""
        return max(needle.blocks([*self.needles, *self.tools]), default=0)

    def check(self, config: Config) -> None:
        """Raises UserError where the model's context is too short."""
        longest = max(
            self.window - 1,
            self.prefill + self.continued + 1,
            *(n + needle.MARGIN for n in needle.blocks(self.needles)),
            *(n + tool_calls.MARGIN for n in needle.blocks(self.tools)),
        )
        if longest > config.max_context:
            options = "--prefill, --decode, --drift, --needle or --tools"
            raise UserError(f"this takes {longest} positions; lower {options}: {config.limit}")

    def check_text(self, tokens: int) -> None:
        """Raises UserError for a text that is too short."""
        needed = self.windows * self.window
        if tokens < needed:
            way_out = "lower --prefill, --decode or --windows"
            raise UserError(f"the text has {tokens} tokens, but {needed} are needed; {way_out}")
        if tokens < self.haystack:
            option = "needle" if max(self.needles, default=0) >= max(self.tools, default=0) else "tools"
            asked = f"--{option} {max([*self.needles, *self.tools])} needs {self.haystack}"
            raise UserError(f"the text has {tokens} tokens, but {asked}; use a longer text")


def evaluate(
    model: str, schemes: Sequence[str], *, text: str | None = None, device: str = "auto", progress: bool = False,
    weights: Sequence[str] = (), window: tuple[int, int] | None = None, **lengths: Any,
) -> dict:
    """Runs every scheme over stretches of a text; the object of `eval --json`. lengths: the fields of
    `Lengths`, and gpus: over so many the model is split.

    weights: modes of rounding.MODES; every scheme also runs with the matrices quantized so, and so does bf16. window:
    flush and keep of all schemes, in place of their own. The first stretch begins with the text and each follows the
    one before. Raises UserError for an unknown scheme, a window that one cannot have, a text that is too short or a
    context that the model does not have.
    """
    from tqdm import tqdm

    names = [BASELINE, *(name for name in dict.fromkeys(schemes) if name != BASELINE)]
    gpus, wanted = gpus_of(lengths.pop("gpus", None)), [with_window(scheme_named(name), window) for name in names]
    asked = Lengths(**lengths)
    ops, folder = backend(device), resolve(model)
    config, tokenizer = Config.from_folder(folder), Tokenizer(folder)
    if weights and config.quantization is not None:
        why = f"the files are {config.quantization.name} already"
        raise UserError(f"--weights {','.join(weights)}: {why}; use a model of 16 bits")
    configs = [with_weights(config, mode) for mode in (None, *dict.fromkeys(weights))]
    for scheme in wanted:
        check_scheme(config, scheme)
        for one in configs if gpus > 1 else ():
            check(one, scheme, gpus)
    ops = over(gpus, ops, config, wanted[0])
    asked.check(config)
    ids = tokenizer.encode(default_text() if text is None else text)
    asked.check_text(len(ids))
    engines = loaded(folder, wanted, configs, tokenizer, ops, progress)
    report = {
        "model": str(model), "device": ops.name, "prefill": asked.prefill, "decode": asked.decode,
        "windows": asked.windows, **({"window": list(window)} if window else {}),
    }
    for name, (tokens, run) in parts(engines, ids, asked).items():
        hidden = None if progress else True
        with tqdm(total=tokens, desc=f"eval: {name}", unit="token", leave=False, disable=hidden) as bar:
            report[name] = run(bar.update)
    return report


def parts(
    engines: Sequence[Engine], ids: Sequence[int], asked: Lengths
) -> dict[str, tuple[int, Callable[[Done], Any]]]:
    """What there is to measure: its name in the report -> tokens that go through models, and what does it."""
    stretches = [ids[start : start + asked.window] for start in range(0, asked.windows * asked.window, asked.window)]
    runs = len(engines) * (1 + asked.emptied) + len(asked.pieces) * sum(e.scheme.quantized for e in engines)
    results = partial(with_emptied if asked.emptied else fidelity, engines, stretches, asked.prefill)
    found: dict[str, tuple[int, Callable[[Done], Any]]] = {
        "results": (runs * asked.windows * (asked.window - 1), partial(results, pieces=asked.pieces)),
    }
    engines = [engine for engine in engines if engine.config.weights is None]
    if asked.continued:
        prompts = [stretch[: asked.prefill] for stretch in stretches]
        tokens = drift.cost(engines, asked.windows, asked.prefill, asked.continued)
        found["drift"] = tokens, lambda done: drift.drift(engines, prompts, asked.continued, done)
    if asked.needles:
        tokens = needle.cost(engines, asked.needles)
        found["needle"] = tokens, lambda done: needle.needle(engines, ids, asked.needles, done)
    if asked.tools:
        tokens = tool_calls.cost(engines, asked.tools)
        found["tools"] = tokens, lambda done: tool_calls.tool_calls(engines, ids, asked.tools, done)
    return found


def loaded(
    folder: Path, wanted: Sequence[Scheme], configs: Sequence[Config], tokenizer: Tokenizer, ops: Reference,
    progress: bool
) -> list[Engine]:
    """`engines_for` of a folder, on one card or on several."""
    if ops.cards == 1:
        return engines_for(wanted, load_weights(folder, configs[0], ops, progress), configs, tokenizer, ops)
    made = [(config, load_for_each(folder, config, ops, wanted, progress)) for config in configs]
    of_all = [(config, *each) for config, weights in made for each in zip(weights, wanted, strict=True)]
    return [Engine(config, weights, tokenizer, scheme, ops) for config, weights, scheme in of_all]


def engines_for(
    wanted: Sequence[Scheme], plain: Weights, configs: Sequence[Config], tokenizer: Tokenizer, ops: Reference
) -> list[Engine]:
    """An engine for each scheme with the weights of each config; those that want the same weights share them."""
    rotated = rotate_values(plain, configs[0], ops) if any(scheme.rotate for scheme in wanted) else plain
    found = []
    for config in configs:
        bases = {True: rotated, False: plain}
        if config.weights is not None:
            bases = {rotates: quantize(weights, config, ops) for rotates, weights in bases.items()}
        shaped: dict[tuple[bool, ...], Weights] = {}
        for scheme in wanted:
            switches = scheme.rotate, scheme.shaped, scheme.pair_scaled
            if switches not in shaped:
                shaped[switches] = shape_keys(bases[scheme.rotate], config, scheme, ops)
            weights = scheme.prepare(shaped[switches], config, ops)
            found.append(Engine(config, weights, tokenizer, scheme, ops))
    return found


def fidelity(
    engines: Sequence[Engine], windows: Sequence[Sequence[int]], prefill: int, done: Done, pieces: Sequence[int] = ()
) -> list[dict]:
    """The rows of the table, one an engine, over all windows; engines[0] is the baseline. pieces: the row of a
    quantized scheme also has the object `piece_row` for each of these sizes."""
    quantized = [i for i, engine in enumerate(engines) if engine.scheme.quantized]
    whole, *others = scored(engines, windows, prefill, [0, *pieces], quantized, done)
    rows = [
        asdict(summary(engine.scheme, engine.config.head_dim, found, whole[0])) | {"weights": engine.config.weights}
        for engine, found in zip(engines, whole, strict=True)
    ]
    for i in quantized if pieces else ():
        rows[i]["pieces"] = [
            piece_row(size, found[i], whole[i]) for size, found in zip(pieces, others, strict=True)
        ]
    return rows


def scored(
    engines: Sequence[Engine], windows: Sequence[Sequence[int]], prefill: int, pieces: Sequence[int],
    quantized: Sequence[int], done: Done,
) -> list[list[np.ndarray]]:
    """For each way of reading a prompt (`teacher_forced`, pieces) and each engine, float64 [windows, (nll, kl, top1)].
    Those that quantize nothing are run the first way alone: to others they are the same."""
    scores: list[list[list[tuple[float, float, float]]]] = [[[] for _ in engines] for _ in pieces]
    for window in windows:
        truth = None  # log-probabilities of the unquantized run
        for way, piece in enumerate(pieces):
            for i in quantized if way else range(len(engines)):
                chunks = map(log_softmax, teacher_forced(engines[i], window, prefill, done, piece))
                if truth is None:  # the first engine is the baseline
                    truth = np.concatenate(list(chunks))
                    chunks = iter([truth])
                scores[way][i].append(compare(chunks, truth, np.array(window[prefill + 1 :])))
    return [[np.array(found) for found in way] for way in scores]


def piece_row(size: int, scores: np.ndarray, whole: np.ndarray) -> dict:
    """KL of prompts that are read in pieces of so many tokens, and by how much it is above that of prompts read whole,
    with the standard errors of both over the windows."""
    found = {"tokens": size}
    for name, of_windows in (("kl", scores[:, 1]), ("more", scores[:, 1] - whole[:, 1])):
        found |= {name: float(of_windows.mean()), f"{name}_se": standard_error(of_windows)}
    return found


def with_emptied(
    engines: Sequence[Engine], windows: Sequence[Sequence[int]], prefill: int, done: Done, pieces: Sequence[int] = ()
) -> list[dict]:
    """The rows of `fidelity` with `kl_emptied` and its standard error: the KL without what exact neighbours give."""
    rows = fidelity(engines, windows, prefill, done, pieces)
    others = fidelity([*map(emptied, engines)], windows, prefill, done)
    named = [{f"kl_emptied{end}": row[f"kl{end}"] for end in ("", "_se")} for row in others]
    return [row | other for row, other in zip(rows, named, strict=True)]


def emptied(engine: Engine) -> Engine:
    """The same with the smallest window that all schemes of oscar.py have kernels for: 64 tokens (128 where so many are
    quantized together) are packed as soon as they are there, and none is kept. A token then sees 32 (64) exact ones on
    average, itself not counted, whatever the scheme's own window gives it."""
    if not engine.scheme.quantized:
        return engine
    scheme = with_window(engine.scheme, (max(engine.scheme.block, PAGE_TOKENS), 0))
    return Engine(engine.config, engine.model.weights, engine.tokenizer, scheme, engine.ops)


def with_window(scheme: Scheme, window: tuple[int, int] | None) -> Scheme:
    """A quantized scheme with another flush and keep. Raises UserError where it cannot have these."""
    if window is None or not scheme.quantized:
        return scheme
    try:
        return replace(scheme, flush=window[0], keep=window[1])
    except ValueError as error:
        raise UserError(f"{error}; --window 128/0 and 128/128 are right for all schemes") from None


def summary(scheme: Scheme, head_dim: int, scores: np.ndarray, baseline: np.ndarray) -> Row:
    """Means, and standard errors where there are several windows. scores, baseline: float64 [windows, (nll, kl,
    top1)]."""
    nll, kl, top1 = scores.mean(axis=0).tolist()
    change = scores[:, 0] - baseline[:, 0]
    errors = standard_error(change), standard_error(scores[:, 1])
    with np.errstate(over="ignore"):  # a perplexity that overflows is null in JSON
        ppl = float(np.exp(nll))
    return Row(scheme.name, scheme.bits_per_element(head_dim), nll, ppl, float(change.mean()), kl, top1, *errors)


def standard_error(of_windows: np.ndarray) -> float | None:
    """Of their mean; None for a single one."""
    return float(of_windows.std(ddof=1) / np.sqrt(len(of_windows))) if len(of_windows) > 1 else None


def compare(
    chunks: Iterable[np.ndarray], truth: np.ndarray, targets: np.ndarray
) -> tuple[float, float, float]:
    """NLL, KL and top-1 agreement of one run; both are log-probabilities float32 [n, vocab], the first in chunks of any
    length: those of a scheme end where it packs."""
    nll = kl = top1 = 0.0
    at = 0
    for ours in chunks:
        theirs, rows = truth[at : at + len(ours)], np.arange(len(ours))
        nll -= float(ours[rows, targets[at + rows]].sum(dtype=np.float64))
        kl += float(divergence(theirs, ours).sum())
        top1 += float((ours.argmax(1) == theirs.argmax(1)).sum())
        at += len(ours)
    return nll / at, kl / at, top1 / at


def with_error(row: dict, name: str) -> str:
    error = row[f"{name}_se"]
    return f"{row[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def table(report: dict) -> str:
    """The report as a Markdown table."""
    rows, several = [], any(row["weights"] for row in report["results"])
    for row in report["results"]:
        numbers = "{bits_per_element:.3f}|{nll:.4f}|{ppl:.3f}|{dnll:+.4f}".format(**row).split("|")
        rows.append([row["kv"], *numbers, with_error(row, "kl"), f"{row['top1']:.3f}"])
        if several:
            rows[-1].insert(1, row["weights"] or "as they are")
        if "kl_emptied" in row:
            rows[-1].append(with_error(row, "kl_emptied"))
    columns = ["kv", *["weights"] * several, "bits/element", "NLL", "perplexity", "ΔNLL", "KL", "top-1"]
    lines = markdown(columns + ["KL, window emptied"] * (len(rows[0]) > len(columns)), rows)
    lines += piece_table(report["results"])
    for name, part in {"drift": drift, "needle": needle, "tools": tool_calls}.items():
        if name in report:
            lines += ["", part.table(report[name])]
    return "\n".join(lines)


def piece_table(rows: Sequence[dict]) -> list[str]:
    """Lines of Markdown; none where no prompt was read in pieces."""
    cells = [
        [row["kv"], f"{one['tokens']}", with_error(one, "kl"), with_error(one, "more")]
        for row in rows for one in row.get("pieces", ())
    ]  # fmt: skip
    head = ["kv", "prompt read in pieces of", "KL", "more than read whole"]
    return ["", *markdown(head, cells)] if cells else []
