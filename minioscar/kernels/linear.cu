// linear.cu: matrix-vector products of a decode step, 1 to 8 tokens at a time, with what stands before and behind them.
//
//   y[m, n] = act(sum_k x'[m, k] weight[n, k] + bias[n]) + residual[m, n]        x' = x, or with NORM rms_norm(x) rounded to BF16
//
// x [M][K], weight [N][K], bias [N], residual [M][out], norm [K]: BF16, K a multiple of 8. out [M][N], BF16 or float32. SILU: weight holds
// gate rows, then up rows; out [M][N / 2] = silu(gate) * up. Float32 inside, rounded once at the end; sums in an order that K alone decides.
//
// The weights are what takes time: 2 B each, read once for all tokens. They are operand A of mma.m16n8k16 as they lie in memory: of 32
// neighbouring k a lane has 8 in 16 bytes, two MMAs take four each, and x, the other operand, stands in the same order.
// A block has 16 rows (of gate and of up) at a time; of these a warp has every WARPS-th piece of 64 k, and the warps' sums meet in shared
// memory. Each lane copies the weights that it will use to a ring of its own (cp.async: what is on its way takes no registers and nobody else
// waits for it), SLOTS - 1 pieces of 2 KB a warp ahead, across the ends of tiles: 96 KB and more a multiprocessor. The first are asked for
// before the launch in front of this one has ended, as weights do not change; x is read and normed while they come.
// x is read from L2 where it is used as it is; normed it stands in shared memory, its rows 64 B past a line apart: no two of the 8 lanes of
// a phase (2 rows, 64 B each) meet in a bank.
// grid: any number of blocks, 512 threads; dynamic shared memory: the rings, WARPS * SLOTS * 2 KB; NORM: M rows of x'; two tiles' sums.
//
// Set by -D: NORM, SLOTS, and what linear.cuh says.
constexpr int WARPS = 16;
#include "linear.cuh"

constexpr int COLUMNS = 8, PIECE = 64, SLOT = 16 * PIECE * 2;

// The piece of weights that a lane copies next: its first row, k and half.
struct Ahead {
  int first, k, half;

  // Copies what this lane has of it, if there is one: of rows r and r + 8, those behind the last row being its like, two runs of 32 k. Then
  // goes on to the other half, this warp's next k, the block's next rows.
  __device__ __forceinline__ void copy(unsigned char* slot, const bf16* weight, int rows, int K) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = k + lane % 4 * 8;
    if (first < rows && k < K) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const bf16* from = weight + (size_t)(half * rows + min(first + lane / 4 + 8 * i, rows - 1)) * K + own;
        cp_async_16_or_zero(slot + i * 1024 + lane * 16, from, own < K);
        cp_async_16_or_zero(slot + i * 1024 + 512 + lane * 16, from + 32, own + 32 < K);
      }
      half = HALVES - 1 - half;
      if (half == 0) k += WARPS * PIECE;
      if (k >= K) k = warp * PIECE, first += gridDim.x * 16;
    }
    cp_async_commit();
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
__device__ __forceinline__ void norm_x(unsigned char* to, int stride, float* sums, const bf16* x, const bf16* norm, uint4 w, float eps, int tokens,
                                       int K) {
  float* factors = sums + COLUMNS * WARPS;
  float sum[COLUMNS];
#pragma unroll
  for (int m = 0; m < COLUMNS; m++) sum[m] = 0.f;
  for (int i = threadIdx.x; i < K / 8; i += THREADS) {
    uint4 a[COLUMNS];
#pragma unroll
    for (int m = 0; m < COLUMNS; m++)
      if (m < tokens) a[m] = *(const uint4*)(x + (size_t)m * K + 8 * i);
#pragma unroll
    for (int m = 0; m < COLUMNS; m++)
      if (m < tokens) sum[m] += squares(a[m]), *(uint4*)(to + m * stride + 16 * i) = a[m];
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

extern "C" __global__ void __launch_bounds__(THREADS, 1) linear(const bf16* x, const bf16* norm, const bf16* weight, const bf16* bias,
                                                               const bf16* residual, Output* out, int tokens, int K, int N, float eps) {
  extern __shared__ __align__(128) unsigned char smem[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int rows = N / HALVES, stride = (K * 2 + 127) / 128 * 128 + 64, columns = (tokens + 1) / 2 * 2;
  unsigned char *ring = smem + warp * SLOTS * SLOT, *normed = smem + WARPS * SLOTS * SLOT;
  float* both = (float*)(normed + (NORM ? tokens * stride : 0));  // [2][WARPS][HALVES][16][columns]
  Ahead ahead = {(int)blockIdx.x * 16, warp * PIECE, 0};
  for (int i = 0; i < SLOTS - 1; i++) ahead.copy(ring + i * SLOT, weight, rows, K);
  const uint4 none = make_uint4(0, 0, 0, 0), norm_first = NORM && threadIdx.x < K / 8 ? *(const uint4*)(norm + 8 * threadIdx.x) : none;
  wait_for_previous(), allow_next();
  if (NORM) norm_x(normed, stride, both, x, norm, norm_first, eps, tokens, K);
  const unsigned char* token = NORM ? normed + r * stride : (const unsigned char*)(x + (size_t)r * K);  // of this lane
  const bf16 zero = __float2bfloat16_rn(0.f);
  int slot = 0;
  bool odd = false;
  for (int first = blockIdx.x * 16; first < rows; first += gridDim.x * 16, odd = !odd) {
    const int m = threadIdx.x / 16, i = threadIdx.x % 16, n = first + i;  // what this thread finishes, if m is a token
    const bool finishes = m < tokens && n < rows;
    const bf16 added = residual && finishes ? residual[(size_t)m * rows + n] : zero;
    bf16 biases[HALVES];
    float y[HALVES][4];
#pragma unroll
    for (int t = 0; t < HALVES; t++) {
      biases[t] = bias && finishes ? bias[t * rows + n] : zero;
      y[t][0] = y[t][1] = y[t][2] = y[t][3] = 0.f;
    }
    for (int k = warp * PIECE + 8 * c; k < K + 8 * c; k += WARPS * PIECE) {
      uint4 b[2];
#pragma unroll
      for (int j = 0; j < 2; j++) b[j] = r < tokens && k + 32 * j < K ? *(const uint4*)(token + 2 * (k + 32 * j)) : none;
#pragma unroll
      for (int t = 0; t < HALVES; t++) {
        cp_async_wait<SLOTS - 2>();
        const uint4* w = (const uint4*)(ring + slot * SLOT) + lane;
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const uint4 w0 = w[32 * j], w8 = w[64 + 32 * j];
          mma_m16n8k16_bf16(y[t], w0.x, w8.x, w0.y, w8.y, b[j].x, b[j].y);
          mma_m16n8k16_bf16(y[t], w0.z, w8.z, w0.w, w8.w, b[j].z, b[j].w);
        }
        ahead.copy(ring + (slot ? slot - 1 : SLOTS - 1) * SLOT, weight, rows, K);  // where the piece before this one was
        slot = slot + 1 < SLOTS ? slot + 1 : 0;
      }
    }
    float* sums = both + odd * WARPS * HALVES * 16 * columns;  // in turn: a tile's are read while those of the next are written
#pragma unroll
    for (int t = 0; t < HALVES; t++)
#pragma unroll
      for (int j = 0; j < 2; j++)
        if (2 * c < tokens)
          *(float2*)(sums + ((warp * HALVES + t) * 16 + r + 8 * j) * columns + 2 * c) = make_float2(y[t][2 * j], y[t][2 * j + 1]);
    __syncthreads();
    if (finishes) {
      float z[HALVES];
#pragma unroll
      for (int t = 0; t < HALVES; t++) {
        z[t] = 0.f;
        for (int v = 0; v < WARPS; v++) z[t] += sums[((v * HALVES + t) * 16 + i) * columns + m];
        z[t] += __bfloat162float(biases[t]);
      }
      out[(size_t)m * rows + n] = to_output(activated(z) + __bfloat162float(added));
    }
  }
}
