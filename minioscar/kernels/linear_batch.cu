// linear_batch.cu: the products of a decode step of 9 to 256 sequences; fewer are linear.cu's, and some of compute capability 9.0
// linear_batch_sm90.cu's.
//
//   y[m, n] = act(sum_k x[m, k] weight[n, k] + bias[n]) + residual[m, n]
//
// Shapes as in linear.cu; SILU: weight holds gate rows, then up rows; out [M][N / 2] = silu(gate) * up. BF16, float32 inside, rounded once.
//
// Still the weights are what takes time, 2 B each. A block has ROWS of them and COLUMNS tokens, and goes over k in slabs, STAGES - 1 of them
// on their way: the weights' part of the first ones from before the launch in front of this one has ended. A warp has WARP_ROWS rows and all
// columns, so that x, which every warp reads from shared memory, is read COLUMNS / WARP_ROWS times for a weight's once. Each block of rows
// reads x from L2 anew: COLUMNS / ROWS of the weights' bytes.
//
// All slabs of all tiles (blocks of rows) stand in one line that the blocks of a launch share equally: in whole tiles if `unit` is a tile's
// slabs; if it is 1, a tile may be of several blocks. Each of those writes its sums to `workspace`, float32, as its lanes hold them, and
// whoever comes last adds them in the order of k: a warp of one block meets the same warp of the others only, and reads 16 B a lane. The
// order depends on how the slabs are shared, not on what else is in a batch.
// K_GROUPS 2: half the rows, twice the k: half the parts to add for a matrix of few rows. The two halves of a block meet in shared memory.
// grid (blocks, blocks of columns), 256 threads; dynamic shared memory STAGES * STAGE_BYTES.
//
// Set by -D: COLUMNS (tokens of a block, a multiple of 16), ROW_TILES (16 rows each, of a warp), K_GROUPS, STAGES, and what linear.cuh says.
constexpr int WARPS = 8;
#include "linear.cuh"

// A warp has ROW_TILES MMA tiles: lane 4r + c holds rows r and r + 8 of each, columns 2c and 2c + 1 of every 8. Rows 2q and 2q + 1 of all of
// them are neighbours in the output, so that a lane stores WIDE numbers of a token at once.
constexpr int WARP_ROWS = ROW_TILES * 16, ROW_WARPS = WARPS / K_GROUPS, ROWS = ROW_WARPS * WARP_ROWS;
constexpr int WARP_OUT = WARP_ROWS / HALVES, OUT_ROWS = ROWS / HALVES, WIDE = WARP_OUT / 4;
constexpr int RUN = 64, SLAB = K_GROUPS * RUN;              // k of a warp and of all
constexpr int TILES = COLUMNS / 8, OWN = TILES / K_GROUPS;  // column tiles; those that a warp finishes
constexpr int LINE = RUN * 2, X_AT = WARPS * WARP_ROWS * LINE, STAGE_BYTES = X_AT + K_GROUPS * COLUMNS * LINE;
static_assert(COLUMNS % 16 == 0 && K_GROUPS * COLUMNS <= 256, "ldmatrix brings two column tiles; the groups' sums fit into a stage");

template <class T, int N>
struct alignas(sizeof(T) * (N & -N) < 16 ? sizeof(T) * (N & -N) : 16) Vector {
  T of[N];
};

struct Product {
  const bf16 *x, *weight, *bias, *residual;
  Output* out;
  int tokens, K, rows;  // rows: of gate, or of all

  // Row r + 8 i of MMA tile t of a warp: the half that it is of, and its output, counted from the warp's first.
  static __device__ __forceinline__ int half(int i) { return SILU ? i : 0; }
  static __device__ __forceinline__ int output(int t, int i, int r) { return WIDE * (r / 2) + 2 * (SILU ? t : 2 * t + i) + r % 2; }
  // The weights of that row; rows behind the last are its like and thrown away. first: the warp's first output.
  __device__ __forceinline__ const bf16* row(int first, int t, int i, int r) const {
    return weight + (size_t)(half(i) * rows + min(first + output(t, i, r), rows - 1)) * K;
  }

  // A stage holds, in lines of 64 k, the rows of every warp and then, for each group, the columns. Piece q of 16 bytes of line i stands at
  // place q ^ i % 8: the eight rows of a matrix of ldmatrix are in different banks.
  __device__ __forceinline__ void copy_weights(unsigned char* stage, int tile, int slab) const {
    const int thread = known_from_here(threadIdx.x), row = thread / 8, piece = thread % 8;
#pragma unroll
    for (int j = 0; j < WARPS * WARP_ROWS; j += THREADS / 8) {
      const bool over = j % WARP_ROWS + THREADS / 8 > WARP_ROWS && j % WARP_ROWS + row >= WARP_ROWS;  // mostly known to the compiler
      const int warp = j / WARP_ROWS + over, own = j % WARP_ROWS + row - over * WARP_ROWS, k = slab * SLAB + warp / ROW_WARPS * RUN + piece * 8;
      const bf16* from = this->row(tile * OUT_ROWS + warp % ROW_WARPS * WARP_OUT, own / 16, own / 8 % 2, own % 8) + k;
      cp_async_16_or_zero<K_GROUPS == 1>(stage + (j + row) * LINE + (piece ^ row % 8) * 16, from, k < K);
    }
  }
  __device__ __forceinline__ void copy_x(unsigned char* stage, int slab) const {
    const int thread = known_from_here(threadIdx.x);
#pragma unroll
    for (int j = 0; j < K_GROUPS * COLUMNS; j += THREADS / 8) {
      const int at = j + thread / 8, m = blockIdx.y * COLUMNS + at % COLUMNS, piece = thread % 8;
      const int k = slab * SLAB + at / COLUMNS * RUN + piece * 8;
      if (K_GROUPS * COLUMNS % (THREADS / 8) == 0 || at < K_GROUPS * COLUMNS)
        cp_async_16_or_zero<false>(stage + X_AT + at * LINE + (piece ^ at % 8) * 16, x + (size_t)m * K + k, m < tokens && k < K);
    }
  }
};

// This warp's part of a slab: its rows, all columns.
__device__ __forceinline__ void multiply(float (&y)[ROW_TILES][TILES][4], const unsigned char* stage) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned char* rows = stage + (warp * WARP_ROWS + lane % 16) * LINE;
  const unsigned char* columns = stage + X_AT + (warp / ROW_WARPS * COLUMNS + lane / 16 * 8 + lane % 8) * LINE;
#pragma unroll
  for (int s = 0; s < RUN / 16; s++) {
    uint32_t a[ROW_TILES][4];
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) ldmatrix_x4(a[t], rows + t * 16 * LINE + ((2 * s + lane / 16) ^ lane % 8) * 16);
#pragma unroll
    for (int n = 0; n < TILES; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, columns + n * 8 * LINE + ((2 * s + lane / 8 % 2) ^ lane % 8) * 16);
#pragma unroll
      for (int t = 0; t < ROW_TILES; t++) {
        mma_m16n8k16_bf16(y[t][n], a[t][0], a[t][1], a[t][2], a[t][3], b[0], b[1]);
        mma_m16n8k16_bf16(y[t][n + 1], a[t][0], a[t][1], a[t][2], a[t][3], b[2], b[3]);
      }
    }
  }
}

// A warp's sums of a tile: bias, activation, residual, and out. first: its first output. z: columns first_column and so on.
__device__ __forceinline__ void finish(const float (&z)[ROW_TILES][OWN][4], const Product& p, int first, int first_column) {
  constexpr int AT_ONCE = OWN % 4 == 0 ? 4 : OWN % 3 == 0 ? 3 : OWN % 2 == 0 ? 2 : 1;  // column tiles whose residuals are asked for together
  const int lane = known_from_here(threadIdx.x % 32), r = lane / 4, c = lane % 4, odd = r % 2, n = first + WIDE * (r / 2);
  const bool aligned = p.rows % WIDE == 0;
  float biases[ROW_TILES][2];
#pragma unroll
  for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int at = Product::half(i) * p.rows + min(first + Product::output(t, i, r), p.rows - 1);
      biases[t][i] = p.bias ? to_float(p.bias[at]) : 0.f;
    }
#pragma unroll
  for (int some = 0; some < OWN; some += AT_ONCE) {
    const int first_token = known_from_here(first_column + 8 * some + 2 * c + odd);
    Vector<uint32_t, WIDE / 2> added[AT_ONCE];
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
#pragma unroll
      for (int j = 0; j < WIDE / 2; j++) added[k].of[j] = 0;
      const int m = first_token + 8 * k;
      if (p.residual && aligned && m < p.tokens && n < p.rows) added[k] = *(const Vector<uint32_t, WIDE / 2>*)(p.residual + (size_t)m * p.rows + n);
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
      // Lanes of rows 2q and 2q + 1 have every other output of tokens 2c and 2c + 1: each gives the other one token's, and has WIDE of the other.
      Vector<float, WIDE> y;
#pragma unroll
      for (int j = 0; j < WIDE / 2; j++) {
        float two[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float(&sums)[4] = z[SILU ? j : j / 2][some + k];
          float halves[HALVES];
#pragma unroll
          for (int h = 0; h < HALVES; h++) {
            const int i = SILU ? h : j % 2;
            halves[h] = sums[2 * i + e] + biases[SILU ? j : j / 2][i];
          }
          two[e] = activated(halves);
        }
        const float got = __shfl_xor_sync(FULL, odd ? two[0] : two[1], 4);
        y.of[2 * j] = odd ? got : two[0], y.of[2 * j + 1] = odd ? two[1] : got;
      }
      const int m = first_token + 8 * k;
      if (m >= p.tokens || n >= p.rows) continue;
      const size_t at = (size_t)m * p.rows + n;
      if (aligned) {
        Vector<Output, WIDE> stored;
#pragma unroll
        for (int j = 0; j < WIDE; j++) stored.of[j] = to_output(y.of[j] + (j % 2 ? high(added[k].of[j / 2]) : low(added[k].of[j / 2])));
        *(Vector<Output, WIDE>*)(p.out + at) = stored;
      } else {
#pragma unroll
        for (int j = 0; j < WIDE; j++)
          if (n + j < p.rows) p.out[at + j] = to_output(y.of[j] + (p.residual ? to_float(p.residual[at + j]) : 0.f));
      }
    }
  }
}

// The line of slabs, and who has which.
struct Line {
  int slabs, total, unit;  // slabs of a tile, of all, of what is not cut

  __device__ __forceinline__ int begin(int block) const { return total / unit * block / (int)gridDim.x * unit; }
  // Where `unit` is 1.
  __device__ __forceinline__ int block_of(int at) const { return ((at + 1) * (int)gridDim.x - 1) / total; }
};

// Writes this warp's part of a tile's sums. Whoever comes last is told so and gets the sum of all parts, in their order.
// parts float32 [blocks][2][ROWS * COLUMNS]: of a tile that a block takes over from another, and of one that it begins. counter: of this warp.
__device__ __forceinline__ bool merge(float (&z)[ROW_TILES][OWN][4], const Line& line, int tile, float* parts, int* counter) {
  const int from = line.block_of(tile * line.slabs), to = line.block_of((tile + 1) * line.slabs - 1);
  const int thread = threadIdx.x, lane = thread % 32;
  auto part = [&](int block) { return (float4*)parts + (size_t)(2 * block + (block == from)) * (ROWS * COLUMNS / 4) + thread; };
  float4* mine = part(blockIdx.x);
#pragma unroll
  for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
    for (int n = 0; n < OWN; n++) __stcg(mine + (t * OWN + n) * THREADS, make_float4(z[t][n][0], z[t][n][1], z[t][n][2], z[t][n][3]));
  __syncwarp();
  int arrived = 0;
  if (lane == 0) {
    arrived = atomic_add_acq_rel(counter, 1);
    if (arrived == to - from) *counter = 0;
  }
  const bool last = __shfl_sync(FULL, arrived, 0) == to - from;
  __syncwarp();
  if (!last) return false;
#pragma unroll
  for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
    for (int n = 0; n < OWN; n++) z[t][n][0] = z[t][n][1] = z[t][n][2] = z[t][n][3] = 0.f;
#pragma unroll (OWN > 4 ? 1 : 2)
  for (int block = from; block <= to; block++) {
    const float4* theirs = part(block);
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
      for (int n = 0; n < OWN; n++) {
        const float4 a = __ldcg(theirs + (t * OWN + n) * THREADS);
        z[t][n][0] += a.x, z[t][n][1] += a.y, z[t][n][2] += a.z, z[t][n][3] += a.w;
      }
  }
  return true;
}

// The two groups' sums of a tile: each warp gets those of its half of the columns, through the stage whose slab is used up.
__device__ __forceinline__ void meet(const float (&y)[ROW_TILES][TILES][4], float (&z)[ROW_TILES][OWN][4], unsigned char* stage) {
  const int thread = threadIdx.x, warp = thread / 32, group = warp / ROW_WARPS;
  float4* place = (float4*)stage + thread % 32;
  if (K_GROUPS > 1) __syncthreads();
#pragma unroll
  for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
    for (int n = 0; n < OWN; n++) {
      const float(&lower)[4] = y[t][n], (&upper)[4] = y[t][TILES - OWN + n];
      float given[4];
#pragma unroll
      for (int i = 0; i < 4; i++) given[i] = group ? lower[i] : upper[i], z[t][n][i] = group ? upper[i] : lower[i];
      if (K_GROUPS > 1) place[((warp * ROW_TILES + t) * OWN + n) * 32] = make_float4(given[0], given[1], given[2], given[3]);
    }
  if (K_GROUPS == 1) return;
  __syncthreads();
#pragma unroll
  for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
    for (int n = 0; n < OWN; n++) {
      const float4 given = place[(((warp ^ ROW_WARPS) * ROW_TILES + t) * OWN + n) * 32];
      z[t][n][0] += given.x, z[t][n][1] += given.y, z[t][n][2] += given.z, z[t][n][3] += given.w;
    }
}

// workspace float32 [blocks of columns][blocks][2][ROWS * COLUMNS]; arrived int [blocks of columns][tiles][WARPS], zero before and after.
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_batch(const bf16* x, const bf16* weight, const bf16* bias, const bf16* residual,
                                                                     Output* out, float* workspace, int* arrived, int tokens, int K, int N, int unit) {
  extern __shared__ __align__(128) unsigned char smem[];
  const Product p = {x, weight, bias, residual, out, tokens, K, N / HALVES};
  const int tiles = (p.rows + OUT_ROWS - 1) / OUT_ROWS, slabs = (K + SLAB - 1) / SLAB, warp = threadIdx.x / 32;
  const Line line = {slabs, slabs * tiles, unit};
  int left = line.begin(blockIdx.x + 1), slab = line.begin(blockIdx.x), tile = slab / slabs;  // left: slabs to multiply
  left -= slab, slab -= tile * slabs;
  int copied_tile = tile, copied_slab = slab;  // what is copied next
  for (int i = 0; i < STAGES - 1; i++) {
    if (i < left) p.copy_weights(smem + i * STAGE_BYTES, copied_tile, copied_slab);
    if (++copied_slab == slabs) copied_slab = 0, copied_tile++;
  }
  wait_for_previous(), allow_next();
  for (int i = 0; i < STAGES - 1; i++) {
    if (i < left) p.copy_x(smem + i * STAGE_BYTES, (slab + i) % slabs);
    cp_async_commit();
  }
  for (unsigned char* stage = smem; left > 0; tile++) {
    float y[ROW_TILES][TILES][4];
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
      for (int n = 0; n < TILES; n++) y[t][n][0] = y[t][n][1] = y[t][n][2] = y[t][n][3] = 0.f;
    const bool begun = slab == 0;  // by this block
    unsigned char* used;
    do {
      cp_async_wait<STAGES - 2>();
      __syncthreads();  // this slab is there for all, and all are through with the one before, whose place is filled now
      if (left >= STAGES) {
        unsigned char* place = stage == smem ? smem + (STAGES - 1) * STAGE_BYTES : stage - STAGE_BYTES;
        p.copy_weights(place, copied_tile, copied_slab), p.copy_x(place, copied_slab);
        if (++copied_slab == slabs) copied_slab = 0, copied_tile++;
      }
      cp_async_commit();
      multiply(y, stage);
      used = stage;
      stage = stage == smem + (STAGES - 1) * STAGE_BYTES ? smem : stage + STAGE_BYTES;
      left--, slab = slab + 1 == slabs ? 0 : slab + 1;
    } while (slab && left > 0);
    float z[ROW_TILES][OWN][4];
    meet(y, z, used);
    float* parts = workspace + (size_t)blockIdx.y * gridDim.x * 2 * ROWS * COLUMNS;
    if ((begun && slab == 0) || merge(z, line, tile, parts, arrived + ((int)blockIdx.y * tiles + tile) * WARPS + warp))
      finish(z, p, tile * OUT_ROWS + warp % ROW_WARPS * WARP_OUT, blockIdx.y * COLUMNS + warp / ROW_WARPS * OWN * 8);
  }
}
