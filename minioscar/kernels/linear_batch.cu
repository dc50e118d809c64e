// linear_batch.cu: the products of a decode step of 9 to 256 sequences; fewer are linear.cu's.
//
//   y[m, n] = act(sum_k x[m, k] weight[n, k] + bias[n]) + residual[m, n]          rms_norm: out[m, k] = x[m, k] / rms(x[m]) * norm[k]
//
// Shapes as in linear.cu; SILU: weight holds gate rows, then up rows; out [M][N / 2] = silu(gate) * up. BF16, float32 inside, rounded once.
//
// Still the weights are what takes time, 2 B each. A block has ROWS of them and COLUMNS tokens, and goes over k in slabs, STAGES - 1 of them
// on their way: the weights' part of the first ones from before the launch in front of this one has ended. A warp has 32 rows and all columns,
// so that x, which every warp reads from shared memory, is read a 32nd of COLUMNS times for a weight's once. Each block of rows reads x from
// L2 anew: COLUMNS / ROWS of the weights' bytes.
//
// How blocks share the tiles: linear_batch.cuh.
// K_GROUPS 2: half the rows, twice the k: half the parts to add for a matrix of few rows. The two halves of a block meet in shared memory.
// grid (blocks, blocks of columns), 256 threads; dynamic shared memory STAGES * STAGE_BYTES.
//
// Set by -D: COLUMNS (tokens of a block, a multiple of 16), K_GROUPS, STAGES, and what linear.cuh says.
constexpr int WARPS = 8, ROW_WARPS = WARPS / K_GROUPS, ROW_TILES = 2, HOLDERS = WARPS * 32;
#include "linear_batch.cuh"

constexpr int RUN = 64, SLAB = K_GROUPS * RUN;              // k of a warp and of all
constexpr int TILES = COLUMNS / 8, OWN = TILES / K_GROUPS;  // column tiles; those that a warp finishes
constexpr int LINE = RUN * 2, X_AT = WARPS * 32 * LINE, STAGE_BYTES = X_AT + K_GROUPS * COLUMNS * LINE;
static_assert(COLUMNS % 16 == 0 && K_GROUPS * COLUMNS <= 256, "ldmatrix brings two column tiles; the groups' sums fit into a stage");

// grid (M), 256 threads.
// The product behind it may begin early, as it reads nothing but weights before it waits for this launch, which has waited for the one before.
extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(const bf16* x, const bf16* norm, bf16* out, int K, float eps) {
  allow_next(), wait_for_previous();
  __shared__ float sums[WARPS];
  const size_t row = (size_t)blockIdx.x * K;
  float sum = 0.f;
  for (int i = threadIdx.x; i < K / 8; i += THREADS) sum += squares(*(const uint4*)(x + row + 8 * i));
  sum_of_warp(sum, sums);
  __syncthreads();
  const float factor = inverse_rms(sums, K, eps);
  for (int i = threadIdx.x; i < K / 8; i += THREADS)
    *(uint4*)(out + row + 8 * i) = scaled(*(const uint4*)(x + row + 8 * i), factor, *(const uint4*)(norm + 8 * i));
}

struct Slabs : Product {
  // A stage holds, in lines of 64 k, the rows of every warp and then, for each group, the columns. Piece q of 16 bytes of line i stands at
  // place q ^ i % 8: the eight rows of a matrix of ldmatrix are in different banks.
  __device__ __forceinline__ void copy_weights(unsigned char* stage, int tile, int slab) const {
    const int thread = known_from_here(threadIdx.x), row = thread / 8, piece = thread % 8;
#pragma unroll
    for (int j = 0; j < WARPS; j++) {
      const int k = slab * SLAB + j / ROW_WARPS * RUN + piece * 8;
      const bf16* from = this->row(tile * OUT_ROWS + j % ROW_WARPS * WARP_OUT, row / 16, row / 8 % 2, row % 8) + k;
      cp_async_16_or_zero(stage + (32 * j + row) * LINE + (piece ^ row % 8) * 16, from, k < K);
    }
  }
  __device__ __forceinline__ void copy_x(unsigned char* stage, int slab) const {
    const int thread = known_from_here(threadIdx.x);
#pragma unroll
    for (int j = 0; j < K_GROUPS * COLUMNS; j += THREADS / 8) {
      const int at = j + thread / 8, m = blockIdx.y * COLUMNS + at % COLUMNS, piece = thread % 8;
      const int k = slab * SLAB + at / COLUMNS * RUN + piece * 8;
      if (K_GROUPS * COLUMNS % (THREADS / 8) == 0 || at < K_GROUPS * COLUMNS)
        cp_async_16_or_zero(stage + X_AT + at * LINE + (piece ^ at % 8) * 16, x + (size_t)m * K + k, m < tokens && k < K);
    }
  }
};

// This warp's part of a slab: 32 rows, all columns.
__device__ __forceinline__ void multiply(float (&y)[2][TILES][4], const unsigned char* stage) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned char* rows = stage + (warp * 32 + lane % 16) * LINE;
  const unsigned char* columns = stage + X_AT + (warp / ROW_WARPS * COLUMNS + lane / 16 * 8 + lane % 8) * LINE;
#pragma unroll
  for (int s = 0; s < RUN / 16; s++) {
    uint32_t a[2][4];
#pragma unroll
    for (int t = 0; t < 2; t++) ldmatrix_x4(a[t], rows + t * 16 * LINE + ((2 * s + lane / 16) ^ lane % 8) * 16);
#pragma unroll
    for (int n = 0; n < TILES; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, columns + n * 8 * LINE + ((2 * s + lane / 8 % 2) ^ lane % 8) * 16);
#pragma unroll
      for (int t = 0; t < 2; t++) {
        mma_m16n8k16_bf16(y[t][n], a[t][0], a[t][1], a[t][2], a[t][3], b[0], b[1]);
        mma_m16n8k16_bf16(y[t][n + 1], a[t][0], a[t][1], a[t][2], a[t][3], b[2], b[3]);
      }
    }
  }
}

// The two groups' sums of a tile: each warp gets those of its half of the columns, through the stage whose slab is used up.
__device__ __forceinline__ void meet(const float (&y)[2][TILES][4], float (&z)[2][OWN][4], unsigned char* stage) {
  const int thread = threadIdx.x, warp = thread / 32, group = warp / ROW_WARPS;
  float4* place = (float4*)stage + thread % 32;
  if (K_GROUPS > 1) __syncthreads();
#pragma unroll
  for (int t = 0; t < 2; t++)
#pragma unroll
    for (int n = 0; n < OWN; n++) {
      const float(&lower)[4] = y[t][n], (&upper)[4] = y[t][TILES - OWN + n];
      float given[4];
#pragma unroll
      for (int i = 0; i < 4; i++) given[i] = group ? lower[i] : upper[i], z[t][n][i] = group ? upper[i] : lower[i];
      if (K_GROUPS > 1) place[((warp * 2 + t) * OWN + n) * 32] = make_float4(given[0], given[1], given[2], given[3]);
    }
  if (K_GROUPS == 1) return;
  __syncthreads();
#pragma unroll
  for (int t = 0; t < 2; t++)
#pragma unroll
    for (int n = 0; n < OWN; n++) {
      const float4 given = place[(((warp ^ ROW_WARPS) * 2 + t) * OWN + n) * 32];
      z[t][n][0] += given.x, z[t][n][1] += given.y, z[t][n][2] += given.z, z[t][n][3] += given.w;
    }
}

// workspace float32 [blocks of columns][blocks][2][ROWS * COLUMNS]; arrived int [blocks of columns][tiles][WARPS], zero before and after.
extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_batch(const bf16* x, const bf16* weight, const bf16* bias, const bf16* residual,
                                                                     Output* out, float* workspace, int* arrived, int tokens, int K, int N) {
  extern __shared__ __align__(128) unsigned char smem[];
  const Slabs p = {{x, weight, bias, residual, out, tokens, K, N / HALVES}};
  const int tiles = (p.rows + OUT_ROWS - 1) / OUT_ROWS, slabs = (K + SLAB - 1) / SLAB, warp = threadIdx.x / 32;
  const Line line = {slabs, slabs * tiles};
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
    float y[2][TILES][4];
#pragma unroll
    for (int t = 0; t < 2; t++)
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
    float z[2][OWN][4];
    meet(y, z, used);
    float* parts = workspace + (size_t)blockIdx.y * gridDim.x * 2 * ROWS * COLUMNS;
    if ((begun && slab == 0) || merge(z, line, tile, parts, arrived + ((int)blockIdx.y * tiles + tile) * WARPS + warp))
      finish(z, p, tile * OUT_ROWS + warp % ROW_WARPS * WARP_OUT, blockIdx.y * COLUMNS + warp / ROW_WARPS * OWN * 8);
  }
}
