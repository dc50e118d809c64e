"""Matrices that are not kept as their files have them: read a layer at a time, unpacked or quantized, then let go of.

What is in memory beside the model is two layers of the files and one layer in its plain form.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .backend import Backend
from .config import Config
from .errors import UserError
from .formats import Linear, Plain, joined, rounding
from .quantized import ROWS, Quantized
from .storage.checkpoint import Checkpoint, Tensor

Array = Any
Matrix = Any  # an array, or a quantized.Quantized
SIBLINGS = ("q", "k", "v"), ("gate", "up"), ("down",)  # projections that stand in one matrix, with those of experts
PROJECTION = re.compile(r"(.*\.)([a-z]+)(_proj\.weight)$")
MLP = "gate_up", "down"  # fields of a layer that has them of each expert, if it has experts


class Whole:
    """What a card has of the tensors of files, of which several have a share each: `parallel.shares.Slices`."""

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """Those rows of a tensor, as it is in the files."""
        return tensor

    def within(self, name: str) -> tuple[slice, slice]:
        """Rows and columns of a matrix; slice(None): all."""
        return slice(None), slice(None)


class Group(NamedTuple):
    """The place of a matrix that is staged: the tensors whose rows it has."""

    names: tuple[str, ...]


class Staging:
    """names: of the matrices that are staged, as they would be called in 16 bits. share: what is kept of them. Rows
    are cut as soon as they are read; columns at last, since what is cut are groups of them."""

    def __init__(
        self, tensors: Checkpoint, config: Config, ops: Backend, matrices: Sequence[str], share: Whole | None = None
    ):
        self.tensors, self.config, self.ops, self.share = tensors, config, ops, share or Whole()
        self.finite = dict[str, Array]()  # whether the codes and scales of a matrix are numbers
        self.widened = Counter[str]()  # why matrices are kept as numbers, and how many
        names = matrices if config.weights else tensors.quantized
        self.names = _siblings(names, config)

    def of(self, name: str) -> list[Tensor]:
        """The tensors of a matrix."""
        quantized = self.tensors.quantized.get(name)
        return list(quantized.tensors.values()) if quantized else [self.share.rows(name, self.tensors[name])]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for name in self.names for tensor in self.of(name))

    def fill(
        self, owners: Sequence[Any], advance: Callable[[int], object], fold: Callable[[Any], Any] | None = None
    ) -> Iterator[Any]:
        """Objects whose fields are arrays or Groups, such as layers, with matrices in the place of the Groups.

        fold: changes such an object before its matrices are quantized; they are arrays then.
        """
        fields = [{field: x for field, x in vars(owner).items() if isinstance(x, Group)} for owner in owners]
        read = self._read([[name for group in found.values() for name in group.names] for found in fields], advance)
        for owner, found, parts in zip(owners, fields, read, strict=True):
            matrices = {
                field: joined([parts[name] for name in group.names], self.ops.xp) for field, group in found.items()
            }
            owner = replace(owner, **matrices)
            if fold is not None:
                owner = fold(owner)
            kept = {field: self._kept(getattr(owner, field), field, group) for field, group in found.items()}
            kept |= {field: by_expert(kept[field], self.config) for field in MLP if field in kept}
            yield replace(owner, **kept)

    def filled(
        self, weights: Any, advance: Callable[[int], object], fold: Callable[[Any], Any] | None = None
    ) -> Any:
        """A `weights.Weights`, so. fold: only where the files have numbers; of layers."""
        fold = None if self.tensors.quantized else fold
        layers = tuple(self.fill(weights.layers, advance, fold))
        weights = replace(weights, layers=layers, rotation="folded" if fold else "none", quantized=True)
        return next(self.fill([weights], advance)) if isinstance(weights.head, Group) else weights

    def _kept(self, matrix: Plain | Array, field: str, group: Group) -> Matrix:
        _, columns = self.share.within(group.names[0])
        if field == "router":
            numbers = matrix.dequantize(self.ops.xp) if isinstance(matrix, Plain) else matrix
            return numbers.astype(self.ops.dtype, copy=False)
        if not isinstance(matrix, Plain):
            if self.config.weights is None:
                self.widened["some of their rows are quantized in the files, in another way than others or not"] += 1
                return self.ops.xp.ascontiguousarray(matrix[:, columns]).astype(self.ops.dtype, copy=False)
            matrix = quantized(matrix, self.config.weights, field, self.ops.xp)
        matrix = matrix.cut_columns(columns, self.ops.xp)
        try:
            check_tiles(matrix.shape[0], field, self.config)
            return self.ops.quantized(matrix)
        except ValueError as error:
            self.widened[str(error)] += 1
            return matrix.dequantize(self.ops.xp).astype(self.ops.dtype, copy=False)

    def _read(self, stages: list[list[str]], advance: Callable[[int], object]) -> Iterator[Mapping[str, Any]]:
        """The matrices of each stage by name, plain or arrays; while one is used, the files of the next are read."""
        with ExitStack() as opened:
            before: Mapping[str, list[Array]] | None = None
            for stage in stages:
                tensors = {name: self.of(name) for name in stage}
                raw = [tensor.raw for of_one in tensors.values() for tensor in of_one]
                put = opened.enter_context(self.ops.loading(advance, raw, np.dtype(np.uint8)))
                arrays = {name: [put([tensor.raw]) for tensor in of_one] for name, of_one in tensors.items()}
                if before is not None:
                    yield self._unpacked(before)
                opened.pop_all().close()  # waits for the last bytes
                before = arrays
            if before is not None:
                yield self._unpacked(before)

    def _unpacked(self, raw: Mapping[str, list[Array]]) -> dict[str, Plain | Array]:
        return {name: self._matrix(name, arrays) for name, arrays in raw.items()}

    def _matrix(self, name: str, raw: list[Array]) -> Plain | Array:
        given = zip(self.of(name), raw, strict=True)
        arrays = [array.view(tensor.dtype).reshape(tensor.shape) for tensor, array in given]
        if (linear := self.tensors.quantized.get(name)) is None:
            same = arrays[0].dtype == self.ops.dtype
            return arrays[0] if same else arrays[0].astype(np.float32).astype(self.ops.dtype)
        found = Linear(linear.rows, linear.columns, dict(zip(linear.tensors, arrays, strict=True)))
        plain = self.tensors.format.read(found, self.ops.xp)
        self.finite[name] = self.ops.xp.isfinite(plain.scale).all()
        if plain.kind == "e4m3":
            self.finite[name] &= (plain.codes & 0x7F != 0x7F).all()
        return plain.rows(self.share.within(name)[0])

    def check(self, says: bool = True) -> None:
        """Says what is kept as numbers. Raises UserError for scales and codes that are no numbers: at the end, so that
        no matrix waits for the one before it."""
        if bad := next((name for name, finite in self.finite.items() if not finite), None):
            what = f"{bad.removesuffix('.weight')} has a NaN or an infinity"
            raise UserError(f"{self.tensors.folder}: {what}; the files are damaged: fetch the model again")
        for why, count in self.widened.items() if says else ():
            what = f"{count} {'matrix is' if count == 1 else 'matrices are'} kept as {self.ops.dtype} numbers"
            print(f"[{what}: {why}]", file=sys.stderr, flush=True)


def quantized(matrix: Array, mode: str, field: str, xp: Any) -> Plain:
    """mode: of rounding.MODES. The last projection, whose rounding every logit shows, is kept in 8 bits by each."""
    return rounding.quantize(matrix, "int8" if field == "head" else mode, xp)


def by_expert(matrix: Matrix, config: Config) -> Matrix:
    """Rows of all experts -> [experts, out, in]; quantized they stay as they are."""
    if config.experts is None or isinstance(matrix, Quantized):
        return matrix
    return matrix.reshape(config.experts.count, -1, matrix.shape[1])


def check_tiles(rows: int, field: str, config: Config) -> None:
    """Raises ValueError where the rows of gate, of up or of an expert are no whole tiles of the quantized form."""
    count, parts = config.experts.count if config.experts else 1, 1 + (field == "gate_up")
    if field in MLP and count * parts > 1 and (own := rows // count // parts) % ROWS:
        raise ValueError(f"{'experts' if config.experts else 'gate and up'} of {own} rows are not a multiple of {ROWS}")


def _siblings(names: Iterable[str], config: Config) -> set[str]:
    """The tensors of the matrices that have these; of an expert's those of all experts of the layer."""
    found, count = set[str](), config.experts.count if config.experts else 0
    for place in {re.sub(r"(?<=\.experts\.)\d+(?=\.)", "*", name) for name in names}:
        parts = PROJECTION.match(place)
        group = next((group for group in SIBLINGS if parts and parts[2] in group), None)
        of_one = [place] if group is None else [f"{parts[1]}{other}{parts[3]}" for other in group]
        of_all = (name.replace("*", str(e)) for name in of_one for e in range(count if "*" in name else 1))
        found.update(of_all)
    return found
