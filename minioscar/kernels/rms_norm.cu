// rms_norm.cu: the norm before a product of more tokens than linear.cu takes, which norms by itself.
//
//   out[m, k] = x[m, k] / rms(x[m]) * norm[k]
//   x, out [M][K], norm [K], bf16; float32 inside, rounded once; K a multiple of 8
//
// grid (M), 256 threads. Its time is latency: a thread loads its vectors of `norm` before the wait, and its vectors
// of x once. The product after it may start early: before its own wait for this launch it reads nothing but weights.
// reads and writes 2 B a number.
constexpr int WARPS = 8;
#include "linear.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm(const bf16* x, const bf16* norm, bf16* out, int K, float eps) {
  constexpr int HELD = 4;  // vectors of 8 numbers in registers: rows of 8192; the rest of longer rows is read twice
  __shared__ float sums[WARPS];
  const uint4 *from = (const uint4*)(x + (size_t)blockIdx.x * K), *weights = (const uint4*)norm;
  uint4* to = (uint4*)(out + (size_t)blockIdx.x * K);
  uint4 weight[HELD], vector[HELD];
  UNROLL for (int j = 0, i = threadIdx.x; j < HELD; j++, i += THREADS)
    if (i < K / 8) weight[j] = weights[i];
  allow_next();
  wait_for_previous();
  UNROLL for (int j = 0, i = threadIdx.x; j < HELD; j++, i += THREADS)
    if (i < K / 8) vector[j] = from[i];
  float sum = 0.f;
  UNROLL for (int j = 0, i = threadIdx.x; j < HELD; j++, i += THREADS)
    if (i < K / 8) sum += sum_squares(vector[j]);
  for (int i = threadIdx.x + HELD * THREADS; i < K / 8; i += THREADS) sum += sum_squares(from[i]);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  const float factor = inverse_rms(sums, K, eps);
  UNROLL for (int j = 0, i = threadIdx.x; j < HELD; j++, i += THREADS)
    if (i < K / 8) to[i] = normalized(vector[j], factor, weight[j]);
  for (int i = threadIdx.x + HELD * THREADS; i < K / 8; i += THREADS) to[i] = normalized(from[i], factor, weights[i]);
}
