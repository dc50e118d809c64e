// sm90/quantized_batch.cu: quantized/linear_batch.cu on compute capability 9.0 (quantized.uses_wgmma).
//
//   y[m, n] = act(row_scale[n] sum_g scale[n, g] sum_k (code[n, k] - zero[n, g]) x[m, k] + bias[n]) + residual[m, n]
//
// Shapes as in quantized/linear.cu; SILU: weight holds gate rows, then up rows, N / 2 a multiple of 16. Float32
// inside, zeros and scales applied to the sums of groups; rounded once at the end.
//
// A block has COLUMNS tokens and ROWS rows: a tile of 16 for each warp of three warpgroups (SILU: two warps of a
// warpgroup have gate, two have up), which is operand a of wgmma, in registers. Each warp copies its own codes, lane by
// lane, STAGES slabs of 128 k ahead, from before the previous launch has ended. x, as prepare_x.cu leaves it, is operand
// b, in shared memory; a thread of a fourth warpgroup copies it and the sums of its groups. Of a stage
//   full      x has landed: two boxes of 64 k, and sums
//   empty     all products of the stage are done
// A run of 64 k is decoded while the run before it is multiplied.
//
// Work items, splits of k and their sums as in sm90/linear_batch.cu; with SILU k is not split. grid (blocks, blocks of
// columns), 512 threads; dynamic shared memory: STAGES stages, with SILU the sums of up. Reads the weights once for
// each block of columns.
//
// Set by -D: COLUMNS (16, 48, 64 or 80, as registers allow), STAGES, GROUP (k whose sum is scaled at once: 64
// or 128), KIND, and the macros of linear.cuh.
constexpr int WARPS = 12;
#include "../linear.cuh"
#include "../split_merge.cuh"
#include "../quantized/codes.cuh"
#include "items.cuh"
#include "wgmma.cuh"

constexpr int RUNS = 2, FOLDS = RUNS * 64 / GROUP, TILES = COLUMNS / 8, LINE_BYTES = 128, PATTERN = 8 * LINE_BYTES;
constexpr int ROWS = WARPS * 16, OUT_TILES = WARPS / BRANCHES;                          // OUT_TILES: of a block
constexpr int RUN_BYTES = COLUMNS * LINE_BYTES, CODE_BYTES = RUNS * TILE_VECTORS * 16;  // of x; of a tile
constexpr int CODE_OFFSET = RUNS * RUN_BYTES, SUM_OFFSET = CODE_OFFSET + WARPS * CODE_BYTES;
constexpr int SCALE_OFFSET = SUM_OFFSET + FOLDS * COLUMNS * 4, SCALE_BYTES = HAS_ZERO ? 64 : 16;  // of a fold of a tile
constexpr int STAGE_BYTES = (SCALE_OFFSET + WARPS * FOLDS * SCALE_BYTES + PATTERN - 1) / PATTERN * PATTERN;
constexpr int UNROLLED = COLUMNS <= 48 ? 2 : 1;  // splits whose sums are loaded together, as registers allow
static_assert(COLUMNS % 16 == 0 && COLUMNS <= 80 && GROUP >= 64, "sums and scales fit into registers");

struct Product {
  const uint4* codes;
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
  // Its tile of the matrix; past the end the last one is repeated.
  DEVICE int matrix_tile(int tile, int warp) const {
    const int tiles = (rows + 15) / 16;
    return branch(warp) * tiles + min(out_tile(tile, warp), tiles - 1);
  }
};

// The slabs of this block in the order in which it takes them.
struct Slabs {
  const Items& items;
  const Product& p;
  int warp, item, slab, end;
  uint32_t first, first_group;  // of this warp's tile: this lane's first vector of codes, and its groups

  DEVICE Slabs(const Items& items, const Product& p, int warp) : items(items), p(p), warp(warp), item(blockIdx.x) {
    begin();
  }
  DEVICE void begin() {
    const uint32_t tile = p.matrix_tile(items.tile(item), warp);
    first = tile * p.runs() * TILE_VECTORS + threadIdx.x % 32;
    first_group = tile * p.groups();
    slab = items.begin(item);
    end = items.end(item);
  }
  DEVICE bool exist() const { return item < items.count(); }
  DEVICE void advance() {
    if (++slab < end) return;
    item += gridDim.x;
    begin();
  }
};
// Which stage is next, and whose turn of its barriers.
struct Stage {
  int at = 0;
  uint32_t parity = 0;

  DEVICE unsigned char* in(unsigned char* smem) const { return smem + at * STAGE_BYTES; }
  DEVICE void advance() {
    at = at + 1 == STAGES ? 0 : at + 1;
    parity ^= at == 0;
  }
};

// This warp's codes and scales of a slab. A lane copies the codes that it reads itself.
DEVICE void copy_codes(unsigned char* stage, const Slabs& next) {
  const int left = next.p.runs() - next.slab * RUNS;  // runs from this slab on
  const uint4* from = next.p.codes + (next.first + next.slab * (RUNS * TILE_VECTORS));
  unsigned char* to = stage + CODE_OFFSET + next.warp * CODE_BYTES + threadIdx.x % 32 * 16;
  UNROLL for (int i = 0; i < RUNS * LOADS; i++)
    cp_async_16_or_zero<true>(to + i * 512, from + 32 * i, i / LOADS < left);
  constexpr int VECTORS = SCALE_BYTES / 16;  // of a fold; e4m3: 4 bytes of one
  const int lane = threadIdx.x % 32, k = next.slab * RUNS * 64 + lane / VECTORS * GROUP;
  if (lane >= FOLDS * VECTORS) return;
  const size_t group = next.first_group + (k >> next.p.shift);
  unsigned char* own = stage + SCALE_OFFSET + next.warp * FOLDS * SCALE_BYTES + lane * 16;
  if (HAS_ZERO)
    cp_async_16_or_zero<false>(own, next.p.scales + group * 16 + lane % VECTORS * 4, k < next.p.K);
  else
    cp_async_4_or_zero(own, next.p.scales + group, k < next.p.K);
}
DEVICE void copy_x(unsigned char* stage, const TensorMap& x, const float* x_sums, int slab, uint64_t* full) {
  constexpr int SUM_BYTES = COLUMNS * 4;
#ifndef NO_X
  mbarrier_arrive_expect_tx(full, RUNS * RUN_BYTES + (HAS_ZERO ? FOLDS * SUM_BYTES : 0));
#endif
#ifdef NO_X
  mbarrier_arrive(full);
  return;
#endif
  UNROLL for (int run = 0; run < RUNS; run++)
    tma_load_2d(stage + run * RUN_BYTES, &x, (slab * RUNS + run) * 64, blockIdx.y * COLUMNS, full);
  UNROLL for (int i = 0; i < FOLDS && HAS_ZERO; i++) {
    const float* from = x_sums + ((size_t)(slab * FOLDS + i) * gridDim.y + blockIdx.y) * COLUMNS;
    bulk_copy(stage + SUM_OFFSET + i * SUM_BYTES, from, SUM_BYTES, full);
  }
}

// This warp's rows of slabs times all columns. A run is decoded while the one before it is multiplied.
struct Products {
  int warp;
  float y[TILES][4], sum[TILES][4];  // sum: of a group
  uint32_t a[RUNS][4][4];

  DEVICE void decode(uint32_t (&a)[4][4], const unsigned char* stage, int run) const {
    uint4 w[LOADS];
    UNROLL for (int i = 0; i < LOADS; i++) {
      const int at = run * TILE_VECTORS + 32 * i + (int)threadIdx.x % 32;
      w[i] = *(const uint4*)(stage + CODE_OFFSET + warp * CODE_BYTES + at * 16);
    }
    UNROLL for (int s = 0; s < 4; s++) operand(a[s], w, s);
  }
  DEVICE void start(uint32_t (&a)[4][4], const unsigned char* stage, int run) {
    const uint64_t b = wgmma_operand(stage + run * RUN_BYTES, PATTERN, 0);
    compiler_fence(a);
    wgmma_fence();
    UNROLL for (int s = 0; s < 4; s++) {  // 16 k are 32 bytes; addresses count 16
      if ((run * 64 + s * 16) % GROUP == 0)
        wgmma_bf16_k_major<true>(sum, a[s], b + 2 * s);
      else
        wgmma_bf16_k_major<false>(sum, a[s], b + 2 * s);
    }
    wgmma_commit();
  }
  // y += the scaled sums of a group, the last whose products were started. stage: that of their slab.
  DEVICE void fold(const unsigned char* stage, int group) {
    wgmma_wait<0>();
    compiler_fence(sum);
    const int lane = threadIdx.x % 32;
    const float* x_sums = (const float*)(stage + SUM_OFFSET) + group * COLUMNS + lane % 4 * 2;
    RowScales of_rows;
    of_rows.load(stage + SCALE_OFFSET + (warp * FOLDS + group) * SCALE_BYTES, 0, lane / 4);
    UNROLL for (int n = 0; n < TILES; n++)
      of_rows.add(y[n], sum[n], HAS_ZERO ? *(const float2*)(x_sums + 8 * n) : make_float2(0.f, 0.f));
  }
  // The products of a slab; of its run 0, a is there.
  DEVICE void multiply(const unsigned char* stage) {
    UNROLL for (int run = 0; run < RUNS; run++) {
      if (run > 0) decode(a[run], stage, run);
      if (run > 0 && GROUP == 64) fold(stage, run - 1);
      start(a[run], stage, run);
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
extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
    linear_batch(const __grid_constant__ TensorMap x, const float* x_sums, const uint4* codes, const uint32_t* scales,
                 const float* row_scale, const bf16* bias, const bf16* residual, Output* out, float* workspace,
                 int* split_counter, int tokens, int K, int N, int shift, int splits) {
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ uint64_t full[STAGES], empty[STAGES];
  const int warp = __shfl_sync(FULL_MASK, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const Product p = {codes, scales, row_scale, bias, residual, out, tokens, K, N / BRANCHES, shift};
  const int tiles = (p.rows + OUT_TILES * 16 - 1) / (OUT_TILES * 16);
  const Items items = {(p.runs() + RUNS - 1) / RUNS, splits, tiles};
  if (warp == WARPS && lane == 0) {
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], WARPS);
    }
    mbarrier_init_fence();
  }
  Slabs next(items, p, warp % WARPS);
  for (int s = 0; s < STAGES && warp < WARPS; s++, next.advance()) {
    if (next.exist()) copy_codes(smem + s * STAGE_BYTES, next);
    cp_async_commit();
  }
  __syncthreads();
  Stage stage;
  if (warp >= WARPS) {
    decrease_registers<32>();
    wait_then_allow_next();
    if (warp > WARPS || lane > 0) return;
    bool first_round = true;
    for (Slabs slabs(items, p, 0); slabs.exist(); slabs.advance(), stage.advance()) {
      first_round &= stage.parity == 0;
      if (!first_round) mbarrier_wait(&empty[stage.at], stage.parity ^ 1);
      copy_x(stage.in(smem), x, x_sums, slabs.slab, &full[stage.at]);
    }
    return;
  }
  increase_registers<160>();
  wait_then_allow_next();
  for (int item = blockIdx.x; item < items.count(); item += gridDim.x) {
    Result result(p, items.tile(item), warp);  // loads wait behind all copies that are under way
    Products products;
    products.warp = warp;
    clear(products.y);
    auto before = [&] { return stage.at == 0 ? STAGES - 1 : stage.at - 1; };
    auto done = [&] {  // with the slab before
      __syncwarp();
      if (lane == 0) mbarrier_arrive(&empty[before()]);
      if (next.exist()) copy_codes(smem + before() * STAGE_BYTES, next);
      next.advance();
    };
    const int slabs = items.end(item) - items.begin(item);
    for (int i = 0; i < slabs; i++) {
      cp_async_wait<STAGES - 2>();
      __syncwarp();  // scales, which other lanes have copied
      wgmma_wait<1>();  // of run 0 of the slab before
      products.decode(products.a[0], stage.in(smem), 0);
      mbarrier_wait(&full[stage.at], stage.parity);
      if (i > 0) {
        products.fold(smem + before() * STAGE_BYTES, FOLDS - 1);
        done();
      }
#ifndef NO_PRODUCTS
      products.multiply(stage.in(smem));
#endif
      cp_async_commit();
      stage.advance();
    }
    products.fold(smem + before() * STAGE_BYTES, FOLDS - 1);
    done();
    cp_async_commit();
    const int own = opaque(item), tile = items.tile(own), split = items.split(own);
    const size_t floats = (size_t)ROWS * COLUMNS, column_block = blockIdx.y;
    auto partial = [&](int s) {
      return (float4*)(workspace + (column_block * items.count() + tile + s * items.tiles) * floats) + threadIdx.x;
    };
    int* counter = split_counter + (column_block * items.tiles + tile) * WARPS + warp;
    if (COLUMNS <= 48) result.load_residuals();
    float sums[1][TILES][4], (&y)[TILES][4] = sums[0];
    UNROLL for (int j = 0; j < TILES; j++)
      UNROLL for (int e = 0; e < 4; e++) y[j][e] = products.y[j][e];
    #ifdef NO_MERGE
    if (split > 0) continue;
    if (false)
#endif
    if (!SILU && splits > 1 && !merge_splits<THREADS, UNROLLED, TILES>(sums, partial, split, 0, splits - 1, counter))
      continue;
    result.scale_sums(y);
    if (SILU && !activate(y, (float4*)(smem + STAGES * STAGE_BYTES), warp)) continue;
    if (COLUMNS > 48) result.load_residuals();
    result.store(y);
  }
}
