// sm90/linear_batch.cu: the products of a decode step of 17 to 256 sequences on compute capability 9.0
// (linear_batch.uses_wgmma: of 49 where the matrix has many rows). The general linear_batch.cu has the others.
//
//   y[m, n] = act(sum_k x[m, k] weight[n, k] + bias[n]) + residual[m, n]
//
// Shapes as in linear.cu; SILU: weight holds gate rows, then up rows; out [M][N / 2] = silu(gate) * up. BF16, float32
// inside, rounded once.
//
// A block has all tokens, 64 for each of WARPGROUPS, and a tile of ROWS rows of the weights (SILU: half of them gate,
// half up, so that a lane has both). One thread issues TMA copies: boxes of tensors, 64 k wide, RUNS of them a slab,
// STAGES slabs ahead, the weights' from before the previous launch has ended. A warpgroup multiplies what has landed:
// tokens are operand a, rows operand b, both in shared memory. Of x a box has as many rows as there are tokens,
// rounded up to 8: rows outside the tensor take the copy engine longer than others.
//
// All blocks need x: they read M / ROWS of the weights' bytes more, from L2, which gives a multiprocessor 64 bytes a
// clock, nearly four times its share of the memory bandwidth (H200).
//
// A work item of a block is a tile and a split of k: all of k where there are tiles for every multiprocessor; then
// splits = 1, and a block continues with other tiles. Else `splits` blocks split k, one item each: each writes its
// sums to `workspace`, float32, as its lanes hold them, and the last one adds them in the order of k
// (split_merge.cuh). That order depends on how k is split, not on the other tokens of a batch.
//
// grid (blocks), 128 * WARPGROUPS + 128 threads; dynamic shared memory STAGES * STAGE_BYTES. Reads the weights once,
// 2 B each.
//
// Set by -D: WARPGROUPS, ROWS (a multiple of 16), RUNS, STAGES, and the macros of linear.cuh.
constexpr int WARPS = 4 * WARPGROUPS;
#include "../linear.cuh"
#include "../split_merge.cuh"
#include "items.cuh"
#include "wgmma.cuh"

constexpr int AT_ONCE = WARPGROUPS == 4 ? 4 : 8;  // columns of 8 whose residuals, or partial sums, are loaded together
// Registers of a thread: the copying warpgroup, in which one thread works, leaves some to the others.
constexpr int COPY_REGISTERS = WARPGROUPS == 4 ? 48 : 40;
constexpr int MULTIPLY_REGISTERS = WARPGROUPS == 1 ? 0 : WARPGROUPS == 2 ? 232 : WARPGROUPS == 3 ? 152 : 104;
constexpr int TOKENS = 64 * WARPGROUPS, OUT_ROWS = ROWS / BRANCHES;
constexpr int TILES = ROWS / 8, OUT_TILES = OUT_ROWS / 8;  // tiles: 8 columns of a warpgroup's sums
constexpr int LINE_BYTES = 128, PATTERN = 8 * LINE_BYTES, X_BYTES = TOKENS * LINE_BYTES;
constexpr int RUN_BYTES = X_BYTES + ROWS * LINE_BYTES, STAGE_BYTES = RUNS * RUN_BYTES;
static_assert(ROWS % 16 == 0 && OUT_ROWS % 8 == 0 && ROWS <= 256, "limits of a box and of a wgmma");

struct Copies {
  const TensorMap *x, *weights;
  unsigned char* smem;
  uint64_t *full, *empty;
  int rows, slab_bytes;
  uint64_t once;  // L2 policy: the weights are read once

  DEVICE void copy_weights(int stage, int tile, int slab) const {
    mbarrier_arrive_expect_tx(&full[stage], slab_bytes);
    UNROLL for (int run = 0; run < RUNS; run++)
      UNROLL for (int branch = 0; branch < BRANCHES; branch++) {
        unsigned char* to = smem + stage * STAGE_BYTES + run * RUN_BYTES + X_BYTES + branch * OUT_ROWS * LINE_BYTES;
        tma_load_2d(to, weights, (slab * RUNS + run) * 64, branch * rows + tile * OUT_ROWS, &full[stage], once);
      }
  }
  DEVICE void copy_x(int stage, int slab) const {
    UNROLL for (int run = 0; run < RUNS; run++)
      tma_load_2d(smem + stage * STAGE_BYTES + run * RUN_BYTES, x, (slab * RUNS + run) * 64, 0, &full[stage]);
  }

  // Before x exists: the weights of the first slabs.
  DEVICE void begin(const Items& items) const {
    int n = 0;
    for (int item = blockIdx.x; item < items.count() && n < STAGES; item += gridDim.x)
      for (int slab = items.begin(item); slab < items.end(item) && n < STAGES; slab++)
        copy_weights(n++, items.tile(item), slab);
  }
  // All other copies.
  DEVICE void copy_rest(const Items& items) const {
    unsigned n = 0;  // slabs so far: slab n uses stage n % STAGES
    for (int item = blockIdx.x; item < items.count(); item += gridDim.x)
      for (int slab = items.begin(item); slab < items.end(item); slab++, n++) {
        if (n >= STAGES) {
          mbarrier_wait(&empty[n % STAGES], n / STAGES & 1 ^ 1);
          copy_weights(n % STAGES, items.tile(item), slab);
        }
        copy_x(n % STAGES, slab);
      }
  }
};

struct Result {
  const bf16 *bias, *residual;
  Output* out;
  int tokens, rows;

  // Of a tile a lane has outputs 8j + 2c, 8j + 2c + 1 of two tokens. first: the tile's first output; m: this warp's
  // first token. The residuals of small tiles are loaded before the products, so that nobody waits for them at the
  // end.
  static constexpr bool EARLY = OUT_TILES <= AT_ONCE;
  DEVICE uint32_t residual_pair(int j, int i, int first, int m) const {
    const int n = first + threadIdx.x % 4 * 2 + 8 * j, token = m + threadIdx.x % 32 / 4 + 8 * i;
    const bool valid = residual && rows % 2 == 0 && token < tokens && n < rows;
    return valid ? *(const uint32_t*)(residual + (size_t)token * rows + n) : 0;
  }
  DEVICE void finish(const float (&y)[TILES][4], const uint32_t (&early)[OUT_TILES][2], int first, int m) const {
    const int lane = threadIdx.x % 32, n0 = first + lane % 4 * 2;
    UNROLL for (int j = 0; j < OUT_TILES; j++) {
      if (j % AT_ONCE == 0) compiler_barrier();
      const int n = n0 + 8 * j;
      float biases[BRANCHES][2];
      UNROLL for (int branch = 0; branch < BRANCHES; branch++)
        UNROLL for (int e = 0; e < 2; e++)
          biases[branch][e] = bias && n + e < rows ? to_float(bias[branch * rows + n + e]) : 0.f;
      UNROLL for (int i = 0; i < 2; i++) {
        const int token = m + lane / 4 + 8 * i;
        if (token >= tokens || n >= rows) continue;
        const size_t at = (size_t)token * rows + n;
        float z[2];
        UNROLL for (int e = 0; e < 2; e++) {
          float branches[BRANCHES];
          UNROLL for (int branch = 0; branch < BRANCHES; branch++)
            branches[branch] = y[branch * OUT_TILES + j][2 * i + e] + biases[branch][e];
          z[e] = activated(branches);
        }
        if (rows % 2 == 0) {
          const uint32_t two = EARLY ? early[j][i] : residual ? *(const uint32_t*)(residual + at) : 0;
          store_pair(out + at, z[0] + low(two), z[1] + high(two));
        } else {
          UNROLL for (int e = 0; e < 2; e++)
            if (n + e < rows) out[at + e] = to_output(z[e] + (residual ? to_float(residual[at + e]) : 0.f));
        }
      }
    }
  }
};

// workspace float32 [items][TOKENS * ROWS]; split_counter int [tiles][WARPS], zero before and after; both only if
// splits > 1, and then blocks = items.
extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
    linear_batch(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weights, const bf16* bias,
                 const bf16* residual, Output* out, float* workspace, int* split_counter, int tokens, int K, int N,
                 int splits) {
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ uint64_t full[STAGES], empty[STAGES];
  const int warp = __shfl_sync(FULL_MASK, threadIdx.x / 32, 0), lane = threadIdx.x % 32, rows = N / BRANCHES;
  const Items items = {(K + 64 * RUNS - 1) / (64 * RUNS), splits, (rows + OUT_ROWS - 1) / OUT_ROWS};
  // Rows of x that a box has, and 16-byte vectors of a run that it does not fill.
  const int box_rows = (tokens + 7) / 8 * 8, missing = (TOKENS - box_rows) * LINE_BYTES / 16;
  const int slab_bytes = RUNS * (box_rows + ROWS) * LINE_BYTES;
  const Copies copies = {&x, &weights, smem, full, empty, rows, slab_bytes, l2_evict_first()};
  if (warp == WARPS && lane == 0) {
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], WARPS);
    }
    mbarrier_init_fence();
    copies.begin(items);
  } else if (warp < WARPS) {
    for (int i = threadIdx.x; i < STAGES * RUNS * missing; i += THREADS)
      *(uint4*)(smem + i / missing * RUN_BYTES + box_rows * LINE_BYTES + i % missing * 16) = make_uint4(0, 0, 0, 0);
    fence_async();
  }
  __syncthreads();
  if (warp >= WARPS) {
    if constexpr (MULTIPLY_REGISTERS > 0) decrease_registers<COPY_REGISTERS>();
    wait_then_allow_next();
    if (warp == WARPS && lane == 0) copies.copy_rest(items);
    return;
  }
  if constexpr (MULTIPLY_REGISTERS > 0) increase_registers<MULTIPLY_REGISTERS>();
  wait_then_allow_next();
  const Result result = {bias, residual, out, tokens, rows};
  auto release = [&](int stage) {  // this warp's products of the stage are done: it may be refilled
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&empty[stage]);
  };
  unsigned n = 0;  // slabs so far
  for (int item = blockIdx.x; item < items.count(); item += gridDim.x) {
    float sums[1][TILES][4], (&y)[TILES][4] = sums[0];
    clear(y);
    uint32_t early[OUT_TILES][2];
    UNROLL for (int j = 0; j < OUT_TILES; j++)
      UNROLL for (int i = 0; i < 2; i++)
        early[j][i] = Result::EARLY ? result.residual_pair(j, i, items.tile(item) * OUT_ROWS, warp * 16) : 0;
    int last_stage = -1;  // whose products may still run
    for (int slab = items.begin(item); slab < items.end(item); slab++, n++) {
      mbarrier_wait(&full[n % STAGES], n / STAGES & 1);
      const unsigned char* stage = smem + n % STAGES * STAGE_BYTES;
      compiler_fence(y);
      wgmma_fence();
      UNROLL for (int run = 0; run < RUNS; run++) {
        const uint64_t a = wgmma_operand(stage + run * RUN_BYTES + warp / 4 * 64 * LINE_BYTES, PATTERN, 0);
        const uint64_t b = wgmma_operand(stage + run * RUN_BYTES + X_BYTES, PATTERN, 0);
        UNROLL for (int s = 0; s < 4; s++)
            wgmma_bf16_shared(y, a + 2 * s, b + 2 * s);  // 16 k are 32 bytes; addresses count 16
      }
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
    const int own = opaque(item), tile = items.tile(own), split = items.split(own);
    const size_t floats = (size_t)TOKENS * ROWS;
    auto partial = [&](int s) {
      return (float4*)(workspace + tile * floats + s * (items.tiles * floats)) + threadIdx.x;
    };
    if (splits == 1 ||
        merge_splits<THREADS, 1, AT_ONCE>(sums, partial, split, 0, splits - 1, split_counter + tile * WARPS + warp))
      result.finish(y, early, tile * OUT_ROWS, warp * 16);
  }
}
