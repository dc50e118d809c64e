// pipeline.cu: a ring of buffers, correct with fault = 0, with one planted fault otherwise. Compute capability 9.0.
#include "device.cuh"
#include "sm90/bulk_copies.cuh"

// Two warps share two buffers of 1 KB, filled by bulk copies; barriers for full and for read ones. out = x
extern "C" __global__ void pipeline(const float4* x, float4* out, int n, int fault) {
  extern __shared__ __align__(128) float4 ring[];
  __shared__ __align__(8) uint64_t full[2], read[2];
  const int t = threadIdx.x;
  if (t == 0)
    for (int s = 0; s < 2; s++) mbarrier_init(&full[s], 1), mbarrier_init(&read[s], 2);
  mbarrier_init_fence();
  __syncthreads();
  auto fill = [&](int i) {
    mbarrier_arrive_expect_tx(&full[i & 1], fault == 4 ? 1040 : 1024);  // 4: announces more than it copies
    bulk_copy(ring + 64 * (i & 1), x + 64 * i, 1024, &full[i & 1], l2_evict_first());
  };
  if (t == 0) fill(0), fill(1);
  for (int i = 0; i < n; i++) {
    const int s = i & 1, parity = i >> 1 & 1;
    if (fault == 1 ? false : fault == 2 ? t % 32 == 0 : true) mbarrier_wait(&full[s], parity);  // 1: none; 2: one lane
    if (fault == 2) __shfl_sync(0xffffffffu, t, 0);  // and a shuffle: others come later, but it orders no memory
    out[64 * i + t] = ring[64 * s + t];
    if (fault == 5) __shfl_sync(0xffffffffu, t, 0);  // 5: lane 0 says that its warp has read; that is no proof
    else __syncwarp();
    if (t % 32 == 0) mbarrier_arrive_expect_tx(&read[s], 0);
    if (t == 0 && i + 2 < n) {
      if (fault != 3) mbarrier_wait(&read[s], parity);    // 3: overwrites what the other warp may still read
      fill(i + 2);
    }
  }
}
