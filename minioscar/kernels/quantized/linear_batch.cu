// quantized/linear_batch.cu: linear_batch.cu for weights in 4 and 8 bits, up to 256 tokens.
//
//   y[m, n] = act(row_scale[n] sum_g scale[n, g] sum_k (code[n, k] - zero[n, g]) x[m, k] + bias[n]) + residual[m, n]
//
// Shapes as in quantized/linear.cu; SILU: weight holds gate rows, then up rows, N / 2 a multiple of 16. Float32
// inside, zeros and scales applied to the sums of groups; rounded once at the end.
//
// As linear_batch.cu a block has ROWS rows and COLUMNS tokens and goes over k in slabs, here of SLAB_RUNS * 64 k for
// each of K_GROUPS, STAGES - 2 of them in flight. Codes lie in a stage as lanes take them: a lane copies and reads its
// own. Rows of x are lines of 64 k in a stage; all threads multiply them by 2^100 in place and add up their groups, a
// slab ahead, so that no warp does it again (codes.cuh). A warp has ROW_TILES * 16 rows and all columns: its products
// of a group, and what scales have made of those before, are 8 * ROW_TILES * TILES floats a lane.
//
// Blocks share slabs, split k and merge as those of linear_batch.cu do (linear_batch.cuh).
// Instructions of a warp for 128 k of 32 rows and 48 tokens in 4 bits, groups of 128: 80 conversions, 96 MMA, 96 FMA
// for the fold, 28 loads, 100 for its share of x. Beyond 38 tokens an H200's tensor cores take longer than the bytes.
// grid (blocks, blocks of columns), 256 threads; dynamic shared memory STAGES * STAGE_BYTES.
//
// Set by -D: COLUMNS (tokens of a block, a multiple of 16), ROW_TILES (even with SILU), K_GROUPS, SLAB_RUNS, STAGES (3
// or more), GROUP (k whose sum is scaled at once: 32, 64, 128), KIND, and the macros of linear.cuh.
constexpr int WARPS = 8;
#include "../linear_batch.cuh"
#include "codes.cuh"

constexpr int FOLDS = SLAB_RUNS * 64 / GROUP;              // of a k group
constexpr int CODE_BYTES = SLAB_RUNS * TILE_VECTORS * 16;  // of a tile
constexpr int SCALE_BYTES = FOLDS * (HAS_ZERO ? 64 : 4);
constexpr int LINE_BYTES = 128, SCALE_OFFSET = WARPS * ROW_TILES * CODE_BYTES;
constexpr int X_OFFSET = (SCALE_OFFSET + WARPS * ROW_TILES * SCALE_BYTES + 127) / 128 * 128;
constexpr int SUM_OFFSET = X_OFFSET + K_GROUPS * SLAB_RUNS * COLUMNS * LINE_BYTES;
constexpr int STAGE_BYTES = (SUM_OFFSET + (HAS_ZERO ? K_GROUPS * FOLDS * COLUMNS * 4 : 0) + 127) / 128 * 128;
static_assert(STAGES >= 3 && SLAB_RUNS * 64 % GROUP == 0, "a slab has whole groups, and the next one is prepared");
static_assert(ROW_TILES % BRANCHES == 0 && COLUMNS % (8 * K_GROUPS) == 0, "gate and up are tiles of one warp");
static_assert(K_GROUPS == 1 || WARPS * ROW_TILES * OWN_TILES * 512 <= STAGE_BYTES, "the groups' sums fit into a stage");

struct Product {
  const bf16 *x, *bias, *residual;
  const uint4* codes;
  const uint32_t* scales;
  const float* row_scale;
  Output* out;
  int tokens, K, rows, shift;  // rows: of gate, or of all; shift: a group has 2^shift columns

  DEVICE int runs() const { return (K + 63) / 64; }
  // Output tile, of 16 rows, that MMA tile t of this warp belongs to.
  DEVICE int out_tile(int tile, int t) const {
    return (tile * ROW_WARPS + (int)threadIdx.x / 32 % ROW_WARPS) * (ROW_TILES / BRANCHES) + t / BRANCHES;
  }
  // The tile of the matrix. Those past the end repeat the last one; their results are discarded.
  DEVICE int matrix_tile(int tile, int t) const {
    const int tiles = (rows + 15) / 16;
    return t % BRANCHES * tiles + min(out_tile(tile, t), tiles - 1);
  }
  DEVICE static int first_run(int slab) {  // of this warp
    return (slab * K_GROUPS + (int)threadIdx.x / 32 / ROW_WARPS) * SLAB_RUNS;
  }

  DEVICE void copy_codes(unsigned char* stage, int tile, int slab) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, run = first_run(slab), of_run = TILE_VECTORS * 16;
    unsigned char* own = stage + warp * ROW_TILES * CODE_BYTES + lane * 16;
    UNROLL for (int t = 0; t < ROW_TILES; t++) {
      const uint4* from = codes + ((size_t)matrix_tile(tile, t) * runs() + run) * TILE_VECTORS + lane;
      UNROLL for (int j = 0; j < SLAB_RUNS; j++)
        UNROLL for (int i = 0; i < LOADS; i++)
          cp_async_16_or_zero<false>(own + t * CODE_BYTES + j * of_run + i * 512, from + j * TILE_VECTORS + 32 * i,
                                     run + j < runs());
    }
    copy_scales(stage + SCALE_OFFSET + warp * ROW_TILES * SCALE_BYTES, tile, run * 64);
  }
  // A tile has 16 words of each group, of e4m3 one.
  DEVICE void copy_scales(unsigned char* to, int tile, int first_k) const {
    constexpr int PARTS = HAS_ZERO ? 4 : 1;
    const int i = threadIdx.x % 32, fold = i / PARTS % FOLDS, k = first_k + fold * GROUP;
    UNROLL for (int t = 0; t < ROW_TILES; t++) {
      if (i >= PARTS * FOLDS) continue;
      const uint32_t group = matrix_tile(tile, t) * (((K - 1) >> shift) + 1) + (k >> shift);
      if (HAS_ZERO)
        cp_async_16_or_zero<false>(to + t * SCALE_BYTES + i * 16, scales + group * (size_t)16 + i % PARTS * 4, k < K);
      else
        cp_async_4_or_zero(to + t * SCALE_BYTES + i * 4, scales + group, k < K);
    }
  }
  // Lines [k group][run][column]; 16-byte vector q of the line of column i is at q ^ 4 (i % 2): the 8 lanes of a phase
  // that load operand B, of two columns, are in different banks.
  DEVICE void copy_x(unsigned char* stage, int slab) const {
    const int thread = opaque(threadIdx.x), vector = thread % 8;
    UNROLL for (int j = 0; j < K_GROUPS * SLAB_RUNS * COLUMNS; j += THREADS / 8) {
      const int line = j + thread / 8, m = blockIdx.y * COLUMNS + line % COLUMNS;
      const int k = (slab * K_GROUPS * SLAB_RUNS + line / COLUMNS) * 64 + vector * 8;
      if (K_GROUPS * SLAB_RUNS * COLUMNS % (THREADS / 8) == 0 || line < K_GROUPS * SLAB_RUNS * COLUMNS)
        cp_async_16_or_zero<false>(stage + X_OFFSET + line * LINE_BYTES + (vector ^ line % 2 * 4) * 16,
                                   x + (size_t)m * K + k, m < tokens && k < K);
    }
  }
};

DEVICE float sum_of(uint32_t pair) { return low(pair) + high(pair); }

// x of a stage, once its copies have landed: times 2^100, and the sums of its groups as the sums of code 1 would be.
DEVICE void prepare_x(unsigned char* stage) {
  const int thread = opaque(threadIdx.x), vector = thread % 8;
  float* x_sums = (float*)(stage + SUM_OFFSET);  // [k group][fold][column]
  UNROLL for (int j = 0; j < K_GROUPS * COLUMNS; j += THREADS / 8) {
    const int line = j + thread / 8, group = line / COLUMNS, column = line % COLUMNS;
    const bool valid = K_GROUPS * COLUMNS % (THREADS / 8) == 0 || line < K_GROUPS * COLUMNS;
    float sums[SLAB_RUNS];
    UNROLL for (int run = 0; run < SLAB_RUNS; run++) {
      uint4* at = (uint4*)(stage + X_OFFSET + ((group * SLAB_RUNS + run) * COLUMNS + column) * LINE_BYTES) + vector;
      const uint4 v = valid ? *at : make_uint4(0, 0, 0, 0);
      if (valid) *at = ScaledX()(v);
      sums[run] = (sum_of(v.x) + sum_of(v.y)) + (sum_of(v.z) + sum_of(v.w));
    }
    if (!HAS_ZERO) continue;
    if (GROUP == 128) sums[0] += sums[1];
    UNROLL for (int run = 0; run < (GROUP == 128 ? 1 : SLAB_RUNS); run++) {
      const float sum = warp_sum<(GROUP == 32 ? 4 : 8)>(sums[run]);
      const int half = GROUP == 32 ? (vector ^ column % 2 * 4) / 4 : 0, fold = run * 64 / GROUP + half;
      if (valid && vector % (GROUP == 32 ? 4 : 8) == 0)
        x_sums[(group * FOLDS + fold) * COLUMNS + column] = sum * unit<false>();
    }
  }
}

// y += this warp's rows of a slab times all columns.
DEVICE void multiply(float (&y)[ROW_TILES][TILES][4], const unsigned char* stage) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, group = warp / ROW_WARPS;
  const unsigned char* codes = stage + warp * ROW_TILES * CODE_BYTES + lane * 16;
  const unsigned char* columns = stage + X_OFFSET + group * SLAB_RUNS * COLUMNS * LINE_BYTES + r * LINE_BYTES;
  const float* x_sums = (const float*)(stage + SUM_OFFSET) + group * FOLDS * COLUMNS + 2 * c;
  const unsigned char* scales = stage + SCALE_OFFSET + warp * ROW_TILES * SCALE_BYTES;
  float sum[ROW_TILES][TILES][4];  // of a group
  UNROLL for (int half = 0; half < 2 * SLAB_RUNS; half++) {  // 32 k: two steps
    const int run = half / 2, h = half % 2;
    uint32_t a[2][ROW_TILES][4];
    UNROLL for (int t = 0; t < ROW_TILES; t++) {
      uint4 w[LOADS];
      UNROLL for (int i = 0; i < LOADS; i++)
        w[i] = *(const uint4*)(codes + t * CODE_BYTES + run * TILE_VECTORS * 16 + (LOADS == 1 ? 0 : h) * 512);
      UNROLL for (int s = 0; s < 2; s++) operand(a[s][t], w, 2 * h + s);
    }
    UNROLL for (int n = 0; n < TILES; n++) {
      const uint4 b = *(const uint4*)(columns + (run * COLUMNS + 8 * n) * LINE_BYTES + ((4 * h + c) ^ r % 2 * 4) * 16);
      const uint4 both[2] = {b, b};
      UNROLL for (int s = 0; s < 2; s++)
        UNROLL for (int t = 0; t < ROW_TILES; t++)
          multiply(sum[t][n], a[s][t], both, 2 * h + s, (half * 32 + s * 16) % GROUP == 0);
    }
    if ((half + 1) * 32 % GROUP != 0) continue;
    const int fold = half * 32 / GROUP;
    RowScales of_rows[ROW_TILES];
    UNROLL for (int t = 0; t < ROW_TILES; t++) of_rows[t].load(scales + t * SCALE_BYTES, fold, r);
    UNROLL for (int n = 0; n < TILES; n++) {
      const float2 x_sum = HAS_ZERO ? *(const float2*)(x_sums + fold * COLUMNS + 8 * n) : make_float2(0.f, 0.f);
      UNROLL for (int t = 0; t < ROW_TILES; t++) of_rows[t].add(y[t][n], sum[t][n], x_sum);
    }
  }
}

// What finishes rows 2r and 2r + 1 of this warp's tiles; loaded before the products.
struct RowEnds {
  float scale[ROW_TILES][2], bias[ROW_TILES][2];

  DEVICE RowEnds(const Product& p, int tile) {
    UNROLL for (int t = 0; t < ROW_TILES; t++)
      UNROLL for (int i = 0; i < 2; i++) {
        const int n = p.out_tile(tile, t) * 16 + (int)threadIdx.x % 32 / 4 * 2 + i, at = t % BRANCHES * p.rows + n;
        scale[t][i] = n < p.rows ? to_result(p.row_scale[at], i) : 0.f;
        bias[t][i] = n < p.rows && p.bias ? to_float(p.bias[at]) : 0.f;
      }
  }
};

// A warp's sums of a tile: scales of rows, bias, activation, residual, and out. z: columns first_column ...
DEVICE void finish(const Sums& z, const Product& p, const RowEnds& ends, int tile, int first_column) {
  const int lane = opaque(threadIdx.x % 32), r = lane / 4, c = lane % 4;
  UNROLL for (int j = 0; j < ROW_TILES / BRANCHES; j++) {
    const int n = p.out_tile(tile, j * BRANCHES) * 16 + 2 * r;
    UNROLL for (int tile = 0; tile < OWN_TILES; tile++)
      UNROLL for (int e = 0; e < 2; e++) {
        const int m = first_column + 8 * tile + 2 * c + e;
        if (m >= p.tokens || n >= p.rows) continue;
        float two[2];
        UNROLL for (int i = 0; i < 2; i++) {
          float branches[BRANCHES];
          UNROLL for (int h = 0; h < BRANCHES; h++) {
            const int t = j * BRANCHES + h;
            branches[h] = z[t][tile][2 * i + e] * ends.scale[t][i] + ends.bias[t][i];
          }
          two[i] = activated(branches);
        }
        const size_t at = (size_t)m * p.rows + n;
        if (p.rows % 2 == 0) {
          const uint32_t added = p.residual ? *(const uint32_t*)(p.residual + at) : 0;
          store_pair(p.out + at, two[0] + low(added), two[1] + high(added));
        } else {
          UNROLL for (int i = 0; i < 2; i++)
            if (n + i < p.rows) p.out[at + i] = to_output(two[i] + (p.residual ? to_float(p.residual[at + i]) : 0.f));
        }
      }
  }
}

// workspace float32 [blocks of columns][blocks][2][ROWS * COLUMNS]; split_counter int [blocks of
// columns][tiles][WARPS], zero before and after.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_batch(const bf16* x, const uint4* codes, const uint32_t* scales, const float* row_scale, const bf16* bias,
             const bf16* residual, Output* out, float* workspace, int* split_counter, int tokens, int K, int N,
             int shift, int granularity) {
  extern __shared__ __align__(128) unsigned char smem[];
  const Product p = {x, bias, residual, codes, scales, row_scale, out, tokens, K, N / BRANCHES, shift};
  const int tiles = (p.rows + OUT_ROWS - 1) / OUT_ROWS, slab_runs = K_GROUPS * SLAB_RUNS;
  const int slabs = (p.runs() + slab_runs - 1) / slab_runs;
  const SlabList list = {slabs, slabs * tiles, granularity};
  int remaining = list.begin(blockIdx.x + 1), slab = list.begin(blockIdx.x), tile = slab / slabs;
  remaining -= slab;  // slabs to multiply
  slab -= tile * slabs;
  int copied_tile = tile, copied_slab = slab;  // what is copied next
  auto next_copy = [&] {
    if (++copied_slab == slabs) {
      copied_slab = 0;
      copied_tile++;
    }
  };
  for (int i = 0; i < STAGES - 1; i++) {
    if (i < remaining) p.copy_codes(smem + i * STAGE_BYTES, copied_tile, copied_slab);
    next_copy();
  }
  wait_then_allow_next();
  for (int i = 0; i < STAGES - 1; i++) {
    if (i < remaining) p.copy_x(smem + i * STAGE_BYTES, (slab + i) % slabs);
    cp_async_commit();
  }
  cp_async_wait<STAGES - 2>();
  __syncthreads();
  if (remaining > 0) prepare_x(smem);
  for (unsigned char* stage = smem; remaining > 0; tile++) {
    const RowEnds ends(p, tile);
    float y[ROW_TILES][TILES][4];
    clear(y);
    const bool starts_here = slab == 0;
    unsigned char* last_stage;
    do {
      cp_async_wait<STAGES - 3>();
      // This slab's x is prepared, the next one has landed, and all are done with the one before, whose stage is
      // refilled now.
      __syncthreads();
      unsigned char* next = stage == smem + (STAGES - 1) * STAGE_BYTES ? smem : stage + STAGE_BYTES;
      if (remaining >= STAGES) {
        unsigned char* free_stage = stage == smem ? smem + (STAGES - 1) * STAGE_BYTES : stage - STAGE_BYTES;
        p.copy_codes(free_stage, copied_tile, copied_slab);
        p.copy_x(free_stage, copied_slab);
        next_copy();
      }
      cp_async_commit();
      if (remaining > 1) prepare_x(next);
      multiply(y, stage);
      last_stage = stage;
      stage = next;
      remaining--;
      slab = slab + 1 == slabs ? 0 : slab + 1;
    } while (slab && remaining > 0);
    Sums z;
    reduce_k_groups(y, z, last_stage);
    float* partials = workspace + (size_t)blockIdx.y * gridDim.x * 2 * ROWS * COLUMNS;
    const int warp = threadIdx.x / 32;
    if ((starts_here && slab == 0) ||
        merge_tile(z, list, tile, partials, split_counter + ((int)blockIdx.y * tiles + tile) * WARPS + warp))
      finish(z, p, ends, tile, blockIdx.y * COLUMNS + warp / ROW_WARPS * OWN_TILES * 8);
  }
}
