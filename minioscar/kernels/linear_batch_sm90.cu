// linear_batch_sm90.cu: the products of a decode step of 17 to 256 sequences on compute capability 9.0 (raw_batch.grouped: of 49 where the
// matrix has many rows). linear_batch.cu has the others, and those of other cards.
//
//   y[m, n] = act(sum_k x[m, k] weight[n, k] + bias[n]) + residual[m, n]
//
// Shapes as in linear.cu; SILU: weight holds gate rows, then up rows; out [M][N / 2] = silu(gate) * up. BF16, float32 inside, rounded once.
//
// A block has all tokens, 64 for each of GROUPS warpgroups, and a tile of ROWS rows of the weights (SILU: half of them gate, half up, so that
// a lane has both). One thread copies: boxes of tensors, 64 k wide, RUNS of them a slab, STAGES slabs ahead, the weights' from before the launch
// in front of this one has ended; a warpgroup multiplies what has come: tokens are operand a, rows operand b, both in shared memory.
// Of x a box has as many rows as there are tokens, up to a multiple of 8, since rows that do not exist take the copy engine longer than others.
//
// All blocks need x: they read M / ROWS of the weights' bytes more, from L2, which gives a multiprocessor 64 bytes a clock, nearly four times
// its share of what memory gives (H200).
//
// A block's items are a tile and a part of k: all of it where there are tiles for every multiprocessor; then parts = 1, and a block goes on
// to other tiles. Else `parts` blocks share k, one item each: every one of them writes its sums to `workspace`, float32, as its lanes hold
// them, and whoever comes last adds them in the order of k: a warp of one block meets the same warp of the others only.
// The order of sums depends on how k is shared, not on what else is in a batch.
//
// grid (blocks), 128 * GROUPS + 128 threads; dynamic shared memory STAGES * STAGE_BYTES. Reads the weights once, 2 B each.
//
// Set by -D: GROUPS, ROWS (a multiple of 16), RUNS, STAGES, and what linear.cuh says.
constexpr int WARPS = 4 * GROUPS;
#include "linear.cuh"

constexpr int AT_ONCE = GROUPS == 4 ? 4 : 8;  // columns of 8 whose residuals, or parts, are asked for together
// The registers of a thread: the copying warpgroup, of which one thread works, leaves some to the others.
constexpr int COPYING = GROUPS == 4 ? 48 : 40, MULTIPLYING = GROUPS == 1 ? 0 : GROUPS == 2 ? 232 : GROUPS == 3 ? 152 : 104;
constexpr int TOKENS = 64 * GROUPS, OUT_ROWS = ROWS / HALVES, TILES = ROWS / 8, OUT_TILES = OUT_ROWS / 8;  // tiles: 8 columns of a warpgroup's sums
constexpr int LINE = 128, PATTERN = 8 * LINE, X_BYTES = TOKENS * LINE, RUN_BYTES = X_BYTES + ROWS * LINE, STAGE_BYTES = RUNS * RUN_BYTES;
static_assert(ROWS % 16 == 0 && OUT_ROWS % 8 == 0 && ROWS <= 256, "what a box and a wgmma can be");

// Tiles and parts of k.
struct Items {
  int slabs, parts, tiles;

  __device__ __forceinline__ int count() const { return tiles * parts; }
  __device__ __forceinline__ int tile(int item) const { return item % tiles; }
  __device__ __forceinline__ int part(int item) const { return item / tiles; }
  __device__ __forceinline__ int begin(int item) const { return slabs * part(item) / parts; }
  __device__ __forceinline__ int end(int item) const { return slabs * (part(item) + 1) / parts; }
};

struct Copies {
  const TensorMap *x, *weights;
  unsigned char* smem;
  uint64_t *full, *empty;
  int rows, slab_bytes;
  uint64_t once;  // the weights are read once

  __device__ __forceinline__ void copy_weights(int stage, int tile, int slab) const {
    mbarrier_arrive_expect_tx(&full[stage], slab_bytes);
#pragma unroll
    for (int run = 0; run < RUNS; run++)
#pragma unroll
      for (int half = 0; half < HALVES; half++) {
        unsigned char* to = smem + stage * STAGE_BYTES + run * RUN_BYTES + X_BYTES + half * OUT_ROWS * LINE;
        box_copy(to, weights, (slab * RUNS + run) * 64, half * rows + tile * OUT_ROWS, &full[stage], once);
      }
  }
  __device__ __forceinline__ void copy_x(int stage, int slab) const {
#pragma unroll
    for (int run = 0; run < RUNS; run++)
      box_copy(smem + stage * STAGE_BYTES + run * RUN_BYTES, x, (slab * RUNS + run) * 64, 0, &full[stage]);
  }

  // What can be asked for before there is an x: the weights of the first slabs.
  __device__ __forceinline__ void begin(const Items& items) const {
    int n = 0;
    for (int item = blockIdx.x; item < items.count() && n < STAGES; item += gridDim.x)
      for (int slab = items.begin(item); slab < items.end(item) && n < STAGES; slab++) copy_weights(n++, items.tile(item), slab);
  }
  // All the rest.
  __device__ __forceinline__ void go_on(const Items& items) const {
    unsigned n = 0;  // slabs so far: they take the stages in turn
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

  // Of a tile a lane has outputs 8j + 2c, 8j + 2c + 1 of two tokens. first: the tile's first output; m: this warp's first token.
  // Their residuals, of small tiles from before the products, so that nobody waits for them at the end.
  static constexpr bool EARLY = OUT_TILES <= AT_ONCE;
  __device__ __forceinline__ uint32_t added(int j, int i, int first, int m) const {
    const int n = first + threadIdx.x % 4 * 2 + 8 * j, token = m + threadIdx.x % 32 / 4 + 8 * i;
    return residual && rows % 2 == 0 && token < tokens && n < rows ? *(const uint32_t*)(residual + (size_t)token * rows + n) : 0;
  }
  __device__ __forceinline__ void finish(const float (&y)[TILES][4], const uint32_t (&early)[OUT_TILES][2], int first, int m) const {
    const int lane = threadIdx.x % 32, n0 = first + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < OUT_TILES; j++) {
      if (j % AT_ONCE == 0) nothing_ahead();
      const int n = n0 + 8 * j;
      float biases[HALVES][2];
#pragma unroll
      for (int half = 0; half < HALVES; half++)
#pragma unroll
        for (int e = 0; e < 2; e++) biases[half][e] = bias && n + e < rows ? to_float(bias[half * rows + n + e]) : 0.f;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int token = m + lane / 4 + 8 * i;
        if (token >= tokens || n >= rows) continue;
        const size_t at = (size_t)token * rows + n;
        float z[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float halves[HALVES];
#pragma unroll
          for (int half = 0; half < HALVES; half++) halves[half] = y[half * OUT_TILES + j][2 * i + e] + biases[half][e];
          z[e] = activated(halves);
        }
        if (rows % 2 == 0) {
          const uint32_t two = EARLY ? early[j][i] : residual ? *(const uint32_t*)(residual + at) : 0;
          store_pair(out + at, z[0] + low(two), z[1] + high(two));
        } else {
#pragma unroll
          for (int e = 0; e < 2; e++)
            if (n + e < rows) out[at + e] = to_output(z[e] + (residual ? to_float(residual[at + e]) : 0.f));
        }
      }
    }
  }
};

// Writes this warp's part of a tile's sums. Whoever comes last is told so and gets the sum of all parts, in their order.
// part: this one's number; first: the part of block 0, `stride` floats from one part to the next. counter: of this warp and tile.
__device__ __forceinline__ bool merge(float (&y)[TILES][4], float* first, size_t stride, int part, int parts, int* counter) {
  const int lane = threadIdx.x % 32;
  auto of_part = [&](int p) { return (float4*)(first + p * stride) + threadIdx.x; };
  float4* mine = of_part(part);
#pragma unroll
  for (int j = 0; j < TILES; j++) __stcg(mine + j * 128 * GROUPS, make_float4(y[j][0], y[j][1], y[j][2], y[j][3]));
  __syncwarp();
  int arrived = 0;
  if (lane == 0) {
    arrived = atomic_add_acq_rel(counter, 1);
    if (arrived == parts - 1) *counter = 0;
  }
  const bool last = __shfl_sync(FULL, arrived, 0) == parts - 1;
  __syncwarp();
  if (!last) return false;
#pragma unroll
  for (int j = 0; j < TILES; j++) y[j][0] = y[j][1] = y[j][2] = y[j][3] = 0.f;
  for (int p = 0; p < parts; p++) {
    const float4* theirs = of_part(p);
#pragma unroll
    for (int j = 0; j < TILES; j++) {
      if (j % AT_ONCE == 0) nothing_ahead();
      const float4 a = __ldcg(theirs + j * 128 * GROUPS);
      y[j][0] += a.x, y[j][1] += a.y, y[j][2] += a.z, y[j][3] += a.w;
    }
  }
  return true;
}

// workspace float32 [items][TOKENS * ROWS]; arrived int [tiles][WARPS], zero before and after; both only where parts > 1, and then
// blocks = items.
extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
linear_batch(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weights, const bf16* bias, const bf16* residual, Output* out,
             float* workspace, int* arrived, int tokens, int K, int N, int parts) {
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ uint64_t full[STAGES], empty[STAGES];
  const int warp = __shfl_sync(FULL, threadIdx.x / 32, 0), lane = threadIdx.x % 32, rows = N / HALVES;
  const Items items = {(K + 64 * RUNS - 1) / (64 * RUNS), parts, (rows + OUT_ROWS - 1) / OUT_ROWS};
  const int box_rows = (tokens + 7) / 8 * 8, missing = (TOKENS - box_rows) * LINE / 16;  // pieces of 16 bytes of a run
  const Copies copies = {&x, &weights, smem, full, empty, rows, RUNS * (box_rows + ROWS) * LINE, l2_evict_first()};
  if (warp == WARPS && lane == 0) {
    for (int s = 0; s < STAGES; s++) mbarrier_init(&full[s], 1), mbarrier_init(&empty[s], WARPS);
    mbarrier_init_fence();
    copies.begin(items);
  } else if (warp < WARPS) {
    for (int i = threadIdx.x; i < STAGES * RUNS * missing; i += THREADS)
      *(uint4*)(smem + i / missing * RUN_BYTES + box_rows * LINE + i % missing * 16) = make_uint4(0, 0, 0, 0);
    fence_async();
  }
  __syncthreads();
  if (warp >= WARPS) {
    if constexpr (MULTIPLYING > 0) fewer_registers<COPYING>();
    wait_for_previous(), allow_next();
    if (warp == WARPS && lane == 0) copies.go_on(items);
    return;
  }
  if constexpr (MULTIPLYING > 0) more_registers<MULTIPLYING>();
  wait_for_previous(), allow_next();
  const Result result = {bias, residual, out, tokens, rows};
  auto leave = [&](int stage) {  // what this warp has multiplied may be written over
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&empty[stage]);
  };
  unsigned n = 0;  // slabs so far
  for (int item = blockIdx.x; item < items.count(); item += gridDim.x) {
    float y[TILES][4];
#pragma unroll
    for (int j = 0; j < TILES; j++) y[j][0] = y[j][1] = y[j][2] = y[j][3] = 0.f;
    uint32_t added[OUT_TILES][2];
#pragma unroll
    for (int j = 0; j < OUT_TILES; j++)
#pragma unroll
      for (int i = 0; i < 2; i++) added[j][i] = Result::EARLY ? result.added(j, i, items.tile(item) * OUT_ROWS, warp * 16) : 0;
    int before = -1;  // the stage that is multiplied still
    for (int slab = items.begin(item); slab < items.end(item); slab++, n++) {
      mbarrier_wait(&full[n % STAGES], n / STAGES & 1);
      const unsigned char* stage = smem + n % STAGES * STAGE_BYTES;
      hold(y);
      wgmma_fence();
#pragma unroll
      for (int run = 0; run < RUNS; run++) {
        const uint64_t a = wgmma_operand(stage + run * RUN_BYTES + warp / 4 * 64 * LINE, PATTERN, 0);
        const uint64_t b = wgmma_operand(stage + run * RUN_BYTES + X_BYTES, PATTERN, 0);
#pragma unroll
        for (int s = 0; s < 4; s++) wgmma_bf16_shared(y, a + 2 * s, b + 2 * s);  // 16 k are 32 bytes; an address counts 16
      }
      wgmma_commit();
      if (before >= 0) {
        wgmma_wait<1>();
        leave(before);
      }
      before = n % STAGES;
    }
    wgmma_wait<0>();
    hold(y);
    leave(before);
    const int own = known_from_here(item), tile = items.tile(own), part = items.part(own);
    const size_t floats = (size_t)TOKENS * ROWS;
    if (parts == 1 || merge(y, workspace + tile * floats, items.tiles * floats, part, parts, arrived + tile * WARPS + warp))
      result.finish(y, added, tile * OUT_ROWS, warp * 16);
  }
}
