// linear.cu: matrix-vector products of a decode step, 1 to 8 tokens at a time, with norm, activation and residual.
//
//   y[m, n] = act(sum_k x'[m, k] weight[n, k] + bias[n]) + residual[m, n]
//   x' = x, or with NORM rms_norm(x) rounded to BF16
//
// x [M][K], weight [N][K], bias [N], residual [M][out], norm [K]: BF16, K a multiple of 8. out [M][N], BF16 or
// float32. SILU: weight holds gate rows, then up rows; out [M][N / 2] = silu(gate) * up. Float32 inside, rounded once
// at the end; K alone decides the order of sums.
//
// The time is that of the weights: 2 B each, read once for all tokens. They are operand A of mma.m16n8k16 as they are
// in memory: of 32 neighbouring k a lane has 8 in one 16-byte load, two MMAs take four each, and x, the other
// operand, is in the same order. A block has 16 rows (of gate and of up) at a time, and its warps split k, two runs
// of 32 (a line of 128 B a row) each in rotation; their sums meet in shared memory. Each lane keeps the weights of
// PREFETCH runs in registers and loads the next as soon as one is used, across the ends of tiles: 128 KB a
// multiprocessor are in flight, from before the previous launch has ended, as weights do not change. x comes from L2
// where it is used once or twice; normed it is in shared memory, rows 64 B past a line apart: no two of the 8 lanes
// of a phase (2 rows, 64 B each) hit the same bank.
// grid: any number of blocks, WARPS * 32 threads, 16 warps a multiprocessor; dynamic shared memory: NORM: M rows of
// x'; two tiles' sums.
//
// Set by -D: BLOCK_WARPS, NORM, and the macros of linear.cuh.
constexpr int WARPS = BLOCK_WARPS;
#include "linear_vector.cuh"

constexpr int PREFETCH = 8 / BRANCHES, ROUND = PREFETCH * WARPS * 32;  // ROUND: the k of PREFETCH runs of all warps
// Runs whose x is loaded together: all where that is a trip to L2.
constexpr int AT_ONCE = NORM ? 4 : PREFETCH;
constexpr int TILE_SUMS = WARPS * BRANCHES * 16 * COLUMNS;
DEVICE constexpr int offset(int run) { return run / 2 * WARPS * 64 + run % 2 * 32; }

// The next weights that a lane loads: rows r and r + 8 of 16 of each branch. Rows past the end repeat the last row;
// their results are discarded.
struct Prefetch {
  const bf16* from[BRANCHES][2];
  int tile, k, k_end;  // k_end: 0 where there is no such tile

  DEVICE void seek(int new_tile, const bf16* weight, int rows, int K, int lane_k) {
    tile = new_tile;
    k = lane_k;
    k_end = tile * 16 < rows ? K : 0;
    UNROLL for (int t = 0; t < BRANCHES; t++)
      UNROLL for (int i = 0; i < 2; i++)
        from[t][i] = weight + (size_t)(t * rows + min(tile * 16 + (int)threadIdx.x % 32 / 4 + 8 * i, rows - 1)) * K;
  }
  DEVICE void load(uint4 (&w)[BRANCHES][2], int run) const {
    UNROLL for (int t = 0; t < BRANCHES; t++)
      UNROLL for (int i = 0; i < 2; i++) load_once(w[t][i], from[t][i] + k + offset(run), k + offset(run) < k_end);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 16 / WARPS)
    linear(const bf16* x, const bf16* norm, const bf16* weight, const bf16* bias, const bf16* residual, Output* out,
           int tokens, int K, int N, float eps) {
  extern __shared__ __align__(128) unsigned char smem[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int rows = N / BRANCHES, lane_k = warp * 64 + 8 * c, stride = (K * 2 + 127) / 128 * 128 + 64;
  float* sum_buffers = (float*)(smem + (NORM ? tokens * stride : 0));  // [2][WARPS][BRANCHES][16][COLUMNS]
  Prefetch prefetch;
  uint4 w[PREFETCH][BRANCHES][2];
  prefetch.seek(blockIdx.x, weight, rows, K, lane_k);
  UNROLL for (int a = 0; a < PREFETCH; a++) {
    UNROLL for (int t = 0; t < BRANCHES; t++) w[a][t][0] = w[a][t][1] = make_uint4(0, 0, 0, 0);
    prefetch.load(w[a], a);
  }
  uint4 norm_first = make_uint4(0, 0, 0, 0);
  if (NORM) load_once(norm_first, norm + 8 * threadIdx.x, threadIdx.x < K / 8);
  wait_then_allow_next();
  if (NORM) norm_x(smem, stride, sum_buffers, x, norm, norm_first, eps, tokens, K);
  const unsigned char* own = NORM ? smem + r * stride : (const unsigned char*)(x + (size_t)r * K);  // this lane's token
  bool odd = false;
  for (int first = blockIdx.x * 16; first < rows; first += gridDim.x * 16, odd = !odd) {
    // Two buffers: a tile's sums are read while the next ones are written; a barrier comes before the ones after that.
    float* sums = sum_buffers + odd * TILE_SUMS;
    OwnOutput<16> own_output;
    own_output.begin(threadIdx.x, first, tokens, rows, bias, residual);
    float y[BRANCHES][4];
    clear(y);
    for (int round = 0; round < K; round += ROUND) {
      prefetch.k += ROUND;
      if (round + ROUND >= K) prefetch.seek(prefetch.tile + gridDim.x, weight, rows, K, lane_k);
      UNROLL for (int run = 0; run < PREFETCH; run += AT_ONCE) {
        uint4 b[AT_ONCE];
        UNROLL for (int a = 0; a < AT_ONCE; a++) {
          const int k = round + lane_k + offset(run + a);
          b[a] = r < tokens && k < K ? *(const uint4*)(own + 2 * k) : make_uint4(0, 0, 0, 0);
        }
        UNROLL for (int a = 0; a < AT_ONCE; a++) {
          uint4(&used)[BRANCHES][2] = w[run + a];
          UNROLL for (int t = 0; t < BRANCHES; t++)
            Operands(used[t][0], used[t][1], round + lane_k + offset(run + a) < K).multiply(y[t], b[a]);
          prefetch.load(used, run + a);
        }
      }
    }
    UNROLL for (int t = 0; t < BRANCHES; t++)
      UNROLL for (int j = 0; j < 2; j++) {
        float* pair = sums + ((warp * BRANCHES + t) * 16 + r + 8 * j) * COLUMNS + 2 * c;
        *(float2*)pair = make_float2(y[t][2 * j], y[t][2 * j + 1]);
      }
    __syncthreads();
    if (own_output.exists) {
      float z[BRANCHES];
      UNROLL for (int t = 0; t < BRANCHES; t++) z[t] = own_output.total(sums, t);
      own_output.store(out, rows, z);
    }
  }
}
