// quantized/linear.cu: linear.cu for weights in 4 and 8 bits, 1 to 8 tokens at a time.
//
//   y[m, n] = act(row_scale[n] sum_g scale[n, g] sum_k (code[n, k] - zero[n, g]) x'[m, k] + bias[n]) + residual[m, n]
//   x' = x, or with NORM rms_norm(x) rounded to BF16        g: the group of k
//
// x [M][K], bias [N], residual [M][out], norm [K]: BF16, K a multiple of 8. codes, scales, row_scale: minioscar/
// quantized.py. out [M][N], BF16 or float32. SILU: weight holds gate rows, then up rows, N / 2 a multiple of 16; out
// [M][N / 2] = silu(gate) * up. Float32 inside, zeros and scales applied to the sums of groups; rounded once at the
// end. K alone decides the order of sums.
//
// The time is that of the weights, 4.25 or 8.25 bits each (groups of 128), read once for all tokens. A block has a
// tile of 16 rows (of gate and of up) at a time; its warps split k, a chunk of RUNS * 64 each in rotation, and their
// sums meet in shared memory. Each warp copies its chunks, codes and scales and without NORM x too, into a ring of its
// own in shared memory, SLOTS of them ahead, across the ends of tiles: no block waits for its copies together. Normed,
// x' is in shared memory once, rows 64 B past a line apart (linear.cu).
//
// What a launch cannot do at the memory's rate is its start and its end: x of the one before, the norm, the last
// sums. So a block takes half of a multiprocessor (quantized.shared_bytes), and lets the next launch begin when its
// own last copies are under way: that one's first SLOTS chunks are copied meanwhile.
//
// Two chains of products run side by side in a warp, of two halves of a chunk or of gate and up, since each product
// waits for the one before it in its chain. Instructions of a warp for 16 rows and 128 k in 4 bits, groups of 128:
// 40 conversions, 16 MMA (8 sum x), 30 for copies, loads and the fold; an H200 has 244 issue slots in the time of
// their 1,088 bytes.
// grid: any number of blocks, WARPS * 32 threads; dynamic shared memory: two tiles' sums, with NORM M rows of x', rings.
//
// Set by -D: NORM, RUNS (2; without SILU also 4), SLOTS, GROUP (k whose sum is scaled at once: 32, 64, 128), KIND, and
// the macros of linear.cuh.
constexpr int WARPS = 8;
#include "../linear_vector.cuh"
#include "codes.cuh"

constexpr int CHAINS = RUNS / 2, FOLDS = 128 / GROUP;        // of products of a tile, side by side; of a chain
constexpr int CODE_BYTES = RUNS * TILE_VECTORS * 16;         // of 16 rows of a chunk
constexpr int SCALE_VECTORS = CHAINS * FOLDS * (HAS_ZERO ? 4 : 1);  // of 16 rows; of e4m3 a group has 4 bytes of one
constexpr int X_OFFSET = BRANCHES * (CODE_BYTES + SCALE_VECTORS * 16);  // of a slot
constexpr int TILE_SUMS = WARPS * BRANCHES * 16 * COLUMNS;
static_assert(RUNS % 2 == 0 && 128 % GROUP == 0, "a chain has whole groups");

// The next chunk that a warp copies. Whatever is past the end is not read.
struct Copies {
  const uint4* codes;
  const uint32_t* scales;
  const bf16* x;
  int rows, K, shift, tokens, tile, chunk;  // shift: a group has 2^shift columns

  DEVICE int chunks() const { return (K + RUNS * 64 - 1) / (RUNS * 64); }
  DEVICE bool exist() const { return tile * 16 < rows && chunk < chunks(); }
  DEVICE void advance() {
    if ((chunk += WARPS) < chunks()) return;
    chunk = threadIdx.x / 32;
    tile += gridDim.x;
  }
  DEVICE void copy_codes(unsigned char* slot) const {
    const int lane = threadIdx.x % 32, tiles = (rows + 15) / 16, runs = (K + 63) / 64, run = chunk * RUNS;
    UNROLL for (int t = 0; t < BRANCHES; t++) {
      const uint4* from = codes + ((uint32_t)(t * tiles + tile) * runs + run) * TILE_VECTORS + lane;
      UNROLL for (int j = 0; j < RUNS; j++)
        UNROLL for (int i = 0; i < LOADS; i++)
          cp_async_16_or_zero<false>(slot + t * CODE_BYTES + (j * TILE_VECTORS + 32 * i + lane) * 16,
                                     from + j * TILE_VECTORS + 32 * i, run + j < runs);
    }
    if (lane >= SCALE_VECTORS) return;
    const int fold = HAS_ZERO ? lane / 4 : lane, k = chunk * RUNS * 64 + fold * GROUP, groups = ((K - 1) >> shift) + 1;
    UNROLL for (int t = 0; t < BRANCHES; t++) {
      unsigned char* to = slot + BRANCHES * CODE_BYTES + (t * SCALE_VECTORS + lane) * 16;
      const uint32_t group = (t * tiles + tile) * groups + (k >> shift);
      if (HAS_ZERO)
        cp_async_16_or_zero<false>(to, scales + group * (size_t)16 + lane % 4 * 4, k < K);
      else
        cp_async_4_or_zero(to, scales + group, k < K);
    }
  }
  // Rows of RUNS * 64 numbers; 16-byte vector v of row m is at v ^ 4 (m % 2): the 8 lanes of a phase that load operand
  // B, of two rows, are in different banks.
  DEVICE void copy_x(unsigned char* slot) const {
    constexpr int VECTORS = RUNS * 8;
    for (int i = threadIdx.x % 32; i < tokens * VECTORS; i += 32) {
      const int m = i / VECTORS, v = i % VECTORS, k = chunk * RUNS * 64 + 8 * v;
      cp_async_16_or_zero<false>(slot + X_OFFSET + m * VECTORS * 16 + (v ^ m % 2 * 4) * 16, x + (size_t)m * K + k, k < K);
    }
  }
};

// y += a chunk: its codes, of each group a sum, times x. own_x: of this lane's token, 8c ... of the chunk's first
// columns, null where there is no such token; columns: of K, from there on.
DEVICE void multiply(float (&y)[BRANCHES][4], const unsigned char* slot, const unsigned char* own_x, int swizzle,
                     int columns) {
  const int lane = threadIdx.x % 32, r = lane / 4;
  const unsigned char* scales = slot + BRANCHES * CODE_BYTES;
  float sum[CHAINS][BRANCHES][4], x_sum[CHAINS][4];  // of a group
  UNROLL for (int half = 0; half < 4; half++) {      // 32 k of a chain: two steps
    uint4 b[CHAINS];
    UNROLL for (int u = 0; u < CHAINS; u++) {
      const int k = u * 128 + half * 32;
      const bool exists = own_x && k < columns;
      const uint4 v = exists ? *(const uint4*)(own_x + ((2 * k) ^ swizzle)) : make_uint4(0, 0, 0, 0);
      b[u] = NORM ? v : ScaledX()(v);
    }
    uint4 w[CHAINS][BRANCHES][LOADS];
    UNROLL for (int u = 0; u < CHAINS; u++)
      UNROLL for (int t = 0; t < BRANCHES; t++)
        UNROLL for (int i = 0; i < LOADS; i++) {
          const int run = 2 * u + half / 2, at = run * TILE_VECTORS + (LOADS == 1 ? 0 : half % 2 * 32) + lane;
          w[u][t][i] = *(const uint4*)(slot + t * CODE_BYTES + at * 16);
        }
    UNROLL for (int s = 0; s < 2; s++) {
      const int step = half % 2 * 2 + s;
      const bool begins = (half * 32 + s * 16) % GROUP == 0;
      UNROLL for (int u = 0; u < CHAINS; u++) {
        const uint4 both[2] = {b[u], b[u]};
        if (HAS_ZERO) add_x(x_sum[u], both, step, begins);
        UNROLL for (int t = 0; t < BRANCHES; t++) {
          uint32_t a[4];
          operand(a, w[u][t], step);
          multiply(sum[u][t], a, both, step, begins);
        }
      }
    }
    if ((half + 1) * 32 % GROUP != 0) continue;
    UNROLL for (int u = 0; u < CHAINS; u++)
      UNROLL for (int t = 0; t < BRANCHES; t++) {
        RowScales of_rows;
        const int fold = u * FOLDS + half * 32 / GROUP;
        of_rows.load(scales + t * SCALE_VECTORS * 16 + fold * (HAS_ZERO ? 64 : 16), 0, r);
        of_rows.add(y[t], sum[u][t], HAS_ZERO ? sums_of_x(x_sum[u]) : make_float2(0.f, 0.f));
      }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    linear(const bf16* x, const bf16* norm, const uint4* codes, const uint32_t* scales, const float* row_scale,
           const bf16* bias, const bf16* residual, Output* out, int tokens, int K, int N, int shift, float eps) {
  extern __shared__ __align__(128) unsigned char smem[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int rows = N / BRANCHES, stride = (K * 2 + 127) / 128 * 128 + 64;
  const int slot_bytes = X_OFFSET + (NORM ? 0 : tokens * RUNS * 128);
  float* sum_buffers = (float*)smem;  // [2][WARPS][BRANCHES][16][COLUMNS]
  unsigned char* normed = smem + 2 * TILE_SUMS * 4;
  unsigned char* ring = normed + (NORM ? tokens * stride : 0) + warp * SLOTS * slot_bytes;
  Copies next = {codes, scales, x, rows, K, shift, tokens, (int)blockIdx.x, warp}, first = next;
  for (int i = 0; i < SLOTS; i++, next.advance()) {
    if (next.exist()) next.copy_codes(ring + i * slot_bytes);
    if (NORM) cp_async_commit();
  }
  uint4 norm_first = make_uint4(0, 0, 0, 0);
  if (NORM) load_once(norm_first, norm + 8 * threadIdx.x, threadIdx.x < K / 8);
  wait_for_previous();
  if (NORM) {
    norm_x(normed, stride, sum_buffers, x, norm, norm_first, eps, tokens, K, ScaledX());
  } else {
    for (int i = 0; i < SLOTS; i++, first.advance()) {
      if (first.exist()) first.copy_x(ring + i * slot_bytes);
      cp_async_commit();
    }
  }
  const unsigned char* token = normed + r * stride + 16 * c;  // this lane's
  const int swizzle = NORM ? 0 : r % 2 * 64;
  int slot = 0;
  bool odd = false;
  for (int tile = blockIdx.x; tile * 16 < rows; tile += gridDim.x, odd = !odd) {
    // Two buffers: a tile's sums are read while the next ones are written; a barrier comes before the ones after that.
    float* sums = sum_buffers + odd * TILE_SUMS;
    OwnOutput<16> own;
    own.begin(threadIdx.x, tile * 16, tokens, rows, bias, residual);
    float row_scales[BRANCHES], y[BRANCHES][4];
    UNROLL for (int t = 0; t < BRANCHES; t++)
      row_scales[t] = own.exists ? to_result(row_scale[t * rows + own.n], own.n % 2) : 0.f;
    clear(y);
    for (int chunk = warp; chunk < next.chunks(); chunk += WARPS) {
      if (!next.exist()) allow_next();
      cp_async_wait<SLOTS - 1>();
      __syncwarp();  // scales and x, which other lanes have copied
      unsigned char* from = ring + slot * slot_bytes;
      const int k = chunk * RUNS * 64;
      const unsigned char* own_x = NORM ? token + 2 * k : from + X_OFFSET + r * RUNS * 128 + 16 * c;
      multiply(y, from, r < tokens ? own_x : nullptr, swizzle, K - k - 8 * c);
      __syncwarp();  // all lanes are done with the slot
      if (next.exist()) {
        next.copy_codes(from);
        if (!NORM) next.copy_x(from);
      }
      cp_async_commit();
      next.advance();
      slot = slot + 1 == SLOTS ? 0 : slot + 1;
    }
    UNROLL for (int t = 0; t < BRANCHES; t++)
      UNROLL for (int i = 0; i < 2; i++) {
        float* pair = sums + ((warp * BRANCHES + t) * 16 + 2 * r + i) * COLUMNS + 2 * c;
        *(float2*)pair = make_float2(y[t][2 * i], y[t][2 * i + 1]);
      }
    __syncthreads();
    if (own.exists) {
      float z[BRANCHES];
      UNROLL for (int t = 0; t < BRANCHES; t++) z[t] = own.total(sums, t, row_scales[t]);
      own.store(out, rows, z);
    }
  }
}
