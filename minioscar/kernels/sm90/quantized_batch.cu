// sm90/quantized_batch.cu: quantized/linear_batch.cu on compute capability 9.0 (quantized.uses_wgmma).
//
//   y[m, n] = act(row_scale[n] sum_g scale[n, g] sum_k (code[n, k] - zero[n, g]) x[m, k] + bias[n]) + residual[m, n]
//
// Shapes as in quantized/linear.cu; SILU: weight holds gate rows, then up rows, N / 2 a multiple of 16. Float32
// inside, zeros and scales applied to the sums of groups; rounded once at the end.
//
// A block has COLUMNS tokens and ROWS rows: a tile of 16 for each warp of three warpgroups (SILU: two warps of a
// warpgroup have gate, two have up), which is operand a of wgmma, in registers. x is operand b, in shared memory. A
// thread of one more warp copies slabs of codes and their scales, 128 k each and STAGES ahead, from before the previous
// launch has ended, a thread of another x. That is as prepare_x.cu leaves it, with the sums of its groups, or, with
// PREPARES, x itself, of which two warps make the same, slab by slab: no launch stands before the product then. Of a
// stage
//   codes_full    they have landed
//   landed        with PREPARES: x has landed
//   x_full        x is as it should be
//   empty         all products of the stage are done
// At most IN_FLIGHT slabs of codes have been asked for and are not there: behind more, x and what the launch before
// reads would wait.
// Of e4m3 a warp loads its scale by itself, a slab ahead: 32 of them are in a line of L1.
//
// Work items, splits of k and their sums as in sm90/linear_batch.cu; with SILU k is not split. grid (blocks, blocks of
// columns), 448 threads (512 for more than 64 columns, and with PREPARES); dynamic shared memory: STAGES stages, with
// SILU the sums of up. What is left of a multiprocessor has room for a block of prepare_x.cu, which can run while this
// launch ends. Reads the weights once for each block of columns.
//
// Set by -D: COLUMNS (a multiple of 8 from 16 to 80, as registers allow), STAGES, GROUP (k whose sum is scaled at once:
// 64 or 128), KIND, PREPARES, and the macros of linear.cuh.
constexpr int WARPS = 12, PREPARING = 2;
#include "../linear.cuh"
#include "../split_merge.cuh"
#include "items.cuh"
#include "prepared_x.cuh"
#include "wgmma.cuh"

constexpr int RUNS = 2, FOLDS = RUNS * 64 / GROUP, TILES = COLUMNS / 8, LINE_BYTES = 128, PATTERN = 8 * LINE_BYTES;
constexpr int ROWS = WARPS * 16, OUT_TILES = WARPS / BRANCHES;                          // OUT_TILES: of a block
constexpr int RUN_BYTES = COLUMNS * LINE_BYTES, CODE_BYTES = RUNS * TILE_VECTORS * 16;  // of x; of a tile
constexpr int CODE_OFFSET = RUNS * RUN_BYTES, SCALE_OFFSET = CODE_OFFSET + WARPS * CODE_BYTES;
constexpr int SCALE_BYTES = HAS_ZERO ? FOLDS * 64 : 0;  // of a tile
constexpr int SUM_OFFSET = SCALE_OFFSET + WARPS * SCALE_BYTES, SUM_BYTES = HAS_ZERO ? COLUMNS * 4 : 0;  // of a fold
constexpr int STAGE_BYTES = (SUM_OFFSET + FOLDS * SUM_BYTES + PATTERN - 1) / PATTERN * PATTERN;
constexpr int IN_FLIGHT = COLUMNS <= 48 ? 2 : STAGES;  // fewer of more columns were not timed alone
constexpr bool MOVES_REGISTERS = PREPARES || COLUMNS > 64;  // from the last four warps to those that multiply
constexpr int UNROLLED = COLUMNS <= 48 ? 3 : 1;  // splits whose sums are loaded together, as registers allow
static_assert(COLUMNS % 8 == 0 && COLUMNS <= 80 && GROUP >= 64, "sums and scales fit into registers");

struct Product {
  const uint32_t* scales;
  const float* row_scale;
  const bf16 *bias, *residual;
  Output* out;
  int tokens, K, rows, shift;  // rows: of gate, or of all; shift: a group has 2^shift columns

  DEVICE int runs() const { return (K + 63) / 64; }
  DEVICE int groups() const { return ((K - 1) >> shift) + 1; }
  DEVICE static int branch(int warp) { return SILU ? warp % 4 / 2 : 0; }
  // The 16 outputs that a warp has a part in; those past the end are not stored.
  DEVICE static int out_tile(int tile, int warp) {
    return tile * OUT_TILES + (SILU ? warp / 4 * 2 + warp % 2 : warp);
  }
  // Where its tile is among those of a stage, and in the matrix; past the end another one, or none.
  DEVICE static int slot(int warp) { return branch(warp) * OUT_TILES + out_tile(0, warp); }
  DEVICE int first_tile(int tile, int branch) const { return branch * ((rows + 15) / 16) + tile * OUT_TILES; }
  DEVICE int group(int slab, int fold) const { return (slab * RUNS * 64 + fold * GROUP) >> shift; }
};

// Which stage is next, and whose turn of its barriers.
struct Stage {
  int at = 0;
  uint32_t parity = 0;

  DEVICE void advance() {
    at = at + 1 == STAGES ? 0 : at + 1;
    parity ^= at == 0;
  }
};

// Copies of a slab, each by one thread.
DEVICE void copy_codes(unsigned char* stage, const TensorMap& codes, const TensorMap& scales, const Product& p,
                       int tile, int slab, uint64_t* full) {
  mbarrier_arrive_expect_tx(full, WARPS * (CODE_BYTES + SCALE_BYTES));
  UNROLL for (int t = 0; t < BRANCHES; t++) {
    const int first = p.first_tile(tile, t);
    tma_load_2d(stage + CODE_OFFSET + t * OUT_TILES * CODE_BYTES, &codes, slab * (CODE_BYTES / 8), first, full);
    if (HAS_ZERO)
      tma_load_2d(stage + SCALE_OFFSET + t * OUT_TILES * SCALE_BYTES, &scales, p.group(slab, 0) * 8, first, full);
  }
}
DEVICE void copy_x(unsigned char* stage, const TensorMap& x, const float* x_sums, int slab, uint64_t* full) {
  mbarrier_arrive_expect_tx(full, RUNS * RUN_BYTES + (PREPARES ? 0 : FOLDS * SUM_BYTES));
  UNROLL for (int run = 0; run < RUNS; run++)
    tma_load_2d(stage + run * RUN_BYTES, &x, (slab * RUNS + run) * 64, blockIdx.y * COLUMNS, full);
  UNROLL for (int i = 0; i < FOLDS && HAS_ZERO && !PREPARES; i++) {
    const float* from = x_sums + ((size_t)(slab * FOLDS + i) * gridDim.y + blockIdx.y) * COLUMNS;
    bulk_copy(stage + SUM_OFFSET + i * SUM_BYTES, from, SUM_BYTES, full);
  }
}

// What prepare_x.cu does, in place, by one of PREPARING warps. A lane has 32 k of a column at a time; 8 columns a warp,
// whose lines have their vectors in different banks.
DEVICE void prepare(unsigned char* stage, int warp) {
  const int lane = threadIdx.x % 32, block = lane / 8;  // block: of 32 k
  for (int column = warp * 8 + lane % 8; column < COLUMNS; column += PREPARING * 8) {
    unsigned char* line = stage + block / 2 * RUN_BYTES + column * LINE_BYTES;
    uint4 v[4];
    UNROLL for (int c = 0; c < 4; c++) v[c] = *(const uint4*)(line + ((block % 2 * 4 + c) ^ column % 8) * 16);
    float sum = prepare_block(v);
    UNROLL for (int j = 0; j < 4; j++) *(uint4*)(line + ((block % 2 * 4 + j) ^ column % 8) * 16) = v[j];
    UNROLL for (int other = 1; other < GROUP / 32; other *= 2) sum += __shfl_xor_sync(FULL_MASK, sum, 8 * other);
    float* x_sums = (float*)(stage + SUM_OFFSET + block * 32 / GROUP * SUM_BYTES);
    if (HAS_ZERO && block % (GROUP / 32) == 0) x_sums[column] = sum * unit<false>();
  }
}
// The same for all slabs of this block, by a warp.
DEVICE void prepare_all(const Items& items, unsigned char* smem, uint64_t* landed, uint64_t* full, int warp) {
  Stage stage;
  for (int item = blockIdx.x; item < items.count(); item += gridDim.x)
    for (int left = items.end(item) - items.begin(item); left > 0; left--, stage.advance()) {
      mbarrier_wait(&landed[stage.at], stage.parity);
      prepare(smem + stage.at * STAGE_BYTES, warp);
      fence_async();
      __syncwarp();
      if (threadIdx.x % 32 == 0) mbarrier_arrive(&full[stage.at]);
    }
}

// Calls copy(tile, slab, stage) for the slabs of this block in order, each when its stage is empty and the slab
// AT_MOST before it has landed.
template <int AT_MOST, class Copy>
DEVICE void copy_all(const Items& items, uint64_t* full, uint64_t* empty, const Copy& copy) {
  Stage stage, landing;
  bool first_round = true;
  int before_landing = AT_MOST;
  for (int item = blockIdx.x; item < items.count(); item += gridDim.x) {
    const int tile = items.tile(item), end = items.end(item);
    for (int slab = items.begin(item); slab < end; slab++, stage.advance()) {
      first_round &= stage.parity == 0;
      if (!first_round) mbarrier_wait(&empty[stage.at], stage.parity ^ 1);
      if (AT_MOST < STAGES && --before_landing < 0) {
        mbarrier_wait(&full[landing.at], landing.parity);
        landing.advance();
      }
      copy(tile, slab, stage.at);
    }
  }
}

// With SILU warpgroups start products in rotation: while one multiplies, the others decode and scale. By themselves all
// three do the same at the same time. A barrier for each, of the warps that begin their turn and of those that end
// theirs.
struct Turn {
  static constexpr int FIRST = 4;  // number of a barrier; those before it: activate
  int warpgroup;
  bool is_last;  // nothing of this block comes after this slab

  DEVICE static void first() { if (SILU && threadIdx.x / 128 == 2) named_barrier_arrive(FIRST, 256); }
  DEVICE void begin() const {
    if (SILU) named_barrier_wait(FIRST + warpgroup, 256);
  }
  DEVICE void end(bool of_slab) const {
    if (SILU && (warpgroup < 2 || !is_last || !of_slab)) named_barrier_arrive(FIRST + (warpgroup + 1) % 3, 256);
  }
};

// Of e4m3, this warp's scales of a slab, which it loads from memory; others are in the stage.
struct OwnScales {
  const uint32_t* of_tile;
  int slab;
  uint32_t words[FOLDS];

  DEVICE OwnScales(const Product& p, int tile, int warp, int slab) : of_tile(p.scales), slab(slab) {
    if (HAS_ZERO) return;
    const int last = BRANCHES * ((p.rows + 15) / 16) - 1, own = Product::out_tile(0, warp);
    of_tile += (size_t)min(p.first_tile(tile, Product::branch(warp)) + own, last) * p.groups();
    load(p);
  }
  DEVICE void load(const Product& p) {
    UNROLL for (int i = 0; i < FOLDS; i++) words[i] = __ldg(of_tile + min(p.group(slab, i), p.groups() - 1));
  }
  DEVICE void advance(const Product& p) {
    slab++;
    if (!HAS_ZERO) load(p);
  }
};

// This warp's rows of slabs times all columns.
struct Products {
  const int slot;           // of this warp's tile in a stage
  const uint64_t operand_b;  // of stage 0
  float y[1][TILES][4], sum[TILES][4];  // sum: of a group
  uint32_t a[RUNS][4][4];

  DEVICE Products(int warp, uint64_t operand_b) : slot(Product::slot(warp)), operand_b(operand_b) { clear(y[0]); }
  // Operands of a run; a[run] is free.
  DEVICE void decode(const unsigned char* stage, int run) {
    uint4 w[LOADS];
    const unsigned char* own = stage + CODE_OFFSET + slot * CODE_BYTES + threadIdx.x % 32 * 16;
    UNROLL for (int i = 0; i < LOADS; i++) w[i] = *(const uint4*)(own + (run * TILE_VECTORS + 32 * i) * 16);
    UNROLL for (int s = 0; s < 4; s++) operand(a[run][s], w, s);
  }
  DEVICE void start(int at, int run) {  // at: the stage
    const uint32_t address = (uint32_t)operand_b + (at * STAGE_BYTES + run * RUN_BYTES) / 16;
    const uint64_t b = operand_b >> 32 << 32 | address;
    compiler_fence(a[run]);
    wgmma_fence();
    UNROLL for (int s = 0; s < 4; s++) {  // 16 k are 32 bytes; addresses count 16
      if ((run * 64 + s * 16) % GROUP == 0)
        wgmma_bf16_k_major<true>(sum, a[run][s], b + 2 * s);
      else
        wgmma_bf16_k_major<false>(sum, a[run][s], b + 2 * s);
    }
    wgmma_commit();
  }
  // y += the scaled sums of a group, whose products are done. stage: that of its slab; scales: of e4m3.
  DEVICE void fold(const unsigned char* stage, int group, const OwnScales& scales) {
    compiler_fence(sum);
    const int lane = threadIdx.x % 32;
    const float* x_sums = (const float*)(stage + SUM_OFFSET + group * SUM_BYTES) + lane % 4 * 2;
    RowScales of_rows;
    if (HAS_ZERO)
      of_rows.set(*(const uint2*)(stage + SCALE_OFFSET + slot * SCALE_BYTES + group * 64 + lane / 4 * 8));
    else
      of_rows.set(make_uint2(scales.words[group], 0));
    UNROLL for (int n = 0; n < TILES; n++)
      of_rows.add(y[0][n], sum[n], HAS_ZERO ? *(const float2*)(x_sums + 8 * n) : make_float2(0.f, 0.f));
  }
  DEVICE void multiply(const unsigned char* smem, int at, const OwnScales& scales, const Turn& turn) {
    const unsigned char* stage = smem + at * STAGE_BYTES;
    constexpr int GROUP_RUNS = RUNS / FOLDS;
    UNROLL for (int group = 0; group < FOLDS; group++) {
      UNROLL for (int run = group * GROUP_RUNS; run < (group + 1) * GROUP_RUNS; run++) decode(stage, run);
      turn.begin();
      UNROLL for (int run = group * GROUP_RUNS; run < (group + 1) * GROUP_RUNS; run++) start(at, run);
      turn.end(group == FOLDS - 1);
      wgmma_wait<0>();
      fold(stage, group, scales);
    }
  }
};

// What a lane stores: rows 2r and 2r + 1 of its warp's outputs, of each 8 columns two. Made before the products, used
// behind them.
struct Result {
  const Product& p;
  int n;  // the first of the rows
  float scale[2];
  bf16 bias[2];
  uint32_t added[TILES][2];  // residuals

  DEVICE Result(const Product& p, int tile, int warp) : p(p), n(Product::out_tile(tile, warp) * 16) {
    const bf16 zero = 0;
    n += threadIdx.x % 32 / 4 * 2;
    UNROLL for (int i = 0; i < 2; i++) {
      const bool exists = n + i < p.rows;
      const int at = Product::branch(warp) * p.rows + n + i;
      scale[i] = exists ? p.row_scale[at] : 0.f;
      bias[i] = exists && p.bias ? p.bias[at] : zero;
    }
  }
  // sums -> what they stand for, without activation and residual.
  DEVICE void scale_sums(float (&y)[TILES][4]) const {
    UNROLL for (int j = 0; j < TILES; j++)
      UNROLL for (int e = 0; e < 4; e++)
        y[j][e] = y[j][e] * to_result(scale[e / 2], e / 2) + to_float(bias[e / 2]);
  }
  DEVICE int token(int j, int e) const { return blockIdx.y * COLUMNS + 8 * j + threadIdx.x % 4 * 2 + e; }
  // Before sums of splits are added, which takes as long.
  DEVICE void load_residuals() {
    const bool loads = p.residual && p.rows % 2 == 0 && n < p.rows;
    const bf16* from = p.residual + n;
    UNROLL for (int j = 0; j < TILES; j++)
      UNROLL for (int e = 0; e < 2; e++) {
        const uint32_t m = opaque(token(j, e));
        added[j][e] = loads && m < p.tokens ? *(const uint32_t*)(from + m * p.rows) : 0;
      }
  }
  DEVICE void store(const float (&y)[TILES][4]) const {
    UNROLL for (int j = 0; j < TILES; j++)
      UNROLL for (int e = 0; e < 2; e++) {
        const int m = opaque(token(j, e));
        if (m >= p.tokens || n >= p.rows) continue;
        const size_t at = (size_t)m * p.rows + n;
        if (p.rows % 2 == 0) {
          store_pair(p.out + at, y[j][e] + low(added[j][e]), y[j][e + 2] + high(added[j][e]));
        } else {
          UNROLL for (int i = 0; i < 2; i++)
            if (n + i < p.rows)
              p.out[at + i] = to_output(y[j][e + 2 * i] + (p.residual ? to_float(p.residual[at + i]) : 0.f));
        }
      }
  }
};

// silu(gate) * up: two warps of a warpgroup have gate, two have up. exchange: [WARPS / 2][TILES][32] float4. Returns
// whether this warp has the products, in y.
DEVICE bool activate(float (&y)[TILES][4], float4* exchange, int warp) {
  float4* own = exchange + (warp / 4 * 2 + warp % 2) * TILES * 32 + threadIdx.x % 32;
  const bool is_up = Product::branch(warp);
  named_barrier_wait(1 + warp / 4, 128);  // the item before has been read
  UNROLL for (int j = 0; j < TILES; j++)
    if (is_up) own[j * 32] = make_float4(y[j][0], y[j][1], y[j][2], y[j][3]);
  named_barrier_wait(1 + warp / 4, 128);
  if (is_up) return false;
  UNROLL for (int j = 0; j < TILES; j++) {
    const float4 v = own[j * 32];
    const float up[4] = {v.x, v.y, v.z, v.w};
    UNROLL for (int e = 0; e < 4; e++) {
      float both[BRANCHES];
      both[0] = y[j][e];
      both[BRANCHES - 1] = up[e];
      y[j][e] = activated(both);
    }
  }
  return true;
}

// x_sums: of groups, [K / GROUP][blocks of columns * COLUMNS]. workspace float32 [blocks of columns][items][ROWS *
// COLUMNS]; split_counter int [blocks of columns][tiles][WARPS], zero before and after; both only if splits > 1, and
// then blocks = items.
extern "C" __global__ void __launch_bounds__(THREADS + (MOVES_REGISTERS ? 128 : 64), 1)
    linear_batch(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap codes,
                 const __grid_constant__ TensorMap scale_boxes, const uint32_t* scales, const float* row_scale,
                 const float* x_sums, const bf16* bias, const bf16* residual, Output* out, float* workspace,
                 int* split_counter, int tokens, int K, int N, int shift, int splits) {
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ uint64_t codes_full[STAGES], landed[PREPARES ? STAGES : 1], x_full[STAGES], empty[STAGES];
  const int warp = __shfl_sync(FULL_MASK, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const Product p = {scales, row_scale, bias, residual, out, tokens, K, N / BRANCHES, shift};
  const int tiles = (p.rows + OUT_TILES * 16 - 1) / (OUT_TILES * 16);
  const Items items = {(p.runs() + RUNS - 1) / RUNS, splits, tiles};
  if (warp == WARPS && lane == 0) {
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(&codes_full[s], 1);
      mbarrier_init(&x_full[s], PREPARES ? PREPARING : 1);
      if (PREPARES) mbarrier_init(&landed[s], 1);
      mbarrier_init(&empty[s], PREPARES ? THREADS : WARPS);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warp >= WARPS) {
    if (MOVES_REGISTERS) decrease_registers<56>();
    if (warp > WARPS) wait_then_allow_next();
    if (PREPARES && warp > WARPS + 1) prepare_all(items, smem, landed, x_full, warp - WARPS - 2);
    if (lane > 0 || warp > WARPS + 1) return;
    if (warp == WARPS)
      copy_all<IN_FLIGHT>(items, codes_full, empty, [&](int tile, int slab, int at) {
        copy_codes(smem + at * STAGE_BYTES, codes, scale_boxes, p, tile, slab, &codes_full[at]);
      });
    else
      copy_all<STAGES>(items, x_full, empty, [&](int tile, int slab, int at) {
        copy_x(smem + at * STAGE_BYTES, x, x_sums, slab, PREPARES ? &landed[at] : &x_full[at]);
      });
    return;
  }
  if (MOVES_REGISTERS) increase_registers<152>();
  Turn::first();
  wait_then_allow_next();
  Stage stage;
  for (int item = blockIdx.x; item < items.count(); item += gridDim.x) {
    Result result(p, items.tile(item), warp);
    Products products(warp, wgmma_operand(smem, PATTERN, 0));
    OwnScales scales(p, items.tile(item), warp, items.begin(item));
    const bool last_item = item + gridDim.x >= items.count();
    for (int left = items.end(item) - items.begin(item); left > 0; left--, stage.advance()) {
      const OwnScales now = scales;
      scales.advance(p);
      mbarrier_wait(&codes_full[stage.at], stage.parity);
      mbarrier_wait(&x_full[stage.at], stage.parity);
      products.multiply(smem, stage.at, now, Turn{warp / 4, last_item && left == 1});
      __syncwarp();
      if (PREPARES || lane == 0) mbarrier_arrive(&empty[stage.at]);  // sums of x are written anew: each reader arrives
    }
    const int own = opaque(item), tile = items.tile(own), split = items.split(own);
    const size_t floats = (size_t)ROWS * COLUMNS, column_block = blockIdx.y;
    auto partial = [&](int s) {
      return (float4*)(workspace + (column_block * items.count() + tile + s * items.tiles) * floats) + threadIdx.x;
    };
    int* counter = split_counter + (column_block * items.tiles + tile) * WARPS + warp;
    if (COLUMNS <= 48) result.load_residuals();
    float (&y)[TILES][4] = products.y[0];
    const bool merges = !SILU && splits > 1;
    if (merges && !merge_splits<THREADS, UNROLLED, TILES>(products.y, partial, split, 0, splits - 1, counter)) continue;
    result.scale_sums(y);
    if (SILU && !activate(y, (float4*)(smem + STAGES * STAGE_BYTES), warp)) continue;
    if (COLUMNS > 48) result.load_residuals();
    result.store(y);
  }
}
