"""What attention is given: queries, keys and values of every layer of an unquantized run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .cache import Cache
from .config import Config
from .model import Model, Progress
from .ops.reference import Reference
from .oscar import SCHEMES
from .weights import Weights


class Seen(NamedTuple):
    """Of one layer, on the host, float32; q and k after QK-norm and RoPE, none of them rotated (v only if the weights rotate it)."""

    q: np.ndarray  # [tokens, q_heads, d]
    k: np.ndarray  # [tokens, kv_heads, d]
    v: np.ndarray


class Listener:
    """A back end that hands each layer's queries, keys and values to `heard` before it attends."""

    def __init__(self, ops: Reference, heard: Callable[[Seen], None]):
        self.ops, self.heard = ops, heard

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def attention(self, q, new, *rest):
        self.heard(Seen(*(np.array(self.ops.numpy(x)).astype(np.float32) for x in (q, new.k, new.v))))
        return self.ops.attention(q, new, *rest)


def listen(weights: Weights, config: Config, ops: Reference, ids: np.ndarray, heard: Callable[[Seen], None], progress: Progress = iter):
    """Runs the model over ids, int [at least 2 tokens], and calls `heard` once a layer, first layer first."""
    scheme = SCHEMES["bf16"]
    model = Model(config, weights, scheme, Listener(ops, heard))
    cache = Cache(config, scheme, 1, len(ids), ops)
    model.step(np.asarray(ids), cache, cache.place([0], [len(ids)]), progress=progress)
