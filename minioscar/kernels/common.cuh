// common.cuh: the types, masks and small functions that all kernels share.
#ifndef MINIOSCAR_COMMON_CUH
#define MINIOSCAR_COMMON_CUH
#include "device.cuh"

typedef unsigned short bf16;  // its bits: cuda_bf16.h is not needed, which NVRTC alone does not find
constexpr unsigned FULL_MASK = 0xffffffffu;  // all lanes of a warp
constexpr float INITIAL_MAX = -1e30f;        // of a running max, before the first logit
constexpr float MASKED = -1e38f;  // logit of a token that a query must not see: p is 0 whatever the running max

// A word holds two neighbouring BF16 numbers.
DEVICE float low(uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE float to_float(bf16 x) { return __uint_as_float((uint32_t)x << 16); }

// Adds the four numbers of a vector to sums.
DEVICE void accumulate(float (&sum)[4], const float4& x) {
  sum[0] += x.x;
  sum[1] += x.y;
  sum[2] += x.z;
  sum[3] += x.w;
}

// Sets MMA accumulators to 0.
template <int N> DEVICE void clear(float (&x)[N]) {
  UNROLL for (int i = 0; i < N; i++) x[i] = 0.f;
}
template <int N, int M, class T> DEVICE void clear(T (&x)[N][M]) {
  UNROLL for (int i = 0; i < N; i++) clear(x[i]);
}

// The sum over `lanes` neighbouring lanes, a power of two; every one of them gets it.
template <int LANES = 32> DEVICE float warp_sum(float x) {
  UNROLL for (int other = LANES / 2; other; other /= 2) x += __shfl_xor_sync(FULL_MASK, x, other);
  return x;
}
// The largest x of four neighbouring lanes, which share a row of an MMA accumulator.
DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 1));
  return fmaxf(x, __shfl_xor_sync(FULL_MASK, x, 2));
}
DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(FULL_MASK, x, 1);
  return x + __shfl_xor_sync(FULL_MASK, x, 2);
}

// The type of a kernel's results, set by -D: BF16 or, with OUT_BF16=0, float32.
#ifdef OUT_BF16
#if OUT_BF16
typedef bf16 Output;
DEVICE bf16 to_output(float x) { return to_bf16(x); }
DEVICE void store_pair(bf16* to, float x, float y) { *(uint32_t*)to = pack_bf16x2(x, y); }
DEVICE void store_output(bf16* to, float x, float y, float z, float w) {
  *(uint2*)to = make_uint2(pack_bf16x2(x, y), pack_bf16x2(z, w));
}
#else
typedef float Output;
DEVICE float to_output(float x) { return x; }
DEVICE void store_pair(float* to, float x, float y) { *(float2*)to = make_float2(x, y); }
DEVICE void store_output(float* to, float x, float y, float z, float w) { *(float4*)to = make_float4(x, y, z, w); }
#endif
#endif
#endif
