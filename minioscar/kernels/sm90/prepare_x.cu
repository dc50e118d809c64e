// sm90/prepare_x.cu: x for sm90/quantized_batch.cu, once for all of its blocks, where there is a norm or they would
// prepare many columns.
//
//   prepared[m, ...] = 2^100 x'[m, k], in the order of prepared_x.cuh      x' = x, or with NORM rms_norm(x) in BF16
//   sums[g, m] = the sum of x'[m, k] over the k of group g, as the sum of code 1 would be (codes.cuh)
//
// x [M][K], norm [K]: BF16, K a multiple of 8. prepared BF16 [M][K up to 128s], zeros past K. sums float32 [K up to
// 128s / GROUP][columns], 0 of tokens that do not exist.
//
// grid (columns, parts of a row; with NORM one), 128 threads; a thread has 32 k at a time. Its time is latency. Reads
// and writes 2 B a number.
//
// Set by -D: GROUP (64 or 128), NORM, KIND, and the macros of linear.cuh.
constexpr int WARPS = 4;
#include "../linear.cuh"
#include "prepared_x.cuh"

// Four vectors of a row, from vector `first` on; zeros past its end.
DEVICE void load_block(uint4 (&v)[4], const uint4* row, int first, int vectors) {
  UNROLL for (int c = 0; c < 4; c++) v[c] = first + c < vectors ? row[first + c] : make_uint4(0, 0, 0, 0);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    prepare_x(const bf16* x, const bf16* norm, bf16* prepared, float* sums, int tokens, int K, float eps) {
  __shared__ float squares[WARPS];
  const int m = blockIdx.x, columns = gridDim.x, vectors = K / 8, blocks = (K + 127) / 128 * 4;  // blocks: of 32 k
  const uint4 *row = (const uint4*)(x + (size_t)m * K), *weights = (const uint4*)norm;
  uint4* to = (uint4*)prepared + (size_t)m * blocks * 4;
  uint4 v[4], weight[4];
  if (NORM) load_block(weight, weights, threadIdx.x * 4, vectors);
  allow_next();  // it copies codes meanwhile, and waits for this launch before it touches x
  wait_for_previous();
  const bool exists = m < tokens;
  float factor = 0.f;
  if (NORM) {
    float square = 0.f;
    for (int i = threadIdx.x; i < blocks && exists; i += THREADS) {
      load_block(v, row, i * 4, vectors);
      UNROLL for (int c = 0; c < 4; c++) square += sum_squares(v[c]);
    }
    square = warp_sum(square);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = square;
    __syncthreads();
    factor = inverse_rms(squares, K, eps);
  }
  const int rounded = (blocks + 31) / 32 * 32;  // a warp adds up groups together
  for (int i = blockIdx.y * THREADS + threadIdx.x; i < rounded; i += gridDim.y * THREADS) {
    load_block(v, row, i * 4, exists ? vectors : 0);
    if (NORM && i >= THREADS) load_block(weight, weights, i * 4, vectors);
    if (NORM) UNROLL for (int c = 0; c < 4; c++) v[c] = normalized(v[c], factor, weight[c]);
    float sum = prepare_block(v);
    if (exists && i < blocks)
      UNROLL for (int j = 0; j < 4; j++) to[i * 4 + j] = v[j];
    UNROLL for (int other = 1; other < GROUP / 32; other *= 2) sum += __shfl_xor_sync(FULL_MASK, sum, other);
    if (i % (GROUP / 32) == 0 && i < blocks) sums[(size_t)(i * 32 / GROUP) * columns + m] = sum * unit<false>();
  }
}
