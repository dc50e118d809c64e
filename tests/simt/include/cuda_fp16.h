// cuda_fp16.h: half under CUDA's names.
#pragma once
#include "small_float.h"

using __half = simt::Small<11, -14>;
using __half2 = simt::Pair<__half>;
using half = __half;
using half2 = __half2;

SIMT_INLINE __half __float2half_rn(float a) { return __half::from(a); }
SIMT_INLINE __half __float2half(float a) { return __half::from(a); }
SIMT_INLINE __half __double2half(double a) { return __half::from(a); }
SIMT_INLINE __half __int2half_rn(int a) { return __half::from(a); }
SIMT_INLINE float __half2float(__half a) { return a.value(); }
SIMT_INLINE __half2 __floats2half2_rn(float a, float b) { return {__half::from(a), __half::from(b)}; }
SIMT_INLINE __half2 __float22half2_rn(float2 a) { return {__half::from(a.x), __half::from(a.y)}; }
SIMT_INLINE __half2 __float2half2_rn(float a) { return {__half::from(a), __half::from(a)}; }
SIMT_INLINE float2 __half22float2(__half2 a) { return {a.x.value(), a.y.value()}; }
SIMT_INLINE __half2 __half2half2(__half a) { return {a, a}; }
SIMT_INLINE __half2 __halves2half2(__half a, __half b) { return {a, b}; }
SIMT_INLINE __half2 make_half2(__half a, __half b) { return {a, b}; }
SIMT_INLINE unsigned short __half_as_ushort(__half a) { return a.bits; }
SIMT_INLINE short __half_as_short(__half a) { return (short)a.bits; }
SIMT_INLINE __half __ushort_as_half(unsigned short a) { return __half::raw(a); }
SIMT_INLINE __half __short_as_half(short a) { return __half::raw((uint16_t)a); }
