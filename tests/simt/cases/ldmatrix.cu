// ldmatrix.cu: device.cuh's ldmatrix_x4. x: four 8x8 matrices of 16-bit numbers; out: [2, 32, 4], as they are,
// transposed.
#include "device.cuh"

extern "C" __global__ void load(const uint4* x, uint32_t* out) {
  __shared__ uint4 rows[32];
  const int l = threadIdx.x;
  rows[l] = x[l];
  __syncwarp();
  uint32_t r[4];
  ldmatrix_x4(r, &rows[l]);
  for (int i = 0; i < 4; i++) out[4 * l + i] = r[i];
  ldmatrix_x4_trans(r, &rows[l]);
  for (int i = 0; i < 4; i++) out[128 + 4 * l + i] = r[i];
}
