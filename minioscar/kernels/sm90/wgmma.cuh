// sm90/wgmma.cuh: the PTX instructions of compute capability 9.0 alone (compiled for sm_90a): named barriers,
// register reallocation, warpgroup MMAs, and copies of tensor boxes. A warpgroup is four neighbouring warps whose
// first is a multiple of 4.
#ifndef MINIOSCAR_WGMMA_CUH
#define MINIOSCAR_WGMMA_CUH
#include "bulk_copies.cuh"

// Waits at barrier `id` (1 ... 15; 0 is __syncthreads) for `threads` arrivals, or arrives without waiting.
DEVICE void named_barrier_wait(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Registers that each thread of this warpgroup may use from here on: a multiple of 8.
template <int N>
DEVICE void decrease_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N>
DEVICE void increase_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
// Orders writes of shared memory (also of other threads, after a barrier) before the wgmma that reads them.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Descriptor of a wgmma operand in shared memory with 128-byte swizzling: rows of 128 bytes, 8 rows a pattern that
// begins at a multiple of 1024 bytes, 16-byte vector i of row r at i ^ r. K-major: a row has 64 k; the next 8 rows
// are `stride` bytes on, 16 k more are 32 bytes on. N-major: a row is one k and has 64 columns; the next 8 k are
// `stride`, the next 64 columns `leading` bytes on.
DEVICE uint64_t wgmma_operand(const void* shared, int stride, int leading) {
  return (uint64_t)1 << 62 | (uint64_t)(stride >> 4) << 32 | (uint64_t)(leading >> 4) << 16 |
         (smem_addr(shared) & 0x3ffff) >> 4;
}
// Accumulators and register operands of a wgmma may be accessed before wgmma_fence and after wgmma_wait only.
// compiler_fence keeps the compiler from moving an access across.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
template <int N>
DEVICE void compiler_fence(float (&d)[N][4]) {
  UNROLL for (int i = 0; i < N;
              i++) asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}
template <int N>
DEVICE void compiler_fence(uint32_t (&d)[N][4]) {
  UNROLL for (int i = 0; i < N;
              i++) asm volatile("" : "+r"(d[i][0]), "+r"(d[i][1]), "+r"(d[i][2]), "+r"(d[i][3])::"memory");
}
// d[64 x N] += a[64 x 16] . b[16 x N], or = with OVERWRITE. Warp w of the warpgroup has rows 16w ...; a and each 8
// columns of d are laid out as in mma_m16n8k16.
#define SUMS_4(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define SUMS_8(d, i) SUMS_4(d, i), SUMS_4(d, i + 1)
#define SUMS_16(d, i) SUMS_8(d, i), SUMS_8(d, i + 2)
#define SUMS_32(d, i) SUMS_16(d, i), SUMS_16(d, i + 4)
#define SUMS_64(d, i) SUMS_32(d, i), SUMS_32(d, i + 8)
#define REGISTERS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define REGISTERS_12 REGISTERS_8 ",%8,%9,%10,%11"
#define REGISTERS_16 REGISTERS_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define REGISTERS_20 REGISTERS_16 ",%16,%17,%18,%19"
#define REGISTERS_24 REGISTERS_16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define REGISTERS_28 REGISTERS_24 ",%24,%25,%26,%27"
#define REGISTERS_32 REGISTERS_24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define REGISTERS_36 REGISTERS_32 ",%32,%33,%34,%35"
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
// a in registers, b K-major. HALF: registers of d; the numbers after it are those of a, b and the predicate.
#define WGMMA_K_MAJOR(N, HALF, A0, A1, A2, A3, B, PREDICATE, ...)                                              \
  template <bool OVERWRITE>                                                                                    \
  DEVICE void wgmma_bf16_k_major(float(&d)[N / 8][4], const uint32_t(&a)[4], uint64_t b) {                     \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #PREDICATE ", 0;\n"                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS_##HALF "}, {%" #A0 "," \
                 "%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", p, 1, 1, 0;\n}"                                        \
                 : __VA_ARGS__                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(OVERWRITE ? 0 : 1));                \
  }
WGMMA_K_MAJOR(16, 8, 8, 9, 10, 11, 12, 13, SUMS_8(d, 0))
WGMMA_K_MAJOR(24, 12, 12, 13, 14, 15, 16, 17, SUMS_8(d, 0), SUMS_4(d, 2))
WGMMA_K_MAJOR(32, 16, 16, 17, 18, 19, 20, 21, SUMS_16(d, 0))
WGMMA_K_MAJOR(40, 20, 20, 21, 22, 23, 24, 25, SUMS_16(d, 0), SUMS_4(d, 4))
WGMMA_K_MAJOR(48, 24, 24, 25, 26, 27, 28, 29, SUMS_16(d, 0), SUMS_8(d, 4))
WGMMA_K_MAJOR(56, 28, 28, 29, 30, 31, 32, 33, SUMS_16(d, 0), SUMS_8(d, 4), SUMS_4(d, 6))
WGMMA_K_MAJOR(64, 32, 32, 33, 34, 35, 36, 37, SUMS_32(d, 0))
WGMMA_K_MAJOR(72, 36, 36, 37, 38, 39, 40, 41, SUMS_32(d, 0), SUMS_4(d, 8))
WGMMA_K_MAJOR(80, 40, 40, 41, 42, 43, 44, 45, SUMS_32(d, 0), SUMS_8(d, 8))
WGMMA_K_MAJOR(128, 64, 64, 65, 66, 67, 68, 69, SUMS_64(d, 0))
// a in registers, b N-major; d += a . b.
DEVICE void wgmma_bf16(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_64
               "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
               : SUMS_16(d, 0), SUMS_16(d, 4), SUMS_16(d, 8), SUMS_16(d, 12)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void wgmma_bf16(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" REGISTERS_32
               "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
               : SUMS_16(d, 0), SUMS_16(d, 4)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void wgmma_bf16(float (&d)[10][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {" REGISTERS_40
               "}, {%40,%41,%42,%43}, %44, 1, 1, 1, 1;"
               : SUMS_32(d, 0), SUMS_8(d, 8)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// Both in shared memory, K-major; d += a . b. HALF: registers of d; NEXT: HALF + 1.
#define WGMMA_SHARED(N, HALF, NEXT, ...)                                                       \
  DEVICE void wgmma_bf16_shared(float(&d)[N / 8][4], uint64_t a, uint64_t b) {                 \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS_##HALF \
                 "}, %" #HALF ", %" #NEXT ", 1, 1, 1, 0, 0;"                                   \
                 : __VA_ARGS__                                                                 \
                 : "l"(a), "l"(b));                                                            \
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

// A CUtensorMap, which ops/launch.py makes of a TensorMap: a matrix read in boxes 64 numbers wide.
struct alignas(64) TensorMap { unsigned char opaque[128]; };
// Copies the box whose first number is `column` of `row`, swizzled as wgmma_operand says, zeros outside the matrix;
// `bar` counts its bytes.
DEVICE void tma_load_2d(void* shared, const TensorMap* map, int column, int row, uint64_t* bar, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3}], [%4], %5;" ::"r"(smem_addr(shared)),
      "l"(map), "r"(column), "r"(row), "r"(smem_addr(bar)), "l"(policy)
      : "memory");
}
DEVICE void tma_load_2d(void* shared, const TensorMap* map, int column, int row, uint64_t* bar) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(smem_addr(shared)), "l"(map), "r"(column), "r"(row), "r"(smem_addr(bar)) : "memory");
}
#endif
