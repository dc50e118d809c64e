// rotate_weights.cu: V's half of canalized rotation, into a weight matrix and in place, once when a model is loaded.
//
//   x[o, :, i] = H . x[o, :, i]
//   x [outer, d, inner] bf16, `columns` = outer * inner; H the normalized Walsh-Hadamard matrix
//
// The rows of v_proj [kv_heads, d, hidden] (weights.rotate_values); where inner is 1, as for o_proj's columns, heads
// are rows in memory and rotate_scale.cu has the kernel. grid (ceil(columns / 32)), 256 threads: a block keeps 32
// columns in shared memory, channel by channel, and all threads take each stage of the transform together. Float32,
// rounded to bf16 once. reads and writes 2 B a number.
#include <cuda_bf16.h>
#include "common.cuh"

constexpr int DIM = HEAD_DIM, THREADS = 256, COLUMNS = 32;
static_assert(DIM == 64 || DIM == 128 || DIM == 256, "head_dim");

// f(channel, column, number in memory) for all numbers of this block; neighbouring threads take neighbours in memory.
template <class F> DEVICE void for_each(__nv_bfloat16* x, int num_columns, int inner, F f) {
  for (int n = threadIdx.x; n < DIM * COLUMNS; n += THREADS) {
    const int channel = n / COLUMNS, column = n % COLUMNS, at = blockIdx.x * COLUMNS + column;
    if (column < num_columns) f(channel, column, x[((size_t)(at / inner) * DIM + channel) * inner + at % inner]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) rotate_weights(__nv_bfloat16* x, int columns, int inner) {
  __shared__ float tile[DIM][COLUMNS + 1];
  wait_then_allow_next();
  const int num_columns = min(COLUMNS, columns - (int)blockIdx.x * COLUMNS);
  for_each(x, num_columns, inner,
           [&](int channel, int column, __nv_bfloat16& number) { tile[channel][column] = __bfloat162float(number); });
  __syncthreads();
#pragma unroll 1
  for (int stride = 1; stride < DIM; stride *= 2) {
    for (int n = threadIdx.x; n < DIM / 2 * COLUMNS; n += THREADS) {
      const int pair = n / COLUMNS, column = n % COLUMNS, channel = pair / stride * 2 * stride + pair % stride;
      if (column >= num_columns) continue;
      const float a = tile[channel][column], b = tile[channel + stride][column];
      tile[channel][column] = a + b;
      tile[channel + stride][column] = a - b;
    }
    __syncthreads();
  }
  for_each(x, num_columns, inner, [&](int channel, int column, __nv_bfloat16& number) {
    number = __float2bfloat16_rn(tile[channel][column] * rsqrtf((float)DIM));
  });
}
