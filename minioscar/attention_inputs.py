"""What attention is given, queries, keys and values of every layer: shown, counted, or recorded of a run in BF16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, NamedTuple

import numpy as np

from .batch import Batch
from .cache import Cache, LayerCache, NewTokens
from .config import Config
from .model import Model
from .ops.reference import Reference
from .oscar import SCHEMES
from .towers.media import Medium
from .weights import Weights

Array = Any
SHOW_PREFILL = 1024  # a prompt this long takes seconds on a CPU: progress is shown


class AttentionInputs(NamedTuple):
    """Of one layer, on the host, float32; q and k after QK-norm and RoPE, none of them rotated (v only if the weights
    rotate it)."""

    q: np.ndarray  # [tokens, q_heads, d]
    k: np.ndarray  # [tokens, kv_heads, d]
    v: np.ndarray


def record_attention_inputs(
    weights: Weights, config: Config, ops: Reference, ids: np.ndarray, record: Callable[[AttentionInputs], None],
    progress: bool = False, media: Sequence[Medium] = (),
) -> None:
    """Runs the model over ids, int [at least 2 tokens], and calls `record` once a layer, first layer first. progress:
    shown where kernels are compiled before. media: whose tokens are among the ids."""

    def on_host(q: np.ndarray, new: NewTokens) -> None:
        of = (q, config.num_heads), (new.k, config.num_kv_heads), (new.v, config.num_kv_heads)
        record(AttentionInputs(*(np.array(ops.all_heads(x, heads)).astype(np.float32) for x, heads in of)))

    model, cache = Model(config, weights, SCHEMES["bf16"], ops), Cache(config, SCHEMES["bf16"], 1, len(ids), ops)
    batch = cache.batch_for([0], [len(ids)]).reading([ids.tolist()], media)
    ops.prepare(model, cache, [batch], (), progress)
    observed(model, on_host).forward(np.asarray(ids), cache, batch)


def observed(model: Model, seen: Callable[[Array, NewTokens], object]) -> Model:
    """The same model, which shows what attention is given, queries and new tokens, to `seen`, a layer after the
    other."""
    other = copy(model)
    other.ops = Observed(model.ops, seen)
    return other


@contextmanager
def with_progress(model: Model, tokens: int, is_shown: bool) -> Iterator[Model]:
    """The model for one forward pass of so many tokens, whose layers count on stderr where it is long and that is
    asked for."""
    if not is_shown or tokens < SHOW_PREFILL:
        yield model
        return
    from tqdm import tqdm

    title = f"prefill {tokens} tokens"
    with tqdm(total=model.config.num_layers, desc=title, unit="layer", leave=False) as bar:
        yield observed(model, lambda *_: bar.update())


class Observed:
    """A back end that shows what attention is given to `seen` before it attends."""

    def __init__(self, ops: Reference, seen: Callable[[Array, NewTokens], object]):
        self.ops, self.seen = ops, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def attention(self, q: Array, new: NewTokens, layer_cache: LayerCache, batch: Batch) -> Array:
        self.seen(q, new)
        return self.ops.attention(q, new, layer_cache, batch)
