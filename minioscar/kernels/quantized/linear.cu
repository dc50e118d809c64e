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
// as soon as they are used, across the ends of passes, from before the previous launch has ended: 64 to 96 KB a
// multiprocessor are in flight. Scales are loaded a round ahead, those of four groups at once, one by each lane of
// four. x comes from L2, normed it is in shared memory, as in linear.cu.
// Instructions of a warp for 16 rows and 64 k (a multiprocessor has 122 issue slots in the time of their bytes): 4 bits
// 20 conversions, 4 MMA, fold 10, and a ROW_TILES-th of x: 2 loads, 4 MMA, without NORM 8 multiplications.
// grid: any number of blocks, WARPS * 32 threads, 16 warps a multiprocessor; dynamic shared memory: NORM: M rows of
// x'; two passes' sums.
//
// Set by -D: BLOCK_WARPS, NORM, ROW_TILES, RUNS, GROUP (k whose sum is scaled at once: 32, 64, 128), KIND, and the
// macros of linear.cuh.
constexpr int WARPS = BLOCK_WARPS;
#include "../linear_vector.cuh"
#include "codes.cuh"

constexpr int TILES = ROW_TILES * BRANCHES, ROWS = ROW_TILES * 16;  // tiles of 16 rows of a pass; its outputs
constexpr int ROUND = WARPS * RUNS;                                 // runs of 64 k of all warps
constexpr int STEPS = GROUP / 16, FOLDS = RUNS * 64 / GROUP, SCALE_LOADS = (FOLDS + Scales::GROUPS - 1) / Scales::GROUPS;
constexpr int PASS_SUMS = WARPS * TILES * 16 * COLUMNS;
static_assert(RUNS * 64 % GROUP == 0, "a warp has whole groups");

// The next codes and scales that a lane loads. Tiles past the end repeat the last one; their results are discarded.
struct Prefetch {
  const uint4* codes;
  const uint32_t* scales;
  int rows, K, shift;  // shift: a group has 2^shift columns
  int pass, run, end;  // run: the first of this warp; end: of the runs, 0 where there is no such pass
  const uint4* from[TILES];

  DEVICE int runs() const { return (K + 63) / 64; }
  DEVICE int groups() const { return ((K - 1) >> shift) + 1; }
  DEVICE uint32_t tile(int t) const {
    const int tiles = (rows + 15) / 16;
    return t / ROW_TILES * tiles + min(pass * ROW_TILES + t % ROW_TILES, tiles - 1);
  }
  DEVICE void seek(int new_pass, int round) {
    pass = new_pass;
    run = round + threadIdx.x / 32 * RUNS;
    end = pass * ROWS < rows ? runs() : 0;
    UNROLL for (int t = 0; t < TILES; t++)
      from[t] = codes + (size_t)(tile(t) * runs() + run) * TILE_VECTORS + threadIdx.x % 32;
  }
  DEVICE void load(uint4 (&w)[LOADS], int t, int j) const {
    UNROLL for (int i = 0; i < LOADS; i++) load_once(w[i], from[t] + j * TILE_VECTORS + 32 * i, run + j < end);
  }
  DEVICE void load(Scales (&s)[SCALE_LOADS], int t) const {
    UNROLL for (int i = 0; i < SCALE_LOADS; i++) {
      const int fold = Scales::GROUPS * i + Scales::own_group(), k = run * 64 + fold * GROUP;
      const uint32_t group = tile(t) * groups() + (k >> shift);
      load_once(s[i].word, scales + Scales::index(group, Scales::own_row()), fold < FOLDS && k < min(end * 64, K));
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 16 / WARPS)
    linear(const bf16* x, const bf16* norm, const uint4* codes, const uint32_t* scales, const float* row_scale,
           const bf16* bias, const bf16* residual, Output* out, int tokens, int K, int N, int shift, float eps) {
  extern __shared__ __align__(128) unsigned char smem[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int rows = N / BRANCHES, stride = (K * 2 + 127) / 128 * 128 + 64;
  float* sum_buffers = (float*)(smem + (NORM ? tokens * stride : 0));  // [2][WARPS][BRANCHES][ROWS][COLUMNS]
  Prefetch prefetch = {codes, scales, rows, K, shift};
  const int runs = prefetch.runs();
  uint4 w[RUNS][TILES][LOADS];
  Scales next_scales[TILES][SCALE_LOADS];
  prefetch.seek(blockIdx.x, 0);
  UNROLL for (int t = 0; t < TILES; t++) {
    UNROLL for (int i = 0; i < SCALE_LOADS; i++) next_scales[t][i].word = 0;
    prefetch.load(next_scales[t], t);
  }
  UNROLL for (int j = 0; j < RUNS; j++)
    UNROLL for (int t = 0; t < TILES; t++) {
      UNROLL for (int i = 0; i < LOADS; i++) w[j][t][i] = make_uint4(0, 0, 0, 0);
      prefetch.load(w[j][t], t, j);
    }
  uint4 norm_first = make_uint4(0, 0, 0, 0);
  if (NORM) load_once(norm_first, norm + 8 * threadIdx.x, threadIdx.x < K / 8);
  wait_then_allow_next();
  if (NORM) norm_x(smem, stride, sum_buffers, x, norm, norm_first, eps, tokens, K, ScaledX());
  const unsigned char* own = NORM ? smem + r * stride : (const unsigned char*)(x + (size_t)r * K);  // this lane's token
  auto load_x = [&](uint4 (&b)[2], int run) {
    UNROLL for (int h = 0; h < 2; h++) {
      const int k = run * 64 + 32 * h + 8 * c;
      b[h] = r < tokens && k < K ? *(const uint4*)(own + 2 * k) : make_uint4(0, 0, 0, 0);
    }
  };
  uint4 next_x[2];  // of the next run, where it comes from L2
  if (!NORM) load_x(next_x, warp * RUNS);
  bool odd = false;
  for (int first = blockIdx.x * ROWS; first < rows; first += gridDim.x * ROWS, odd = !odd) {
    // Two buffers: a pass's sums are read while the next ones are written; a barrier comes before the ones after that.
    float* sums = sum_buffers + odd * PASS_SUMS;
    const OwnOutput<ROWS> own_output(first, tokens, rows, bias, residual);
    float row_scales[BRANCHES];
    UNROLL for (int t = 0; t < BRANCHES; t++) row_scales[t] = own_output.exists ? row_scale[t * rows + own_output.n] : 0;
    float y[TILES][4];
    clear(y);
    for (int round = 0; round < runs; round += ROUND) {
      Scales now[TILES][SCALE_LOADS];
      if (round + ROUND < runs)
        prefetch.seek(prefetch.pass, round + ROUND);
      else
        prefetch.seek(prefetch.pass + gridDim.x, 0);
      UNROLL for (int t = 0; t < TILES; t++) {
        UNROLL for (int i = 0; i < SCALE_LOADS; i++) now[t][i] = next_scales[t][i];
        prefetch.load(next_scales[t], t);
      }
      float sum[TILES][4], x_sum[4];  // of a group
      UNROLL for (int j = 0; j < RUNS; j++) {
        uint4 b[2];
        if (NORM) {
          load_x(b, round + warp * RUNS + j);
        } else {
          UNROLL for (int h = 0; h < 2; h++) b[h] = ScaledX()(next_x[h]);
          const bool last = round + ROUND >= runs;
          load_x(next_x, j + 1 < RUNS ? round + warp * RUNS + j + 1 : (last ? 0 : round + ROUND) + warp * RUNS);
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
    if (own_output.exists) {
      float z[BRANCHES];
      UNROLL for (int t = 0; t < BRANCHES; t++)
        z[t] = own_output.total(sums, t, to_result(row_scales[t], own_output.n % 2));
      own_output.store(out, rows, z);
    }
  }
}
