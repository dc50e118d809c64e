// linear.cuh: what linear.cu and linear_batch.cu share: RMSNorm of pairs of BF16, and the activation.
// Set by -D: SILU (weight holds gate rows, then up rows), OUT_BF16; and WARPS by the file that includes this one.
#ifndef MINIOSCAR_LINEAR_CUH
#define MINIOSCAR_LINEAR_CUH
#include "device.cuh"
#include "output.cuh"

constexpr unsigned FULL = 0xffffffffu;
constexpr int THREADS = WARPS * 32, HALVES = SILU ? 2 : 1;

__device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float squares(uint32_t x) { return fmaf(low(x), low(x), high(x) * high(x)); }
__device__ __forceinline__ float squares(uint4 a) { return squares(a.x) + squares(a.y) + squares(a.z) + squares(a.w); }

// The sum of squares over a block in two steps, in an order of its own: of a warp, to sums[warp]; of all, to what RMSNorm multiplies with.
__device__ __forceinline__ void sum_of_warp(float sum, float* sums) {
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

// Of gate and up, or of the one sum that there is.
__device__ __forceinline__ float activated(const float (&z)[HALVES]) {
  return SILU ? z[0] * rcp_approx(1.f + ex2(-1.4426950f * z[0])) * z[HALVES - 1] : z[0];
}
#endif
