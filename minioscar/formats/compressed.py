"""compressed-tensors (llm-compressor): what a layer has says how it is packed, whatever group of the config it is of.

pack-quantized   weight_packed int32 [rows, ceil(columns * bits / 32)], codes in order; weight_scale [rows, groups];
                 weight_zero_point int32 [ceil(rows * bits / 32), groups], whose codes run down, absent where symmetric;
                 weight_shape int64 [2]; weight_g_idx int32 [columns]
float-quantized  as fp8.py has it: weight F8_E4M3, weight_scale [1], [rows, 1] or one for each block
int-quantized    the same with weight int8; activations stay in 16 bits
Codes and zeros are signed, kept with 2^(bits - 1) added: W = (code - zero) * scale either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import fp8, gptq
from .base import FLOATS, Linear, Tensor, Unfit, kinds, named, plain, unpack, unpack_down
from .plain import Plain

FORMATS = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "mixed-precision", "dense")


@dataclass(frozen=True)
class Compressed(fp8.Scaled):
    def layout(self, linear: Linear) -> dict[str, Tensor | tuple[Tensor, ...]]:
        if "weight_packed" not in linear.tensors:
            return super().layout(linear)
        (rows, columns), bits = linear[:2], self._bits(linear)
        layout = {"weight_packed": Tensor("I32", (rows, -(-columns * bits // 32))), "weight_shape": Tensor("I64", (2,))}
        layout["weight_scale"] = tuple(one for shape in self._shapes(linear) for one in kinds(FLOATS, shape))
        if "weight_zero_point" in linear.tensors:
            count = (linear.shape("weight_scale") or (1,))[-1]
            layout["weight_zero_point"] = Tensor("I32", (-(-rows * bits // 32), count))
        if "weight_g_idx" in linear.tensors:
            layout["weight_g_idx"] = Tensor("I32", (columns,))
        return layout

    def _bits(self, linear: Linear) -> int:
        words = (linear.shape("weight_packed") or (0,))[-1]
        packable = [bits for bits in self.bits if -(-linear.columns * bits // 32) == words]
        return packable[0] if packable else self.bits[0]

    def check_values(self, linear: Linear) -> None:
        x = linear.tensors
        if "weight_shape" in x and (given := tuple(map(int, x["weight_shape"].array))) != tuple(linear[:2]):
            raise Unfit(f"weight_shape says {list(given)}, but config.json asks for {list(linear[:2])}")
        if "weight_g_idx" in x:
            shape = linear.shape("weight_scale")
            gptq.order(x["weight_g_idx"].array, self._shapes(linear)[shape][1], shape[-1])

    def read(self, linear: Linear, xp: Any) -> Plain:
        if "weight_packed" not in linear.tensors:
            return super().read(linear, xp)
        x, (rows, columns), bits = linear.tensors, linear[:2], self._bits(linear)
        codes = xp.ascontiguousarray(unpack(x["weight_packed"], bits, xp)[:, :columns])
        tile = self._shapes(linear)[tuple(x["weight_scale"].shape)]
        scale, zero = fp8.spread(x["weight_scale"], tile, rows, xp), None
        if "weight_zero_point" in x:
            zero = unpack_down(x["weight_zero_point"], bits, xp)[:, :rows].T
        if "weight_g_idx" in x:
            first = x["weight_g_idx"][:: tile[1]]
            scale, zero = scale[:, first], None if zero is None else zero[:, first]
        return plain(bits, codes, scale, zero, tile[1], xp)


def read_config(raw: dict, name: str) -> Compressed:
    """Raises Unfit for what is not implemented."""
    if raw.get("transform_config"):
        raise Unfit(f"transform_config of {name} (rotations at run time) is not supported")
    sparse = raw.get("sparsity_config") or {}
    if sparse.get("format", "dense") != "dense" or sparse.get("sparsity_structure") not in (None, "unstructured"):
        raise Unfit(f"sparsity_config of {name} is not supported")
    groups = raw.get("config_groups")
    given = list(groups.values()) if isinstance(groups, dict) else []
    for form in (raw.get("format", "dense"), *(of.get("format") for of in given if isinstance(of, dict))):
        if form is not None and form not in FORMATS:
            raise Unfit(f"format {form!r} of {name} is not supported, only {', '.join(FORMATS[:4])}")
    weights = [of["weights"] for of in given if isinstance(of, dict) and of.get("weights")]
    if not weights or not all(isinstance(of, dict) for of in weights):
        raise Unfit(f"{name} has no config_groups with weights")
    for of in weights:
        if (of.get("type", "int"), of.get("num_bits")) not in (("int", 4), ("int", 8), ("float", 8)):
            what = f"{of.get('type', 'int')} weights of {of.get('num_bits')!r} bits"
            raise Unfit(f"{what} of {name} are not supported, only int of 4 or 8 and float of 8")
    bits, tiles = tuple(dict.fromkeys(of["num_bits"] for of in weights)), tuple(dict.fromkeys(map(_tile, weights)))
    what = f"{name} ({raw.get('format', 'mixed-precision')}, {named(set(bits))} bits)"
    return Compressed(what, bits, tuple(tile[1] for tile in tiles), tiles)


def _tile(weights: dict) -> fp8.Tile:
    """Of one group's `weights`. Raises Unfit."""
    group = weights.get("group_size")
    strategy = weights.get("strategy") or ("group" if group and group > 0 else "channel" if group else "tensor")
    if strategy in ("tensor", "channel"):
        return fp8.WHOLE if strategy == "tensor" else fp8.ROW
    if strategy == "block":
        return fp8.tile_of(weights.get("block_structure"), "block_structure")
    if strategy != "group" or type(group) is not int or group < 1:
        raise Unfit(f"strategy {strategy!r} with group_size {group!r} is not supported")
    return 1, group
