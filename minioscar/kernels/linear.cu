// linear.cu: matrix-vector products of a decode step, 1 to 8 tokens at a time, with what stands before and behind them.
//
//   y[m, n] = act(sum_k x'[m, k] weight[n, k] + bias[n]) + residual[m, n]        x' = x, or with NORM rms_norm(x) rounded to BF16
//
// x [M][K], weight [N][K], bias [N], residual [M][out], norm [K]: BF16, K a multiple of 8. out [M][N], BF16 or float32. SILU: weight holds
// gate rows, then up rows; out [M][N / 2] = silu(gate) * up. Float32 inside, rounded once at the end; sums in an order that K alone decides.
//
// The weights are what takes time: 2 B each, read once for all tokens. They are operand A of mma.m16n8k16 as they lie in memory: of 32
// neighbouring k a lane has 8 in one 16-byte load, two MMAs take four each, and x, the other operand, stands in the same order.
// A block has 16 rows (of gate and of up) at a time, its warps a part of k each, two runs of 32 (a line of 128 B a row) in turn; their sums
// meet in shared memory. Each lane holds the weights of AHEAD runs in registers and asks for the next as soon as one is used, across the
// ends of tiles: 128 KB a multiprocessor are on their way, from before the launch in front of this one has ended, as weights do not change.
// x comes from L2 where it is used once or twice; normed it stands in shared memory, rows 64 B past a line apart: no two of the 8 lanes of a
// phase (2 rows, 64 B each) meet in a bank.
// grid: any number of blocks, WARPS * 32 threads, 16 warps a multiprocessor; dynamic shared memory: NORM: M rows of x'; two tiles' sums.
//
// Set by -D: BLOCK_WARPS, NORM, and what linear.cuh says.
constexpr int WARPS = BLOCK_WARPS;
#include "linear.cuh"

constexpr int COLUMNS = 8, AHEAD = 8 / HALVES, ROUND = AHEAD * WARPS * 32;  // ROUND: the k of AHEAD runs of all warps
constexpr int TILE_SUMS = WARPS * HALVES * 16 * COLUMNS;
__device__ __forceinline__ constexpr int offset(int run) { return run / 2 * WARPS * 64 + run % 2 * 32; }

// Operand A of two MMAs, from the 16 bytes that a lane has of rows r and r + 8; zeros where there is no such k.
struct Operands {
  uint32_t a[2][4];

  __device__ __forceinline__ Operands(const uint4& row, const uint4& row8, bool there) {
    a[0][0] = there ? row.x : 0, a[0][1] = there ? row8.x : 0, a[0][2] = there ? row.y : 0, a[0][3] = there ? row8.y : 0;
    a[1][0] = there ? row.z : 0, a[1][1] = there ? row8.z : 0, a[1][2] = there ? row.w : 0, a[1][3] = there ? row8.w : 0;
  }
  // b: of the other operand, the same k in the same order.
  __device__ __forceinline__ void multiply(float (&y)[4], const uint4& b) const {
    mma_m16n8k16_bf16(y, a[0][0], a[0][1], a[0][2], a[0][3], b.x, b.y);
    mma_m16n8k16_bf16(y, a[1][0], a[1][1], a[1][2], a[1][3], b.z, b.w);
  }
};

// The weights that a lane asks for next: rows r and r + 8 of 16 of each half; those behind the last row are its like and thrown away.
struct Ahead {
  const bf16* from[HALVES][2];
  int tile, k, until;  // until: no k where there is no such tile

  __device__ __forceinline__ void to(int new_tile, const bf16* weight, int rows, int K, int lane_k) {
    tile = new_tile, k = lane_k, until = tile * 16 < rows ? K : 0;
#pragma unroll
    for (int t = 0; t < HALVES; t++)
#pragma unroll
      for (int i = 0; i < 2; i++) from[t][i] = weight + (size_t)(t * rows + min(tile * 16 + (int)threadIdx.x % 32 / 4 + 8 * i, rows - 1)) * K;
  }
  __device__ __forceinline__ void load(uint4 (&w)[HALVES][2], int run) const {
#pragma unroll
    for (int t = 0; t < HALVES; t++)
#pragma unroll
      for (int i = 0; i < 2; i++) load_once(w[t][i], from[t][i] + k + offset(run), k + offset(run) < until);
  }
};

// Eight sums over a warp at once; lanes 4m and on have that of token m. At every step a lane gives away half of the sums that it has.
__device__ __forceinline__ float sums_of_warp(float (&sum)[COLUMNS]) {
#pragma unroll
  for (int half = COLUMNS / 2; half; half /= 2) {
    const bool upper = threadIdx.x & 4 * half;
#pragma unroll
    for (int m = 0; m < half; m++) {
      const float given = __shfl_xor_sync(FULL, upper ? sum[m] : sum[m + half], 4 * half);
      sum[m] = (upper ? sum[m + half] : sum[m]) + given;
    }
  }
  for (int other = 2; other; other /= 2) sum[0] += __shfl_xor_sync(FULL, sum[0], other);
  return sum[0];
}

// RMSNorm of x to shared memory, all tokens in one pass; a thread has the same columns of each. w: of the norm, this thread's first eight.
// `sums`: (WARPS + 1) * COLUMNS numbers.
__device__ __forceinline__ void norm_x(unsigned char* to, int stride, float* sums, const bf16* x, const bf16* norm, uint4 w, float eps, int tokens, int K) {
  float* factors = sums + COLUMNS * WARPS;
  float sum[COLUMNS];
#pragma unroll
  for (int m = 0; m < COLUMNS; m++) sum[m] = 0.f;
  for (int i = threadIdx.x; i < K / 8; i += THREADS) {
#pragma unroll
    for (int four = 0; four < COLUMNS; four += 4) {  // as many as there are registers for
      uint4 a[4];
#pragma unroll
      for (int m = 0; m < 4; m++)
        if (four + m < tokens) a[m] = *(const uint4*)(x + (size_t)(four + m) * K + 8 * i);
#pragma unroll
      for (int m = 0; m < 4; m++)
        if (four + m < tokens) sum[four + m] += squares(a[m]), *(uint4*)(to + (four + m) * stride + 16 * i) = a[m];
    }
  }
  sum[0] = sums_of_warp(sum);
  if (threadIdx.x % 4 == 0) sums[threadIdx.x % 32 / 4 * WARPS + threadIdx.x / 32] = sum[0];
  __syncthreads();
  if (threadIdx.x < tokens) factors[threadIdx.x] = inverse_rms(sums + threadIdx.x * WARPS, K, eps);
  __syncthreads();
  for (int i = threadIdx.x; i < K / 8;) {
    for (int m = 0; m < tokens; m++) {
      uint4* place = (uint4*)(to + m * stride + 16 * i);
      *place = scaled(*place, factors[m], w);
    }
    if ((i += THREADS) < K / 8) w = *(const uint4*)(norm + 8 * i);
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, 16 / WARPS) linear(const bf16* x, const bf16* norm, const bf16* weight, const bf16* bias,
                                                                        const bf16* residual, Output* out, int tokens, int K, int N, float eps) {
  extern __shared__ __align__(128) unsigned char smem[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int rows = N / HALVES, lane_k = warp * 64 + 8 * c, stride = (K * 2 + 127) / 128 * 128 + 64;
  float* both = (float*)(smem + (NORM ? tokens * stride : 0));  // [2][WARPS][HALVES][16][COLUMNS]
  Ahead ahead;
  uint4 w[AHEAD][HALVES][2];
  ahead.to(blockIdx.x, weight, rows, K, lane_k);
#pragma unroll
  for (int a = 0; a < AHEAD; a++) {
#pragma unroll
    for (int t = 0; t < HALVES; t++) w[a][t][0] = w[a][t][1] = make_uint4(0, 0, 0, 0);
    ahead.load(w[a], a);
  }
  uint4 norm_first = make_uint4(0, 0, 0, 0);
  if (NORM) load_once(norm_first, norm + 8 * threadIdx.x, threadIdx.x < K / 8);
  wait_for_previous(), allow_next();
  if (NORM) norm_x(smem, stride, both, x, norm, norm_first, eps, tokens, K);
  const unsigned char* own = NORM ? smem + r * stride : (const unsigned char*)(x + (size_t)r * K);  // this lane's token
  const bf16 zero = 0;
  bool odd = false;
  for (int first = blockIdx.x * 16; first < rows; first += gridDim.x * 16, odd = !odd) {
    float* sums = both + odd * TILE_SUMS;  // in turn: a tile's are read while the next ones are written, a barrier lies before the ones after
    const int m = threadIdx.x / 16, i = threadIdx.x % 16, n = first + i;  // what this thread finishes, if m is a token
    const bool finishes = m < tokens && n < rows;
    const bf16 added = residual && finishes ? residual[(size_t)m * rows + n] : zero;
    bf16 biases[HALVES];
#pragma unroll
    for (int t = 0; t < HALVES; t++) biases[t] = bias && finishes ? bias[t * rows + n] : zero;
    float y[HALVES][4];
#pragma unroll
    for (int t = 0; t < HALVES; t++) y[t][0] = y[t][1] = y[t][2] = y[t][3] = 0.f;
    for (int round = 0; round < K; round += ROUND) {
      ahead.k += ROUND;
      if (round + ROUND >= K) ahead.to(ahead.tile + gridDim.x, weight, rows, K, lane_k);
#pragma unroll
      for (int four = 0; four < AHEAD; four += 4) {
        uint4 b[4];
#pragma unroll
        for (int a = 0; a < 4; a++) {
          const int k = round + lane_k + offset(four + a);
          b[a] = r < tokens && k < K ? *(const uint4*)(own + 2 * k) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int a = 0; a < 4; a++) {
          uint4(&used)[HALVES][2] = w[four + a];
#pragma unroll
          for (int t = 0; t < HALVES; t++) Operands(used[t][0], used[t][1], round + lane_k + offset(four + a) < K).multiply(y[t], b[a]);
          ahead.load(used, four + a);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < HALVES; t++)
#pragma unroll
      for (int j = 0; j < 2; j++)
        *(float2*)(sums + ((warp * HALVES + t) * 16 + r + 8 * j) * COLUMNS + 2 * c) = make_float2(y[t][2 * j], y[t][2 * j + 1]);
    __syncthreads();
    if (finishes) {
      float z[HALVES];
#pragma unroll
      for (int t = 0; t < HALVES; t++) {
        z[t] = 0.f;
        for (int v = 0; v < WARPS; v++) z[t] += sums[((v * HALVES + t) * 16 + i) * COLUMNS + m];
        z[t] += to_float(biases[t]);
      }
      out[(size_t)m * rows + n] = to_output(activated(z) + to_float(added));
    }
  }
}
