// step.cu: the first and the last launch of a decode step whose tokens and lengths live on the device.
//
// embed: x[row] = table[tokens[row]]; for -1 (logits that were not finite) any row. BF16, hidden a multiple of 8. grid
// (rows), 128 threads.
// advance: lengths and steps of a row in use (lengths[row] >= 0) grow by one; the step numbers the row's random
// numbers.
// grid (1).
#include "common.cuh"

extern "C" __global__ void embed(const bf16* table, const int* tokens, bf16* x, int hidden) {
  wait_then_allow_next();
  const uint4* from = (const uint4*)(table + (size_t)max(tokens[blockIdx.x], 0) * hidden);
  uint4* to = (uint4*)(x + (size_t)blockIdx.x * hidden);
  for (int i = threadIdx.x; i < hidden / 8; i += blockDim.x) to[i] = from[i];
}

extern "C" __global__ void advance(int* lengths, int* steps, int rows) {
  wait_then_allow_next();
  for (int row = threadIdx.x; row < rows; row += blockDim.x)
    if (lengths[row] >= 0) {
      lengths[row]++;
      steps[row]++;
    }
}
