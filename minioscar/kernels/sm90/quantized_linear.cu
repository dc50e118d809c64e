// sm90/quantized_linear.cu: quantized/linear.cu on compute capability 9.0 (quantized.vector_plan).
//
//   y[m, n] = act(row_scale[n] sum_g scale[n, g] sum_k (code[n, k] - zero[n, g]) x'[m, k] + bias[n]) + residual[m, n]
//   x' = x, or with NORM rms_norm(x) rounded to BF16        g: the group of k
//
// Shapes as there; K a multiple of 512, groups of 128 columns or fewer. Float32 inside, zeros and scales applied to the
// sums of groups; rounded once at the end. K and BLOCK_WARPS decide the order of sums.
//
// The time is that of the weights. A block has ROW_TILES * 16 rows (of gate and of up) at a time; WARPS warps split k,
// a chunk of 128 each in rotation, and their sums meet in shared memory. One thread of another warp has the copy engine
// bring what all warps take next, codes and scales and without NORM x too, a few large pieces a stage, SLOTS ahead and
// across the ends of passes, from before the previous launch has ended. So no warp spends instructions on copies, of
// which the products leave few.
//   full    a stage's copies have landed
//   empty   all warps have multiplied it
// Loads wait behind copies that are under way: those of what finishes rows are a pass ahead. At its end a block asks L2
// for its share of what the next product reads first (ahead).
// grid: any number of blocks, (WARPS + 1) * 32 threads, one block a multiprocessor; dynamic shared memory: two passes'
// sums, with NORM M rows of x', stages.
//
// Set by -D: BLOCK_WARPS, NORM, ROW_TILES, SLOTS, GROUP (columns of a group: 32, 64, 128), KIND, and the macros of
// linear.cuh.
constexpr int WARPS = BLOCK_WARPS;
#include "wgmma.cuh"
#define SYNC_WARPS() named_barrier_wait(1, THREADS)  // the copying warp has no part in it
#include "../linear_vector.cuh"
#include "../quantized/codes.cuh"

constexpr int CHUNK = 128, FOLDS = CHUNK / GROUP;                     // k; groups of a chunk
constexpr int TILES = ROW_TILES * BRANCHES, ROWS = ROW_TILES * 16;    // tiles of 16 rows of a pass; its outputs
constexpr int CODE_BYTES = 2 * TILE_VECTORS * 16;                     // of 16 rows of a chunk
constexpr int FOLD_BYTES = HAS_ZERO ? 64 : 4, SCALE_BYTES = FOLDS * FOLD_BYTES;
constexpr int SCALE_OFFSET = TILES * WARPS * CODE_BYTES, X_OFFSET = SCALE_OFFSET + TILES * WARPS * SCALE_BYTES;
constexpr int X_STRIDE = WARPS * CHUNK * 2 + 64;                      // of a stage's rows: 64 B past a line (linear.cu)
constexpr int PASS_SUMS = WARPS * TILES * 16 * COLUMNS;

// What a block copies: stages of WARPS chunks of a pass. Tiles past the end repeat the last one; their results are
// discarded.
struct Copies {
  const unsigned char *codes, *scales, *x;
  int rows, K, tokens, pass, chunk;

  DEVICE int chunks() const { return K / CHUNK; }
  DEVICE bool exist() const { return pass * ROWS < rows; }
  DEVICE int count() const { return min(WARPS, chunks() - chunk); }
  DEVICE void advance() {
    chunk += WARPS;
    if (chunk < chunks()) return;
    chunk = 0;
    pass += gridDim.x;
  }
  DEVICE void copy_codes(unsigned char* stage, uint64_t* full) const {
    const int tiles = (rows + 15) / 16;
    mbarrier_arrive_expect_tx(full, count() * (TILES * (CODE_BYTES + SCALE_BYTES) + (NORM ? 0 : tokens * CHUNK * 2)));
    UNROLL for (int t = 0; t < TILES; t++) {
      const int tile = t / ROW_TILES * tiles + min(pass * ROW_TILES + t % ROW_TILES, tiles - 1);
      const size_t first = (size_t)tile * chunks() + chunk;
      bulk_copy(stage + t * WARPS * CODE_BYTES, codes + first * CODE_BYTES, count() * CODE_BYTES, full);
      bulk_copy(stage + SCALE_OFFSET + t * WARPS * SCALE_BYTES, scales + first * SCALE_BYTES, count() * SCALE_BYTES,
                full);
    }
  }
  DEVICE void copy_x(unsigned char* stage, uint64_t* full) const {
    for (int m = 0; m < tokens; m++)
      bulk_copy(stage + X_OFFSET + m * X_STRIDE, x + ((size_t)m * K + chunk * CHUNK) * 2, count() * CHUNK * 2, full);
  }
};

// A slot of the ring, and which round it is in.
struct Slot {
  int at = 0;
  uint32_t parity = 0;

  DEVICE void advance() {
    at = at + 1 == SLOTS ? 0 : at + 1;
    parity ^= at == 0;
  }
};

// One thread: all copies of a block.
DEVICE void copy_all(Copies next, unsigned char* ring, int stage_bytes, uint64_t* full, uint64_t* empty) {
  Copies first = next;
  for (int i = 0; i < SLOTS && next.exist(); i++, next.advance()) next.copy_codes(ring + i * stage_bytes, &full[i]);
  if (!NORM) {
    wait_for_previous();
    for (int i = 0; i < SLOTS && first.exist(); i++, first.advance()) first.copy_x(ring + i * stage_bytes, &full[i]);
  }
  for (Slot slot; next.exist(); next.advance(), slot.advance()) {
    mbarrier_wait(&empty[slot.at], slot.parity);
    next.copy_codes(ring + slot.at * stage_bytes, &full[slot.at]);
    if (!NORM) next.copy_x(ring + slot.at * stage_bytes, &full[slot.at]);
  }
}
DEVICE void prefetch_share(const unsigned char* ahead, int bytes) {
  const int share = (bytes + gridDim.x * 16 - 1) / (gridDim.x * 16) * 16, first = blockIdx.x * share;
  if (first < bytes) prefetch_l2(ahead + first, min(share, bytes - first));
}

// y += a chunk: its codes, of each group a sum, times x. own_x: 8c ... of the chunk's first columns, of this lane's
// token; lanes of tokens that do not exist have another one's, and their results are discarded.
DEVICE void multiply(float (&y)[TILES][4], const unsigned char* codes, const unsigned char* scales,
                     const unsigned char* own_x) {
  const int lane = threadIdx.x % 32;
  float sum[TILES][4], x_sum[4];              // of a group
  UNROLL for (int half = 0; half < 4; half++) {  // 32 k: two steps
    if (TILES > 2 && half == 2) compiler_barrier();
    const uint4 loaded = *(const uint4*)(own_x + 64 * half), b = NORM ? loaded : ScaledX()(loaded);
    const uint4 both[2] = {b, b};
    uint4 w[TILES][LOADS];
    UNROLL for (int t = 0; t < TILES; t++)
      UNROLL for (int i = 0; i < LOADS; i++) {
        const int at = half / 2 * TILE_VECTORS + (LOADS == 1 ? 0 : half % 2 * 32) + lane;
        w[t][i] = *(const uint4*)(codes + t * WARPS * CODE_BYTES + at * 16);
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
      of_rows.load(scales + t * WARPS * SCALE_BYTES + half * 32 / GROUP * FOLD_BYTES, 0, lane / 4);
      of_rows.add(y[t], sum[t], HAS_ZERO ? sums_of_x(x_sum) : make_float2(0.f, 0.f));
    }
  }
}

// What finishes a thread's output of a pass, loaded a pass ahead. The scales of rows are weights.
struct Ends {
  const float* row_scale;
  const bf16 *bias, *residual;
  int tokens, rows;

  DEVICE OwnOutput<ROWS> outputs(int pass) const {
    OwnOutput<ROWS> own;
    own.begin(opaque(threadIdx.x), pass * ROWS, tokens, rows, bias, residual);
    return own;
  }
  // Which output it is, computed again: kept during the products it would hold registers.
  DEVICE void locate(OwnOutput<ROWS>& own, int pass) const {
    own.m = opaque(threadIdx.x) / ROWS;
    own.i = opaque(threadIdx.x) % ROWS;
    own.n = pass * ROWS + own.i;
    own.exists = own.m < tokens && own.n < rows;
  }
  DEVICE void load_scales(float (&scales)[BRANCHES], int pass) const {
    const int n = pass * ROWS + (int)threadIdx.x % ROWS;
    const bool exists = n < rows && threadIdx.x < tokens * ROWS;
    UNROLL for (int t = 0; t < BRANCHES; t++) scales[t] = exists ? row_scale[t * rows + n] : 0.f;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
    linear(const bf16* x, const bf16* norm, const uint4* codes, const uint32_t* scales, const float* row_scale,
           const bf16* bias, const bf16* residual, Output* out, int tokens, int K, int N, int shift, float eps,
           const unsigned char* ahead, int ahead_bytes) {
  extern __shared__ __align__(128) unsigned char smem[];
  __shared__ uint64_t full[SLOTS], empty[SLOTS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rows = N / BRANCHES, chunks = K / CHUNK, stride = K * 2 + 64;
  const int stage_bytes = X_OFFSET + (NORM ? 0 : tokens * X_STRIDE);
  float* sum_buffers = (float*)smem;  // [2][WARPS][BRANCHES][ROWS][COLUMNS]
  unsigned char *normed = smem + 2 * PASS_SUMS * 4, *ring = normed + (NORM ? tokens * stride : 0);
  if (threadIdx.x == THREADS) {
    for (int i = 0; i < SLOTS; i++) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], WARPS);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (warp == WARPS) {
    if (lane > 0) return;
    copy_all({(const unsigned char*)codes, (const unsigned char*)scales, (const unsigned char*)x, rows, K, tokens,
              (int)blockIdx.x, 0}, ring, stage_bytes, full, empty);
    prefetch_share(ahead, ahead_bytes);
    return;
  }
  const Ends ends = {row_scale, bias, residual, tokens, rows};
  float scale_ahead[BRANCHES];
  ends.load_scales(scale_ahead, blockIdx.x);
  uint4 norm_first = make_uint4(0, 0, 0, 0);
  if (NORM) load_once(norm_first, norm + 8 * threadIdx.x, threadIdx.x < K / 8);
  wait_then_allow_next();
  if (NORM) norm_x(normed, stride, sum_buffers, x, norm, norm_first, eps, tokens, K, ScaledX());
  OwnOutput<ROWS> own_ahead = ends.outputs(blockIdx.x);
  const int m = min(lane / 4, tokens - 1), first_x = (NORM ? m * stride : X_OFFSET + m * X_STRIDE) + lane % 4 * 16;
  Slot slot;
  bool odd = false;
  for (int pass = blockIdx.x; pass * ROWS < rows; pass += gridDim.x, odd = !odd) {
    // Two buffers: a pass's sums are read while the next ones are written; a barrier comes before the ones after that.
    float* sums = sum_buffers + odd * PASS_SUMS;
    OwnOutput<ROWS> own = own_ahead;
    float row_scales[BRANCHES], y[TILES][4];
    UNROLL for (int t = 0; t < BRANCHES; t++) row_scales[t] = scale_ahead[t];
    ends.load_scales(scale_ahead, pass + gridDim.x);
    own_ahead = ends.outputs(pass + gridDim.x);
    clear(y);
    for (int chunk = warp; chunk - warp < chunks; chunk += WARPS, slot.advance()) {
      mbarrier_wait(&full[slot.at], slot.parity);
      const unsigned char* stage = ring + slot.at * stage_bytes;
      const unsigned char* own_x = first_x + (NORM ? normed + chunk * CHUNK * 2 : stage + warp * CHUNK * 2);
      if (chunk < chunks) multiply(y, stage + warp * CODE_BYTES, stage + SCALE_OFFSET + warp * SCALE_BYTES, own_x);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(&empty[slot.at]);
    }
    const int own_lane = opaque(lane);
    UNROLL for (int t = 0; t < TILES; t++)
      UNROLL for (int i = 0; i < 2; i++) {
        float* pair = sums + ((warp * TILES + t) * 16 + own_lane / 4 * 2 + i) * COLUMNS + own_lane % 4 * 2;
        *(float2*)pair = make_float2(y[t][2 * i], y[t][2 * i + 1]);
      }
    SYNC_WARPS();
    ends.locate(own, pass);
    if (own.exists) {
      float z[BRANCHES];
      UNROLL for (int t = 0; t < BRANCHES; t++) z[t] = own.total(sums, t, to_result(row_scales[t], own.n % 2));
      own.store(out, rows, z);
    }
  }
}
