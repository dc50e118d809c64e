"""The same operations on CuPy: the reference's array code in bfloat16, and raw kernels (kernels/*.cu) where they pay."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from ..cache import BF16
from ..oscar import Scheme, hadamard, odd_part
from .reference import Reference

Array = Any
KERNELS = Path(__file__).resolve().parent.parent / "kernels"
VOCABULARY = 16384  # rows of the last projection that are widened to float32 at once


@cache
def kernel(name: str) -> cupy.RawKernel:
    """The kernel of kernels/<name>.cu, compiled by NVRTC for the card that is there; CuPy keeps the binary on disk."""
    return cupy.RawModule(code=(KERNELS / f"{name}.cu").read_text(), options=("-std=c++17",)).get_function(name)


class Cuda(Reference):
    name = "cuda"
    xp = cupy
    dtype = BF16

    def array(self, x: np.ndarray) -> Array:
        return cupy.asarray(np.asarray(x).astype(self.dtype))

    def numpy(self, x: Array) -> np.ndarray:
        return cupy.asnumpy(x)

    def free_bytes(self) -> int:
        return cupy.cuda.runtime.memGetInfo()[0] + cupy.get_default_memory_pool().free_bytes()

    def widen(self, x: Array) -> Array:
        return x.astype(cupy.float32)

    def logits(self, x: Array, weight: Array) -> Array:
        """In float32: the difference between two tokens is often smaller than the bfloat16 rounding of a logit."""
        x = x.astype(cupy.float32)
        parts = [x @ weight[i : i + VOCABULARY].astype(cupy.float32).T for i in range(0, len(weight), VOCABULARY)]
        return cupy.concatenate(parts, axis=1)

    def rotate_scale(self, q: Array, k: Array, scheme: Scheme) -> tuple[Array, Array, Array | None]:
        if not (scheme.rotate or scheme.scale):
            return q, k, None
        q, k = cupy.ascontiguousarray(q), cupy.ascontiguousarray(k)
        tokens, q_heads, dim = q.shape
        q_out, k_out = cupy.empty_like(q), cupy.empty_like(k)
        norms = cupy.empty(tokens, cupy.float32) if scheme.scale else None
        order = odd_part(dim) if scheme.rotate else 1
        sizes = map(np.int32, (q_heads, k.shape[1], dim, order, scheme.rotate))
        kernel("rotate_scale")((tokens,), (128,), (q, k, _odd_matrix(order), q_out, k_out, _or_null(norms), *sizes))
        return q_out, k_out, norms

    def pack(self, layer: dict[str, Array], slot: int, first: int, keys: Array, values: Array, scheme: Scheme) -> None:
        keys, values = cupy.ascontiguousarray(keys), cupy.ascontiguousarray(values)
        heads, n, dim = keys.shape
        outputs = ("norms", "key_codes", "key_step", "key_min", "value_codes", "value_step", "value_min")
        rows = [_or_null(layer[name][slot] if name in layer else None) for name in outputs]
        group, capacity = scheme.group, layer["key_codes"].shape[2]
        sizes = (n, dim, first, capacity, scheme.bits, group, scheme.value_group(dim), scheme.key_axis == "token")
        factors = (scheme.shrink, scheme.shrink / ((2**scheme.bits - 1) / 2))
        arguments = (keys, values, *rows, *map(np.int32, sizes), *map(np.float32, factors))
        kernel("pack")((n // group, heads), (128,), arguments, shared_mem=group * dim)
        self.keep_sinks(layer, slot, first, keys, values, scheme)


@cache
def _odd_matrix(order: int) -> cupy.ndarray:
    """P of rotate_scale.cu: entries +-1."""
    return cupy.asarray(hadamard(order) * np.float32(np.sqrt(order)))


def _or_null(array: Array | None) -> Array | np.uint64:
    return np.uint64(0) if array is None else array
