// rotate_weights.cu: V's half of canalized rotation, into a weight matrix and in place, once when a model is loaded (weights.rotate_values).
//
//   x[o, :, i] = H . x[o, :, i]            x [outer, d, inner] bf16, `columns` = outer * inner; H as in hadamard.cuh
//
// The rows of v_proj [kv_heads, d, hidden], its bias [kv_heads, d, 1], the columns of o_proj [hidden * q_heads, d, 1].
// grid (ceil(columns / 32)), 256 threads: 32 columns stand in shared memory, channel by channel, and the 256 threads go through the stages
// of the transform together. Float32, rounded to bf16 once. reads and writes 2 B a number.
#include <cuda_bf16.h>
#include "device.cuh"
#include "hadamard.cuh"

constexpr int DIM = HEAD_DIM, ORDER = hadamard_order(DIM), THREADS = 256, COLUMNS = 32;
static_assert(DIM == 64 || DIM == 80 || DIM == 96 || DIM == 128 || DIM == 256, "head_dim");

// f(channel, column, number in memory) for all that this block has; what is side by side in memory is for threads side by side.
template <class F>
__device__ __forceinline__ void each(__nv_bfloat16* x, int own, int inner, F f) {
  for (int n = threadIdx.x; n < DIM * COLUMNS; n += THREADS) {
    const int channel = inner == 1 ? n % DIM : n / COLUMNS, column = inner == 1 ? n / DIM : n % COLUMNS, at = blockIdx.x * COLUMNS + column;
    if (column < own) f(channel, column, x[((size_t)(at / inner) * DIM + channel) * inner + at % inner]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) rotate_weights(__nv_bfloat16* x, int columns, int inner) {
  __shared__ float tile[DIM][COLUMNS + 1];
  wait_for_previous(), allow_next();
  const int own = min(COLUMNS, columns - (int)blockIdx.x * COLUMNS);
  each(x, own, inner, [&](int channel, int column, __nv_bfloat16& number) { tile[channel][column] = __bfloat162float(number); });
  __syncthreads();
#pragma unroll 1
  for (int stride = ORDER; stride < DIM; stride *= 2) {
    for (int n = threadIdx.x; n < DIM / 2 * COLUMNS; n += THREADS) {
      const int pair = n / COLUMNS, column = n % COLUMNS, channel = pair / stride * 2 * stride + pair % stride;
      if (column >= own) continue;
      const float a = tile[channel][column], b = tile[channel + stride][column];
      tile[channel][column] = a + b, tile[channel + stride][column] = a - b;
    }
    __syncthreads();
  }
  each(x, own, inner, [&](int channel, int column, __nv_bfloat16& number) {
    const int block = channel / ORDER * ORDER;
    float sum = tile[channel][column];
    if constexpr (ORDER > 1) {
      sum = 0.f;
      for (int j = 0; j < ORDER; j++) sum += paley_negative<ORDER>(j, channel - block) ? -tile[block + j][column] : tile[block + j][column];
    }
    number = __float2bfloat16_rn(sum * rsqrtf((float)DIM));
  });
}
