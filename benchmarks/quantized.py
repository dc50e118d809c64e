"""Weights in 4 and 8 bits for bench.py: random ones of the forms that files have, in memory and in files.

int8, int4   what --weights makes of matrices in BF16
awq          4 bits in groups of 128 with zeros, the head in int8: an AWQ file with --weights int8
fp8          E4M3 with a scale for each 128 x 128, the head in BF16: an FP8 file
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from minioscar.arguments import with_weights
from minioscar.cache import BF16
from minioscar.config import Config
from minioscar.errors import UserError
from minioscar.formats import Format, Linear, Plain, read_config
from minioscar.formats.plain import E4M3
from minioscar.formats.rounding import MODES
from minioscar.ops.reference import Reference
from minioscar.quantized import Q4, Q8, Quantized
from minioscar.quantized.weights import quantize_head, quantize_layer
from minioscar.storage.checkpoint import DTYPES
from minioscar.weights import Layer, Weights, fold_values

Array = Any
E4M3_TYPE = np.dtype(ml_dtypes.float8_e4m3fn)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
FORMS: dict[str, tuple[dict, str | None]] = {"awq": (AWQ, "int8"), "fp8": (FP8, None)}
NAMES = (*MODES, *FORMS)


def config_with(config: Config, name: str | None) -> Config:
    """The config of a model whose weights are kept so: of NAMES, None: in BF16."""
    if name in FORMS:
        raw, mode = FORMS[name]
        return replace(config, quantization=read_config({"quantization_config": raw}, name), weights=mode)
    return with_weights(config, name)


def check(name: str | None, random: bool) -> None:
    """Raises UserError for a form that only random weights have."""
    if name in FORMS and not random:
        raise UserError(f"--weights {name} is for --random-weights: a model's files are in the form that they have")


def random_matrix(of: Format, rows: int, columns: int, scale: float, ops: Reference, rng: Any) -> Any:
    """A matrix with numbers of standard deviation `scale`, about, as the back end keeps it."""
    xp, group = ops.xp, of.groups[0]
    shape, groups = (rows, columns), -(-columns // group)
    if of.bits == (4,):
        zero = rng.integers(5, 11, (rows, groups)).astype(xp.float32)
        spread = xp.full((rows, groups), np.float16(scale / 21**0.5), np.float32)  # 4.6 is that of 16 levels
        codes = rng.integers(0, 16, shape).astype(np.uint8)
        return ops.quantized(Plain("int4", codes, spread, zero, group, np.dtype(np.float16)))
    codes = (rng.integers(0x20, 0x40, shape) + 0x80 * rng.integers(0, 2, shape)).astype(np.uint8)
    deviation = float(np.sqrt((E4M3[0x20:0x40] ** 2).mean()))
    spread = xp.full((rows, groups), scale / deviation, xp.float32)
    return ops.quantized(Plain("e4m3", codes, spread, None, group, np.dtype(BF16)))


def random_form(kind: str, rows: int, columns: int, group: int, xp: Any, rng: Any) -> Quantized:
    """Random bits in the form that kernels read, without a plain form before; rows a multiple of 16."""
    form, tiles, runs, groups = Q4 if kind == "int4" else Q8, rows // 16, columns // 64, columns // group
    shape = (tiles, runs, 32, 4) if kind == "int4" else (tiles, runs, 2, 32, 4)
    codes = rng.integers(0, 1 << 32, shape, dtype=np.uint32)
    row_scale = xp.full(rows, 0.2 * columns**-0.5, np.float32)
    if kind == "e4m3":
        codes &= np.uint32(0xBBFFBBFF)  # numbers below 2, none that is no number
        return form(kind, (rows, columns), group, codes, xp.ones((tiles, groups), np.float32), row_scale)
    words = np.uint32(0x3C00 | (0x4800 if kind == "int4" else 0x5800) << 16)  # scale 1, zero 8 or 128
    return form(kind, (rows, columns), group, codes, xp.full((tiles, groups, 16), words), row_scale)


def of_layer(layer: Layer, config: Config, rotates: bool, ops: Reference) -> Layer:
    """A layer of arrays as --weights keeps it: values rotated, then quantized."""
    if config.quantization is not None or config.weights is None:
        return layer
    layer = fold_values(layer, config, ops) if rotates else layer
    return quantize_layer(layer, config, ops)


def of_model(weights: Weights, config: Config, rotates: bool, ops: Reference) -> Weights:
    """Of layers that `of_layer` made; the head follows them."""
    if config.quantization is None and config.weights is None:
        return weights
    rotation = "folded" if rotates and config.quantization is None else "none"
    return replace(weights, head=quantize_head(weights, config, ops), rotation=rotation, quantized=True)


def tensors(of: Format, rows: int, columns: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Of a file, by the last part of their names: random codes, scales of 1/64."""
    found = {}
    for name, choice in of.layout(Linear(rows, columns, {"qzeros": np.empty(0)})).items():
        kind, shape = choice[0] if isinstance(choice[0], tuple) else choice
        if "scale" in name:
            found[name] = np.full(shape, 1 / 64, DTYPES[kind])
        else:
            octets = rng.integers(0, 0x70, (*shape, DTYPES[kind].itemsize), np.uint8)
            found[name] = octets.view(E4M3_TYPE if kind == "F8_E4M3" else DTYPES[kind]).reshape(shape)
    return found
