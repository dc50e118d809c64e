// ldmatrix.cu: no kernel has a wrapper for it yet, so the simulator's own operation. x: four 8x8 matrices of 16-bit numbers; out: [2, 32, 4], as they are, transposed.
extern "C" __global__ void load(const uint4* x, uint32_t* out) {
  __shared__ uint4 rows[32];
  const int l = threadIdx.x;
  rows[l] = x[l];
  __syncwarp();
  uint32_t r[4];
  simt::ldmatrix(r, 4, false, &rows[l], __LINE__);
  for (int i = 0; i < 4; i++) out[4 * l + i] = r[i];
  simt::ldmatrix(r, 2, true, &rows[l], __LINE__);
  simt::ldmatrix(r + 2, 2, true, &rows[(l + 16) % 32], __LINE__);
  for (int i = 0; i < 4; i++) out[128 + 4 * l + i] = r[i];
}
