// sm90/wgmma.cuh: host versions of minioscar/kernels/sm90/wgmma.cuh, whose include guard this file has.
#ifndef MINIOSCAR_WGMMA_CUH
#define MINIOSCAR_WGMMA_CUH
#if BULK_COPIES
SIMT_INLINE void named_barrier_wait(int id, int threads, SIMT_LINE) { simt::barrier_named(id, threads, line); }
SIMT_INLINE void named_barrier_arrive(int id, int threads) { simt::barrier_named_arrive(id, threads); }
template <int N> SIMT_INLINE void decrease_registers() {}
template <int N> SIMT_INLINE void increase_registers() {}
SIMT_INLINE void fence_async() {}
SIMT_INLINE uint64_t wgmma_operand(const void* shared, int stride, int leading) {
  return (uint64_t)1 << 62 | (uint64_t)(stride >> 4) << 32 | (uint64_t)(leading >> 4) << 16 |
         (smem_addr(shared) & 0x3ffff) >> 4;
}
SIMT_INLINE void wgmma_fence() { simt::wgmma_fence(); }
SIMT_INLINE void wgmma_commit() { simt::wgmma_commit(); }
template <int N> SIMT_INLINE void wgmma_wait(SIMT_LINE) { simt::wgmma_wait(N, line); }
template <class T> SIMT_INLINE void compiler_fence(T&) {}
template <bool OVERWRITE, int N>
SIMT_INLINE void wgmma_bf16_k_major(float (&d)[N][4], const uint32_t (&a)[4], uint64_t b, SIMT_LINE) {
  static_assert((N >= 2 && N <= 10) || N == 16);
  simt::wgmma(&d[0][0], 8 * N, OVERWRITE, a, 0, b, false, line);
}
template <int N> SIMT_INLINE void wgmma_bf16(float (&d)[N][4], const uint32_t (&a)[4], uint64_t b, SIMT_LINE) {
  static_assert(N == 8 || N == 10 || N == 16);
  simt::wgmma(&d[0][0], 8 * N, false, a, 0, b, true, line);
}
template <int N> SIMT_INLINE void wgmma_bf16_shared(float (&d)[N][4], uint64_t a, uint64_t b, SIMT_LINE) {
  static_assert(N % 2 == 0 && N <= 32);
  simt::wgmma(&d[0][0], 8 * N, false, nullptr, a, b, false, line);
}

struct TensorMap { simt::Tensor tensor; char rest[128 - sizeof(simt::Tensor)]; };
SIMT_INLINE void tma_load_2d(void* shared, const TensorMap* map, int column, int row, uint64_t* bar, uint64_t) {
  simt::copy_tensor_box(shared, map->tensor, column, row, bar);
}
SIMT_INLINE void tma_load_2d(void* shared, const TensorMap* map, int column, int row, uint64_t* bar) {
  tma_load_2d(shared, map, column, row, bar, 0);
}
#endif
#endif
