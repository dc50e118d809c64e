// device.cuh: the PTX instructions that CUDA C++ has no name for, one thin wrapper each. No inline assembly outside this file.
// Everything here runs on sm_80 and later, but for the bulk copies at the end, which need sm_90 (BULK_COPIES says whether they are there).
#ifndef MINIOSCAR_DEVICE_CUH
#define MINIOSCAR_DEVICE_CUH

#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

__device__ __forceinline__ uint32_t smem_addr(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// --- arithmetic

// d[16 x 8] += a[16 x 16] . b[16 x 8]; lane = 4r + c holds a: rows r, r+8, r, r+8 x columns 2c.., 2c.., 2c+8.., 2c+8..;
// b: rows 2c.., 2c+8.. of column r; d: row r columns 2c, 2c+1, then row r+8.
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// The same with d = a . b: saves the moves that would clear d.
__device__ __forceinline__ void mma_m16n8k16_f16_fresh(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.f));
}
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// 8 x 8 matrix of 16-bit elements over a warp, lane 4r + c holds row r, columns 2c and 2c+1: its transpose.
__device__ __forceinline__ uint32_t movmatrix(uint32_t a) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}
// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l points at the 16 bytes that are row l % 8 of matrix l / 8; lane 4r + c
// gets elements 2c and 2c + 1 of row r of each, or, transposed, of column r.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(smem_addr(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(smem_addr(row)) : "memory");
}
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 where the comparison holds, else 0.
__device__ __forceinline__ float set_ge(float a, float b) {
  float d;
  asm("set.ge.f32.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
__device__ __forceinline__ float set_gt(float a, float b) {
  float d;
  asm("set.gt.f32.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
__device__ __forceinline__ uint32_t pack_f16x2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ unsigned short to_bf16(float x) {
  unsigned short d;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(x));
  return d;
}
__device__ __forceinline__ uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
// Rounds nothing where b is a power of two.
__device__ __forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));  // + -0
  return d;
}

// The same number, but nothing is computed from it before this place: not in front of a loop, where it would take registers all along.
__device__ __forceinline__ int known_from_here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
// What stands behind this reads memory behind it, too: not all at once, where there are no registers for that.
__device__ __forceinline__ void nothing_ahead() { asm volatile("" ::: "memory"); }

// --- memory

// 16 bytes that are read once and never written; d stays what it was where they are not wanted. Volatile: what stands in front of
// wait_for_previous stays there. The whole line of 128 bytes comes to L2, since the rest of it is asked for next: memory gives 64 bytes
// at a time at 0.86 to 0.97 of the rate of a copy, 128 at 1.00 to 1.06 (H200).
__device__ __forceinline__ void load_once(uint4& d, const void* global, bool wanted) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n@p ld.global.cs.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
               : "+r"(d.x), "+r"(d.y), "+r"(d.z), "+r"(d.w) : "l"(global), "r"((int)wanted));
}
// Adds at GPU scope; what was written before it is visible to whoever reads the sum later, and the other way round.
__device__ __forceinline__ int atomic_add_acq_rel(int* p, int x) {
  int old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(x) : "memory");
  return old;
}
// The same, but nothing else follows from it.
__device__ __forceinline__ int atomic_add_relaxed(int* p, int x) {
  int old;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(x) : "memory");
  return old;
}
// What other blocks may read or write at the same time: each word by itself is what was there or what has been written.
__device__ __forceinline__ int load_relaxed(const int* p) {
  int x;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
__device__ __forceinline__ float2 load_relaxed(const float2* p) {
  float2 x;
  asm volatile("ld.relaxed.gpu.global.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(p) : "memory");
  return x;
}
__device__ __forceinline__ float4 load_relaxed(const float4* p) {
  float4 x;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(p) : "memory");
  return x;
}
__device__ __forceinline__ void store_relaxed(int* p, int x) { asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory"); }
__device__ __forceinline__ void store_relaxed(float2* p, float2 x) {
  asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1,%2};" ::"l"(p), "f"(x.x), "f"(x.y) : "memory");
}
__device__ __forceinline__ void store_relaxed(float4* p, float4 x) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(p), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_addr(shared)), "l"(global) : "memory");
}
// The same where `there`; else zeros, and nothing is read. AROUND: all 256 bytes around come to L2, since they are asked for next.
template <bool AROUND>
__device__ __forceinline__ void cp_async_16_or_zero(void* shared, const void* global, bool there) {
  if (AROUND) asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(smem_addr(shared)), "l"(global), "r"(there ? 16 : 0) : "memory");
  else asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_addr(shared)), "l"(global), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of this thread's groups are under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// --- launches that overlap (ops/card.py); nothing happens on cards and in launches that do not

// Waits until every launch before this one has ended and what it wrote can be read. Each kernel calls it in every thread, before it writes
// anything and before it reads what the launch directly before it may have written; whatever came earlier is there from the start.
__device__ __forceinline__ void wait_for_previous() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The blocks of the next launch may take the room that this one's leave. After wait_for_previous: the one before is through then.
__device__ __forceinline__ void allow_next() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define BULK_COPIES 1
// True for one lane of a whole warp, which the compiler then knows to be one.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected;
}
__device__ __forceinline__ void mbarrier_init(uint64_t* bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_addr(bar)), "r"(arrivals) : "memory");
}
// Makes this thread's mbarrier_init visible to the copy engine.
__device__ __forceinline__ void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_addr(bar)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_addr(bar)) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* bar, uint32_t parity) {
  asm volatile("{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra ARRIVED;\nbra WAIT;\nARRIVED:\n}" ::"r"(smem_addr(bar)), "r"(parity) : "memory");
}
__device__ __forceinline__ uint64_t l2_evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// Contiguous copy, both addresses and the size multiples of 16; reports its bytes to `bar`.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, int bytes, uint64_t* bar, uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               ::"r"(smem_addr(shared)), "l"(global), "r"(bytes), "r"(smem_addr(bar)), "l"(policy) : "memory");
}
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, int bytes, uint64_t* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(smem_addr(shared)), "l"(global), "r"(bytes), "r"(smem_addr(bar)) : "memory");
}
#else
#define BULK_COPIES 0
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)  // compiled for sm_90a: instructions of warpgroups, four neighbouring warps whose first is a multiple of 4
// Waits until `threads` have come to barrier `id` (1 ... 15; 0 is __syncthreads), or only comes to it.
__device__ __forceinline__ void named_barrier_wait(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// The registers that each thread of this warpgroup may use from here on: a multiple of 8.
template <int N>
__device__ __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N>
__device__ __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
// Between writing shared memory, or having waited for who did, and the wgmma that reads it.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Operand of a wgmma in shared memory, rows of 128 bytes whose 16-byte pieces are exchanged: piece i of row r of a pattern of 8 rows, which
// begins at a multiple of 1024 bytes, stands at i ^ r. K-major: a row has 64 k; the next 8 rows are `stride` on, and 16 k more are 32 bytes on.
// N-major: a row is one k and has 64 columns; the next 8 k are `stride`, the next 64 columns `leading` bytes on.
__device__ __forceinline__ uint64_t wgmma_operand(const void* shared, int stride, int leading) {
  return (uint64_t)1 << 62 | (uint64_t)(stride >> 4) << 32 | (uint64_t)(leading >> 4) << 16 | (smem_addr(shared) & 0x3ffff) >> 4;
}
// Sums and operands in registers may be touched after the wait, and have been before the fence; for the compiler, `hold` says so.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
template <int N>
__device__ __forceinline__ void hold(float (&d)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}
template <int N>
__device__ __forceinline__ void hold(uint32_t (&d)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(d[i][0]), "+r"(d[i][1]), "+r"(d[i][2]), "+r"(d[i][3])::"memory");
}
// d[64 x N] += a[64 x 16] . b[16 x N], or = where FRESH. Warp w of the warpgroup has rows 16w ...: each 8 columns of d, and a, as in mma_m16n8k16.
#define SUMS_4(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define SUMS_8(d, i) SUMS_4(d, i), SUMS_4(d, i + 1)
#define SUMS_16(d, i) SUMS_8(d, i), SUMS_8(d, i + 2)
#define SUMS_32(d, i) SUMS_16(d, i), SUMS_16(d, i + 4)
#define SUMS_64(d, i) SUMS_32(d, i), SUMS_32(d, i + 8)
#define REGISTERS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define REGISTERS_16 REGISTERS_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define REGISTERS_24 REGISTERS_16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define REGISTERS_32 REGISTERS_24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define REGISTERS_40 REGISTERS_32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define REGISTERS_48 REGISTERS_40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define REGISTERS_56 REGISTERS_48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define REGISTERS_64 REGISTERS_56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define REGISTERS_72 REGISTERS_64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define REGISTERS_80 REGISTERS_72 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define REGISTERS_88 REGISTERS_80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define REGISTERS_96 REGISTERS_88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define REGISTERS_104 REGISTERS_96 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define REGISTERS_112 REGISTERS_104 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define REGISTERS_120 REGISTERS_112 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define REGISTERS_128 REGISTERS_120 ",%120,%121,%122,%123,%124,%125,%126,%127"
// a in registers, b K-major.
template <bool FRESH>
__device__ __forceinline__ void wgmma_bf16_k_major(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_64 "}, {%64,%65,%66,%67}, %68, p, 1, 1, 0;\n}"
               : SUMS_16(d, 0), SUMS_16(d, 4), SUMS_16(d, 8), SUMS_16(d, 12) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(FRESH ? 0 : 1));
}
// a in registers, b N-major; d += a . b.
__device__ __forceinline__ void wgmma_bf16(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
               : SUMS_16(d, 0), SUMS_16(d, 4), SUMS_16(d, 8), SUMS_16(d, 12) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma_bf16(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" REGISTERS_32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
               : SUMS_16(d, 0), SUMS_16(d, 4) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// Both in shared memory, K-major; d += a . b. HALF: registers of d; NEXT: one more.
#define WGMMA_SHARED(N, HALF, NEXT, ...)                                                                                                     \
  __device__ __forceinline__ void wgmma_bf16_shared(float (&d)[N / 8][4], uint64_t a, uint64_t b) {                                          \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS_##HALF "}, %" #HALF ", %" #NEXT ", 1, 1, 1, 0, 0;"   \
                 : __VA_ARGS__ : "l"(a), "l"(b));                                                                                            \
  }
WGMMA_SHARED(16, 8, 9, SUMS_8(d, 0))
WGMMA_SHARED(32, 16, 17, SUMS_16(d, 0))
WGMMA_SHARED(48, 24, 25, SUMS_16(d, 0), SUMS_8(d, 4))
WGMMA_SHARED(64, 32, 33, SUMS_32(d, 0))
WGMMA_SHARED(80, 40, 41, SUMS_32(d, 0), SUMS_8(d, 8))
WGMMA_SHARED(96, 48, 49, SUMS_32(d, 0), SUMS_16(d, 8))
WGMMA_SHARED(112, 56, 57, SUMS_32(d, 0), SUMS_16(d, 8), SUMS_8(d, 12))
WGMMA_SHARED(128, 64, 65, SUMS_64(d, 0))
WGMMA_SHARED(144, 72, 73, SUMS_64(d, 0), SUMS_8(d, 16))
WGMMA_SHARED(160, 80, 81, SUMS_64(d, 0), SUMS_16(d, 16))
WGMMA_SHARED(176, 88, 89, SUMS_64(d, 0), SUMS_16(d, 16), SUMS_8(d, 20))
WGMMA_SHARED(192, 96, 97, SUMS_64(d, 0), SUMS_32(d, 16))
WGMMA_SHARED(208, 104, 105, SUMS_64(d, 0), SUMS_32(d, 16), SUMS_8(d, 24))
WGMMA_SHARED(224, 112, 113, SUMS_64(d, 0), SUMS_32(d, 16), SUMS_16(d, 24))
WGMMA_SHARED(240, 120, 121, SUMS_64(d, 0), SUMS_32(d, 16), SUMS_16(d, 24), SUMS_8(d, 28))
WGMMA_SHARED(256, 128, 129, SUMS_64(d, 0), SUMS_64(d, 16))

// --- tensors in global memory

struct alignas(64) TensorMap { unsigned char opaque[128]; };  // CUtensorMap, as ops/card.py makes it of a raw.TensorMap: rows in boxes 64 numbers wide
__device__ __forceinline__ void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// The box whose first number is `column` of `row`, as a pattern of wgmma_operand; zeros where there is nothing. Reports its bytes to `bar`.
__device__ __forceinline__ void box_copy(void* shared, const TensorMap* map, int column, int row, uint64_t* bar, uint64_t policy) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;"
               ::"r"(smem_addr(shared)), "l"(map), "r"(column), "r"(row), "r"(smem_addr(bar)), "l"(policy) : "memory");
}
__device__ __forceinline__ void box_copy(void* shared, const TensorMap* map, int column, int row, uint64_t* bar) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(smem_addr(shared)), "l"(map), "r"(column), "r"(row), "r"(smem_addr(bar)) : "memory");
}
#endif

#endif
