// device.cuh: the PTX instructions that CUDA C++ has no name for, one thin wrapper each, of compute capability 8.0 and
// later. Inline assembly is in this file and in sm90/ alone.
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

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

DEVICE uint32_t smem_addr(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// --- arithmetic

// d[16 x 8] += a[16 x 16] . b[16 x 8]. Lane 4r + c holds a: rows r, r+8, r, r+8, columns 2c.., 2c.., 2c+8.., 2c+8..;
// b: rows 2c.., 2c+8.. of column r; d: row r, columns 2c and 2c+1, then row r+8.
#define MMA_OPERANDS uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1
#define MMA(NAME, TYPE)                                                                                             \
  DEVICE void NAME(float (&d)[4], MMA_OPERANDS) {                                                                   \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "                                     \
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                            \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                   \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                           \
  }
MMA(mma_m16n8k16_f16, "f16")
MMA(mma_m16n8k16_bf16, "bf16")
// d = a . b: saves the moves that would clear d.
#define MMA_ZERO(NAME, TYPE)                                                                                        \
  DEVICE void NAME(float (&d)[4], MMA_OPERANDS) {                                                                   \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "                                     \
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"                                        \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                   \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.f));                                 \
  }
MMA_ZERO(mma_m16n8k16_f16_zero, "f16")
MMA_ZERO(mma_m16n8k16_bf16_zero, "bf16")
// 8 x 8 matrix of 16-bit elements over a warp, lane 4r + c holds row r, columns 2c and 2c+1: its transpose.
DEVICE uint32_t movmatrix(uint32_t a) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}
// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l points at the 16 bytes of row l % 8 of matrix l /
// 8. Lane 4r + c gets elements 2c and 2c + 1 of row r of each, or, transposed, of column r.
DEVICE void ldmatrix_x4(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(smem_addr(row)) : "memory");
}
DEVICE void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(smem_addr(row)) : "memory");
}
// Functions of one instruction without side effects.
#define PTX(TYPE, NAME, PARAMETERS, INSTRUCTION, RESULT, ...) \
  DEVICE TYPE NAME PARAMETERS {                               \
    TYPE result;                                              \
    asm(INSTRUCTION : RESULT(result) : __VA_ARGS__);          \
    return result;                                            \
  }
PTX(float, ex2, (float x), "ex2.approx.ftz.f32 %0, %1;", "=f", "f"(x))
PTX(float, rcp_approx, (float x), "rcp.approx.ftz.f32 %0, %1;", "=f", "f"(x))
// 1 where the comparison holds, else 0.
PTX(float, set_ge, (float a, float b), "set.ge.f32.f32 %0, %1, %2;", "=f", "f"(a), "f"(b))
PTX(float, set_gt, (float a, float b), "set.gt.f32.f32 %0, %1, %2;", "=f", "f"(a), "f"(b))
PTX(uint32_t, pack_f16x2, (float low, float high), "cvt.rn.f16x2.f32 %0, %1, %2;", "=r", "f"(high), "f"(low))
PTX(uint32_t, pack_bf16x2, (float low, float high), "cvt.rn.bf16x2.f32 %0, %1, %2;", "=r", "f"(high), "f"(low))
PTX(unsigned short, to_bf16, (float x), "cvt.rn.bf16.f32 %0, %1;", "=h", "f"(x))
PTX(uint32_t, mul_f16x2, (uint32_t a, uint32_t b), "mul.rn.f16x2 %0, %1, %2;", "=r", "r"(a), "r"(b))
// a * b + -0: rounds nothing where b is a power of two.
PTX(uint32_t, mul_bf16x2, (uint32_t a, uint32_t b), "fma.rn.bf16x2 %0, %1, %2, %3;", "=r", "r"(a), "r"(b),
    "r"(0x80008000u))

// The float16 number in the low, or the high, half of a word.
DEVICE float low_f16(uint32_t pair) {
  float x;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, low;\n}" : "=f"(x) : "r"(pair));
  return x;
}
DEVICE float high_f16(uint32_t pair) {
  float x;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, high;\n}" : "=f"(x) : "r"(pair));
  return x;
}

// x, whose value the compiler does not know before this point: it cannot compute anything from x ahead of a loop,
// where the result would hold registers throughout.
DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
// Keeps later loads from being hoisted above this point, which would need too many registers.
DEVICE void compiler_barrier() { asm volatile("" ::: "memory"); }

// --- memory

// Loads 16 bytes that are read once and never written; without `predicate` d keeps its value. Volatile: a load before
// wait_for_previous stays before it. L2 fetches the whole line of 128 bytes, whose rest is loaded next: memory
// delivers 64 bytes at a time at 0.86 to 0.97 of the copy rate, 128 at 1.00 to 1.06 (H200).
DEVICE void load_once(uint4& d, const void* global, bool predicate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n@p ld.global.cs.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
               : "+r"(d.x), "+r"(d.y), "+r"(d.z), "+r"(d.w) : "l"(global), "r"((int)predicate));
}
DEVICE void load_once(uint2& d, const void* global, bool predicate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %3, 0;\n@p ld.global.cs.v2.u32 {%0,%1}, [%2];\n}"
               : "+r"(d.x), "+r"(d.y) : "l"(global), "r"((int)predicate));
}
DEVICE void load_once(uint32_t& d, const void* global, bool predicate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %2, 0;\n@p ld.global.cs.u32 %0, [%1];\n}"
               : "+r"(d) : "l"(global), "r"((int)predicate));
}
#define ATOMIC_ADD(NAME, ORDER)                                                                                       \
  DEVICE int NAME(int* p, int x) {                                                                                  \
    int old;                                                                                                        \
    asm volatile("atom." ORDER ".gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(x) : "memory");        \
    return old;                                                                                                     \
  }
// Adds at GPU scope: writes before it are visible to a thread that reads the sum later, and the other way round.
ATOMIC_ADD(atomic_add_acq_rel, "acq_rel")
ATOMIC_ADD(atomic_add_relaxed, "relaxed")  // orders no other access
// Memory that other blocks may access at the same time: each 32-bit word by itself is either the old or the new one.
DEVICE int load_relaxed(const int* p) {
  int x;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
DEVICE float2 load_relaxed(const float2* p) {
  float2 x;
  asm volatile("ld.relaxed.gpu.global.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(p) : "memory");
  return x;
}
DEVICE float4 load_relaxed(const float4* p) {
  float4 x;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(p) : "memory");
  return x;
}
DEVICE void store_relaxed(int* p, int x) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
DEVICE void store_relaxed(float2* p, float2 x) {
  asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1,%2};" ::"l"(p), "f"(x.x), "f"(x.y) : "memory");
}
DEVICE void store_relaxed(float4* p, float4 x) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(p), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}
DEVICE void cp_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_addr(shared)), "l"(global) : "memory");
}
// 4 bytes if `valid`, else zeros without a read.
DEVICE void cp_async_4_or_zero(void* shared, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_addr(shared)), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
}
// 16 bytes if `valid`, else zeros without a read. PREFETCH: L2 fetches the 256 bytes around, which are copied next.
template <bool PREFETCH> DEVICE void cp_async_16_or_zero(void* shared, const void* from, bool valid) {
  const uint32_t to = smem_addr(shared), bytes = valid ? 16 : 0;
  if (PREFETCH)
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are in flight.
template <int N> DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// --- overlapping launches (ops/launch.py); no effect on cards and in launches without them

// Waits until every earlier launch has ended and its writes are visible. Each kernel calls it in every thread before
// it writes anything and before it reads what the launch directly before may have written; results of older launches
// are visible from the start.
DEVICE void wait_for_previous() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Blocks of the next launch may start where this launch's blocks leave a multiprocessor. After wait_for_previous, so
// that at most two launches overlap; before it if all that the next one reads early is older than the launch before.
DEVICE void allow_next() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
DEVICE void wait_then_allow_next() {
  wait_for_previous();
  allow_next();
}
#endif
