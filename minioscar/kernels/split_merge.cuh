// split_merge.cuh: one sum split over several blocks. Each block writes its partial sums to a workspace in L2 and
// counts itself; the one that counts last adds all partials in their order. Equal inputs give equal bits; no float
// atomics, and no block waits for another.
//
// Used by linear_batch.cu and sm90/linear_batch.cu, whose splits are of k. decode_merge.cuh and
// sm90/prefill_attention.cu merge sums of a softmax in protocols of their own and say why.
#ifndef MINIOSCAR_SPLIT_MERGE_CUH
#define MINIOSCAR_SPLIT_MERGE_CUH
#include "common.cuh"

// Splits first ... last of a tile's sums, this warp's share of them. partial(i): where this lane's M * N float4 of
// split i are, STRIDE apart. Writes those of split `own`. Returns true in the warp that counts last, and `sum` is
// then that of all splits. A warp meets only the same warp of other blocks, and a lane reads what the same lane
// wrote. UNROLLED splits are loaded at a time, of AT_ONCE columns each: as many as there are registers for.
template <int STRIDE, int UNROLLED, int AT_ONCE, int M, int N, class Address>
DEVICE bool merge_splits(float (&sum)[M][N][4], const Address& partial, int own, int first, int last,
                         int* split_counter) {
  float4* mine = partial(own);
  UNROLL for (int t = 0; t < M; t++)
    UNROLL for (int n = 0; n < N; n++)
      __stcg(mine + (t * N + n) * STRIDE, make_float4(sum[t][n][0], sum[t][n][1], sum[t][n][2], sum[t][n][3]));
  __syncwarp();
  int counted = 0;
  if (threadIdx.x % 32 == 0) {
    counted = atomic_add_acq_rel(split_counter, 1);
    if (counted == last - first) *split_counter = 0;
  }
  const bool is_last = __shfl_sync(FULL_MASK, counted, 0) == last - first;
  __syncwarp();
  if (!is_last) return false;
  clear(sum);
#pragma unroll (UNROLLED)
  for (int split = first; split <= last; split++) {
    const float4* from = partial(split);
    UNROLL for (int t = 0; t < M; t++)
      UNROLL for (int n = 0; n < N; n++) {
        if (AT_ONCE < N && n % AT_ONCE == 0) compiler_barrier();
        accumulate(sum[t][n], __ldcg(from + (t * N + n) * STRIDE));
      }
  }
  return true;
}
#endif
