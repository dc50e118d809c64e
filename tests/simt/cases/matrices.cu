// matrices.cu: one warp; registers as they are in memory: a [32, 4], b [32, 2], c and d [32, 4].
#include "device.cuh"

extern "C" __global__ void multiply_f16(const uint32_t* a, const uint32_t* b, const float* c, float* out) {
  const int l = threadIdx.x;
  float d[4] = {c[4 * l], c[4 * l + 1], c[4 * l + 2], c[4 * l + 3]};
  mma_m16n8k16_f16(d, a[4 * l], a[4 * l + 1], a[4 * l + 2], a[4 * l + 3], b[2 * l], b[2 * l + 1]);
  for (int i = 0; i < 4; i++) out[4 * l + i] = d[i];
}
extern "C" __global__ void multiply_bf16(const uint32_t* a, const uint32_t* b, const float* c, float* out) {
  const int l = threadIdx.x;
  float d[4] = {c[4 * l], c[4 * l + 1], c[4 * l + 2], c[4 * l + 3]};
  mma_m16n8k16_bf16(d, a[4 * l], a[4 * l + 1], a[4 * l + 2], a[4 * l + 3], b[2 * l], b[2 * l + 1]);
  for (int i = 0; i < 4; i++) out[4 * l + i] = d[i];
}
extern "C" __global__ void multiply_fresh_f16(const uint32_t* a, const uint32_t* b, const float* c, float* out) {
  const int l = threadIdx.x;
  float d[4] = {c[4 * l], c[4 * l + 1], c[4 * l + 2], c[4 * l + 3]};
  mma_m16n8k16_f16_zero(d, a[4 * l], a[4 * l + 1], a[4 * l + 2], a[4 * l + 3], b[2 * l], b[2 * l + 1]);
  for (int i = 0; i < 4; i++) out[4 * l + i] = d[i];
}
// x: a register a lane, which is an 8x8 matrix of 16-bit numbers
extern "C" __global__ void transpose(const uint32_t* x, uint32_t* out) { out[threadIdx.x] = movmatrix(x[threadIdx.x]); }

// powers: [2, n], 2^x and 1/y; pairs: [3, n], the pairs (x, y) as half and bfloat16, and their product as half pairs
extern "C" __global__ void wrapped(const float* x, const float* y, float* powers, uint32_t* pairs) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
  powers[i] = ex2(x[i]);
  powers[n + i] = rcp_approx(y[i]);
  pairs[i] = pack_f16x2(x[i], y[i]);
  pairs[n + i] = pack_bf16x2(x[i], y[i]);
  pairs[2 * n + i] = mul_f16x2(pack_f16x2(x[i], y[i]), pack_f16x2(y[i], y[i]));
}
