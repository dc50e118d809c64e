// sm90/quantized_vector.cu: quantized/linear.cu for weights in 8 bits on compute capability 9.0.
//
//   y[m, n] = act(row_scale[n] sum_g scale[n, g] sum_k (code[n, k] - zero[n, g]) x'[m, k] + bias[n]) + residual[m, n]
//   x' = x, or with NORM rms_norm(x) rounded to BF16        g: the group of k
//
// Arrays as in quantized/linear.cu; M at most 8, K a multiple of 128 (e4m3: of 512), outputs of 16. Equal bits: a warp
// has the same chunks of 128 k, and sums are added in the same order.
//
// A thread has the copy engine fill a ring of units, 16 rows and 1,024 k each, from before the previous launch has
// ended. At most IN_FLIGHT of them have been asked for and are not there: x, which other loads bring, would wait behind
// more. Of a unit each of 8 warps multiplies a chunk, of two units at a time: neighbouring tiles, or gate and up. x' is
// in shared memory, rows 64 B past a line apart.
//
// A block has neighbouring tiles of 16 outputs, `share` of them, the first `extra` blocks one more. grid (blocks), 640
// threads, of which 512 multiply and one copies, one block a multiprocessor; dynamic shared memory: barriers, sums of
// two passes, x', the ring. Moves codes and scales once, and x, from L2, once a block.
//
// Set by -D: GROUP (k that have a scale: 64 or 128, as registers allow), KIND, NORM, IN_FLIGHT, and the macros of
// linear.cuh.
constexpr int WARPS = 16;
#define SYNC_WARPS() named_barrier_wait(1, WARPS * 32)
#include "../quantized/codes.cuh"
#include "wgmma.cuh"
#include "../linear_vector.cuh"

constexpr int MAX_STAGES = 16, TILES = 2;  // TILES: of a pass; with SILU gate and up of one
constexpr int CHUNK = 128, RUNS = CHUNK / 64, FOLDS = CHUNK / GROUP;  // k; runs of 64 and groups of a chunk
constexpr int UNIT_WARPS = 8, UNIT = UNIT_WARPS * CHUNK, ROUND = WARPS * CHUNK;
constexpr int CODE_BYTES = RUNS * TILE_VECTORS * 16, SCALE_BYTES = FOLDS * (HAS_ZERO ? 64 : 4);  // of a chunk
constexpr int SCALE_OFFSET = UNIT_WARPS * CODE_BYTES, UNIT_BYTES = SCALE_OFFSET + UNIT_WARPS * SCALE_BYTES;
constexpr int BARRIER_BYTES = 2 * MAX_STAGES * 8;

struct Product {
  const unsigned char *codes, *scales;
  const float* row_scale;
  const bf16 *bias, *residual;
  Output* out;
  int K, tiles, first, end;  // tiles: of 16 outputs, all, and those of this block

  DEVICE int in_pass(int tile) const { return SILU ? TILES : min(end - tile, TILES); }
};

// A slot of the ring, and how often its barriers have turned.
struct Slot {
  int at, stages;
  uint32_t parity;

  DEVICE void advance(int n) {
    at += n;
    if (at < stages) return;
    at -= stages;
    parity ^= 1;
  }
  DEVICE Slot after(int n) const {
    Slot other = *this;
    other.advance(n);
    return other;
  }
};
struct Ring {
  uint64_t* barriers;
  unsigned char* units;

  DEVICE uint64_t* full(int slot) const { return barriers + slot; }
  DEVICE uint64_t* empty(int slot) const { return barriers + MAX_STAGES + slot; }
  DEVICE unsigned char* unit(int slot) const { return units + slot * UNIT_BYTES; }
};

// By one thread: units in the order in which they are multiplied, one k after the other of the tiles of a pass.
struct Copies {
  Ring ring;
  Slot slot, landing;               // landing: IN_FLIGHT units behind
  int before_wait, before_landing;  // units until those are waited for
  uint64_t once;

  DEVICE void copy(const Product& p, int tile, int k) {
    if (--before_wait < 0) mbarrier_wait(ring.empty(slot.at), slot.parity ^ 1);
    if (--before_landing < 0) {
      mbarrier_wait(ring.full(landing.at), landing.parity);
      landing.advance(1);
    }
    constexpr int OF_GROUP = HAS_ZERO ? 64 : 4;
    const int size = min(p.K - k, UNIT), code_bytes = size / 64 * TILE_VECTORS * 16;
    const int scale_bytes = size / GROUP * OF_GROUP;
    const size_t run = (size_t)tile * (p.K / 64) + k / 64, group = (size_t)tile * (p.K / GROUP) + k / GROUP;
    uint64_t* bar = ring.full(slot.at);
    mbarrier_arrive_expect_tx(bar, code_bytes + scale_bytes);
    bulk_copy(ring.unit(slot.at), p.codes + run * (TILE_VECTORS * 16), code_bytes, bar, once);
    bulk_copy(ring.unit(slot.at) + SCALE_OFFSET, p.scales + group * OF_GROUP, scale_bytes, bar, once);
    slot.advance(1);
  }
  DEVICE void copy_all(const Product& p) {
    for (int tile = p.first; tile < p.end; tile += TILES / BRANCHES)
      for (int k = 0; k < p.K; k += UNIT)
        for (int i = 0; i < p.in_pass(tile); i++) copy(p, tile + (SILU ? i * p.tiles : i), k);
  }
};

// y += a chunk: its codes, of each group a sum, times x (quantized/linear.cu). codes: this lane's; scales: of rows 2r.
template <int N>
DEVICE void multiply(float (&y)[TILES][4], const unsigned char* const (&codes)[TILES],
                     const unsigned char* const (&scales)[TILES], const unsigned char* own_x) {
  float sum[N][4], x_sum[4];                            // of a group
  UNROLL for (int half = 0; half < 2 * RUNS; half++) {  // 32 k: two steps
    const uint4 b = *(const uint4*)(own_x + 64 * half), both[2] = {b, b};
    uint4 w[N][LOADS];
    UNROLL for (int t = 0; t < N; t++)
      UNROLL for (int i = 0; i < LOADS; i++) {
        const int at = half / 2 * TILE_VECTORS + (LOADS == 1 ? 0 : half % 2 * 32);
        w[t][i] = *(const uint4*)(codes[t] + at * 16);
      }
    UNROLL for (int s = 0; s < 2; s++) {
      const int step = half % 2 * 2 + s;
      const bool begins = (half * 32 + s * 16) % GROUP == 0;
      if (HAS_ZERO) add_x(x_sum, both, step, begins);
      UNROLL for (int t = 0; t < N; t++) {
        uint32_t a[4];
        operand(a, w[t], step);
        multiply(sum[t], a, both, step, begins);
      }
    }
    if ((half + 1) * 32 % GROUP != 0) continue;
    UNROLL for (int t = 0; t < N; t++) {
      RowScales of_rows;
      of_rows.load(scales[t], half * 32 / GROUP, 0);
      of_rows.add(y[t], sum[t], HAS_ZERO ? sums_of_x(x_sum) : make_float2(0.f, 0.f));
    }
  }
}

// The output of a pass that a thread finishes: of the `count` tiles from `tile` on, token m, row n. Passes are finished
// by the warps in turn.
struct Place {
  int m, i, n;
  bool exists;

  DEVICE Place(int tile, int count, int tokens, int turn) {
    const int shift = count == 2 && !SILU ? 5 : 4, at = (threadIdx.x - 32 * turn) % THREADS;
    m = at >> shift;
    i = at & ((1 << shift) - 1);
    n = tile * 16 + i;
    exists = m < tokens;
  }
};
// What finishes it, loaded before its products.
struct Ends {
  bf16 added, biases[BRANCHES];
  float row_scales[BRANCHES];

  DEVICE void load(const Product& p, const Place& to) {
    const int rows = p.tiles * 16;
    const bf16 zero = 0;
    added = p.residual ? p.residual[(size_t)to.m * rows + to.n] : zero;
    UNROLL for (int t = 0; t < BRANCHES; t++) {
      biases[t] = p.bias ? p.bias[t * rows + to.n] : zero;
      row_scales[t] = p.row_scale[t * rows + to.n];
    }
  }
  // sums: [WARPS][tokens][TILES * 16].
  DEVICE void finish(const Product& p, const Place& to, const float* sums, int tokens) const {
    float z[BRANCHES];
    UNROLL for (int t = 0; t < BRANCHES; t++) {
      const float* of_row = sums + to.m * (TILES * 16) + t * 16 + to.i;
      float sum = 0.f;
      UNROLL for (int v = 0; v < WARPS; v++) sum += of_row[v * TILES * 16 * tokens];
      z[t] = sum * to_result(row_scales[t], to.n % 2) + to_float(biases[t]);
    }
    p.out[(size_t)to.m * (p.tiles * 16) + to.n] = to_output(activated(z) + to_float(added));
  }
};

// x * 2^100 to shared memory, rows `stride` bytes apart; three loads of a thread at a time.
DEVICE void copy_x(const bf16* x, unsigned char* to, int K, int stride, int tokens) {
  const int vectors = K / 8;
  for (int first = threadIdx.x; first < tokens * vectors; first += 3 * THREADS) {
    uint4 v[3];
    UNROLL for (int i = 0; i < 3; i++)
      if (first + i * THREADS < tokens * vectors) v[i] = ((const uint4*)x)[first + i * THREADS];
    UNROLL for (int i = 0; i < 3; i++) {
      const int at = first + i * THREADS;
      if (at < tokens * vectors) *(uint4*)(to + at / vectors * stride + at % vectors * 16) = ScaledX()(v[i]);
    }
  }
  SYNC_WARPS();
}

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
    linear(const bf16* x, const bf16* norm, const unsigned char* codes, const unsigned char* scales,
           const float* row_scale, const bf16* bias, const bf16* residual, Output* out, int tokens, int K, int N,
           int share, int extra, int stages, int x_bytes, float eps) {
  extern __shared__ __align__(128) unsigned char smem[];
  const int warp = __shfl_sync(FULL_MASK, threadIdx.x / 32, 0), lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int block = blockIdx.x, first = block * share + min(block, extra), end = first + share + (block < extra);
  const Product p = {codes, scales, row_scale, bias, residual, out, K, N / (16 * BRANCHES), first, end};
  const int sum_floats = WARPS * TILES * 16 * tokens, stride = K * 2 + 64;
  float* sum_buffers = (float*)(smem + BARRIER_BYTES);  // [2][WARPS][tokens][TILES * 16]
  unsigned char* own_smem = smem + BARRIER_BYTES + 2 * sum_floats * 4;
  const Ring ring = {(uint64_t*)smem, own_smem + x_bytes};
  if (warp >= WARPS) {
    decrease_registers<56>();
    if (warp > WARPS) return;
    if (lane == 0) {
      for (int s = 0; s < stages; s++) {
        mbarrier_init(ring.full(s), 1);
        mbarrier_init(ring.empty(s), UNIT_WARPS);
      }
      mbarrier_init_fence();
    }
    __syncwarp();
    named_barrier_arrive(2, THREADS + 32);
    Copies copies = {ring, {0, stages, 0}, {0, stages, 0}, stages, min(IN_FLIGHT, stages), l2_evict_first()};
    if (lane == 0) copies.copy_all(p);
    return;
  }
  increase_registers<104>();
  uint4 norm_first = make_uint4(0, 0, 0, 0);
  if (NORM) load_once(norm_first, norm + 8 * threadIdx.x, (int)threadIdx.x < K / 8);
  named_barrier_wait(2, THREADS + 32);
  wait_then_allow_next();
  if (NORM)
    norm_x(own_smem, stride, sum_buffers, x, norm, norm_first, eps, tokens, K, ScaledX());
  else
    copy_x(x, own_smem, K, stride, tokens);
  const unsigned char* own_x = own_smem + min(r, tokens - 1) * stride + warp * CHUNK * 2 + 16 * c;
  Slot slot = {0, stages, 0};
  for (int tile = first, turn = 0; tile < end; tile += TILES / BRANCHES, turn++) {
    // Two buffers: a pass's sums are read while the next ones are written; a barrier comes before the ones after.
    float* sums = sum_buffers + turn % 2 * sum_floats;
    const int n = p.in_pass(tile);
    Ends ends = {};
    if (const Place to(tile, n, tokens, turn); to.exists) ends.load(p, to);
    float y[TILES][4];
    clear(y);
    for (int k = 0; k < K; k += ROUND) {
      if (k + warp / UNIT_WARPS * UNIT < K) {
        const unsigned char *own_codes[TILES], *own_scales[TILES];
        int taken[TILES];
        UNROLL for (int t = 0; t < TILES; t++) {
          const Slot own = slot.after(warp / UNIT_WARPS * n + t);
          if (t < n) mbarrier_wait(ring.full(own.at), own.parity);
          taken[t] = own.at;
          own_codes[t] = ring.unit(own.at) + warp % UNIT_WARPS * CODE_BYTES + lane * 16;
          own_scales[t] = ring.unit(own.at) + SCALE_OFFSET + warp % UNIT_WARPS * SCALE_BYTES + (HAS_ZERO ? r * 8 : 0);
        }
        if (k + warp * CHUNK < K) {
          if (n == TILES)
            multiply<TILES>(y, own_codes, own_scales, own_x + 2 * k);
          else
            multiply<1>(y, own_codes, own_scales, own_x + 2 * k);
        }
        __syncwarp();  // all lanes are done with the units
        UNROLL for (int t = 0; t < TILES; t++)
          if (lane == 0 && t < n) mbarrier_arrive(ring.empty(taken[t]));
      }
      slot.advance(n * (K - k <= UNIT ? 1 : 2));
    }
    UNROLL for (int t = 0; t < TILES; t++)
      UNROLL for (int e = 0; e < 2; e++) {
        float* column = sums + ((warp * tokens + 2 * c + e) * TILES + t) * 16 + 2 * r;
        if (2 * c + e < tokens && t < n) *(float2*)column = make_float2(y[t][e], y[t][2 + e]);
      }
    SYNC_WARPS();
    const Place to(opaque(tile), n, tokens, turn);  // again: it held registers meanwhile
    if (to.exists) ends.finish(p, to, sums, tokens);
  }
}
