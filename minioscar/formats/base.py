"""What readers share: how a format says which tensors a linear layer has, and how words become codes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .plain import Plain

Array = Any
FLOATS = ("F16", "BF16", "F32")


class Unfit(Exception):
    """A reason why the tensors of a layer are not what config.json says; the caller adds where."""


class Tensor(NamedTuple):
    """As safetensors describes one: dtype and shape."""

    kind: str
    shape: tuple[int, ...]


class Linear(NamedTuple):
    """A linear layer of a file: [rows, columns] of its matrix, and its tensors by the last part of their names."""

    rows: int
    columns: int
    tensors: Mapping[str, Any]  # what has a kind and a shape; for `read` an array

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor; () where there is none, which `Format.check` refuses."""
        return tuple(self.tensors[name].shape) if name in self.tensors else ()


@dataclass(frozen=True)
class Format:
    """A way to keep quantized matrices in files, with the parameters of config.json. `read_config` makes one."""

    name: str  # for people
    bits: tuple[int, ...]  # that a matrix may have
    groups: tuple[int, ...]  # columns of a group that a matrix may have; 0: the whole row

    def stored_bits(self, columns: int = 0) -> float:
        """Of a number as it is kept, its share of a scale and a zero of 16 bits included; at most, of several forms.
        columns: of rows that were cut (`Plain.cut_columns`), 0: of whole ones."""
        return max(self.bits) + max((32 / math.gcd(group, columns) for group in self.groups if group), default=0)

    def layout(self, linear: Linear) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """The tensors that a layer must have, each with one description or several to choose from. Raises Unfit."""
        raise NotImplementedError

    def read(self, linear: Linear, xp: Any) -> Plain:
        """From arrays in the dtypes of the file, which `check` has accepted."""
        raise NotImplementedError

    def check_values(self, linear: Linear) -> None:
        """What numbers a layer may have, of tensors that lie on the host. Raises Unfit."""

    def check(self, linear: Linear) -> None:
        """Raises Unfit for a tensor that is missing, has no place, or has another shape or dtype."""
        wanted, found = self.layout(linear), linear.tensors
        for name, choice in wanted.items():
            choices = (choice,) if isinstance(choice, Tensor) else choice
            if name not in found:
                raise Unfit(f"{name} is missing")
            if not any((found[name].kind, tuple(found[name].shape)) == one for one in choices):
                kinds, shapes = (" or ".join(dict.fromkeys(map(str, x))) for x in zip(*choices, strict=True))
                given = f"{name} is {found[name].kind} {tuple(found[name].shape)}"
                raise Unfit(f"{given}, but config.json asks for {kinds} {shapes}")
        if more := sorted(found.keys() - wanted.keys()):
            raise Unfit(f"{more[0]} has no place in {self.name}")
        self.check_values(linear)

    def group(self, columns: int, count: int) -> int:
        """Columns of a group where a row has `count` of them. Raises Unfit where config.json has no such size."""
        sizes = {group or columns for group in self.groups}
        fitting = {min(size, columns) for size in sizes if -(-columns // size) == count}
        if len(fitting) != 1:
            raise Unfit(f"{count} groups in {columns} columns do not follow from group_size {named(sizes)}")
        return fitting.pop()


def kinds(names: Sequence[str], shape: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(Tensor(name, tuple(shape)) for name in names)


def named(sizes: Sequence[int] | set[int]) -> str:
    return " or ".join(map(str, sorted(sizes))) or "nothing"


def unpack(words: Array, bits: int, xp: Any) -> Array:
    """Integers [..., n] -> their codes, lowest bits first: uint8 [..., n * width / bits], of 4 or 8 bits."""
    octets = xp.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets
    return xp.stack([octets & 15, octets >> 4], axis=-1).reshape(*octets.shape[:-1], -1)


def unpack_down(words: Array, bits: int, xp: Any) -> Array:
    """Words [n, m] whose codes run down a column -> uint8 [m, n * 32 / bits], columns as rows."""
    return unpack(words.T, bits, xp)


def scales(x: Array, xp: Any) -> tuple[Array, np.dtype]:
    """A tensor of scales -> float32, and the dtype that represents them. Bytes are exponents: 2^(byte - 127)."""
    if x.dtype == np.uint8:
        return xp.exp2(x.astype(xp.float32) - 127), np.dtype(np.float32)
    return x.astype(xp.float32), np.dtype(x.dtype)


def plain(bits: int, codes: Array, scale: Array, zero: Array | None, group: int, xp: Any) -> Plain:
    """Of integer codes. scale: as in the file, [rows, groups]; zero: whole numbers of any dtype, None: half the
    range."""
    scale, dtype = scales(scale, xp)
    zero = xp.full(scale.shape, 1 << bits - 1, xp.float32) if zero is None else zero.astype(xp.float32)
    return Plain(f"int{bits}", codes, xp.ascontiguousarray(scale), xp.ascontiguousarray(zero), group, dtype)
