"""One product by cuBLAS, which writes into an array that is there: CuPy's own make a new one."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any
ONE = np.ones(1, np.float32)  # where cuBLAS reads alpha and beta


def add_product(y: Array, x: Array, weight: Array, beta: np.ndarray = ONE) -> None:
    """y = beta y + x @ weight.T by cuBLAS: y [tokens, out] bf16 or float32, x [tokens, in], weight [out, in] bf16.

    The product is rounded as y is, then the sum, in every math mode (CUDA 13, H200). CUBLAS_COMPUTE_32F_PEDANTIC rounds
    once, without tensor cores, and takes 25 times as long. On CuPy's current stream. Raises cupy's CUBLASError.
    """
    from cupy.cuda.device import get_cublas_handle
    from cupy.cuda.runtime import CUDA_R_16BF, CUDA_R_32F
    from cupy_backends.cuda.libs import cublas

    (tokens, size), rows, one = x.shape, len(weight), ONE.ctypes.data
    sizes = rows, tokens, size  # cuBLAS counts column by column: y.T += weight @ x.T
    a, b = (weight.data.ptr, CUDA_R_16BF, size), (x.data.ptr, CUDA_R_16BF, size)
    c = y.data.ptr, CUDA_R_32F if y.dtype == np.float32 else CUDA_R_16BF, rows
    how, handle = (cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT_TENSOR_OP), get_cublas_handle()
    cublas.gemmEx(handle, cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, *sizes, one, *a, *b, beta.ctypes.data, *c, *how)
