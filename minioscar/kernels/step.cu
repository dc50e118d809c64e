// step.cu: the first and the last launch of a decode step whose tokens and lengths live on the device.
//
// embed: x[row] = table[tokens[row]], of -1 (logits that were not finite) any row; BF16, hidden a multiple of 8. grid (rows), 128 threads.
// advance: a row in use (lengths[row] >= 0) is one token longer now, and draws its next random number as another step. grid (1).
#include <cuda_bf16.h>
#include "device.cuh"

extern "C" __global__ void embed(const __nv_bfloat16* table, const int* tokens, __nv_bfloat16* x, int hidden) {
  wait_for_previous(), allow_next();
  const uint4* from = (const uint4*)(table + (size_t)max(tokens[blockIdx.x], 0) * hidden);
  uint4* to = (uint4*)(x + (size_t)blockIdx.x * hidden);
  for (int i = threadIdx.x; i < hidden / 8; i += blockDim.x) to[i] = from[i];
}

extern "C" __global__ void advance(int* lengths, int* steps, int rows) {
  wait_for_previous(), allow_next();
  for (int row = threadIdx.x; row < rows; row += blockDim.x)
    if (lengths[row] >= 0) lengths[row]++, steps[row]++;
}
