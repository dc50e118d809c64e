// linear_batch.cuh: how the blocks of linear_batch.cu and quantized/linear_batch.cu share the products of a matrix: a
// list of slabs of k, sums of several blocks merged in the order of k, k groups of a block reduced in shared memory.
// Set by -D: COLUMNS, ROW_TILES, K_GROUPS (linear_batch.cu), and the macros of linear.cuh.
#ifndef MINIOSCAR_LINEAR_BATCH_CUH
#define MINIOSCAR_LINEAR_BATCH_CUH
#include "linear.cuh"
#include "split_merge.cuh"

constexpr int WARP_ROWS = ROW_TILES * 16, ROW_WARPS = WARPS / K_GROUPS, ROWS = ROW_WARPS * WARP_ROWS;
constexpr int OUT_ROWS = ROWS / BRANCHES;
constexpr int TILES = COLUMNS / 8, OWN_TILES = TILES / K_GROUPS;  // column tiles; those that a warp finishes

typedef float Sums[ROW_TILES][OWN_TILES][4];  // of a warp

// The list of slabs, and which block has which.
struct SlabList {
  int slabs, total, granularity;  // slabs of a tile, of all, that stay in one block

  DEVICE int begin(int block) const { return total / granularity * block / (int)gridDim.x * granularity; }
  // With a granularity of 1.
  DEVICE int block_of(int at) const { return ((at + 1) * (int)gridDim.x - 1) / total; }
};

// Sums of a tile that several blocks share. partials float32 [blocks][2][ROWS * COLUMNS]: of a tile that a block
// takes over from another, and of one that it begins. Returns whether z is the sum of all blocks now. split_counter:
// of this tile and warp.
DEVICE bool merge_tile(Sums& z, const SlabList& list, int tile, float* partials, int* split_counter) {
  const int from = list.block_of(tile * list.slabs), to = list.block_of((tile + 1) * list.slabs - 1),
            thread = threadIdx.x;
  auto partial = [&](int block) {
    return (float4*)partials + (size_t)(2 * block + (block == from)) * (ROWS * COLUMNS / 4) + thread;
  };
  return merge_splits<THREADS, (OWN_TILES > 4 ? 1 : 2), OWN_TILES>(z, partial, blockIdx.x, from, to, split_counter);
}

// Reduces the k groups' sums of a tile: each warp gets those of its half of the columns, through the stage whose slab
// is used up.
DEVICE void reduce_k_groups(const float (&y)[ROW_TILES][TILES][4], Sums& z, unsigned char* stage) {
  const int thread = threadIdx.x, warp = thread / 32, group = warp / ROW_WARPS;
  float4* slots = (float4*)stage + thread % 32;
  if (K_GROUPS > 1) __syncthreads();
  UNROLL for (int t = 0; t < ROW_TILES; t++)
    UNROLL for (int n = 0; n < OWN_TILES; n++) {
      const float(&lower)[4] = y[t][n], (&upper)[4] = y[t][TILES - OWN_TILES + n];
      float sent[4];
      UNROLL for (int i = 0; i < 4; i++) {
        sent[i] = group ? lower[i] : upper[i];
        z[t][n][i] = group ? upper[i] : lower[i];
      }
      if (K_GROUPS > 1)
        slots[((warp * ROW_TILES + t) * OWN_TILES + n) * 32] = make_float4(sent[0], sent[1], sent[2], sent[3]);
    }
  if (K_GROUPS == 1) return;
  __syncthreads();
  UNROLL for (int t = 0; t < ROW_TILES; t++)
    UNROLL for (int n = 0; n < OWN_TILES; n++) {
      accumulate(z[t][n], slots[(((warp ^ ROW_WARPS) * ROW_TILES + t) * OWN_TILES + n) * 32]);
    }
}
#endif
