// linear_batch.cuh: what linear_batch.cu and linear_batch_sm90.cu share: how the sums of a block stand in its warps, and what becomes of them.
//
// A warp has WARP_ROWS of a tile's rows, ROW_TILES MMA tiles of 16: lane 4r + c holds rows r and r + 8 of each, columns 2c and 2c + 1 of every 8.
// Rows 2q and 2q + 1 of all its tiles are neighbours in the output, so that a lane stores WIDE numbers of a token at once.
//
// All slabs of all tiles (blocks of rows) stand in one line that the blocks of a launch share equally, so a tile may be of several blocks. Each
// writes its sums to `workspace`, float32, as its lanes hold them, and whoever comes last adds them in the order of k: a warp of one block
// meets the same warp of the others only, and reads 16 B a lane. The order depends on the sizes and the grid, not on what else is in a batch.
//
// Set before: ROW_TILES, ROW_WARPS, COLUMNS, HOLDERS (threads of a block that hold sums, from thread 0 on), and what linear.cuh says.
#ifndef MINIOSCAR_LINEAR_BATCH_CUH
#define MINIOSCAR_LINEAR_BATCH_CUH
#include "linear.cuh"

constexpr int WARP_ROWS = 16 * ROW_TILES, WARP_OUT = WARP_ROWS / HALVES, WIDE = WARP_OUT / 4;
constexpr int ROWS = ROW_WARPS * WARP_ROWS, OUT_ROWS = ROWS / HALVES;

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
};

// A warp's sums of a tile: bias, activation, residual, and out. first: its first output. z: columns first_column and so on.
template <int OWN>
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
      biases[t][i] = p.bias ? __bfloat162float(p.bias[at]) : 0.f;
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
          if (n + j < p.rows) p.out[at + j] = to_output(y.of[j] + (p.residual ? __bfloat162float(p.residual[at + j]) : 0.f));
      }
    }
  }
}

// The line of slabs, and who has which.
struct Line {
  int slabs, total;  // of a tile, of all

  __device__ __forceinline__ int begin(int block) const { return total * block / (int)gridDim.x; }
  __device__ __forceinline__ int block_of(int at) const { return ((at + 1) * (int)gridDim.x - 1) / total; }
};

// Writes this warp's part of a tile's sums. Whoever comes last is told so and gets the sum of all parts, in their order.
// parts float32 [blocks][2][ROWS * COLUMNS]: of a tile that a block takes over from another, and of one that it begins. counter: of this warp.
template <int OWN>
__device__ __forceinline__ bool merge(float (&z)[ROW_TILES][OWN][4], const Line& line, int tile, float* parts, int* counter) {
  const int from = line.block_of(tile * line.slabs), to = line.block_of((tile + 1) * line.slabs - 1);
  const int thread = threadIdx.x, lane = thread % 32;
  auto part = [&](int block) { return (float4*)parts + (size_t)(2 * block + (block == from)) * (ROWS * COLUMNS / 4) + thread; };
  float4* mine = part(blockIdx.x);
#pragma unroll
  for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
    for (int n = 0; n < OWN; n++) __stcg(mine + (t * OWN + n) * HOLDERS, make_float4(z[t][n][0], z[t][n][1], z[t][n][2], z[t][n][3]));
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
        const float4 a = __ldcg(theirs + (t * OWN + n) * HOLDERS);
        z[t][n][0] += a.x, z[t][n][1] += a.y, z[t][n][2] += a.z, z[t][n][3] += a.w;
      }
  }
  return true;
}
#endif
