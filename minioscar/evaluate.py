"""Fidelity of a KV scheme: teacher-forced decoding of a real text, compared with the unquantized run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from .cache import Cache
from .config import Config
from .engine import Engine, scheme_named
from .errors import UserError
from .hub import resolve
from .model import check_scheme
from .ops import backend
from .oscar import WINDOW, Scheme
from .shaping import shape_keys
from .tokenizer import Tokenizer
from .weights import load as load_weights
from .weights import rotate_values

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


def default_text() -> str:
    """The topics of CPython's built-in help: real English of about 465,000 characters, on every machine that has Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def evaluate(
    model: str, schemes: Sequence[str], *, text: str | None = None, prefill: int = 1024, decode: int = 512, windows: int = 1,
    device: str = "auto", progress: bool = False,
) -> dict:
    """Runs every scheme over `windows` stretches of prefill + decode + 1 tokens of a text; the object of `eval --json`.

    The first stretch begins with the text and each follows the one before. Its prompt is prefilled, then `decode` true tokens are
    fed; the prediction at each of those positions counts. Raises UserError for an unknown scheme, a text that is too short or
    a context that the model does not have.
    """
    from tqdm import tqdm

    names = [BASELINE, *(name for name in dict.fromkeys(schemes) if name != BASELINE)]
    wanted = [scheme_named(name) for name in names]
    for name, value in (("prefill", prefill), ("decode", decode), ("windows", windows)):
        if value < 1:
            raise UserError(f"--{name} {value} is out of range; it must be at least 1")
    ops, folder = backend(device), resolve(model)
    config, tokenizer = Config.from_folder(folder), Tokenizer(folder)
    for scheme in wanted:
        check_scheme(config, scheme)
    if prefill + decode > config.max_positions:
        raise UserError(f"--prefill {prefill} + --decode {decode} exceed the model's {config.max_positions} positions")
    ids, size = tokenizer.encode(default_text() if text is None else text), prefill + decode + 1
    if len(ids) < windows * size:
        raise UserError(f"the text has {len(ids)} tokens, but {windows * size} are needed; lower --prefill, --decode or --windows")
    plain = load_weights(folder, config, ops, progress)
    rotated = rotate_values(plain, config, ops) if any(scheme.rotate for scheme in wanted) else plain
    shaped = shape_keys(rotated, config, ops) if any(scheme.shaped for scheme in wanted) else rotated
    weights = [shaped if scheme.shaped else rotated if scheme.rotate else plain for scheme in wanted]
    engines = [Engine(config, prepared, tokenizer, scheme, ops) for scheme, prepared in zip(wanted, weights, strict=True)]
    scores: list[list[np.ndarray]] = [[] for _ in names]  # per scheme and window: nll, kl, top1
    total = len(names) * windows * (prefill + decode)
    with tqdm(total=total, desc="eval", unit="token", leave=False, disable=None if progress else True) as bar:
        for start in range(0, windows * size, size):
            window = ids[start : start + size]
            truth: list[np.ndarray] = []  # log-probabilities of the unquantized run, chunk by chunk
            for engine, found in zip(engines, scores, strict=True):
                bar.set_postfix_str(engine.scheme.name)
                chunks = map(log_softmax, teacher_forced(engine, window, prefill, bar.update))
                truth = truth or list(chunks)  # the first engine is the baseline
                chunks = iter(truth) if engine is engines[0] else chunks
                found.append(compare(chunks, truth, np.array(window[prefill + 1 :])))
    rows = [summary(scheme, config.head_dim, np.array(found), np.array(scores[0])) for scheme, found in zip(wanted, scores, strict=True)]
    return {
        "model": str(model), "device": ops.name, "prefill": prefill, "decode": decode, "windows": windows,
        "results": [asdict(row) for row in rows],
    }


def summary(scheme: Scheme, head_dim: int, scores: np.ndarray, baseline: np.ndarray) -> Row:
    """Means, and standard errors where there are several windows. scores, baseline: float64 [windows, (nll, kl, top1)]."""
    nll, kl, top1 = scores.mean(axis=0).tolist()
    change, several = scores[:, 0] - baseline[:, 0], len(scores) > 1
    errors = [float(x.std(ddof=1) / np.sqrt(len(x))) if several else None for x in (change, scores[:, 1])]
    return Row(scheme.name, scheme.bits_per_element(head_dim), nll, float(np.exp(nll)), float(change.mean()), kl, top1, *errors)


def teacher_forced(engine: Engine, ids: Sequence[int], prefill: int, done=lambda tokens: None) -> Iterator[np.ndarray]:
    """Logits, in chunks, at positions prefill ... len(ids) - 2 of a decode that is fed the true tokens.

    The window is flushed only when a block of WINDOW tokens is full, so all tokens up to the next flush can go through the
    model at once and see exactly what they would see one by one: the packed blocks, the window, and each other unquantized.
    """
    cache = Cache(engine.config, engine.scheme, 1, len(ids) - 1, engine.ops)
    feed = np.array(ids[:-1])
    engine.model.forward(feed[:prefill], cache, cache.place([0], [prefill]))
    done(prefill)
    while (start := int(cache.lengths[0])) < len(feed):
        chunk = feed[start : (start // WINDOW + 1) * WINDOW]
        yield engine.model.forward(chunk, cache, cache.place([0], [len(chunk)]), every=True)
        done(len(chunk))


def compare(chunks: Iterable[np.ndarray], truth: Iterable[np.ndarray], targets: np.ndarray) -> tuple[float, float, float]:
    """NLL, KL and top-1 agreement of one run; both are log-probabilities float32 [n, vocab] in equal chunks."""
    nll = kl = top1 = 0.0
    at = 0
    for ours, theirs in zip(chunks, truth, strict=True):
        rows = np.arange(len(ours))
        nll -= float(ours[rows, targets[at + rows]].sum(dtype=np.float64))
        kl += float((np.exp(theirs) * (theirs - ours)).sum(dtype=np.float64))
        top1 += float((ours.argmax(1) == theirs.argmax(1)).sum())
        at += len(ours)
    return nll / at, kl / at, top1 / at


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32 [n, vocab], accumulated in float64."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)


def table(report: dict) -> str:
    """The report as a Markdown table."""
    lines = ["| kv | bits/element | NLL | perplexity | ΔNLL | KL | top-1 |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in report["results"]:
        kl = "{kl:.4f}" if row["kl_se"] is None else "{kl:.4f} ± {kl_se:.4f}"
        lines.append(("| {kv} | {bits_per_element:.3f} | {nll:.4f} | {ppl:.3f} | {dnll:+.4f} | " + kl + " | {top1:.3f} |").format(**row))
    return "\n".join(lines)
