// sm90/bulk_copies.cuh: mbarriers and bulk copies, of compute capability 9.0 and later. BULK_COPIES says whether they
// exist.
#ifndef MINIOSCAR_BULK_COPIES_CUH
#define MINIOSCAR_BULK_COPIES_CUH
#include "../device.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define BULK_COPIES 1
// True in one lane of a converged warp, and the compiler knows that it is one.
DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected;
}
DEVICE void mbarrier_init(uint64_t* bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_addr(bar)), "r"(arrivals) : "memory");
}
// Makes this thread's mbarrier_init visible to the copy engine.
DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void mbarrier_arrive_expect_tx(uint64_t* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_addr(bar)), "r"(bytes) : "memory");
}
DEVICE void mbarrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_addr(bar)) : "memory");
}
DEVICE void mbarrier_wait(uint64_t* bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra ARRIVED;\nbra "
      "WAIT;\nARRIVED:\n}" ::"r"(smem_addr(bar)),
      "r"(parity)
      : "memory");
}
DEVICE uint64_t l2_evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// Contiguous copy by the copy engine, both addresses and the size multiples of 16; `bar` counts its bytes.
DEVICE void bulk_copy(void* shared, const void* global, int bytes, uint64_t* bar, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(smem_addr(shared)),
      "l"(global), "r"(bytes), "r"(smem_addr(bar)), "l"(policy)
      : "memory");
}
DEVICE void bulk_copy(void* shared, const void* global, int bytes, uint64_t* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(smem_addr(shared)), "l"(global), "r"(bytes), "r"(smem_addr(bar)) : "memory");
}
#else
#define BULK_COPIES 0
#endif
#endif
