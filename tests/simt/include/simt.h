// simt.h: CUDA C++ for g++. Force-included before a kernel's source; together with cuda_fp16.h, cuda_bf16.h and
// device.cuh.
#pragma once
#include <float.h>
#include <limits.h>
// C's own: C++'s would be half of the precompiled header, which every compilation reads. Kernels call sqrtf, not sqrt.
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <math.h>
#undef _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <type_traits>
#include <utility>

#include "../runtime.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ thread_local  // the module's thread-local segment is the shared memory of the block that runs
#define __forceinline__ inline  // g++ decides: a sixth of the time of a compilation, for code that runs as fast
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __maxnreg__(n)
#define __grid_constant__
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 800
#endif

#define SIMT_INLINE inline __attribute__((always_inline))
#define SIMT_LINE int line = __builtin_LINE()

// ---- Where am I.
using uint3 = simt::Index;
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(simt::Index i) : x(i.x), y(i.y), z(i.z) {}
};
#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())
constexpr int warpSize = 32;

// ---- Vector types: as aligned as CUDA's.
#define SIMT_VECTOR(T, name)                                                                   \
  struct name##1 { T x; };                                                                     \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                           \
  struct name##3 { T x, y, z; };                                                               \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; };           \
  SIMT_INLINE name##1 make_##name##1(T x) { return {x}; }                                      \
  SIMT_INLINE name##2 make_##name##2(T x, T y) { return {x, y}; }                              \
  SIMT_INLINE name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                      \
  SIMT_INLINE name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define uint3 simt_uint3  // uint3 is the type of threadIdx
SIMT_VECTOR(unsigned, uint)
#undef uint3
SIMT_VECTOR(int, int)
SIMT_VECTOR(float, float)
SIMT_VECTOR(double, double)
SIMT_VECTOR(short, short)
SIMT_VECTOR(unsigned short, ushort)
SIMT_VECTOR(signed char, char)
SIMT_VECTOR(unsigned char, uchar)
SIMT_VECTOR(long long, longlong)
SIMT_VECTOR(unsigned long long, ulonglong)

namespace simt {
template <class To, class From>
SIMT_INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
template <class T>
SIMT_INLINE T opaque(T x) {  // the *_rn intrinsics are never merged into a fused multiply-add
#if defined(__x86_64__)
  asm("" : "+x"(x));
#else
  asm("" : "+w"(x));
#endif
  return x;
}
}  // namespace simt

// ---- Synchronization and exchange.
SIMT_INLINE void __syncthreads(SIMT_LINE) { simt::barrier(line); }
SIMT_INLINE int __syncthreads_count(int p, SIMT_LINE) { return simt::barrier_reduce(p != 0, '+', line); }
SIMT_INLINE int __syncthreads_and(int p, SIMT_LINE) { return simt::barrier_reduce(p != 0, '&', line); }
SIMT_INLINE int __syncthreads_or(int p, SIMT_LINE) { return simt::barrier_reduce(p != 0, '|', line); }
SIMT_INLINE void __syncwarp(unsigned mask = ~0u, SIMT_LINE) { simt::sync_warp(mask, line); }
SIMT_INLINE void __threadfence() { simt::fence(); }
SIMT_INLINE void __threadfence_block() {}  // orders, but makes nobody wait
SIMT_INLINE void __threadfence_system() { simt::fence(); }
SIMT_INLINE unsigned __ballot_sync(unsigned mask, int p, SIMT_LINE) { return simt::ballot(mask, p != 0, line); }
SIMT_INLINE int __any_sync(unsigned mask, int p, SIMT_LINE) { return simt::ballot(mask, p != 0, line) != 0; }
SIMT_INLINE int __all_sync(unsigned mask, int p, SIMT_LINE) { return simt::ballot(mask, p == 0, line) == 0; }

namespace simt {
template <class T>
SIMT_INLINE T shuffled(unsigned mask, T value, int from, int line) {
  uint64_t in = 0, out;
  static_assert(sizeof(T) <= 8);
  __builtin_memcpy(&in, &value, sizeof value);
  out = shuffle(mask, in, from, line);
  __builtin_memcpy(&value, &out, sizeof value);
  return value;
}
SIMT_INLINE int lane() {
  return (thread_index().x + block_size().x * (thread_index().y + block_size().y * thread_index().z)) & 31;
}
}  // namespace simt

// A source outside of the segment of `width` lanes is the lane itself, except for __shfl_sync, which takes it modulo
// width.
template <class T> SIMT_INLINE T __shfl_sync(unsigned mask, T v, int from, int width = 32, SIMT_LINE) {
  const int l = simt::lane();
  return simt::shuffled(mask, v, (l & ~(width - 1)) | (from & (width - 1)), line);
}
template <class T> SIMT_INLINE T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32, SIMT_LINE) {
  const int l = simt::lane(), from = l ^ x;
  return simt::shuffled(mask, v, from < (l & ~(width - 1)) + width ? from : l, line);
}
template <class T> SIMT_INLINE T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, SIMT_LINE) {
  const int l = simt::lane();
  return simt::shuffled(mask, v, (l & (width - 1)) + int(by) < width ? l + int(by) : l, line);
}
template <class T> SIMT_INLINE T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, SIMT_LINE) {
  const int l = simt::lane();
  return simt::shuffled(mask, v, (l & (width - 1)) >= int(by) ? l - int(by) : l, line);
}
#define SIMT_REDUCE(name, T, expression)                                           \
  SIMT_INLINE T __reduce_##name##_sync(unsigned mask, T v, SIMT_LINE) {            \
    T a = simt::shuffled(mask, v, __builtin_ctz(mask), line);                      \
    for (int i = __builtin_ctz(mask) + 1; i < 32; i++)                             \
      if (mask >> i & 1) { T b = simt::shuffled(mask, v, i, line); a = expression; } \
    return a;                                                                      \
  }
SIMT_REDUCE(add, unsigned, a + b)
SIMT_REDUCE(add, int, a + b) SIMT_REDUCE(max, unsigned, a > b ? a : b) SIMT_REDUCE(max, int, a > b ? a : b)
    SIMT_REDUCE(min, unsigned, a < b ? a : b) SIMT_REDUCE(min, int, a < b ? a : b) SIMT_REDUCE(and, unsigned, a& b)
        SIMT_REDUCE(or, unsigned, a | b) SIMT_REDUCE(xor, unsigned, a ^ b)
// ---- Atomics. Fibers do not interrupt one another, so a plain update is atomic; it only must not be seen as a plain
// access.
#define SIMT_ATOMIC(name, expression)                                                            \
  template <class T> __attribute__((no_sanitize("thread"), noinline)) T name(T* p, std::common_type_t<T> v) { \
    simt::atomic(p, sizeof(T));                                                                  \
    const T old = *p;                                                                            \
    *p = expression;                                                                             \
    return old;                                                                                  \
  }
            SIMT_ATOMIC(atomicAdd, old + v) SIMT_ATOMIC(atomicSub, old - v) SIMT_ATOMIC(atomicExch, v)
                SIMT_ATOMIC(atomicMax, old > v ? old : v) SIMT_ATOMIC(atomicMin, old < v ? old : v)
                    SIMT_ATOMIC(atomicAnd, old& v) SIMT_ATOMIC(atomicOr, old | v) SIMT_ATOMIC(atomicXor, old ^ v)
                        SIMT_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
                            SIMT_ATOMIC(atomicDec, old == 0 || old > v ? v : old - 1) template <class T>
                            __attribute__((no_sanitize("thread"), noinline)) T
    atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> v) {
  simt::atomic(p, sizeof(T));
  const T old = *p;
  if (old == expected) *p = v;
  return old;
}

// ---- Cache hints change nothing here.
template <class T> SIMT_INLINE T __ldg(const T* p) { return *p; }
template <class T> SIMT_INLINE T __ldca(const T* p) { return *p; }
template <class T> SIMT_INLINE T __ldcg(const T* p) { return *p; }
template <class T> SIMT_INLINE T __ldcs(const T* p) { return *p; }
template <class T> SIMT_INLINE T __ldlu(const T* p) { return *p; }
template <class T> SIMT_INLINE T __ldcv(const T* p) { return *p; }
template <class T> SIMT_INLINE void __stcg(T* p, std::common_type_t<T> v) { *p = v; }
template <class T> SIMT_INLINE void __stcs(T* p, std::common_type_t<T> v) { *p = v; }
template <class T> SIMT_INLINE void __stwb(T* p, std::common_type_t<T> v) { *p = v; }
template <class T> SIMT_INLINE void __stwt(T* p, std::common_type_t<T> v) { *p = v; }
SIMT_INLINE size_t __cvta_generic_to_shared(const void* p) { return simt::shared_address(p); }

// ---- Integers and bits.
SIMT_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
SIMT_INLINE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
SIMT_INLINE int __clz(int x) { return x ? __builtin_clz(x) : 32; }
SIMT_INLINE int __ffs(int x) { return __builtin_ffs(x); }
SIMT_INLINE unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
SIMT_INLINE unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned __int128)a * b >> 64;
}
SIMT_INLINE int __mulhi(int a, int b) { return (int)((int64_t)a * b >> 32); }
SIMT_INLINE unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
  return r;
}
SIMT_INLINE unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t all = (uint64_t)b << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned s = selector >> (4 * i) & 15, byte = all >> (8 * (s & 7)) & 255;
    r |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
  }
  return r;
}
SIMT_INLINE unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned by) {
  return (unsigned)(((uint64_t)hi << 32 | lo) >> (by & 31));
}
SIMT_INLINE unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned by) {
  return (unsigned)(((uint64_t)hi << 32 | lo) << (by & 31) >> 32);
}
SIMT_INLINE float __int_as_float(int x) { return simt::bits_of<float>(x); }
SIMT_INLINE float __uint_as_float(unsigned x) { return simt::bits_of<float>(x); }
SIMT_INLINE int __float_as_int(float x) { return simt::bits_of<int>(x); }
SIMT_INLINE unsigned __float_as_uint(float x) { return simt::bits_of<unsigned>(x); }
template <class A, class B> SIMT_INLINE constexpr std::common_type_t<A, B> min(A a, B b) {
  return (std::common_type_t<A, B>)b < (std::common_type_t<A, B>)a ? b : a;
}
template <class A, class B> SIMT_INLINE constexpr std::common_type_t<A, B> max(A a, B b) {
  return (std::common_type_t<A, B>)a < (std::common_type_t<A, B>)b ? b : a;
}
SIMT_INLINE float min(float a, float b) { return fminf(a, b); }
SIMT_INLINE float max(float a, float b) { return fmaxf(a, b); }

// ---- Float. Approximate intrinsics are computed accurately: the card's own may differ in the last bits.
SIMT_INLINE float __fadd_rn(float a, float b) { return simt::opaque(simt::opaque(a) + simt::opaque(b)); }
SIMT_INLINE float __fsub_rn(float a, float b) { return simt::opaque(simt::opaque(a) - simt::opaque(b)); }
SIMT_INLINE float __fmul_rn(float a, float b) { return simt::opaque(a * b); }
SIMT_INLINE float __fdiv_rn(float a, float b) { return a / b; }
SIMT_INLINE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
SIMT_INLINE float __frcp_rn(float a) { return 1.f / a; }
SIMT_INLINE float __fsqrt_rn(float a) { return sqrtf(a); }
SIMT_INLINE float __frsqrt_rn(float a) { return (float)(1. / sqrt((double)a)); }
SIMT_INLINE float __fdividef(float a, float b) { return a / b; }
SIMT_INLINE float rsqrtf(float a) { return (float)(1. / sqrt((double)a)); }
SIMT_INLINE float __expf(float a) { return expf(a); }
SIMT_INLINE float __exp10f(float a) { return powf(10.f, a); }
SIMT_INLINE float __logf(float a) { return logf(a); }
SIMT_INLINE float __log2f(float a) { return log2f(a); }
SIMT_INLINE float __powf(float a, float b) { return powf(a, b); }
SIMT_INLINE float __sinf(float a) { return sinf(a); }
SIMT_INLINE float __cosf(float a) { return cosf(a); }
SIMT_INLINE float __saturatef(float a) { return a > 0.f ? (a < 1.f ? a : 1.f) : 0.f; }
SIMT_INLINE float sinpif(float a) { return (float)sin(M_PI * a); }
SIMT_INLINE float cospif(float a) { return (float)cos(M_PI * a); }
SIMT_INLINE int __float2int_rn(float a) { return (int)rintf(a); }
SIMT_INLINE int __float2int_rz(float a) { return (int)a; }
SIMT_INLINE int __float2int_rd(float a) { return (int)floorf(a); }
SIMT_INLINE int __float2int_ru(float a) { return (int)ceilf(a); }
SIMT_INLINE unsigned __float2uint_rn(float a) { return (unsigned)rintf(a); }
SIMT_INLINE float __int2float_rn(int a) { return (float)a; }
SIMT_INLINE float __uint2float_rn(unsigned a) { return (float)a; }

SIMT_INLINE long long clock64() { return simt::clock_ticks(); }
SIMT_INLINE void __nanosleep(unsigned) {}
SIMT_INLINE void __trap() { simt::trap("__trap()"); }
#undef assert
#define assert(condition) ((condition) ? (void)0 : simt::trap("assertion failed: " #condition))

// ---- For the driver: a kernel with any parameters as a function of void**, and its parameters' types as text
// ("P0008i0004": kind, size).
namespace simt {
template <class... A, size_t... I>
__attribute__((no_sanitize("thread"))) void call(void (*kernel)(A...), void** v, std::index_sequence<I...>) {
  kernel(*(std::remove_reference_t<A>*)v[I]...);
}
template <class... A>
__attribute__((no_sanitize("thread"))) void call(void (*kernel)(A...), void** v) {
  call(kernel, v, std::index_sequence_for<A...>{});
}
template <class A>
constexpr char kind_of() {
  return std::is_pointer_v<A>          ? 'P'
         : std::is_floating_point_v<A> ? 'f'
         : std::is_same_v<A, bool>     ? 'b'
         : !std::is_integral_v<A>      ? 'V'
         : std::is_signed_v<A>         ? 'i'
                                       : 'u';
}
constexpr char digit(size_t n, size_t of) { return char('0' + n / of % 10); }
template <class... A>
struct Signature {
  static constexpr char text[][5] = {
      {kind_of<A>(), digit(sizeof(A), 1000), digit(sizeof(A), 100), digit(sizeof(A), 10), digit(sizeof(A), 1)}..., {}};
};
template <class... A>
const char* signature(void (*)(A...)) { return Signature<A...>::text[0]; }
}  // namespace simt
