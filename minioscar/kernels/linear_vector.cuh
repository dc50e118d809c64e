// linear_vector.cuh: what the kernels of 1 to 8 tokens share (linear.cu, quantized/linear.cu, experts/experts.cu):
// RMSNorm of x into shared memory, rows of weights as operands, and the outputs, which meet in shared memory from the
// warps that split k. Set by -D: those of linear.cuh.
#ifndef MINIOSCAR_LINEAR_VECTOR_CUH
#define MINIOSCAR_LINEAR_VECTOR_CUH
#include "linear.cuh"

constexpr int COLUMNS = 8;  // tokens
#ifndef SYNC_WARPS
#define SYNC_WARPS() __syncthreads()  // of the warps that multiply
#endif

// Eight sums over a warp at once; lanes 4m ... 4m + 3 get that of token m. At every step a lane sends half of the
// sums that it has.
DEVICE float sums_of_warp(float (&sum)[COLUMNS]) {
  UNROLL for (int half = COLUMNS / 2; half; half /= 2) {
    const bool upper = threadIdx.x & 4 * half;
    UNROLL for (int m = 0; m < half; m++) {
      const float received = __shfl_xor_sync(FULL_MASK, upper ? sum[m] : sum[m + half], 4 * half);
      sum[m] = (upper ? sum[m + half] : sum[m]) + received;
    }
  }
  return warp_sum<4>(sum[0]);
}

struct Unchanged {
  DEVICE uint4 operator()(uint4 x) const { return x; }
};

struct Nothing { DEVICE void operator()() const {} };

// norm_x of one token: every block waits for a third of the instructions then, which come from L2, too. Equal
// bits: a thread's columns and the order of sums are those of norm_x.
template <class Then, class Meanwhile>
DEVICE void norm_token(unsigned char* to, float* sums, const bf16* x, const bf16* norm, uint4 w, float eps, int K,
                       const Then& then, const Meanwhile& meanwhile) {
  const int own = threadIdx.x, vectors = K / 8;
  const uint4* from = (const uint4*)x;
  uint4 a = make_uint4(0, 0, 0, 0);
  if (own < vectors) a = from[own];
  __syncwarp();  // else the compiler moves the load behind the copies, for which x would wait: 6.1 us become 7.0
  meanwhile();
  float sum = sum_squares(a);
#pragma unroll 1
  for (int i = own + THREADS; i < vectors; i += THREADS) sum += sum_squares(from[i]);
  sum = warp_sum(sum);
  if (own % 32 == 0) sums[own / 32] = sum;
  SYNC_WARPS();
  const float factor = inverse_rms(sums, K, eps);
  if (own < vectors) *(uint4*)(to + 16 * own) = then(normalized(a, factor, w));
#pragma unroll 1
  for (int i = own + THREADS; i < vectors; i += THREADS)
    *(uint4*)(to + 16 * i) = then(normalized(from[i], factor, ((const uint4*)norm)[i]));
  SYNC_WARPS();
}

// RMSNorm of x to shared memory, all tokens in one pass; a thread has the same columns of each. w: of the norm, this
// thread's first eight. `sums`: (WARPS + 1) * COLUMNS numbers. then: what is stored of eight normed numbers.
// meanwhile: copies that would delay the first loads of x, and are started behind them.
template <class Then = Unchanged, class Meanwhile = Nothing>
DEVICE void norm_x(unsigned char* to, int stride, float* sums, const bf16* x, const bf16* norm, uint4 w, float eps,
                   int tokens, int K, Then then = Then(), Meanwhile meanwhile = Meanwhile()) {
  if (tokens == 1) return norm_token(to, sums, x, norm, w, eps, K, then, meanwhile);
  float* factors = sums + COLUMNS * WARPS;
  float sum[COLUMNS];
  clear(sum);
  uint4 a[4];  // four tokens at a time: as many as registers allow
  auto load = [&](int i, int first) {
    UNROLL for (int m = 0; m < 4; m++)
      if (first + m < tokens && i < K / 8) a[m] = *(const uint4*)(x + (size_t)(first + m) * K + 8 * i);
  };
  load(threadIdx.x, 0);
  meanwhile();
  for (int i = threadIdx.x; i < K / 8; i += THREADS)
    UNROLL for (int first = 0; first < COLUMNS; first += 4) {
      if (first > 0 || i >= THREADS) load(i, first);
      UNROLL for (int m = 0; m < 4; m++)
        if (first + m < tokens) {
          sum[first + m] += sum_squares(a[m]);
          *(uint4*)(to + (first + m) * stride + 16 * i) = a[m];
        }
    }
  const float token_sum = sums_of_warp(sum);
  if (threadIdx.x % 4 == 0) sums[threadIdx.x % 32 / 4 * WARPS + threadIdx.x / 32] = token_sum;
  SYNC_WARPS();
  if (threadIdx.x < tokens) factors[threadIdx.x] = inverse_rms(sums + threadIdx.x * WARPS, K, eps);
  SYNC_WARPS();
  for (int i = threadIdx.x; i < K / 8;) {
    for (int m = 0; m < tokens; m++) {
      uint4* vector = (uint4*)(to + m * stride + 16 * i);
      *vector = then(normalized(*vector, factors[m], w));
    }
    if ((i += THREADS) < K / 8) w = *(const uint4*)(norm + 8 * i);
  }
  SYNC_WARPS();
}

// Operand A of two MMAs, from the 16 bytes that a lane has of rows r and r + 8; zeros where there is no such k.
struct Operands {
  uint32_t a[2][4];

  DEVICE Operands(const uint4& row, const uint4& row8, bool valid)
      : a{{valid ? row.x : 0, valid ? row8.x : 0, valid ? row.y : 0, valid ? row8.y : 0},
          {valid ? row.z : 0, valid ? row8.z : 0, valid ? row.w : 0, valid ? row8.w : 0}} {}
  // b: the same k of the other operand, in the same order.
  DEVICE void multiply(float (&y)[4], const uint4& b) const {
    mma_m16n8k16_bf16(y, a[0][0], a[0][1], a[0][2], a[0][3], b.x, b.y);
    mma_m16n8k16_bf16(y, a[1][0], a[1][1], a[1][2], a[1][3], b.z, b.w);
  }
};

// An output that a thread finishes of ROWS rows (of gate and of up): token m, row n. What is added to its sum is
// loaded before the products.
template <int ROWS> struct OwnOutput {
  int m, i, n;
  bool exists;
  bf16 added, biases[BRANCHES];

  // number: of ROWS * COLUMNS outputs.
  DEVICE void begin(int number, int first, int tokens, int rows, const bf16* bias, const bf16* residual) {
    const bf16 zero = 0;
    m = number / ROWS;
    i = number % ROWS;
    n = first + i;
    exists = m < tokens && n < rows;
    added = residual && exists ? residual[(size_t)m * rows + n] : zero;
    UNROLL for (int t = 0; t < BRANCHES; t++) biases[t] = bias && exists ? bias[t * rows + n] : zero;
  }
  // sums: [WARPS][BRANCHES][ROWS][COLUMNS]; scale: of their total.
  DEVICE float total(const float* sums, int branch, float scale = 1.f) const {
    float z = 0.f;
    for (int v = 0; v < WARPS; v++) z += sums[((v * BRANCHES + branch) * ROWS + i) * COLUMNS + m];
    return z * scale + to_float(biases[branch]);
  }
  DEVICE void store(Output* out, int rows, const float (&z)[BRANCHES]) const {
    out[(size_t)m * rows + n] = to_output(activated(z) + to_float(added));
  }
};
#endif
