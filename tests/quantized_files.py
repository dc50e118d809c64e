"""Writers of every format of quantized weights, the inverse of minioscar/formats, and models made of them.

They are written from the formats' descriptions, number by number; golden files of the true libraries are in
fixtures/formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from minioscar import quantized
from minioscar.config import Config
from minioscar.ops.reference import Reference
from minioscar.weights import expected, matrices
from minioscar.work_bytes import of_weights

from .tiny import CONFIG, random_weights

BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn
Tensors = dict[str, np.ndarray]


class Exact(NamedTuple):
    """A matrix as a writer takes it; w is what it stands for."""

    codes: np.ndarray  # uint8 [rows, columns]
    scale: np.ndarray  # [rows, groups], in a dtype of files
    zero: np.ndarray  # int [rows, groups]
    group: int
    bits: int

    @property
    def w(self) -> np.ndarray:
        scale, zero = (np.repeat(x, self.group, 1)[:, : self.codes.shape[1]] for x in (self.scale, self.zero))
        return (self.codes.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32)


def random_matrix(
    rng: np.random.Generator, rows: int, columns: int, bits: int, group: int, symmetric: bool = False, dtype=np.float16
) -> Exact:
    """Zeros at both ends of their range, scales that are negative or 0 among them."""
    top, groups = (1 << bits) - 1, -(-columns // group)
    codes = rng.integers(0, top + 1, (rows, columns)).astype(np.uint8)
    scale = rng.uniform(0.5, 1.5, (rows, groups)) / np.sqrt(columns) * 5 / top
    scale *= rng.choice([1, 1, 1, -1, 0], (rows, groups))
    zero = rng.choice([0, top, top // 2, top // 2 + 1, 3], (rows, groups))
    return Exact(codes, scale.astype(dtype), np.full_like(zero, top // 2 + 1) if symmetric else zero, group, bits)


def packed(codes: np.ndarray, bits: int, kind: type = np.int32) -> np.ndarray:
    """Codes along the last axis -> words, the first code in the lowest bits; padded with zeros."""
    per_word = 8 * np.dtype(kind).itemsize // bits
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per_word)])
    words = sum(codes[..., i::per_word].astype(np.uint64) << np.uint64(bits * i) for i in range(per_word))
    return words.astype(np.dtype(f"u{np.dtype(kind).itemsize}")).view(kind)


def awq_gemm(m: Exact) -> Tensors:
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(x: np.ndarray) -> np.ndarray:
        return packed(x.T.reshape(x.shape[1], -1, 8)[..., order].reshape(x.shape[1], -1), 4)

    return {"qweight": words(m.codes), "qzeros": words(m.zero), "scales": m.scale.T}


def awq_width(m: Exact) -> int:
    words, multiple = -(-m.scale.shape[1] // 8), {64: 2, 32: 4}.get(m.group, 1)
    return -(-words // multiple) * multiple


def awq_gemv(m: Exact) -> Tensors:
    pad = (0, 0), (0, 8 * awq_width(m) - m.scale.shape[1])
    return {"qweight": packed(m.codes, 4), "qzeros": packed(np.pad(m.zero, pad), 4), "scales": np.pad(m.scale, pad)}


def awq_gemv_fast(m: Exact) -> Tensors:
    rows, columns = m.codes.shape
    n, k = np.indices((rows, columns))
    eight, run, odd = k % 32 // 8, k % 8 // 2, k % 2
    at = n % 4 * 64 + k % 64 // 32 * 32 + run * 8 + odd * 4 + eight  # of the 256 numbers of 4 rows and 64 columns
    words = np.zeros((rows // 4, columns), np.uint16)
    np.bitwise_or.at(words, (n // 4, k // 64 * 64 + at // 4), m.codes.astype(np.uint16) << (4 * (at % 4)))
    pad = (0, 0), (0, 8 * awq_width(m) - m.scale.shape[1])
    scale, zero = np.pad(m.scale, pad), np.pad(m.zero, pad)
    shift = -(scale.astype(np.float32) * zero).astype(np.float16)
    return {"qweight": words.view(np.int16), "scales": scale.T, "qzeros": shift.T}


def gptq(m: Exact, version: int, g_idx: bool = True) -> Tensors:
    zeros = packed(m.zero.T, m.bits).view(np.uint32)
    if version == 1:
        zeros = zeros - np.uint32(0x11111111 if m.bits == 4 else 0x01010101)
    found = {"qweight": packed(m.codes, m.bits).T, "qzeros": zeros.view(np.int32), "scales": m.scale.T}
    return found | ({"g_idx": (np.arange(m.codes.shape[1]) // m.group).astype(np.int32)} if g_idx else {})


def compressed_pack(m: Exact, symmetric: bool) -> Tensors:
    found = {"weight_packed": packed(m.codes, m.bits), "weight_scale": m.scale}
    found["weight_shape"] = np.array(m.codes.shape, np.int64)
    return found if symmetric else found | {"weight_zero_point": packed(m.zero.T, m.bits).T}


def tiles(rng: np.random.Generator, rows: int, columns: int, tile: tuple[int, int]) -> np.ndarray:
    """Scales, float32 [rows of tiles, columns of tiles]. tile 0: all."""
    shape = [-(-size // (of or size)) for size, of in zip((rows, columns), tile, strict=True)]
    return (rng.uniform(0.5, 1.5, shape) / 256 / np.sqrt(columns) * 4).astype(np.float32)


def spread(scale: np.ndarray, rows: int, columns: int, tile: tuple[int, int]) -> np.ndarray:
    return np.repeat(np.repeat(scale, tile[0] or rows, 0)[:rows], tile[1] or columns, 1)[:, :columns]


def of_bytes(
    rng: np.random.Generator, shape: tuple[int, int], tile: tuple[int, int], kind: type, scale_kind: type
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """weight, scale and what they stand for. kind: E4M3 or int8."""
    if kind is E4M3:
        weight = (rng.standard_normal(shape) * 100).clip(-448, 448).astype(np.float32).astype(E4M3)
    else:
        weight = rng.integers(-128, 128, shape).astype(np.int8)
    scale = tiles(rng, *shape, tile).astype(scale_kind)
    return weight, scale, weight.astype(np.float32) * spread(scale.astype(np.float32), *shape, tile)


# --- models

Writer = Callable[[np.random.Generator, int, int], tuple[Tensors, np.ndarray]]  # tensors, and what they stand for


class Kind(NamedTuple):
    """A format: the quantization_config, and what writes a random matrix of [rows, columns]."""

    config: dict[str, Any]
    write: Writer


def _integers(writer: Callable[..., Tensors], bits: int, group: int, dtype: type = np.float16, **how: Any) -> Writer:
    def write(rng: np.random.Generator, rows: int, columns: int) -> tuple[Tensors, np.ndarray]:
        m = random_matrix(rng, rows, columns, bits, group or columns, how.get("symmetric", False), dtype)
        return writer(m, **how), m.w

    return write


def _bytes(tile: tuple[int, int], kind: type, scale_kind: type, name: str = "weight_scale") -> Writer:
    def write(rng: np.random.Generator, rows: int, columns: int) -> tuple[Tensors, np.ndarray]:
        weight, scale, w = of_bytes(rng, (rows, columns), tile, kind, scale_kind)
        return {"weight": weight, name: scale.reshape(1) if scale.size == 1 else scale}, w

    return write


def _awq(version: str, group: int) -> Kind:
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": version}
    writers = {"gemm": awq_gemm, "gemv": awq_gemv, "gemv_fast": awq_gemv_fast}
    return Kind(config, _integers(writers[version.lower()], 4, group))


def _gptq(bits: int, group: int, version: int, g_idx: bool = True, **more: Any) -> Kind:
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": True, **more}
    if version == 2:
        config["checkpoint_format"] = "gptq_v2"
    return Kind(config, _integers(gptq, bits, max(group, 0), version=version, g_idx=g_idx))


def _compressed(form: str, write: Writer, **weights: Any) -> Kind:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config = {"quant_method": "compressed-tensors", "config_groups": groups, "format": form, "ignore": ["lm_head"]}
    return Kind(config | {"quantization_status": "compressed"}, write)


def _packed(bits: int, group: int, symmetric: bool, dtype: type) -> Kind:
    write = _integers(compressed_pack, bits, group, dtype, symmetric=symmetric)
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group or None}
    return _compressed("pack-quantized", write, **weights, strategy="group" if group else "channel")


def _scaled(kind: type, strategy: str, tile: tuple[int, int], scale_kind: type) -> Kind:
    form, name = ("float-quantized", "float") if kind is E4M3 else ("int-quantized", "int")
    weights = {"num_bits": 8, "type": name, "symmetric": True, "strategy": strategy}
    weights |= {"block_structure": list(tile)} if strategy == "block" else {}
    return _compressed(form, _bytes(tile, kind, scale_kind), **weights)


def _fp8(tile: tuple[int, int] | None, scale_kind: type) -> Kind:
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": tile and list(tile)}
    return Kind(config, _bytes(tile or (0, 0), E4M3, scale_kind, "weight_scale_inv"))


KINDS: dict[str, Kind] = {
    "awq-gemm": _awq("gemm", 64),
    "awq-gemv": _awq("GEMV", 64),
    "awq-gemv-32": _awq("gemv", 32),
    "awq-gemv-fast": _awq("gemv_fast", 64),
    "auto-round-awq": Kind(
        {"quant_method": "intel/auto-round", "bits": 4, "group_size": 64, "packing_format": "auto_round:auto_awq"},
        _integers(awq_gemm, 4, 64),
    ),
    "gptq-v1": _gptq(4, 64, 1),
    "gptq-v2": _gptq(4, 32, 2),
    "gptq-8": _gptq(8, 64, 1),
    "gptq-rows": _gptq(4, -1, 1, g_idx=False, desc_act=True),
    "gptq-short-group": _gptq(4, 96, 1),
    "auto-round-gptq": Kind(
        {"quant_method": "auto-round", "bits": 4, "group_size": 64, "packing_format": "auto_round:auto_gptq"},
        _integers(gptq, 4, 64, version=1),
    ),
    "ct-int4": _packed(4, 64, True, BF16),
    "ct-int4-16": _packed(4, 16, True, BF16),
    "ct-int4-zeros": _packed(4, 32, False, np.float16),
    "ct-int4-rows": _packed(4, 0, True, np.float32),
    "ct-int8": _packed(8, 64, True, BF16),
    "ct-int8-zeros": _packed(8, 0, False, BF16),
    "ct-fp8": _scaled(E4M3, "tensor", (0, 0), BF16),
    "ct-fp8-rows": _scaled(E4M3, "channel", (1, 0), np.float32),
    "ct-fp8-blocks": _scaled(E4M3, "block", (128, 128), BF16),
    "ct-w8a8": _scaled(np.int8, "channel", (1, 0), BF16),
    "fp8": _fp8((128, 128), BF16),
    "fp8-matrix": _fp8(None, np.float32),
    "fbgemm": Kind({"quant_method": "fbgemm_fp8"}, _bytes((1, 0), E4M3, np.float32)),
}
SHAPE = {
    "hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
}  # fmt: skip


def write_quantized(folder: Path, name: str, seed: int, **changes: Any) -> Tensors:
    """A folder in the format of KINDS, shards of which no two tensors of a matrix lie in the same one; returns what it
    stands for, float32 by the names of 16-bit files."""
    folder.mkdir(parents=True, exist_ok=True)
    raw, kind = {**CONFIG, **SHAPE, **changes}, KINDS[name]
    config, rng = Config.from_dict(raw), np.random.default_rng(seed)
    exact = random_weights(config, seed)
    files: dict[str, Tensors] = {"a": {}, "b": {}, "c": {}}
    for tensor in expected(config):
        if tensor in matrices(config) and tensor != "lm_head.weight":
            written, exact[tensor] = kind.write(rng, *exact[tensor].shape)
            for shard, (last, array) in zip("abca", sorted(written.items()), strict=False):
                files[shard][tensor.removesuffix("weight") + last] = np.ascontiguousarray(array)
        else:
            files["a"][tensor] = exact[tensor].astype(BF16)
            exact[tensor] = files["a"][tensor].astype(np.float32)
    save(folder, {**raw, "quantization_config": kind.config}, files)
    return exact


def save(folder: Path, config: dict[str, Any], files: dict[str, Tensors]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    for shard, tensors in files.items():
        save_file(tensors, folder / f"{shard}.safetensors")
    index = {name: f"{shard}.safetensors" for shard, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def write_numbers(folder: Path, exact: Tensors, **changes: Any) -> Path:
    """The same model in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    save(folder, {**CONFIG, **SHAPE, **changes}, {"a": exact})
    return folder


class HostOps(Reference):
    """A card's way to keep quantized matrices, on the host."""

    dtype = np.dtype(BF16)

    def quantized(self, plain):
        return quantized.from_plain(plain)

    def weight_bytes(self, config):
        return of_weights(config, 2)
