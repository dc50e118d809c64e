// cuda_bf16.h: bfloat16 under CUDA's names.
#pragma once
#include "small_float.h"

using __nv_bfloat16 = simt::Small<8, -126>;
using __nv_bfloat162 = simt::Pair<__nv_bfloat16>;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

SIMT_INLINE __nv_bfloat16 __float2bfloat16_rn(float a) { return __nv_bfloat16::from(a); }
SIMT_INLINE __nv_bfloat16 __float2bfloat16(float a) { return __nv_bfloat16::from(a); }
SIMT_INLINE __nv_bfloat16 __double2bfloat16(double a) { return __nv_bfloat16::from(a); }
SIMT_INLINE float __bfloat162float(__nv_bfloat16 a) { return a.value(); }
SIMT_INLINE __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__nv_bfloat16::from(a), __nv_bfloat16::from(b)};
}
SIMT_INLINE __nv_bfloat162 __float22bfloat162_rn(float2 a) {
  return {__nv_bfloat16::from(a.x), __nv_bfloat16::from(a.y)};
}
SIMT_INLINE __nv_bfloat162 __float2bfloat162_rn(float a) { return {__nv_bfloat16::from(a), __nv_bfloat16::from(a)}; }
SIMT_INLINE float2 __bfloat1622float2(__nv_bfloat162 a) { return {a.x.value(), a.y.value()}; }
SIMT_INLINE __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return {a, a}; }
SIMT_INLINE __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
SIMT_INLINE __nv_bfloat162 make_bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return {a, b}; }
SIMT_INLINE __nv_bfloat16 __low2bfloat16(__nv_bfloat162 a) { return a.x; }
SIMT_INLINE __nv_bfloat16 __high2bfloat16(__nv_bfloat162 a) { return a.y; }
SIMT_INLINE unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }
SIMT_INLINE __nv_bfloat16 __ushort_as_bfloat16(unsigned short a) { return __nv_bfloat16::raw(a); }
