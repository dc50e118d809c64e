// linear.cuh: what the linear kernels and rms_norm.cu share: RMSNorm of BF16 vectors, and the activation.
// Set by -D: SILU (weight holds gate rows, then up rows), OUT_BF16; and WARPS by the including file.
#ifndef MINIOSCAR_LINEAR_CUH
#define MINIOSCAR_LINEAR_CUH
#include "common.cuh"

constexpr int THREADS = WARPS * 32, BRANCHES = SILU ? 2 : 1;  // gate and up, or one

DEVICE float sum_squares(uint32_t x) { return fmaf(low(x), low(x), high(x) * high(x)); }
DEVICE float sum_squares(uint4 a) { return sum_squares(a.x) + sum_squares(a.y) + sum_squares(a.z) + sum_squares(a.w); }

// 1 / rms of a row from the warps' sums of squares, added in order.
DEVICE float inverse_rms(const float* sums, int K, float eps) {
  float sum = 0.f;
  for (int w = 0; w < WARPS; w++) sum += sums[w];
  return 1.f / sqrtf(sum / K + eps);
}
DEVICE uint32_t normalized(uint32_t x, float factor, uint32_t weight) {
  return pack_bf16x2(__fmul_rn(__fmul_rn(low(x), factor), low(weight)),
                     __fmul_rn(__fmul_rn(high(x), factor), high(weight)));
}
DEVICE uint4 normalized(uint4 a, float factor, uint4 w) {
  return make_uint4(normalized(a.x, factor, w.x), normalized(a.y, factor, w.y), normalized(a.z, factor, w.z),
                    normalized(a.w, factor, w.w));
}

// silu(gate) * up, or the one sum.
DEVICE float activated(const float (&z)[BRANCHES]) {
  return SILU ? z[0] * rcp_approx(1.f + ex2(-1.4426950f * z[0])) * z[BRANCHES - 1] : z[0];
}
#endif
