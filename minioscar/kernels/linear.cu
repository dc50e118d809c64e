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
#include <cuda_bf16.h>
#include "device.cuh"

typedef __nv_bfloat16 bf16;
constexpr int WARPS = 8, THREADS = WARPS * 32, COLUMNS = 8;
constexpr int TILES = SILU ? 2 : 1;  // of 16 rows: gate and up
constexpr int AHEAD = SILU ? 2 : 4;  // runs of 32 k whose weights are on their way
constexpr unsigned FULL = 0xffffffffu;
#if OUT_BF16
typedef bf16 Output;
__device__ __forceinline__ bf16 to_output(float x) { return __float2bfloat16_rn(x); }
#else
typedef float Output;
__device__ __forceinline__ float to_output(float x) { return x; }
#endif

__device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ uint32_t scaled(uint32_t x, float factor, uint32_t weight) {
  return pack_bf16x2(__fmul_rn(__fmul_rn(low(x), factor), low(weight)), __fmul_rn(__fmul_rn(high(x), factor), high(weight)));
}
__device__ __forceinline__ float squares(uint32_t x) { return fmaf(low(x), low(x), high(x) * high(x)); }

// x, or its RMSNorm, to shared memory; `sums` has room for WARPS numbers a token.
__device__ __forceinline__ void load_x(unsigned char* to, float* sums, const bf16* x, const bf16* norm, float eps, int tokens, int K) {
  const int pieces = K / 8, stride = K * 2 + 16;
  for (int m = 0; norm && m < tokens; m++) {
    float sum = 0.f;
    for (int i = threadIdx.x; i < pieces; i += THREADS) {
      const uint4 a = *(const uint4*)(x + (size_t)m * K + 8 * i);
      sum += squares(a.x) + squares(a.y) + squares(a.z) + squares(a.w);
    }
    for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(FULL, sum, other);
    if (threadIdx.x % 32 == 0) sums[m * WARPS + threadIdx.x / 32] = sum;
  }
  __syncthreads();
  for (int m = 0; m < tokens; m++) {
    float factor = 1.f;
    if (norm) {
      float sum = 0.f;
      for (int w = 0; w < WARPS; w++) sum += sums[m * WARPS + w];
      factor = 1.f / sqrtf(sum / K + eps);
    }
    for (int i = threadIdx.x; i < pieces; i += THREADS) {
      uint4 a = *(const uint4*)(x + (size_t)m * K + 8 * i);
      if (norm) {
        const uint4 w = *(const uint4*)(norm + 8 * i);
        a = make_uint4(scaled(a.x, factor, w.x), scaled(a.y, factor, w.y), scaled(a.z, factor, w.z), scaled(a.w, factor, w.w));
      }
      *(uint4*)(to + m * stride + 16 * i) = a;
    }
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) linear(const bf16* x, const bf16* norm, const bf16* weight, const bf16* bias,
                                                               const bf16* residual, Output* out, int tokens, int K, int N, float eps) {
  extern __shared__ __align__(128) unsigned char smem[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int stride = K * 2 + 16, rows = N / TILES, runs = (K + 31) / 32;
  float* sums = (float*)(smem + tokens * stride);  // [WARPS][TILES][16][COLUMNS]
  load_x(smem, sums, x, norm, eps, tokens, K);
  const uint4 none = make_uint4(0, 0, 0, 0);
  for (int first = blockIdx.x * 16; first < rows; first += gridDim.x * 16) {
    float y[TILES][4];
    const bf16* from[TILES][2];  // rows r and r + 8; those behind the last are its like and thrown away
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      y[t][0] = y[t][1] = y[t][2] = y[t][3] = 0.f;
#pragma unroll
      for (int i = 0; i < 2; i++) from[t][i] = weight + (size_t)(t * rows + min(first + r + 8 * i, rows - 1)) * K + 8 * c;
    }
    for (int run = warp; run < runs; run += WARPS * AHEAD) {
      uint4 w[AHEAD][TILES][2];
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        const int k = (run + a * WARPS) * 32;
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
          for (int i = 0; i < 2; i++) w[a][t][i] = k + 8 * c < K ? __ldcs((const uint4*)(from[t][i] + k)) : none;
      }
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        const int k = (run + a * WARPS) * 32 + 8 * c;
        const uint4 b = r < tokens && k < K ? *(const uint4*)(smem + r * stride + k * 2) : none;
#pragma unroll
        for (int t = 0; t < TILES; t++) {
          mma_m16n8k16_bf16(y[t], w[a][t][0].x, w[a][t][1].x, w[a][t][0].y, w[a][t][1].y, b.x, b.y);
          mma_m16n8k16_bf16(y[t], w[a][t][0].z, w[a][t][1].z, w[a][t][0].w, w[a][t][1].w, b.z, b.w);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        *(float2*)(sums + ((warp * TILES + t) * 16 + r + 8 * i) * COLUMNS + 2 * c) = make_float2(y[t][2 * i], y[t][2 * i + 1]);
    __syncthreads();
    const int m = threadIdx.x / 16, n = first + threadIdx.x % 16;
    if (m < tokens && n < rows) {
      float z[TILES];
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        z[t] = 0.f;
        for (int w = 0; w < WARPS; w++) z[t] += sums[((w * TILES + t) * 16 + threadIdx.x % 16) * COLUMNS + m];
        if (bias) z[t] += __bfloat162float(bias[t * rows + n]);
      }
      float result = TILES == 2 ? z[0] / (1.f + ex2(-1.4426950f * z[0])) * z[TILES - 1] : z[0];
      const size_t at = (size_t)m * rows + n;
      if (residual) result += __bfloat162float(residual[at]);
      out[at] = to_output(result);
    }
    __syncthreads();  // before the next sums
  }
}
