"""What each card has of a model: contiguous shares of q and kv heads, of the MLP's numbers and of the vocabulary.

q, v, gate, up and the head are split by outputs, which are rows of their matrices; o and down by inputs, columns, so
that what they make has to be summed over the cards. Every card computes the keys of all kv heads, since a token's norm
is over all of them, and packs only its own: no sum over cards is needed for it, and what a cache holds does not depend
on the number of cards. Experts are split like the MLP, each of them, and not dealt out: of the few that a token takes,
most may lie on one card, whose weights the step would then wait for. Embedding, norms and router are on all cards.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np

from ..config import Config
from ..errors import UserError
from ..formats import rounding
from ..oscar import Scheme
from ..quantized import ROWS, Quantized, has_form
from ..staging import Whole
from ..storage.checkpoint import Tensor
from ..weights import Layer, Weights
from .ranks import Ranks

Array = Any
SUMMED, GATHERED = "summed", "gathered"  # what becomes of a product with a split matrix: `Ranks.split`
MATRICES = {"o": SUMMED, "down": SUMMED, "head": GATHERED}  # of the fields of Layer and Weights
AXES = {  # part of a tensor's name -> its axis that is split, and over what
    "q_proj": (0, "q"), "v_proj": (0, "kv"), "o_proj.weight": (1, "q"), "lm_head": (0, "vocab"),
    "gate_proj": (0, "mlp"), "up_proj": (0, "mlp"), "down_proj.weight": (1, "mlp"),
}  # fmt: skip
TEXT = "model.layers.", "lm_head."  # of the names of what is split; towers have projections, too
SPLIT = re.compile("|".join(map(re.escape, AXES)))


def fitting(config: Config) -> list[int]:
    """Numbers of cards that heads and MLP can be split over: divisors of the kv heads, and multiples of them that
    divide the q heads, where cards have the same kv head."""
    q, kv = config.num_heads, config.num_kv_heads
    counts = (n for n in range(1, q + 1) if q % n == 0 and (kv % n == 0 or n % kv == 0))
    return [n for n in counts if config.intermediate_size % n == 0 and (n == 1 or _codes_fit(config, n))]


def _codes_fit(config: Config, cards: int) -> bool:
    """Whether shares of quantized matrices have a form where the matrices have: tiles of gate and of up, and groups of
    columns, which a share that begins or ends within one has as smaller ones (`Plain.cut_columns`)."""
    if config.quantization is None and config.weights is None:
        return True
    rows = config.q_size, config.intermediate_size  # numbers of a row, of o and of down
    groups = ((group, size // cards) for size in rows for group in _groups(config, size) if has_form(group))
    return all(has_form(math.gcd(*each)) for each in groups) and config.intermediate_size // cards % ROWS == 0


def _groups(config: Config, columns: int) -> list[int]:
    """Columns of a group, as far as a row of so many can have several."""
    given = [] if config.quantization is None else [*config.quantization.groups]
    given += [] if config.weights is None else [rounding.group_of(columns)]
    return [group for group in given if 0 < group < columns]


def check(config: Config, scheme: Scheme, cards: int) -> None:
    """Raises UserError for a model or scheme that several cards cannot run."""
    q, kv, option = config.num_heads, config.num_kv_heads, f"--gpus {cards}"
    if cards not in (counts := fitting(config)):
        fits = f"{', '.join(map(str, counts[:-1]))} or {counts[-1]}" if len(counts) > 1 else f"only {counts[0]}"
        mlp = f"an MLP of {config.intermediate_size}{_in_groups(config)}"
        raise UserError(f"{option}: {q} q heads, {kv} kv heads and {mlp} fit {fits}")
    if scheme.calibrated:
        raise UserError(f"{option}: --kv {scheme.name} draws samples while it is loaded, on one card; use another --kv")


def _in_groups(config: Config) -> str:
    """What messages say of quantized weights behind the MLP."""
    groups = sorted({group for size in (config.q_size, config.intermediate_size) for group in _groups(config, size)})
    return f" with groups of {' or '.join(map(str, groups))} columns" if groups else ""


def local(config: Config, cards: int, first_key: Any) -> Config:
    """The config of one card's share. first_key: the first of its kv heads; or of each card, `Ranks`."""
    return replace(
        config, num_heads=config.num_heads // cards, num_kv_heads=max(config.num_kv_heads // cards, 1),
        intermediate_size=config.intermediate_size // cards, shared_keys=(config.num_kv_heads, first_key),
    )  # fmt: skip


def first_key(config: Config, cards: int, rank: int) -> np.int32:
    return np.int32(rank * config.num_kv_heads // cards)


def vocabulary(config: Config, cards: int) -> tuple[int, list[int]]:
    """Tokens of each card, and the first of each. All have equally many: where cards do not divide the vocabulary, the
    last share overlaps the one before it."""
    share = -(-config.vocab_size // cards)
    return share, [min(rank * share, config.vocab_size - share) for rank in range(cards)]


class Slices(Whole):
    """Where the share of one card lies in the tensors of a checkpoint."""

    def __init__(self, config: Config, cards: int, rank: int):
        def of(first: int, count: int) -> slice:
            return slice(int(first), int(first) + count)

        one, (tokens, firsts) = local(config, cards, first_key(config, cards, rank)), vocabulary(config, cards)
        self.of = {
            "q": of(rank * one.q_size, one.q_size), "kv": of(one.shared_keys[1] * one.head_dim, one.kv_size),
            "mlp": of(rank * one.intermediate_size, one.intermediate_size), "vocab": of(firsts[rank], tokens),
        }  # fmt: skip

    def columns(self, name: str) -> slice | None:
        """The columns of a matrix; None: all."""
        axis, over = self._split(name)
        return self.of[over] if axis == 1 else None

    def within(self, name: str) -> tuple[slice, slice]:
        axis, over = self._split(name)
        return tuple(self.of[over] if axis == i else slice(None) for i in (0, 1))

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """They are one stretch of the file."""
        axis, over = self._split(name)
        if axis != 0:
            return tensor
        rows, width = self.of[over], tensor.nbytes // tensor.shape[0]
        count = rows.stop - rows.start
        place = {"begin": tensor.begin + rows.start * width, "nbytes": count * width}
        return replace(tensor, shape=(count, *tensor.shape[1:]), **place)

    @staticmethod
    def _split(name: str) -> tuple[int | None, str]:
        found = SPLIT.search(name) if name.startswith(TEXT) else None
        return AXES[found[0]] if found else (None, "")


def joined(parts: list[Weights]) -> Weights:
    """The weights of all cards as one, each array the `Ranks` of theirs."""

    def together(field: str, arrays: list[Array | Quantized | None]) -> Ranks | Quantized | None:
        first, split = arrays[0], MATRICES.get(field)
        forms = {(x.kind, x.group) if isinstance(x, Quantized) else None for x in arrays}
        if len(forms) > 1:
            why = f"cards' shares of {field} have unequal forms: of some, scales change within tiles of {ROWS} rows"
            raise UserError(f"--gpus {len(arrays)}: {why}; take BF16 weights, or leave it out")
        if not isinstance(first, Quantized):
            return None if first is None else Ranks(arrays, split)
        of_cards = zip(*(x.arrays() for x in arrays), strict=True)
        codes, scales, row_scale = map(Ranks, of_cards)
        return replace(first, codes=codes, scales=scales, row_scale=row_scale, split=split)

    layers = (
        Layer(**{field: together(field, [getattr(layer, field) for layer in of_cards]) for field in vars(of_cards[0])})
        for of_cards in zip(*(part.layers for part in parts), strict=True)
    )
    outer = ("embed", "norm", "head", "key_feedback")
    return replace(
        parts[0], layers=tuple(layers),
        **{field: together(field, [getattr(part, field) for part in parts]) for field in outer},
    )  # fmt: skip
