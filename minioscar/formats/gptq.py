"""GPTQ (arXiv 2210.17323) as AutoGPTQ and GPTQModel write it: W[n, k] = (code - zero) * scale of group g_idx[k].

qweight int32 [columns * bits / 32, rows], codes run down; qzeros int32 [groups, rows * bits / 32]; scales [groups,
rows]; g_idx int32 [columns], which may be absent. Version 1 keeps zeros less one: it subtracted 1 from each code of a
word in one 32-bit subtraction, which borrows from the next where a zero was 0, and adding the same word gives all back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import FLOATS, Format, Linear, Tensor, Unfit, kinds, named, plain, unpack, unpack_down
from .plain import Plain

ONES = {4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True)
class Gptq(Format):
    version: int  # 1 or 2

    def layout(self, linear: Linear) -> dict[str, Tensor | tuple[Tensor, ...]]:
        (rows, columns), bits = linear[:2], self._bits(linear)
        if columns * bits % 32 or rows * bits % 32:
            raise Unfit(f"[{rows}, {columns}] does not consist of words of {32 // bits}")
        count = next(iter(linear.shape("scales")), 0)
        self.group(columns, count)
        layout = {"qweight": Tensor("I32", (columns * bits // 32, rows)), "scales": kinds(FLOATS, (count, rows))}
        layout["qzeros"] = Tensor("I32", (count, rows * bits // 32))
        if "g_idx" in linear.tensors:
            layout["g_idx"] = kinds(("I32", "I64"), (columns,))
        return layout

    def _bits(self, linear: Linear) -> int:
        words = next(iter(linear.shape("qweight")), 0)
        return next((bits for bits in self.bits if linear.columns * bits == 32 * words), self.bits[0])

    def check_values(self, linear: Linear) -> None:
        if "g_idx" in linear.tensors:
            group = self.group(linear.columns, linear.shape("scales")[0])
            order(linear.tensors["g_idx"].array, group, linear.shape("scales")[0])

    def read(self, linear: Linear, xp: Any) -> Plain:
        x, bits = linear.tensors, self._bits(linear)
        group = self.group(linear.columns, len(x["scales"]))
        words = x["qzeros"].view(np.uint32)
        zero = unpack(words + np.uint32(ONES[bits]) if self.version == 1 else words, bits, xp)
        scale = x["scales"]
        if "g_idx" in x:
            first = x["g_idx"][::group]
            scale, zero = scale[first], zero[first]
        return plain(bits, unpack_down(x["qweight"], bits, xp), scale.T, zero.T, group, xp)


def order(indices: np.ndarray, group: int, count: int) -> None:
    """Raises Unfit where the columns of a group do not stand side by side (desc_act, actorder)."""
    first = indices[::group]
    if not (np.repeat(first, group)[: len(indices)] == indices).all() or sorted(first) != list(range(count)):
        raise Unfit(
            "the columns of a group are scattered (desc_act, or actorder group), which is not supported; take a file "
            "that was made with desc_act false"
        )


def read_config(raw: dict, name: str) -> Gptq:
    """Raises Unfit for what is not implemented."""
    written = str(raw.get("checkpoint_format", raw.get("format", "gptq"))).lower()
    if raw.get("is_marlin_format") or written not in ("gptq", "gptq_v2"):
        written = "marlin" if raw.get("is_marlin_format") else written
        raise Unfit(f"checkpoint_format {written!r} of {name} is not supported, only gptq and gptq_v2")
    if raw.get("pack_dtype", "int32") != "int32":
        raise Unfit(f"pack_dtype {raw['pack_dtype']!r} of {name} is not supported, only int32")
    own = [of for of in (*_objects(raw.get("dynamic")), *_objects(raw.get("extra_config"))) if of.get("bits") != 16]
    bits = numbers("bits", raw, own)
    if not bits or not set(bits) <= {4, 8}:
        raise Unfit(f"{name} of {named(bits)} bits is not supported, only of 4 or 8")
    groups = tuple(max(group, 0) for group in numbers("group_size", raw, own))
    version = 2 if written == "gptq_v2" else 1
    return Gptq(f"{name} (v{version})", bits, groups or (128,), version)


def numbers(key: str, raw: dict, own: list[dict]) -> tuple[int, ...]:
    """Every value of a key, of the whole model first. Raises Unfit for one that is no whole number."""
    found = [of[key] for of in (raw, *own) if of.get(key) is not None]
    if wrong := [value for value in found if isinstance(value, bool) or not isinstance(value, int)]:
        raise Unfit(f"{key} must be a whole number, not {wrong[0]!r}")
    return tuple(dict.fromkeys(found))


def _objects(value: Any) -> list[dict]:
    """The objects of an object, such as the overrides of some layers."""
    return [of for of in value.values() if isinstance(of, dict)] if isinstance(value, dict) else []
