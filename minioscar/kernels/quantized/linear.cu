// quantized/linear.cu: linear.cu for weights in 4 and 8 bits, 1 to 8 tokens at a time.
//
//   y[m, n] = act(row_scale[n] sum_g scale[n, g] sum_k (code[n, k] - zero[n, g]) x'[m, k] + bias[n]) + residual[m, n]
//   x' = x, or with NORM rms_norm(x) rounded to BF16        g: the group of k
//
// x [M][K], bias [N], residual [M][out], norm [K]: BF16, K a multiple of 8. codes, scales, row_scale: as
// minioscar/quantized has them. out [M][N], BF16 or float32. SILU: weight holds gate rows, then up rows, N / 2 a
// multiple of 16; out [M][N / 2] = silu(gate) * up. Float32 inside, zeros and scales applied to the sums of groups;
// rounded once at the end. K and BLOCK_WARPS decide the order of sums.
//
// The time is that of the weights, 4.25 or 8.25 bits each (groups of 128), read once for all tokens. A block has
// ROW_TILES * 16 rows (of gate and of up) at a time; its warps split k, a chunk of 128 each in rotation, and their sums
// meet in shared memory. Each warp copies its chunks, codes and scales and without NORM x too, into a ring of its own
// in shared memory, SLOTS ahead and across the ends of passes, EARLY of them before the previous launch has ended.
// Loads wait behind copies: with EARLY < SLOTS x is asked for before the other slots, and what finishes rows a pass
// ahead. Normed, x' is in shared memory once, rows 64 B past a line apart (linear.cu).
// A product waits for the one before it in its sum, so that a warp alone takes as long for a chunk as the memory for
// those of two: there are 16 warps, and the tiles of a chunk are products side by side. Instructions of a warp for 16
// rows and 128 k in 4 bits, groups of 128: 40 conversions (two clocks of a pipe each), 8 MMA, 20 for copies, loads and
// the fold, and a TILES-th of 30 for x and its sums; an H200 has 244 issue slots in the time of their 1,088 bytes.
// grid: any number of blocks, WARPS * 32 threads, one block a multiprocessor; dynamic shared memory: two passes' sums,
// with NORM M rows of x', rings.
//
// Set by -D: BLOCK_WARPS (16; 8 where shared memory is small), NORM, ROW_TILES, SLOTS, EARLY, GROUP (k whose sum is
// scaled at once: 32, 64, 128), KIND, and the macros of linear.cuh.
constexpr int WARPS = BLOCK_WARPS;
#include "../linear_vector.cuh"
#include "codes.cuh"

constexpr int CHUNK = 128, RUNS = CHUNK / 64, FOLDS = CHUNK / GROUP;        // k; runs of 64 and groups of a chunk
constexpr int TILES = ROW_TILES * BRANCHES, ROWS = ROW_TILES * 16;          // tiles of 16 rows of a pass; its outputs
constexpr int CODE_BYTES = RUNS * TILE_VECTORS * 16;                        // of 16 rows of a chunk
constexpr int SCALE_VECTORS = FOLDS * (HAS_ZERO ? 4 : 1), SCALE_BYTES = SCALE_VECTORS * 16;  // e4m3: 4 bytes of one
constexpr int SCALE_OFFSET = TILES * CODE_BYTES, X_OFFSET = SCALE_OFFSET + TILES * SCALE_BYTES;  // of a slot
constexpr int PASS_SUMS = WARPS * TILES * 16 * COLUMNS;

// The next chunk that a warp copies. Tiles past the end repeat the last one; their results are discarded.
struct Copies {
  const uint4* codes;
  const uint32_t* scales;
  const bf16* x;
  int rows, K, shift, tokens, pass, chunk;  // shift: a group has 2^shift columns
  uint32_t first[TILES], first_group[TILES];  // of this lane's vectors and of the groups of the pass

  DEVICE int chunks() const { return (K + CHUNK - 1) / CHUNK; }
  DEVICE bool exist() const { return pass * ROWS < rows && chunk < chunks(); }
  DEVICE void seek(int new_pass) {
    const int tiles = (rows + 15) / 16, runs = (K + 63) / 64, groups = ((K - 1) >> shift) + 1;
    pass = new_pass;
    chunk = threadIdx.x / 32;
    UNROLL for (int t = 0; t < TILES; t++) {
      const uint32_t tile = t / ROW_TILES * tiles + min(pass * ROW_TILES + t % ROW_TILES, tiles - 1);
      first[t] = tile * runs * TILE_VECTORS + threadIdx.x % 32;
      first_group[t] = tile * groups;
    }
  }
  DEVICE void advance() {
    chunk += WARPS;
    if (chunk >= chunks()) seek(pass + gridDim.x);
  }
  DEVICE void copy_codes(unsigned char* slot) const {
    const int lane = threadIdx.x % 32, left = (K + 63) / 64 - chunk * RUNS;  // runs from this chunk on
    unsigned char* own = slot + lane * 16;
    UNROLL for (int t = 0; t < TILES; t++) {
      const uint4* from = codes + (first[t] + chunk * (RUNS * TILE_VECTORS));
      UNROLL for (int i = 0; i < RUNS * LOADS; i++)
        cp_async_16_or_zero<true>(own + t * CODE_BYTES + i * 512, from + 32 * i, i / LOADS < left);
    }
    const int k = chunk * CHUNK + (HAS_ZERO ? lane / 4 : lane) * GROUP;
    if (lane >= SCALE_VECTORS) return;
    UNROLL for (int t = 0; t < TILES; t++) {
      unsigned char* to = own + SCALE_OFFSET + t * SCALE_BYTES;
      const uint32_t group = first_group[t] + (k >> shift);
      if (HAS_ZERO)
        cp_async_16_or_zero<false>(to, scales + (size_t)group * 16 + lane % 4 * 4, k < K);
      else
        cp_async_4_or_zero(to, scales + group, k < K);
    }
  }
  // Rows of CHUNK numbers; 16-byte vector v of row m is at v ^ 4 (m % 2): the 8 lanes of a phase that load operand B,
  // of two rows, are in different banks.
  DEVICE void copy_x(unsigned char* slot) const {
    constexpr int VECTORS = CHUNK / 8;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < tokens * VECTORS; i += 32) {
      const int m = i / VECTORS, v = i % VECTORS, k = chunk * CHUNK + 8 * v;
      unsigned char* to = slot + X_OFFSET + m * VECTORS * 16 + (v ^ m % 2 * 4) * 16;
      cp_async_16_or_zero<false>(to, x + (size_t)m * K + k, k < K);
    }
  }
};

// y += a chunk: its codes, of each group a sum, times x. own_x: 8c ... of the chunk's first columns, of this lane's
// token; lanes of tokens that do not exist have another one's, and their results are discarded.
DEVICE void multiply(float (&y)[TILES][4], const unsigned char* slot, const unsigned char* own_x, int swizzle) {
  const int lane = threadIdx.x % 32, r = lane / 4;
  float sum[TILES][4], x_sum[4];                     // of a group
  UNROLL for (int half = 0; half < 2 * RUNS; half++) {  // 32 k: two steps
    const uint4 loaded = *(const uint4*)(own_x + ((64 * half) ^ swizzle)), b = NORM ? loaded : ScaledX()(loaded);
    const uint4 both[2] = {b, b};
    uint4 w[TILES][LOADS];
    UNROLL for (int t = 0; t < TILES; t++)
      UNROLL for (int i = 0; i < LOADS; i++) {
        const int at = half / 2 * TILE_VECTORS + (LOADS == 1 ? 0 : half % 2 * 32) + lane;
        w[t][i] = *(const uint4*)(slot + t * CODE_BYTES + at * 16);
      }
    UNROLL for (int s = 0; s < 2; s++) {
      const int step = half % 2 * 2 + s;
      const bool begins = (half * 32 + s * 16) % GROUP == 0;
      if (HAS_ZERO) add_x(x_sum, both, step, begins);
      UNROLL for (int t = 0; t < TILES; t++) {
        uint32_t a[4];
        operand(a, w[t], step);
        multiply(sum[t], a, both, step, begins);
      }
    }
    if ((half + 1) * 32 % GROUP != 0) continue;
    UNROLL for (int t = 0; t < TILES; t++) {
      RowScales of_rows;
      of_rows.load(slot + SCALE_OFFSET + t * SCALE_BYTES + half * 32 / GROUP * (HAS_ZERO ? 64 : 16), 0, r);
      of_rows.add(y[t], sum[t], HAS_ZERO ? sums_of_x(x_sum) : make_float2(0.f, 0.f));
    }
  }
}

// What finishes a thread's output of a pass.
struct Ends {
  OwnOutput<ROWS> own;
  float row_scales[BRANCHES];

  DEVICE void load(int pass, int tokens, int rows, const bf16* bias, const bf16* residual, const float* row_scale) {
    own.begin(threadIdx.x, pass * ROWS, tokens, rows, bias, residual);
    UNROLL for (int t = 0; t < BRANCHES; t++) row_scales[t] = own.exists ? row_scale[t * rows + own.n] : 0.f;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    linear(const bf16* x, const bf16* norm, const uint4* codes, const uint32_t* scales, const float* row_scale,
           const bf16* bias, const bf16* residual, Output* out, int tokens, int K, int N, int shift, float eps) {
  extern __shared__ __align__(128) unsigned char smem[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int rows = N / BRANCHES, stride = (K + CHUNK - 1) / CHUNK * CHUNK * 2 + 64;
  const int slot_bytes = X_OFFSET + (NORM ? 0 : tokens * CHUNK * 2);
  float* sum_buffers = (float*)smem;  // [2][WARPS][BRANCHES][ROWS][COLUMNS]
  unsigned char* normed = smem + 2 * PASS_SUMS * 4;
  unsigned char* ring = normed + (NORM ? tokens * stride : 0) + warp * SLOTS * slot_bytes;
  Copies next = {codes, scales, x, rows, K, shift, tokens, 0, 0, {}};
  next.seek(blockIdx.x);
  Copies first = next;
  auto fill = [&](int from, int end, bool commits) {
    for (int i = from; i < end; i++, next.advance()) {
      if (next.exist()) next.copy_codes(ring + i * slot_bytes);
      if (commits) cp_async_commit();
    }
  };
  fill(0, EARLY, NORM);
  uint4 norm_first = make_uint4(0, 0, 0, 0);
  if (NORM) {
    load_once(norm_first, norm + 8 * threadIdx.x, threadIdx.x < K / 8);
    const int row_end = K / 8, missing = (stride - 64) / 16 - row_end;  // 16-byte vectors that no k fills
    for (int i = threadIdx.x; i < tokens * missing; i += THREADS)
      *(uint4*)(normed + i / missing * stride + (row_end + i % missing) * 16) = make_uint4(0, 0, 0, 0);
  }
  wait_then_allow_next();
  if (NORM) {
    norm_x(normed, stride, sum_buffers, x, norm, norm_first, eps, tokens, K, ScaledX(), [&] { fill(EARLY, SLOTS, 1); });
  } else {
    for (int i = 0; i < SLOTS; i++, first.advance()) {
      if (first.exist()) first.copy_x(ring + i * slot_bytes);
      if (i >= EARLY) fill(i, i + 1, false);
      cp_async_commit();
    }
  }
  const int m = min(r, tokens - 1), swizzle = NORM ? 0 : m % 2 * 64;
  Ends ahead;
  if (EARLY < SLOTS) ahead.load(blockIdx.x, tokens, rows, bias, residual, row_scale);
  int slot = 0;
  bool odd = false;
  for (int pass = blockIdx.x; pass * ROWS < rows; pass += gridDim.x, odd = !odd) {
    // Two buffers: a pass's sums are read while the next ones are written; a barrier comes before the ones after that.
    float* sums = sum_buffers + odd * PASS_SUMS;
    if (EARLY == SLOTS) ahead.load(pass, tokens, rows, bias, residual, row_scale);
    const Ends ends = ahead;
    const OwnOutput<ROWS>& own = ends.own;
    if (EARLY < SLOTS) ahead.load(pass + gridDim.x, tokens, rows, bias, residual, row_scale);
    float y[TILES][4];
    clear(y);
    for (int chunk = warp; chunk < next.chunks(); chunk += WARPS) {
      cp_async_wait<SLOTS - 1>();
      __syncwarp();  // scales and x, which other lanes have copied
      unsigned char* from = ring + slot * slot_bytes;
      multiply(y, from, (NORM ? normed + m * stride + chunk * CHUNK * 2 : from + X_OFFSET + m * CHUNK * 2) + 16 * c,
               swizzle);
      __syncwarp();  // all lanes are done with the slot
      if (next.exist()) {
        next.copy_codes(from);
        if (!NORM) next.copy_x(from);
      }
      cp_async_commit();
      next.advance();
      slot = slot + 1 == SLOTS ? 0 : slot + 1;
    }
    UNROLL for (int t = 0; t < TILES; t++)
      UNROLL for (int i = 0; i < 2; i++) {
        float* pair = sums + ((warp * TILES + t) * 16 + 2 * r + i) * COLUMNS + 2 * c;
        *(float2*)pair = make_float2(y[t][2 * i], y[t][2 * i + 1]);
      }
    __syncthreads();
    if (own.exists) {
      float z[BRANCHES];
      UNROLL for (int t = 0; t < BRANCHES; t++) z[t] = own.total(sums, t, to_result(ends.row_scales[t], own.n % 2));
      own.store(out, rows, z);
    }
  }
}
