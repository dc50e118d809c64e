// linear_batch.cu: the products of a decode step of 9 to 128 sequences; fewer are linear.cu's.
//
//   y[m, n] = act(sum_k x[m, k] weight[n, k] + bias[n]) + residual[m, n]          rms_norm: out[m, k] = x[m, k] / rms(x[m]) * norm[k]
//
// Shapes as in linear.cu; SILU: weight holds gate rows, then up rows; out [M][N / 2] = silu(gate) * up. BF16, float32 inside, rounded once.
//
// Still the weights are what takes time, 2 B each, read once; x is read again by every block, out of L2: COLUMNS / 128 of their bytes.
// A block has 128 rows (SILU: 64 of gate and the same of up) and one of `splits` parts of k, in slabs of 64, STAGES - 1 of them on their way.
// The parts' sums go to `workspace`, float32; the last part of a block of rows to arrive adds them in their order. No float atomics.
// grid (splits, blocks of rows), 256 threads; dynamic shared memory STAGES * STAGE_BYTES.
//
// Set by -D: COLUMNS (tokens, rounded up to 16, above 64 to 32), SILU, OUT_BF16, STAGES.
#include "linear.cuh"

constexpr int ROWS = 128, SLAB = 64, PIECES = SLAB / 8, STRIDE = SLAB * 2 + 16;
constexpr int COLUMN_WARPS = COLUMNS > 64 ? 2 : 1, ROW_WARPS = WARPS / COLUMN_WARPS;
constexpr int ROW_TILES = ROWS / 16 / ROW_WARPS, COLUMN_TILES = COLUMNS / 8 / COLUMN_WARPS;  // of a warp
constexpr int STAGE_BYTES = (ROWS + COLUMNS) * STRIDE, OUT_ROWS = ROWS / HALVES;
static_assert(COLUMNS % (16 * COLUMN_WARPS) == 0, "ldmatrix brings two column tiles");

// grid (M), 256 threads.
extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(const bf16* x, const bf16* norm, bf16* out, int K, float eps) {
  wait_for_previous(), allow_next();
  __shared__ float sums[WARPS];
  const size_t row = (size_t)blockIdx.x * K;
  sum_squares(x + row, sums, K);
  __syncthreads();
  const float factor = inverse_rms(sums, K, eps);
  for (int i = threadIdx.x; i < K / 8; i += THREADS)
    *(uint4*)(out + row + 8 * i) = scaled(*(const uint4*)(x + row + 8 * i), factor, *(const uint4*)(norm + 8 * i));
}

struct Product {
  const bf16 *x, *weight;
  int tokens, K, rows;  // rows: of gate, or of all

  // Row i of a block's 128, as a row of `weight`; -1 where there is none.
  __device__ __forceinline__ int weight_row(int block, int i) const {
    const int n = block * OUT_ROWS + i % OUT_ROWS;
    return n < rows ? i / OUT_ROWS * rows + n : -1;
  }
  __device__ __forceinline__ void copy(unsigned char* to, int block, int slab) const {
    for (int i = threadIdx.x; i < (ROWS + COLUMNS) * PIECES; i += THREADS) {
      const int row = i / PIECES, k = slab * SLAB + i % PIECES * 8, n = row < ROWS ? weight_row(block, row) : row - ROWS < tokens ? row - ROWS : -1;
      unsigned char* place = to + row * STRIDE + i % PIECES * 16;
      if (n >= 0 && k < K) cp_async_16(place, (row < ROWS ? weight : x) + (size_t)n * K + k);
      else *(uint4*)place = make_uint4(0, 0, 0, 0);
    }
  }
};

__device__ __forceinline__ void multiply(float (&y)[ROW_TILES][COLUMN_TILES][4], const unsigned char* stage, int row, int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int s = 0; s < SLAB / 16; s++) {
    uint32_t a[ROW_TILES][4];
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) ldmatrix_x4(a[t], stage + (row + 16 * t + lane % 16) * STRIDE + (2 * s + lane / 16) * 16);
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, stage + (ROWS + column + 8 * n + lane / 16 * 8 + lane % 8) * STRIDE + (2 * s + lane / 8 % 2) * 16);
#pragma unroll
      for (int t = 0; t < ROW_TILES; t++) {
        mma_m16n8k16_bf16(y[t][n], a[t][0], a[t][1], a[t][2], a[t][3], b[0], b[1]);
        mma_m16n8k16_bf16(y[t][n + 1], a[t][0], a[t][1], a[t][2], a[t][3], b[2], b[3]);
      }
    }
  }
}

// workspace float32 [blocks of rows][splits][ROWS][COLUMNS]; arrived int [blocks of rows], zero before and after.
extern "C" __global__ void __launch_bounds__(THREADS) linear_batch(const bf16* x, const bf16* weight, const bf16* bias, const bf16* residual,
                                                                  Output* out, float* workspace, int* arrived, int tokens, int K, int N) {
  wait_for_previous(), allow_next();
  extern __shared__ __align__(128) unsigned char smem[];
  __shared__ bool last;
  const int split = blockIdx.x, splits = gridDim.x, block = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Product product = {x, weight, tokens, K, N / HALVES};
  const int slabs = (K + SLAB - 1) / SLAB, from = slabs * split / splits, count = slabs * (split + 1) / splits - from;
  const int row = warp % ROW_WARPS * ROW_TILES * 16, column = warp / ROW_WARPS * COLUMN_TILES * 8;
  float y[ROW_TILES][COLUMN_TILES][4];
#pragma unroll
  for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++) y[t][n][0] = y[t][n][1] = y[t][n][2] = y[t][n][3] = 0.f;
  for (int i = 0; i < STAGES - 1; i++) {
    if (i < count) product.copy(smem + i * STAGE_BYTES, block, from + i);
    cp_async_commit();
  }
  for (int i = 0; i < count; i++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // slab i is there for all, and all are through with the one before, whose place is filled now
    if (i + STAGES - 1 < count) product.copy(smem + (i + STAGES - 1) % STAGES * STAGE_BYTES, block, from + i + STAGES - 1);
    cp_async_commit();
    multiply(y, smem + i % STAGES * STAGE_BYTES, row, column);
  }
  float* parts = workspace + (size_t)block * splits * ROWS * COLUMNS;
#pragma unroll
  for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int at = (split * ROWS + row + 16 * t + 8 * i + lane / 4) * COLUMNS + column + 8 * n + lane % 4 * 2;
        __stcg((float2*)(parts + at), make_float2(y[t][n][2 * i], y[t][n][2 * i + 1]));
      }
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomic_add_acq_rel(arrived + block, 1) == splits - 1;
    if (last) arrived[block] = 0;
  }
  __syncthreads();
  if (!last) return;
  for (int i = threadIdx.x; i < OUT_ROWS * tokens; i += THREADS) {
    const int m = i / OUT_ROWS, n = block * OUT_ROWS + i % OUT_ROWS;
    if (n >= product.rows) continue;
    float z[HALVES];
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      z[h] = 0.f;
      for (int s = 0; s < splits; s++) z[h] += __ldcg(parts + (s * ROWS + h * OUT_ROWS + i % OUT_ROWS) * COLUMNS + m);
    }
    finish(z, bias, residual, out, m, n, product.rows);
  }
}
