// linear.cu: matrix-vector products of a decode step, 1 to 8 tokens at a time, with what stands before and behind them.
//
//   y[m, n] = act(sum_k x'[m, k] weight[n, k] + bias[n]) + residual[m, n]        x' = x, or rms_norm(x) rounded to BF16
//
// x [M][K], weight [N][K], bias [N], residual [M][out], norm [K]: BF16, K a multiple of 8. out [M][N], BF16 or float32. SILU: weight holds
// gate rows, then up rows; out [M][N / 2] = silu(gate) * up. Float32 inside, rounded once at the end; sums in a fixed order.
//
// The weights are what takes time: 2 B each, read once for all tokens. They are operand A of mma.m16n8k16 as they lie in memory: of 32
// neighbouring k a lane has 8 in one 16-byte load, two MMAs take four each, and x, the other operand, stands in the same order.
// A block has 16 rows (of gate and of up) at a time, its warps a part of k each; their sums meet in shared memory.
// grid: any number of blocks, WARPS * 32 threads; dynamic shared memory: M rows of x', K * 2 + 16 bytes each, and the sums.
#include "linear.cuh"

constexpr int COLUMNS = 8;
constexpr int AHEAD = SILU ? 2 : 4;  // runs of 32 k whose weights are on their way

// x, or its RMSNorm, to shared memory; `sums` has room for WARPS numbers a token.
__device__ __forceinline__ void load_x(unsigned char* to, float* sums, const bf16* x, const bf16* norm, float eps, int tokens, int K) {
  for (int m = 0; norm && m < tokens; m++) sum_squares(x + (size_t)m * K, sums + m * WARPS, K);
  __syncthreads();
  for (int m = 0; m < tokens; m++) {
    const float factor = norm ? inverse_rms(sums + m * WARPS, K, eps) : 1.f;
    for (int i = threadIdx.x; i < K / 8; i += THREADS) {
      const uint4 a = *(const uint4*)(x + (size_t)m * K + 8 * i);
      *(uint4*)(to + m * (K * 2 + 16) + 16 * i) = norm ? scaled(a, factor, *(const uint4*)(norm + 8 * i)) : a;
    }
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) linear(const bf16* x, const bf16* norm, const bf16* weight, const bf16* bias,
                                                               const bf16* residual, Output* out, int tokens, int K, int N, float eps) {
  wait_for_previous(), allow_next();
  extern __shared__ __align__(128) unsigned char smem[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int stride = K * 2 + 16, rows = N / HALVES, runs = (K + 31) / 32;
  float* sums = (float*)(smem + tokens * stride);  // [WARPS][HALVES][16][COLUMNS]
  load_x(smem, sums, x, norm, eps, tokens, K);
  const uint4 none = make_uint4(0, 0, 0, 0);
  for (int first = blockIdx.x * 16; first < rows; first += gridDim.x * 16) {
    float y[HALVES][4];
    const bf16* from[HALVES][2];  // rows r and r + 8; those behind the last are its like and thrown away
#pragma unroll
    for (int t = 0; t < HALVES; t++) {
      y[t][0] = y[t][1] = y[t][2] = y[t][3] = 0.f;
#pragma unroll
      for (int i = 0; i < 2; i++) from[t][i] = weight + (size_t)(t * rows + min(first + r + 8 * i, rows - 1)) * K + 8 * c;
    }
    for (int run = warp; run < runs; run += WARPS * AHEAD) {
      uint4 w[AHEAD][HALVES][2];
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        const int k = (run + a * WARPS) * 32;
#pragma unroll
        for (int t = 0; t < HALVES; t++)
#pragma unroll
          for (int i = 0; i < 2; i++) w[a][t][i] = k + 8 * c < K ? __ldcs((const uint4*)(from[t][i] + k)) : none;
      }
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        const int k = (run + a * WARPS) * 32 + 8 * c;
        const uint4 b = r < tokens && k < K ? *(const uint4*)(smem + r * stride + k * 2) : none;
#pragma unroll
        for (int t = 0; t < HALVES; t++) {
          mma_m16n8k16_bf16(y[t], w[a][t][0].x, w[a][t][1].x, w[a][t][0].y, w[a][t][1].y, b.x, b.y);
          mma_m16n8k16_bf16(y[t], w[a][t][0].z, w[a][t][1].z, w[a][t][0].w, w[a][t][1].w, b.z, b.w);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < HALVES; t++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        *(float2*)(sums + ((warp * HALVES + t) * 16 + r + 8 * i) * COLUMNS + 2 * c) = make_float2(y[t][2 * i], y[t][2 * i + 1]);
    __syncthreads();
    const int m = threadIdx.x / 16, i = threadIdx.x % 16, n = first + i;
    if (m < tokens && n < rows) {
      float z[HALVES];
#pragma unroll
      for (int t = 0; t < HALVES; t++) {
        z[t] = 0.f;
        for (int w = 0; w < WARPS; w++) z[t] += sums[((w * HALVES + t) * 16 + i) * COLUMNS + m];
      }
      finish(z, bias, residual, out, m, n, rows);
    }
    __syncthreads();  // before the next sums
  }
}
