"""The one thing of cuBLAS that CuPy has no name for: a product that is added to what is there, which saves a pass over both."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any
ONE = np.ones(1, np.float32)  # where cuBLAS reads alpha and beta


def add_product(y: Array, x: Array, weight: Array) -> None:
    """y += x @ weight.T: y [tokens, out], x [tokens, in], weight [out, in], all bf16 and contiguous.

    The product is rounded to bf16, then the sum, as by two operations one after the other: so cuBLAS's tensor-core kernels do it, whatever
    its math mode (CUDA 13, H200). CUBLAS_COMPUTE_32F_PEDANTIC rounds once, without tensor cores, and takes 25 times as long.
    On CuPy's current stream. Raises cupy's CUBLASError.
    """
    from cupy.cuda.device import get_cublas_handle
    from cupy.cuda.runtime import CUDA_R_16BF
    from cupy_backends.cuda.libs import cublas

    (tokens, size), rows, one = x.shape, len(weight), ONE.ctypes.data
    # column by column, as cuBLAS counts, the arrays are their transposes: y.T += weight @ x.T
    sizes = rows, tokens, size
    a, b, c = (weight.data.ptr, CUDA_R_16BF, size), (x.data.ptr, CUDA_R_16BF, size), (y.data.ptr, CUDA_R_16BF, rows)
    how, handle = (cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT_TENSOR_OP), get_cublas_handle()
    cublas.gemmEx(handle, cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, *sizes, one, *a, *b, one, *c, *how)
