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
from .ops import backend
from .oscar import WINDOW
from .tokenizer import Tokenizer
from .weights import load as load_weights

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


def default_text() -> str:
    """The topics of CPython's built-in help: real English of about 465,000 characters, on every machine that has Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def evaluate(
    model: str, schemes: Sequence[str], *, text: str | None = None, prefill: int = 1024, decode: int = 512, device: str = "auto",
    progress: bool = False,
) -> dict:
    """Runs every scheme over the first prefill + decode + 1 tokens of a text and returns the object of `eval --json`.

    The prompt is prefilled, then `decode` true tokens are fed; the prediction at each of those positions counts. Raises
    UserError for an unknown scheme, a text that is too short or a context that the model does not have.
    """
    from tqdm import tqdm

    names = [BASELINE, *(name for name in dict.fromkeys(schemes) if name != BASELINE)]
    for name in names:
        scheme_named(name)
    if prefill < 1 or decode < 1:
        raise UserError("--prefill and --decode must be at least 1")
    ops, folder = backend(device), resolve(model)
    config, tokenizer = Config.from_folder(folder), Tokenizer(folder)
    if prefill + decode > config.max_positions:
        raise UserError(f"--prefill {prefill} + --decode {decode} exceed the model's {config.max_positions} positions")
    ids = tokenizer.encode(default_text() if text is None else text)[: prefill + decode + 1]
    if len(ids) < prefill + decode + 1:
        raise UserError(f"the text has {len(ids)} tokens, but {prefill + decode + 1} are needed; lower --prefill or --decode")
    weights = load_weights(folder, config, ops, progress)
    rows: list[Row] = []
    truth: list[np.ndarray] = []  # log-probabilities of the unquantized run, chunk by chunk
    with tqdm(total=len(names) * (prefill + decode), desc="eval", unit="token", leave=False, disable=None if progress else True) as bar:
        for name in names:
            bar.set_postfix_str(name)
            engine = Engine(config, weights, tokenizer, scheme_named(name), ops)
            chunks = map(log_softmax, teacher_forced(engine, ids, prefill, bar.update))
            if name == BASELINE:
                truth = list(chunks)
                chunks = iter(truth)
            rows.append(compare(name, engine.scheme.bits_per_element(config.head_dim), chunks, truth, np.array(ids[prefill + 1 :])))
            if len(rows) > 1:
                rows[-1].dnll = rows[-1].nll - rows[0].nll
    return {"model": str(model), "device": ops.name, "prefill": prefill, "decode": decode, "results": [asdict(row) for row in rows]}


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


def compare(name: str, bits: float, chunks: Iterable[np.ndarray], truth: Iterable[np.ndarray], targets: np.ndarray) -> Row:
    """Metrics of one run against the unquantized one; both are log-probabilities float32 [n, vocab] in equal chunks."""
    nll = kl = top1 = 0.0
    at = 0
    for ours, theirs in zip(chunks, truth, strict=True):
        rows = np.arange(len(ours))
        nll -= float(ours[rows, targets[at + rows]].sum(dtype=np.float64))
        kl += float((np.exp(theirs) * (theirs - ours)).sum(dtype=np.float64))
        top1 += float((ours.argmax(1) == theirs.argmax(1)).sum())
        at += len(ours)
    return Row(name, bits, nll / at, float(np.exp(nll / at)), 0.0, kl / at, top1 / at)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float32 [n, vocab], accumulated in float64."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)


def table(report: dict) -> str:
    """The report as a Markdown table."""
    lines = ["| kv | bits/element | NLL | perplexity | ΔNLL | KL | top-1 |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in report["results"]:
        lines.append("| {kv} | {bits_per_element:.3f} | {nll:.4f} | {ppl:.3f} | {dnll:+.4f} | {kl:.4f} | {top1:.3f} |".format(**row))
    return "\n".join(lines)

