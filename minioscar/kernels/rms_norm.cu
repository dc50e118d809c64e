// rms_norm.cu: the norm in front of a product of more tokens than linear.cu takes, which norms by itself.
//
//   out[m, k] = x[m, k] / rms(x[m]) * norm[k]          x, out [M][K], norm [K], bf16; float32 inside, rounded once; K a multiple of 8
//
// grid (M), 256 threads. Latency is all that it takes: a thread asks for its part of `norm` before the wait, and for its part of x once.
// The product behind it may begin early, as it reads nothing but weights before it waits for this launch, which has waited for the one before.
// reads and writes 2 B a number.
constexpr int WARPS = 8;
#include "linear.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(const bf16* x, const bf16* norm, bf16* out, int K, float eps) {
  constexpr int HELD = 4;  // pieces of 8 numbers, of 8192; of longer rows the rest is read where it is needed
  __shared__ float sums[WARPS];
  const uint4 *from = (const uint4*)(x + (size_t)blockIdx.x * K), *weights = (const uint4*)norm;
  uint4* to = (uint4*)(out + (size_t)blockIdx.x * K);
  uint4 weight[HELD], piece[HELD];
#pragma unroll
  for (int j = 0, i = threadIdx.x; j < HELD; j++, i += THREADS)
    if (i < K / 8) weight[j] = weights[i];
  allow_next(), wait_for_previous();
#pragma unroll
  for (int j = 0, i = threadIdx.x; j < HELD; j++, i += THREADS)
    if (i < K / 8) piece[j] = from[i];
  float sum = 0.f;
#pragma unroll
  for (int j = 0, i = threadIdx.x; j < HELD; j++, i += THREADS)
    if (i < K / 8) sum += squares(piece[j]);
  for (int i = threadIdx.x + HELD * THREADS; i < K / 8; i += THREADS) sum += squares(from[i]);
  sum_of_warp(sum, sums);
  __syncthreads();
  const float factor = inverse_rms(sums, K, eps);
#pragma unroll
  for (int j = 0, i = threadIdx.x; j < HELD; j++, i += THREADS)
    if (i < K / 8) to[i] = scaled(piece[j], factor, weight[j]);
  for (int i = threadIdx.x + HELD * THREADS; i < K / 8; i += THREADS) to[i] = scaled(from[i], factor, weights[i]);
}
