// linear.cuh: what linear.cu and linear_batch.cu share: RMSNorm of pairs of BF16, and what follows a product.
// Set by -D: SILU (weight holds gate rows, then up rows), OUT_BF16.
#ifndef MINIOSCAR_LINEAR_CUH
#define MINIOSCAR_LINEAR_CUH
#include "device.cuh"
#include "output.cuh"

constexpr unsigned FULL = 0xffffffffu;
constexpr int WARPS = 8, THREADS = WARPS * 32, HALVES = SILU ? 2 : 1;

__device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float squares(uint32_t x) { return fmaf(low(x), low(x), high(x) * high(x)); }

// This warp's part of the sum of squares of K numbers, to sums[warp]; then what RMSNorm multiplies them with.
__device__ __forceinline__ void sum_squares(const bf16* x, float* sums, int K) {
  float sum = 0.f;
  for (int i = threadIdx.x; i < K / 8; i += THREADS) {
    const uint4 a = *(const uint4*)(x + 8 * i);
    sum += squares(a.x) + squares(a.y) + squares(a.z) + squares(a.w);
  }
  for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(FULL, sum, other);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
}
__device__ __forceinline__ float inverse_rms(const float* sums, int K, float eps) {
  float sum = 0.f;
  for (int w = 0; w < WARPS; w++) sum += sums[w];
  return 1.f / sqrtf(sum / K + eps);
}
__device__ __forceinline__ uint32_t scaled(uint32_t x, float factor, uint32_t weight) {
  return pack_bf16x2(__fmul_rn(__fmul_rn(low(x), factor), low(weight)), __fmul_rn(__fmul_rn(high(x), factor), high(weight)));
}
__device__ __forceinline__ uint4 scaled(uint4 a, float factor, uint4 w) {
  return make_uint4(scaled(a.x, factor, w.x), scaled(a.y, factor, w.y), scaled(a.z, factor, w.z), scaled(a.w, factor, w.w));
}

// out[m, n] from the sums of row n of each half of the weight, `rows` rows a half.
__device__ __forceinline__ void finish(const float (&sums)[HALVES], const bf16* bias, const bf16* residual, Output* out, int m, int n, int rows) {
  float z[HALVES];
#pragma unroll
  for (int h = 0; h < HALVES; h++) z[h] = sums[h] + (bias ? __bfloat162float(bias[h * rows + n]) : 0.f);
  const size_t at = (size_t)m * rows + n;
  float y = z[0];
  if (SILU) y = y / (1.f + ex2(-1.4426950f * y)) * z[HALVES - 1];
  out[at] = to_output(residual ? y + __bfloat162float(residual[at]) : y);
}
#endif
