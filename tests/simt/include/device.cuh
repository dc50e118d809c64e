// device.cuh: host versions of minioscar/kernels/device.cuh. Its include guard is the same: included first, this file
// replaces it.
#ifndef MINIOSCAR_DEVICE_CUH
#define MINIOSCAR_DEVICE_CUH
#define MINIOSCAR_BULK_COPIES_CUH  // below
#include "cuda_bf16.h"
#include "cuda_fp16.h"

#define DEVICE __device__ __forceinline__
#define UNROLL

SIMT_INLINE uint32_t smem_addr(const void* p) { return simt::shared_address(p); }

// --- arithmetic

// Products and sums in double, rounded once to float: a tensor core keeps fewer bits of each addend.
#define SIMT_MMA(name, bf16, accumulator)                                                                           \
  SIMT_INLINE void name(float(&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, \
                        SIMT_LINE) {                                                                                \
    const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};                                                        \
    const float zero[4] = {0, 0, 0, 0}, *c = accumulator;                                                           \
    (void)zero, simt::mma_16816(d, a, b, c, bf16, line);                                                            \
  }
SIMT_MMA(mma_m16n8k16_f16, false, d)
SIMT_MMA(mma_m16n8k16_f16_zero, false, zero)
SIMT_MMA(mma_m16n8k16_bf16, true, d)
SIMT_MMA(mma_m16n8k16_bf16_zero, true, zero)
SIMT_INLINE uint32_t movmatrix(uint32_t a, SIMT_LINE) { return simt::movmatrix(a, line); }
SIMT_INLINE void ldmatrix_x4(uint32_t (&d)[4], const void* row, SIMT_LINE) { simt::ldmatrix(d, 4, false, row, line); }
SIMT_INLINE void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row, SIMT_LINE) {
  simt::ldmatrix(d, 4, true, row, line);
}
SIMT_INLINE float ex2(float x) {  // .ftz: subnormals become zero
  const float y = exp2f(fabsf(x) < FLT_MIN ? 0.f : x);
  return y < FLT_MIN ? 0.f : y;
}
SIMT_INLINE float rcp_approx(float x) {  // 1 ulp is promised: one or the other neighbour of 1/x, as a hash of x decides
  const double exact = 1. / (fabsf(x) < FLT_MIN ? copysignf(0.f, x) : x);
  float y = (float)exact;
  if (y != exact && (__float_as_uint(x) * 0x9E3779B9u >> 31)) y = nextafterf(y, y < exact ? INFINITY : -INFINITY);
  return fabsf(y) < FLT_MIN ? copysignf(0.f, y) : y;
}
SIMT_INLINE float set_ge(float a, float b) { return a >= b ? 1.f : 0.f; }
SIMT_INLINE float set_gt(float a, float b) { return a > b ? 1.f : 0.f; }
SIMT_INLINE uint32_t pack_f16x2(float low, float high) { return simt::bits_of<uint32_t>(__floats2half2_rn(low, high)); }
SIMT_INLINE uint32_t pack_bf16x2(float low, float high) {
  return simt::bits_of<uint32_t>(__floats2bfloat162_rn(low, high));
}
SIMT_INLINE unsigned short to_bf16(float x) { return pack_bf16x2(x, 0.f) & 0xffff; }
SIMT_INLINE uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  return simt::bits_of<uint32_t>(__hmul2(simt::bits_of<__half2>(a), simt::bits_of<__half2>(b)));
}
SIMT_INLINE uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  return simt::bits_of<uint32_t>(__hmul2(simt::bits_of<__nv_bfloat162>(a), simt::bits_of<__nv_bfloat162>(b)));
}
SIMT_INLINE float low_f16(uint32_t pair) { return __half2float(__ushort_as_half((unsigned short)pair)); }
SIMT_INLINE float high_f16(uint32_t pair) { return low_f16(pair >> 16); }
SIMT_INLINE int opaque(int x) { return x; }
SIMT_INLINE void compiler_barrier() {}

// --- memory

template <class T>
SIMT_INLINE void load_once(T& d, const void* global, bool predicate) {
  if (predicate) d = *(const T*)global;
}
__attribute__((no_sanitize("thread"), noinline)) inline int atomic_add_acq_rel(int* p, int x) {
  simt::atomic(p, sizeof *p, true);
  return (*p += x) - x;
}
__attribute__((no_sanitize("thread"), noinline)) inline int atomic_add_relaxed(int* p, int x) {
  simt::relaxed(p, sizeof *p, simt::ATOMIC);
  return (*p += x) - x;
}
template <class T>
__attribute__((no_sanitize("thread"), noinline)) T load_relaxed(const T* p) {
  simt::relaxed(p, sizeof *p, simt::RELAXED_READ);
  return *p;
}
template <class T>
__attribute__((no_sanitize("thread"), noinline)) void store_relaxed(T* p, T x) {
  simt::relaxed(p, sizeof *p, simt::RELAXED_WRITE);
  *p = x;
}
SIMT_INLINE void cp_async_16(void* shared, const void* global) { simt::copy_async(shared, global, 16, 16); }
SIMT_INLINE void cp_async_4_or_zero(void* shared, const void* global, bool valid) {
  simt::copy_async(shared, global, 4, valid ? 4 : 0);
}
template <bool>
SIMT_INLINE void cp_async_16_or_zero(void* shared, const void* global, bool valid) {
  simt::copy_async(shared, global, 16, valid ? 16 : 0);
}
SIMT_INLINE void cp_async_commit() { simt::copy_commit(); }
template <int N>
SIMT_INLINE void cp_async_wait() { simt::copy_wait(N); }

SIMT_INLINE void wait_for_previous() {}  // launches run one after the other here
SIMT_INLINE void allow_next() {}
SIMT_INLINE void wait_then_allow_next() {}

#define BULK_COPIES (__CUDA_ARCH__ >= 900)
#if BULK_COPIES
SIMT_INLINE bool elect_one() { return threadIdx.x % 32 == 0; }
SIMT_INLINE void mbarrier_init(uint64_t* bar, int arrivals) { simt::mbarrier_init(bar, arrivals); }
SIMT_INLINE void mbarrier_init_fence() {}
SIMT_INLINE void mbarrier_arrive_expect_tx(uint64_t* bar, int bytes) { simt::mbarrier_arrive(bar, bytes); }
SIMT_INLINE void mbarrier_arrive(uint64_t* bar) { simt::mbarrier_arrive(bar, 0); }
SIMT_INLINE void mbarrier_wait(uint64_t* bar, uint32_t parity, SIMT_LINE) { simt::mbarrier_wait(bar, parity, line); }
SIMT_INLINE uint64_t l2_evict_first() { return 0; }
SIMT_INLINE void bulk_copy(void* shared, const void* global, int bytes, uint64_t* bar, uint64_t) {
  simt::copy_bulk(shared, global, bytes, bar);
}
SIMT_INLINE void bulk_copy(void* shared, const void* global, int bytes, uint64_t* bar) {
  simt::copy_bulk(shared, global, bytes, bar);
}
#endif
#endif
