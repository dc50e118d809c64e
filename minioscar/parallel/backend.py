"""The back end of several cards: the operations of the model, each on every card, and the sums over cards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np

from ..batch import Batch
from ..cache import LayerCache, NewTokens
from ..config import Config
from ..decoding import Stepper
from ..ops.reference import Reference
from ..oscar import Scheme
from ..weights import Layer
from .caches import split_cache
from .ranks import Namespace, Ranks, of_rank
from .shares import GATHERED, SUMMED, first_key, local, vocabulary

Array = Any


class Split:
    """What both kinds have in common. ranks: the back end of each card. config: the whole model's."""

    def __init__(self, ranks: Sequence[Reference], config: Config):
        self.ranks, self.config, self.cards = list(ranks), config, len(ranks)
        self.xp = Namespace([rank.xp for rank in ranks], self.on)
        firsts = Ranks([first_key(config, self.cards, rank) for rank in range(self.cards)])
        self.local = local(config, self.cards, firsts)
        self.share, self.first_tokens = vocabulary(config, self.cards)

    def on(self, rank: int) -> AbstractContextManager:
        """A card as the current one."""
        return nullcontext()

    def each(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        """What `work` makes of each card's back end and arguments, on the card."""
        made = []
        for rank, ops in enumerate(self.ranks):
            with self.on(rank):
                made.append(work(ops, *of_rank(args, rank)))
        return made

    def numpy(self, x: Array) -> np.ndarray:
        """The first card's: of what all have alike."""
        with self.on(0):
            return self.ranks[0].numpy(of_rank(x, 0))

    def on_host(self, x: Array) -> Ranks:
        return Ranks(self.each(lambda ops, x: ops.on_host(x), x))

    def on_cards(self, x: Array) -> list[np.ndarray]:
        return self.each(lambda ops, x: ops.on_cards(x)[0], x)

    def all_heads(self, x: Array, heads: int) -> np.ndarray:
        found = self.on_cards(x)
        same = self.cards * x.shape[1] // heads  # cards that have the same kv head
        return np.concatenate(found[::same], axis=1)

    first = property(lambda self: self.ranks[0])

    def spread(self, x: Array) -> Ranks:
        return Ranks(self.each(lambda ops: x if ops is self.first else x.copy()))

    def sum(self, x: Array, y: Array) -> Ranks:
        return Ranks(self.each(lambda ops, x, y: ops.sum(x, y), x, y))

    def free_bytes(self) -> int:
        """Of all cards, as if each had what the fullest has."""
        return self.cards * min(self.each(lambda ops: ops.free_bytes()))

    def release(self) -> None:
        self.each(lambda ops: ops.release())

    def weight_bytes(self, config: Config) -> int:
        """Of all cards: what the first has, with all that is on every card, and its towers."""
        first, own = self.ranks[0], replace(local(config, self.cards, 0), vocab_size=self.share)
        embedding = (config.vocab_size - self.share) * config.hidden_size * first.dtype.itemsize  # the rest of it
        return self.cards * (first.weight_bytes(own) + embedding)

    def cache_bytes(self, config: Config, *rest: Any) -> int:
        return self.cards * self.ranks[0].cache_bytes(local(config, self.cards, 0), *rest)

    def work_bytes(
        self, config: Config, tokens: int, context: int, rows: int = 1, penalties: bool | None = False
    ) -> int:
        return self.cards * self.ranks[0].work_bytes(self.local, tokens, context, rows, penalties)

    def _localized(self, model: Stepper) -> Stepper:
        """The model with the config of one card's share."""
        model = copy(model)
        model.config = replace(self.local, weights=model.config.weights)
        return model


class SplitReference(Split, Reference):
    """Simulated cards: array code on the host."""

    def cache_type(self, config: Config, scheme: Scheme) -> type[LayerCache]:
        return split_cache(self.ranks[0].cache_type(config, scheme), self.cards)

    def free_bytes(self) -> int:
        return self.ranks[0].free_bytes()

    def embed(self, table: Array, ids: np.ndarray) -> Array:
        return Ranks(self.each(lambda ops, table, ids: ops.embed(table, ids), table, ids))

    def rotate_heads(self, x: Array, head_dim: int, axis: int) -> None:
        self.each(lambda ops, x: ops.rotate_heads(x, head_dim, axis), x)

    def linear(self, x: Array, weight: Array, bias: Array | None = None, **options: Any) -> Array:
        """`Reference.linear` with each card's share of a matrix. What is summed has bias and residual once."""
        if weight.split == SUMMED:
            bias = self.once(bias)
            options["residual"] = self.once(options.get("residual"))
        made = Ranks(
            self.each(lambda ops, x, weight, bias, options: ops.linear(x, weight, bias, **options),
                      x, weight, bias, options)
        )  # fmt: skip
        return self.summed(made) if weight.split == SUMMED else self.gathered(made, weight.split)

    def once(self, x: Array | None) -> Ranks | None:
        """Of the first card only."""
        return None if x is None else Ranks([of_rank(x, 0), *[None] * (self.cards - 1)])

    def summed(self, parts: Ranks) -> Ranks:
        """The sum over cards, in their order; each card has its own copy of it."""
        total = parts.values[0]
        for part in parts.values[1:]:
            total = self.ranks[0].sum(total, part)
        return Ranks([total.copy() for _ in self.ranks])

    def gathered(self, parts: Ranks, split: str | None) -> Ranks:
        if split != GATHERED:
            return parts
        whole = np.empty((len(parts), self.config.vocab_size), parts.dtype)
        for first, part in zip(self.first_tokens, parts.values, strict=True):
            whole[:, first : first + self.share] = part
        return Ranks([whole.copy() for _ in self.ranks])

    def experts(self, x: Array, layer: Layer, config: Config, batch: Batch) -> Array:
        made = self.each(lambda ops, x, layer: ops.experts(x, Layer(**layer), self.local, batch, True), x, vars(layer))
        return self.summed(Ranks([x.values[0], *made]))

    def rotate_scale(
        self, qkv: Array, layer: Layer, tables: tuple[Array, Array], layer_cache: LayerCache, config: Config,
        batch: Batch, rotate_values: bool = False,
    ) -> tuple[Array, NewTokens]:  # fmt: skip
        made = []
        for rank, ops in enumerate(self.ranks):
            own = replace(self.local, shared_keys=of_rank(self.local.shared_keys, rank))
            of_card = of_rank((qkv, vars(layer), tables), rank)
            qkv_of, layer_of, tables_of = of_card
            cache = layer_cache.of(rank)
            made.append(ops.rotate_scale(qkv_of, Layer(**layer_of), tables_of, cache, own, batch, rotate_values))
        q, new = zip(*made, strict=True)
        return Ranks(q), NewTokens(*(None if x[0] is None else Ranks(x) for x in zip(*new, strict=True)))
