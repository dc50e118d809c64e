// linear_batch.cu: the products of a decode step of 9 to 256 sequences; linear.cu has fewer, sm90/linear_batch.cu
// some of compute capability 9.0.
//
//   y[m, n] = act(sum_k x[m, k] weight[n, k] + bias[n]) + residual[m, n]
//
// Shapes as in linear.cu; SILU: weight holds gate rows, then up rows; out [M][N / 2] = silu(gate) * up. BF16, float32
// inside, rounded once.
//
// The time is still that of the weights, 2 B each. A block has ROWS of them and COLUMNS tokens, and goes over k in
// slabs, STAGES - 1 of them in flight: the weights of the first ones from before the previous launch has ended. A
// warp has WARP_ROWS rows and all columns, so that x, which every warp reads from shared memory, is read COLUMNS /
// WARP_ROWS times for a weight's once. Each block of rows reads x from L2 anew: COLUMNS / ROWS of the weights' bytes.
//
// All slabs of all tiles (blocks of rows) form one list that the blocks of a launch share equally: in whole tiles if
// `granularity` is a tile's slabs; if it is 1, several blocks may share a tile and split k. Each of those writes its
// sums to `workspace`, float32, as its lanes hold them, and the last one adds them in the order of k
// (split_merge.cuh). That order depends on how the slabs are shared, not on the other tokens of a batch.
// K_GROUPS 2: half the rows, twice the k: half the splits to merge for a matrix of few rows. The two halves of a
// block reduce their k groups in shared memory.
// grid (blocks, blocks of columns), 256 threads; dynamic shared memory STAGES * STAGE_BYTES. reads the weights once,
// 2 B each.
//
// Set by -D: COLUMNS (tokens of a block, a multiple of 16), ROW_TILES (16 rows each, of a warp), K_GROUPS, STAGES,
// and the macros of linear.cuh.
constexpr int WARPS = 8;
#include "linear_batch.cuh"

// A warp has ROW_TILES MMA tiles: lane 4r + c holds rows r and r + 8 of each, columns 2c and 2c + 1 of every 8. Rows
// 2q and 2q + 1 of all of them are neighbours in the output, so that a lane stores LANE_OUT of them.
constexpr int WARP_OUT = WARP_ROWS / BRANCHES, LANE_OUT = WARP_OUT / 4;
constexpr int GROUP_K = 64, SLAB = K_GROUPS * GROUP_K;  // k of a warp and of all
constexpr int LINE_BYTES = GROUP_K * 2, X_OFFSET = WARPS * WARP_ROWS * LINE_BYTES;
constexpr int STAGE_BYTES = X_OFFSET + K_GROUPS * COLUMNS * LINE_BYTES;
static_assert(COLUMNS % 16 == 0 && K_GROUPS * COLUMNS <= 256,
              "ldmatrix loads two column tiles; the groups' sums fit into a stage");

template <class T, int N> struct alignas(sizeof(T) * (N & -N) < 16 ? sizeof(T) * (N & -N) : 16) Vector {
  T of[N];
};

struct Product {
  const bf16 *x, *weight, *bias, *residual;
  Output* out;
  int tokens, K, rows;  // rows: of gate, or of all

  // Row r + 8 i of MMA tile t of a warp: its branch, and its output, counted from the warp's first.
  DEVICE static int branch(int i) { return SILU ? i : 0; }
  DEVICE static int output(int t, int i, int r) { return LANE_OUT * (r / 2) + 2 * (SILU ? t : 2 * t + i) + r % 2; }
  // The weights of that row. Rows past the end repeat the last row; their results are discarded.
  DEVICE const bf16* row(int first, int t, int i, int r) const {
    return weight + (size_t)(branch(i) * rows + min(first + output(t, i, r), rows - 1)) * K;
  }

  // A stage holds, in lines of 64 k, the rows of every warp and then, for each group, the columns. 16-byte vector q
  // of line i is at q ^ i % 8: the eight rows of a matrix of ldmatrix are in different banks.
  DEVICE void copy_weights(unsigned char* stage, int tile, int slab) const {
    const int thread = opaque(threadIdx.x), row = thread / 8, vector = thread % 8;
    UNROLL for (int j = 0; j < WARPS * WARP_ROWS; j += THREADS / 8) {
      // Whether this row is of the next warp; the compiler mostly knows.
      const bool over = j % WARP_ROWS + THREADS / 8 > WARP_ROWS && j % WARP_ROWS + row >= WARP_ROWS;
      const int warp = j / WARP_ROWS + over, own = j % WARP_ROWS + row - over * WARP_ROWS;
      const int k = slab * SLAB + warp / ROW_WARPS * GROUP_K + vector * 8;
      const int first = tile * OUT_ROWS + warp % ROW_WARPS * WARP_OUT;
      const bf16* from = this->row(first, own / 16, own / 8 % 2, own % 8) + k;
      cp_async_16_or_zero<K_GROUPS == 1>(stage + (j + row) * LINE_BYTES + (vector ^ row % 8) * 16, from, k < K);
    }
  }
  DEVICE void copy_x(unsigned char* stage, int slab) const {
    const int thread = opaque(threadIdx.x);
    UNROLL for (int j = 0; j < K_GROUPS * COLUMNS; j += THREADS / 8) {
      const int at = j + thread / 8, m = blockIdx.y * COLUMNS + at % COLUMNS, vector = thread % 8;
      const int k = slab * SLAB + at / COLUMNS * GROUP_K + vector * 8;
      if (K_GROUPS * COLUMNS % (THREADS / 8) == 0 || at < K_GROUPS * COLUMNS)
        cp_async_16_or_zero<false>(stage + X_OFFSET + at * LINE_BYTES + (vector ^ at % 8) * 16, x + (size_t)m * K + k,
                                   m < tokens && k < K);
    }
  }
};

// This warp's rows of a slab times all columns.
DEVICE void multiply(float (&y)[ROW_TILES][TILES][4], const unsigned char* stage) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned char* rows = stage + (warp * WARP_ROWS + lane % 16) * LINE_BYTES;
  const unsigned char* columns =
      stage + X_OFFSET + (warp / ROW_WARPS * COLUMNS + lane / 16 * 8 + lane % 8) * LINE_BYTES;
  UNROLL for (int s = 0; s < GROUP_K / 16; s++) {
    uint32_t a[ROW_TILES][4];
    UNROLL for (int t = 0; t < ROW_TILES; t++)
      ldmatrix_x4(a[t], rows + t * 16 * LINE_BYTES + ((2 * s + lane / 16) ^ lane % 8) * 16);
    UNROLL for (int n = 0; n < TILES; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, columns + n * 8 * LINE_BYTES + ((2 * s + lane / 8 % 2) ^ lane % 8) * 16);
      UNROLL for (int t = 0; t < ROW_TILES; t++) {
        mma_m16n8k16_bf16(y[t][n], a[t][0], a[t][1], a[t][2], a[t][3], b[0], b[1]);
        mma_m16n8k16_bf16(y[t][n + 1], a[t][0], a[t][1], a[t][2], a[t][3], b[2], b[3]);
      }
    }
  }
}

// A warp's sums of a tile: bias, activation, residual, and out. first: its first output. z: columns first_column ...
DEVICE void finish(const Sums& z, const Product& p, int first, int first_column) {
  // Column tiles whose residuals are loaded together.
  constexpr int AT_ONCE = OWN_TILES % 4 == 0 ? 4 : OWN_TILES % 3 == 0 ? 3 : OWN_TILES % 2 == 0 ? 2 : 1;
  typedef Vector<uint32_t, LANE_OUT / 2> Residuals;
  const int lane = opaque(threadIdx.x % 32), r = lane / 4, c = lane % 4, odd = r % 2, n = first + LANE_OUT * (r / 2);
  const bool aligned = p.rows % LANE_OUT == 0;
  float biases[ROW_TILES][2];
  UNROLL for (int t = 0; t < ROW_TILES; t++)
    UNROLL for (int i = 0; i < 2; i++) {
      const int at = Product::branch(i) * p.rows + min(first + Product::output(t, i, r), p.rows - 1);
      biases[t][i] = p.bias ? to_float(p.bias[at]) : 0.f;
    }
  UNROLL for (int tile = 0; tile < OWN_TILES; tile += AT_ONCE) {
    const int first_token = opaque(first_column + 8 * tile + 2 * c + odd);
    Residuals residuals[AT_ONCE];
    UNROLL for (int k = 0; k < AT_ONCE; k++) {
      UNROLL for (int j = 0; j < LANE_OUT / 2; j++) residuals[k].of[j] = 0;
      const int m = first_token + 8 * k;
      if (p.residual && aligned && m < p.tokens && n < p.rows)
        residuals[k] = *(const Residuals*)(p.residual + (size_t)m * p.rows + n);
    }
    UNROLL for (int k = 0; k < AT_ONCE; k++) {
      // Lanes of rows 2q and 2q + 1 have every other output of tokens 2c and 2c + 1. They exchange, so that each has
      // LANE_OUT outputs of one token.
      Vector<float, LANE_OUT> y;
      UNROLL for (int j = 0; j < LANE_OUT / 2; j++) {
        float two[2];
        UNROLL for (int e = 0; e < 2; e++) {
          const float(&sums)[4] = z[SILU ? j : j / 2][tile + k];
          float branches[BRANCHES];
          UNROLL for (int h = 0; h < BRANCHES; h++) {
            const int i = SILU ? h : j % 2;
            branches[h] = sums[2 * i + e] + biases[SILU ? j : j / 2][i];
          }
          two[e] = activated(branches);
        }
        const float received = __shfl_xor_sync(FULL_MASK, odd ? two[0] : two[1], 4);
        y.of[2 * j] = odd ? received : two[0];
        y.of[2 * j + 1] = odd ? two[1] : received;
      }
      const int m = first_token + 8 * k;
      if (m >= p.tokens || n >= p.rows) continue;
      const size_t at = (size_t)m * p.rows + n;
      if (aligned) {
        Vector<Output, LANE_OUT> stored;
        UNROLL for (int j = 0; j < LANE_OUT; j++) {
          const uint32_t pair = residuals[k].of[j / 2];
          stored.of[j] = to_output(y.of[j] + (j % 2 ? high(pair) : low(pair)));
        }
        *(Vector<Output, LANE_OUT>*)(p.out + at) = stored;
      } else {
        UNROLL for (int j = 0; j < LANE_OUT; j++)
          if (n + j < p.rows) p.out[at + j] = to_output(y.of[j] + (p.residual ? to_float(p.residual[at + j]) : 0.f));
      }
    }
  }
}

// workspace float32 [blocks of columns][blocks][2][ROWS * COLUMNS]; split_counter int [blocks of
// columns][tiles][WARPS], zero before and after.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
linear_batch(const bf16* x, const bf16* weight, const bf16* bias, const bf16* residual, Output* out, float* workspace,
             int* split_counter, int tokens, int K, int N, int granularity) {
  extern __shared__ __align__(128) unsigned char smem[];
  const Product p = {x, weight, bias, residual, out, tokens, K, N / BRANCHES};
  const int tiles = (p.rows + OUT_ROWS - 1) / OUT_ROWS, slabs = (K + SLAB - 1) / SLAB, warp = threadIdx.x / 32;
  const SlabList list = {slabs, slabs * tiles, granularity};
  int remaining = list.begin(blockIdx.x + 1), slab = list.begin(blockIdx.x),
      tile = slab / slabs;  // remaining: slabs to multiply
  remaining -= slab;
  slab -= tile * slabs;
  int copied_tile = tile, copied_slab = slab;  // what is copied next
  auto next_copy = [&] {
    if (++copied_slab == slabs) {
      copied_slab = 0;
      copied_tile++;
    }
  };
  for (int i = 0; i < STAGES - 1; i++) {
    if (i < remaining) p.copy_weights(smem + i * STAGE_BYTES, copied_tile, copied_slab);
    next_copy();
  }
  wait_then_allow_next();
  for (int i = 0; i < STAGES - 1; i++) {
    if (i < remaining) p.copy_x(smem + i * STAGE_BYTES, (slab + i) % slabs);
    cp_async_commit();
  }
  for (unsigned char* stage = smem; remaining > 0; tile++) {
    float y[ROW_TILES][TILES][4];
    clear(y);
    const bool starts_here = slab == 0;
    unsigned char* last_stage;
    do {
      cp_async_wait<STAGES - 2>();
      __syncthreads();  // this slab is visible to all, and all are done with the one before, whose stage is refilled
                        // now
      if (remaining >= STAGES) {
        unsigned char* free_stage = stage == smem ? smem + (STAGES - 1) * STAGE_BYTES : stage - STAGE_BYTES;
        p.copy_weights(free_stage, copied_tile, copied_slab);
        p.copy_x(free_stage, copied_slab);
        next_copy();
      }
      cp_async_commit();
      multiply(y, stage);
      last_stage = stage;
      stage = stage == smem + (STAGES - 1) * STAGE_BYTES ? smem : stage + STAGE_BYTES;
      remaining--;
      slab = slab + 1 == slabs ? 0 : slab + 1;
    } while (slab && remaining > 0);
    Sums z;
    reduce_k_groups(y, z, last_stage);
    float* partials = workspace + (size_t)blockIdx.y * gridDim.x * 2 * ROWS * COLUMNS;
    if ((starts_here && slab == 0) ||
        merge_tile(z, list, tile, partials, split_counter + ((int)blockIdx.y * tiles + tile) * WARPS + warp))
      finish(z, p, tile * OUT_ROWS + warp % ROW_WARPS * WARP_OUT,
             blockIdx.y * COLUMNS + warp / ROW_WARPS * OWN_TILES * 8);
  }
}
