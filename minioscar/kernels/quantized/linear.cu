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
// The time is that of the weights, 4.25 or 8.25 bits each (groups of 128), read once for all tokens. A block has
// ROW_TILES * 16 rows (of gate and of up) at a time; its warps split k, RUNS neighbouring runs of 64 each in a round;
// their sums meet in shared memory. A lane keeps the codes of a whole round in registers and loads those of the next
// as soon as they are used, across the ends of passes, from before the previous launch has ended: 8 warps, which have
// 255 registers each, have 64 to 128 KB in flight. Scales are loaded a round ahead, those of two (four) groups at once,
// by the lanes that share a row. x' is in shared memory, rows 64 B past a line apart (linear.cu).
// Instructions of a warp for 16 rows and 64 k in 4 bits, groups of 128: 20 conversions, 4 MMA, 10 for load and fold,
// and a ROW_TILES-th of 2 loads and 4 MMA for x. An H200 has 122 issue slots in the time of their 544 bytes.
// grid: any number of blocks, WARPS * 32 threads, 8 warps a multiprocessor; dynamic shared memory: M rows of x', two
// passes' sums.
//
// Set by -D: BLOCK_WARPS, NORM, ROW_TILES, RUNS, GROUP (k whose sum is scaled at once: 32, 64, 128), KIND, and the
// macros of linear.cuh.
constexpr int WARPS = BLOCK_WARPS;
#include "../linear_vector.cuh"
#include "codes.cuh"

constexpr int TILES = ROW_TILES * BRANCHES, ROWS = ROW_TILES * 16;  // tiles of 16 rows of a pass; its outputs
constexpr int ROUND = WARPS * RUNS;                                 // runs of 64 k of all warps
constexpr int STEPS = GROUP / 16, FOLDS = RUNS * 64 / GROUP;
constexpr int SCALE_LOADS = (FOLDS + Scales::GROUPS - 1) / Scales::GROUPS;
constexpr int PASS_SUMS = WARPS * TILES * 16 * COLUMNS;
constexpr int OUTPUTS = (ROWS * COLUMNS + THREADS - 1) / THREADS;  // of a thread
static_assert(RUNS * 64 % GROUP == 0, "a warp has whole groups");

// The codes and scales that a lane loads: those of a round of a pass. Tiles past the end repeat the last one; their
// results are discarded.
struct Prefetch {
  const uint4* codes;
  const uint32_t* scales;
  int rows, K, shift;    // shift: a group has 2^shift columns
  int left;              // runs from this warp's first one on
  uint32_t from[TILES];  // of this lane, in 16-byte vectors

  DEVICE int runs() const { return (K + 63) / 64; }
  DEVICE void seek(int pass, int round, Scales (&next)[TILES][SCALE_LOADS]) {
    const int tiles = (rows + 15) / 16, groups = ((K - 1) >> shift) + 1, run = round + threadIdx.x / 32 * RUNS;
    left = pass * ROWS < rows ? runs() - run : 0;
    UNROLL for (int t = 0; t < TILES; t++) {
      const uint32_t tile = t / ROW_TILES * tiles + min(pass * ROW_TILES + t % ROW_TILES, tiles - 1);
      from[t] = (tile * runs() + run) * TILE_VECTORS + threadIdx.x % 32;
      UNROLL for (int i = 0; i < SCALE_LOADS; i++) {
        const int fold = Scales::GROUPS * i + Scales::own_group(), k = run * 64 + fold * GROUP;
        const uint32_t* word = scales + Scales::index(tile * groups + (k >> shift), Scales::own_row());
        load_once(next[t][i].word, word, fold < FOLDS && pass * ROWS < rows && k < K);
      }
    }
  }
  DEVICE void load(uint4 (&w)[LOADS], int t, int j) const {
    UNROLL for (int i = 0; i < LOADS; i++) load_once(w[i], codes + from[t] + (j * TILE_VECTORS + 32 * i), j < left);
  }
};

// x to shared memory, as norm_x leaves it.
DEVICE void copy_x(unsigned char* to, int stride, const bf16* x, int tokens, int K) {
  for (int i = threadIdx.x; i < K / 8; i += THREADS)
    for (int m = 0; m < tokens; m++)
      *(uint4*)(to + m * stride + 16 * i) = ScaledX()(*(const uint4*)(x + (size_t)m * K + 8 * i));
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, 8 / WARPS)
    linear(const bf16* x, const bf16* norm, const uint4* codes, const uint32_t* scales, const float* row_scale,
           const bf16* bias, const bf16* residual, Output* out, int tokens, int K, int N, int shift, float eps) {
  extern __shared__ __align__(128) unsigned char smem[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int rows = N / BRANCHES, stride = (K * 2 + 127) / 128 * 128 + 64;
  float* sum_buffers = (float*)(smem + tokens * stride);  // [2][WARPS][BRANCHES][ROWS][COLUMNS]
  Prefetch prefetch = {codes, scales, rows, K, shift};
  const int runs = prefetch.runs();
  uint4 w[RUNS][TILES][LOADS];
  Scales next_scales[TILES][SCALE_LOADS];
  UNROLL for (int t = 0; t < TILES; t++)
    UNROLL for (int i = 0; i < SCALE_LOADS; i++) next_scales[t][i].word = 0;
  prefetch.seek(blockIdx.x, 0, next_scales);
  UNROLL for (int j = 0; j < RUNS; j++)
    UNROLL for (int t = 0; t < TILES; t++) {
      UNROLL for (int i = 0; i < LOADS; i++) w[j][t][i] = make_uint4(0, 0, 0, 0);
      prefetch.load(w[j][t], t, j);
    }
  uint4 norm_first = make_uint4(0, 0, 0, 0);
  if (NORM) load_once(norm_first, norm + 8 * threadIdx.x, threadIdx.x < K / 8);
  wait_then_allow_next();
  if (NORM)
    norm_x(smem, stride, sum_buffers, x, norm, norm_first, eps, tokens, K, ScaledX());
  else
    copy_x(smem, stride, x, tokens, K);
  bool odd = false;
  for (int pass = blockIdx.x; pass * ROWS < rows; pass += gridDim.x, odd = !odd) {
    // Two buffers: a pass's sums are read while the next ones are written; a barrier comes before the ones after that.
    float* sums = sum_buffers + odd * PASS_SUMS;
    OwnOutput<ROWS> own[OUTPUTS];
    float row_scales[OUTPUTS][BRANCHES];
    UNROLL for (int o = 0; o < OUTPUTS; o++) {
      own[o].begin(o * THREADS + threadIdx.x, pass * ROWS, tokens, rows, bias, residual);
      UNROLL for (int t = 0; t < BRANCHES; t++)
        row_scales[o][t] = own[o].exists ? to_result(row_scale[t * rows + own[o].n], own[o].n % 2) : 0.f;
    }
    float y[TILES][4];
    clear(y);
    for (int round = 0; round < runs; round += ROUND) {
      Scales now[TILES][SCALE_LOADS];
      UNROLL for (int t = 0; t < TILES; t++)
        UNROLL for (int i = 0; i < SCALE_LOADS; i++) now[t][i] = next_scales[t][i];
      const bool last = round + ROUND >= runs;
      prefetch.seek(last ? pass + gridDim.x : pass, last ? 0 : round + ROUND, next_scales);
      float sum[TILES][4], x_sum[4];  // of a group
      UNROLL for (int j = 0; j < RUNS; j++) {
        uint4 b[2];
        UNROLL for (int h = 0; h < 2; h++) {
          const int k = (round + warp * RUNS + j) * 64 + 32 * h + 8 * c;
          b[h] = r < tokens && k < K ? *(const uint4*)(smem + r * stride + 2 * k) : make_uint4(0, 0, 0, 0);
        }
        UNROLL for (int s = 0; s < 4; s++) {
          const int step = 4 * j + s, fold = step / STEPS;
          const bool begins = step % STEPS == 0, ends = step % STEPS == STEPS - 1;
          if (HAS_ZERO) add_x(x_sum, b, s, begins);
          UNROLL for (int t = 0; t < TILES; t++) {
            uint32_t a[4];
            operand(a, w[j][t], s);
            multiply(sum[t], a, b, s, begins);
          }
          UNROLL for (int t = 0; t < TILES; t++)
            if (ends) now[t][fold / Scales::GROUPS].add(y[t], sum[t], x_sum, fold % Scales::GROUPS);
        }
        UNROLL for (int t = 0; t < TILES; t++) prefetch.load(w[j][t], t, j);
      }
    }
    UNROLL for (int t = 0; t < TILES; t++)
      UNROLL for (int i = 0; i < 2; i++) {
        float* pair = sums + ((warp * TILES + t) * 16 + 2 * r + i) * COLUMNS + 2 * c;
        *(float2*)pair = make_float2(y[t][2 * i], y[t][2 * i + 1]);
      }
    __syncthreads();
    UNROLL for (int o = 0; o < OUTPUTS; o++)
      if (own[o].exists) {
        float z[BRANCHES];
        UNROLL for (int t = 0; t < BRANCHES; t++) z[t] = own[o].total(sums, t, row_scales[o][t]);
        own[o].store(out, rows, z);
      }
  }
}
