// sm90/quantized_batch.cu: quantized/linear_batch.cu on compute capability 9.0 (quantized.uses_wgmma).
//
//   y[m, n] = act(row_scale[n] sum_g scale[n, g] sum_k (code[n, k] - zero[n, g]) x[m, k] + bias[n]) + residual[m, n]
//
// Shapes as in quantized/linear.cu; SILU: weight holds gate rows, then up rows, N / 2 a multiple of 16. Float32
// inside, zeros and scales applied to the sums of groups; rounded once at the end.
//
// A block has COLUMNS tokens and ROWS rows: a tile of 16 for each warp of three warpgroups (SILU: two warps of a
// warpgroup have gate, two have up), which is operand a of wgmma, in registers. Each warp copies its own codes, lane by
// lane, STAGES slabs of 128 k ahead, from before the previous launch has ended. x is operand b, in shared memory. The
// warps of a fourth warpgroup feed it, in as many stages:
//   full      one thread's copies of a slab of x have landed, two boxes of 64 k
//   prepared  three warps have multiplied x by 2^100 (codes.cuh), put it into the order of k that codes have, and
//             added up its groups
//   empty     all products of the stage are done
// The order of k: of 32 columns a lane's codes have 8c + 4s + 2p + {0, 1} in register 2p + i of step s, where wgmma has
// 16s + 8p + 2c + {0, 1}: the four words of four vectors of x are transposed.
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
constexpr int PREPARING = 3;                     // warps; the fourth one of their warpgroup copies
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
DEVICE void copy_x(unsigned char* stage, const TensorMap& x, int slab, uint64_t* full) {
  mbarrier_arrive_expect_tx(full, RUNS * RUN_BYTES);
  UNROLL for (int run = 0; run < RUNS; run++)
    tma_load_2d(stage + run * RUN_BYTES, &x, (slab * RUNS + run) * 64, blockIdx.y * COLUMNS, full);
}

DEVICE float sum_of(uint32_t pair) { return low(pair) + high(pair); }
DEVICE float sum_of(uint4 v) { return (sum_of(v.x) + sum_of(v.y)) + (sum_of(v.z) + sum_of(v.w)); }

// x of a stage in place: times 2^100, transposed, and the sums of its groups as the sums of code 1 would be. A lane has
// 32 k of a column at a time; 8 columns a warp, whose lines have their vectors in different banks.
DEVICE void prepare_x(unsigned char* stage, int warp) {
  const int lane = threadIdx.x % 32, block = lane / 8;  // block: of 32 k
  float* x_sums = (float*)(stage + SUM_OFFSET);         // [fold][column]
  for (int column = warp * 8 + lane % 8; column < COLUMNS; column += PREPARING * 8) {
    unsigned char* line = stage + block / 2 * RUN_BYTES + column * LINE_BYTES;
    uint4 v[4];
    UNROLL for (int c = 0; c < 4; c++) v[c] = *(const uint4*)(line + ((block % 2 * 4 + c) ^ column % 8) * 16);
    float sum = (sum_of(v[0]) + sum_of(v[1])) + (sum_of(v[2]) + sum_of(v[3]));
    UNROLL for (int c = 0; c < 4; c++) v[c] = ScaledX()(v[c]);
    UNROLL for (int j = 0; j < 4; j++)
      *(uint4*)(line + ((block % 2 * 4 + j) ^ column % 8) * 16) =
          make_uint4(word(v[0], j), word(v[1], j), word(v[2], j), word(v[3], j));
    sum += __shfl_xor_sync(FULL_MASK, sum, 8);
    if (GROUP > 64) sum += __shfl_xor_sync(FULL_MASK, sum, 16);
    if (HAS_ZERO && block % (GROUP / 32) == 0) x_sums[block * 32 / GROUP * COLUMNS + column] = sum * unit<false>();
  }
}

// y += this warp's rows of a slab times all columns.
DEVICE void multiply(float (&y)[TILES][4], const unsigned char* stage, int warp) {
  const int lane = threadIdx.x % 32, c = lane % 4;
  const float* x_sums = (const float*)(stage + SUM_OFFSET) + 2 * c;
  const unsigned char* scales = stage + SCALE_OFFSET + warp * FOLDS * SCALE_BYTES;
  float sum[TILES][4];  // of a group
  uint32_t a[RUNS][4][4];
  auto fold = [&](int i) {
    RowScales of_rows;
    of_rows.load(scales + i * SCALE_BYTES, 0, lane / 4);
    wgmma_wait<0>();
    compiler_fence(sum);
    UNROLL for (int n = 0; n < TILES; n++)
      of_rows.add(y[n], sum[n], HAS_ZERO ? *(const float2*)(x_sums + i * COLUMNS + 8 * n) : make_float2(0.f, 0.f));
  };
  UNROLL for (int run = 0; run < RUNS; run++) {
    uint4 w[LOADS];
    UNROLL for (int i = 0; i < LOADS; i++) {
      const int at = run * TILE_VECTORS + 32 * i + lane;
      w[i] = *(const uint4*)(stage + CODE_OFFSET + warp * CODE_BYTES + at * 16);
    }
    UNROLL for (int s = 0; s < 4; s++) operand(a[run][s], w, s);
    const uint64_t b = wgmma_operand(stage + run * RUN_BYTES, PATTERN, 0);
    UNROLL for (int s = 0; s < 4; s++) {
      const int k = run * 64 + s * 16;
      if (s == 0 || k % GROUP == 0) {
        compiler_fence(a[run]);
        wgmma_fence();
      }
      if (k % GROUP == 0)
        wgmma_bf16_k_major<true>(sum, a[run][s], b + 2 * s);  // 16 k are 32 bytes; addresses count 16
      else
        wgmma_bf16_k_major<false>(sum, a[run][s], b + 2 * s);
      if (s == 3 || (k + 16) % GROUP == 0) wgmma_commit();
      if ((k + 16) % GROUP == 0) fold(k / GROUP);
    }
  }
}

// What a lane stores: rows 2r and 2r + 1 of its warp's outputs, of each 8 columns two. Made before the products, used
// behind them.
struct Result {
  const Product& p;
  int n;  // the first of the rows
  float scale[2];
  bf16 bias[2];

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
  DEVICE void store(const float (&y)[TILES][4]) const {
    uint32_t added[TILES][2];  // loaded before the first store, which the compiler takes to change them
    UNROLL for (int j = 0; j < TILES; j++)
      UNROLL for (int e = 0; e < 2; e++) {
        const bool loads = p.residual && p.rows % 2 == 0 && n < p.rows && token(j, e) < p.tokens;
        added[j][e] = loads ? *(const uint32_t*)(p.residual + (size_t)token(j, e) * p.rows + n) : 0;
      }
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

// workspace float32 [blocks of columns][items][ROWS * COLUMNS]; split_counter int [blocks of columns][tiles][WARPS],
// zero before and after; both only if splits > 1, and then blocks = items.
extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
    linear_batch(const __grid_constant__ TensorMap x, const uint4* codes, const uint32_t* scales,
                 const float* row_scale, const bf16* bias, const bf16* residual, Output* out, float* workspace,
                 int* split_counter, int tokens, int K, int N, int shift, int splits) {
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ uint64_t full[STAGES], prepared[STAGES], empty[STAGES];
  const int warp = __shfl_sync(FULL_MASK, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const Product p = {codes, scales, row_scale, bias, residual, out, tokens, K, N / BRANCHES, shift};
  const int tiles = (p.rows + OUT_TILES * 16 - 1) / (OUT_TILES * 16);
  const Items items = {(p.runs() + RUNS - 1) / RUNS, splits, tiles};
  if (warp == WARPS && lane == 0) {
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&prepared[s], PREPARING);
      mbarrier_init(&empty[s], WARPS);
    }
    mbarrier_init_fence();
  }
  Slabs next(items, p, warp);
  for (int s = 0; s < STAGES && warp < WARPS; s++, next.advance()) {
    if (next.exist()) copy_codes(smem + s * STAGE_BYTES, next);
    cp_async_commit();
  }
  __syncthreads();
  Stage stage;
  if (warp >= WARPS) {
    decrease_registers<56>();
    wait_then_allow_next();
    if (warp == WARPS && lane > 0) return;
    bool first_round = true;
    for (Slabs slabs(items, p, 0); slabs.exist(); slabs.advance(), stage.advance()) {
      first_round &= stage.parity == 0;
      if (warp == WARPS) {
        if (!first_round) mbarrier_wait(&empty[stage.at], stage.parity ^ 1);
        copy_x(stage.in(smem), x, slabs.slab, &full[stage.at]);
        continue;
      }
      mbarrier_wait(&full[stage.at], stage.parity);
      prepare_x(stage.in(smem), warp - WARPS - 1);
      fence_async();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(&prepared[stage.at]);
    }
    return;
  }
  increase_registers<152>();
  wait_then_allow_next();
  for (int item = blockIdx.x; item < items.count(); item += gridDim.x) {
    float sums[1][TILES][4], (&y)[TILES][4] = sums[0];
    clear(y);
    const Result result(p, items.tile(item), warp);  // loads wait behind all copies that are under way
    for (int left = items.end(item) - items.begin(item); left > 0; left--, stage.advance()) {
      cp_async_wait<STAGES - 1>();
      __syncwarp();  // scales, which other lanes have copied
      mbarrier_wait(&prepared[stage.at], stage.parity);
      multiply(y, stage.in(smem), warp);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(&empty[stage.at]);
      if (next.exist()) copy_codes(stage.in(smem), next);
      cp_async_commit();
      next.advance();
    }
    const int own = opaque(item), tile = items.tile(own), split = items.split(own);
    const size_t floats = (size_t)ROWS * COLUMNS, column_block = blockIdx.y;
    auto partial = [&](int s) {
      return (float4*)(workspace + (column_block * items.count() + tile + s * items.tiles) * floats) + threadIdx.x;
    };
    int* counter = split_counter + (column_block * items.tiles + tile) * WARPS + warp;
    if (!SILU && splits > 1 && !merge_splits<THREADS, UNROLLED, TILES>(sums, partial, split, 0, splits - 1, counter))
      continue;
    result.scale_sums(y);
    if (SILU && !activate(y, (float4*)(smem + STAGES * STAGE_BYTES), warp)) continue;
    result.store(y);
  }
}
