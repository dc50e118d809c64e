// sm90/experts.cu: the two products of a layer of experts for many tokens, on compute capability 9.0. What they compute
// is said in experts/experts.cu, which has them for fewer tokens and on other cards.
//
//   SILU=1, up:    h[i, n] = weight_p * silu(sum_k x'[i, k] gate[e, n, k]) * sum_k x'[i, k] up[e, n, k]
//   SILU=0, down:  out[p, n] = sum_k h[i, k] down[e, n, k]
//
// i counts the pairs sorted by expert, p = sorted[i] is the pair, e its expert (experts/route.cu). x' bf16 [pairs][K]
// and h bf16 [pairs][N / 2] in that order, weight bf16 [EXPERTS * N][K], out float32 [pairs][N]. Float32 inside,
// rounded once; the sums of a pair are in the order of k.
//
// As in sm90/linear_batch.cu one thread issues TMA copies, STAGES slabs of 64 k ahead, and a warpgroup has 64 pairs:
// operand a, and the tile's ROWS rows of weights (SILU: half gate, half up) operand b. An item is an entry of up to
// 64 * WARPGROUPS pairs of one expert and a tile; blocks take items side by side, so that the pairs of an entry and the
// weights of an expert are in L2 when they are read again. A warpgroup without pairs does not multiply.
//
// grid (blocks), 128 * WARPGROUPS + 128 threads; dynamic shared memory STAGES * STAGE_BYTES. An item reads 2 B of every
// number of its pairs and its tile, mostly from L2: 48 B a clock of a multiprocessor for 256 rows and 128 pairs.
//
// Set by -D: WARPGROUPS (2), ROWS (a multiple of 16), STAGES, and the macros of linear.cuh.
constexpr int WARPS = 4 * WARPGROUPS;
#include "../linear.cuh"
#include "wgmma.cuh"

constexpr int COPY_REGISTERS = 40, MULTIPLY_REGISTERS = 232;  // of a thread, WARPGROUPS = 2
constexpr int OUT_ROWS = ROWS / BRANCHES, TILES = ROWS / 8, OUT_TILES = OUT_ROWS / 8;
constexpr int LINE_BYTES = 128, PATTERN = 8 * LINE_BYTES, GROUP_BYTES = 64 * LINE_BYTES;
constexpr int X_BYTES = WARPGROUPS * GROUP_BYTES, ROWS_BYTES = ROWS * LINE_BYTES, STAGE_BYTES = X_BYTES + ROWS_BYTES;
static_assert(WARPGROUPS == 2 && ROWS % 16 == 0 && ROWS <= 256, "registers; limits of a box and of a wgmma");

struct Item {
  int expert, first, count, tile;  // pairs sorted[first] ...

  DEVICE Item(const int4* entries, int item, int tiles) : tile(item % tiles) {
    const int4 entry = entries[1 + item / tiles];
    expert = entry.x;
    first = entry.y;
    count = entry.z;
  }
  DEVICE int groups() const { return (count + 63) / 64; }
};

// entries: experts/route.cu, of at most 64 * WARPGROUPS pairs.
extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
    experts(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const int* sorted,
            const int4* entries, const float* weights, Output* out, int K, int N) {
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ uint64_t full[STAGES], empty[STAGES];
  const int warp = __shfl_sync(FULL_MASK, threadIdx.x / 32, 0), lane = threadIdx.x % 32, rows = N / BRANCHES;
  const int tiles = (rows + OUT_ROWS - 1) / OUT_ROWS, slabs = (K + 63) / 64;
  if (warp == WARPS && lane == 0) {
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], WARPS);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  wait_then_allow_next();
  const int num_items = entries[0].x * tiles;
  unsigned n = 0;  // slabs so far: slab n uses stage n % STAGES
  if (warp >= WARPS) {
    decrease_registers<COPY_REGISTERS>();
    if (warp > WARPS || lane > 0) return;
    for (int i = blockIdx.x; i < num_items; i += gridDim.x) {
      const Item item(entries, i, tiles);
      for (int slab = 0; slab < slabs; slab++, n++) {
        uint64_t* bar = &full[n % STAGES];
        unsigned char* stage = smem + n % STAGES * STAGE_BYTES;
        if (n >= STAGES) mbarrier_wait(&empty[n % STAGES], n / STAGES & 1 ^ 1);
        mbarrier_arrive_expect_tx(bar, item.groups() * GROUP_BYTES + ROWS_BYTES);
        for (int group = 0; group < item.groups(); group++)
          tma_load_2d(stage + group * GROUP_BYTES, &x, slab * 64, item.first + group * 64, bar);
        UNROLL for (int branch = 0; branch < BRANCHES; branch++)
          tma_load_2d(stage + X_BYTES + branch * OUT_ROWS * LINE_BYTES, &weight, slab * 64,
                      item.expert * N + branch * rows + item.tile * OUT_ROWS, bar);
      }
    }
    return;
  }
  increase_registers<MULTIPLY_REGISTERS>();
  auto release = [&](int stage) {  // this warp's products of the stage are done: it may be refilled
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&empty[stage]);
  };
  for (int i = blockIdx.x; i < num_items; i += gridDim.x) {
    const Item item(entries, i, tiles);
    float y[TILES][4];
    clear(y);
    if (warp / 4 >= item.groups()) {
      for (int slab = 0; slab < slabs; slab++, n++) {
        mbarrier_wait(&full[n % STAGES], n / STAGES & 1);
        release(n % STAGES);
      }
      continue;
    }
    int last_stage = -1;  // whose products may still run
    for (int slab = 0; slab < slabs; slab++, n++) {
      mbarrier_wait(&full[n % STAGES], n / STAGES & 1);
      const unsigned char* stage = smem + n % STAGES * STAGE_BYTES;
      compiler_fence(y);
      wgmma_fence();
      const uint64_t a = wgmma_operand(stage + warp / 4 * GROUP_BYTES, PATTERN, 0);
      const uint64_t b = wgmma_operand(stage + X_BYTES, PATTERN, 0);
      UNROLL for (int s = 0; s < 4; s++) wgmma_bf16_shared(y, a + 2 * s, b + 2 * s);  // 16 k are 32 bytes
      wgmma_commit();
      if (last_stage >= 0) {
        wgmma_wait<1>();
        release(last_stage);
      }
      last_stage = n % STAGES;
    }
    wgmma_wait<0>();
    compiler_fence(y);
    release(last_stage);
    UNROLL for (int half = 0; half < 2; half++) {
      const int own = warp * 16 + lane / 4 + 8 * half;  // of the entry's pairs
      if (own >= item.count) continue;
      const int pair = sorted[item.first + own];
      const float weight_of_pair = SILU ? weights[pair] : 1.f;
      Output* to = out + (size_t)(SILU ? item.first + own : pair) * rows;
      UNROLL for (int j = 0; j < OUT_TILES; j++) {
        const int at = item.tile * OUT_ROWS + 8 * j + lane % 4 * 2;
        float z[2];
        UNROLL for (int e = 0; e < 2; e++) {
          float branches[BRANCHES];
          UNROLL for (int t = 0; t < BRANCHES; t++) branches[t] = y[t * OUT_TILES + j][2 * half + e];
          z[e] = activated(branches) * weight_of_pair;
        }
        if (at < rows) store_pair(to + at, z[0], z[1]);
      }
    }
  }
}
