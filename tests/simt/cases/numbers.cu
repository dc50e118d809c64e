// numbers.cu: conversions and arithmetic of half and bfloat16, one element a thread.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

extern "C" __global__ void to_half(const float* x, unsigned short* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = __half_as_ushort(__float2half_rn(x[i]));
}
extern "C" __global__ void to_bfloat16(const float* x, unsigned short* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = __bfloat16_as_ushort(__float2bfloat16_rn(x[i]));
}
extern "C" __global__ void from_half(const unsigned short* x, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = __half2float(__ushort_as_half(x[i]));
}
extern "C" __global__ void from_bfloat16(const unsigned short* x, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = __bfloat162float(__ushort_as_bfloat16(x[i]));
}
// out: [4, n] pairs: a + b, a - b, a * b, fma(a, b, c)
template <class T2>
__global__ void arithmetic(const T2* a, const T2* b, const T2* c, T2* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
  out[i] = __hadd2(a[i], b[i]);
  out[n + i] = __hsub2(a[i], b[i]);
  out[2 * n + i] = __hmul2(a[i], b[i]);
  out[3 * n + i] = __hfma2(a[i], b[i], c[i]);
}
// out: [6, n]: byte permutation, funnel shift, high product, population count, find first set, reversed bits
extern "C" __global__ void integers(const unsigned* a, const unsigned* b, unsigned* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
  out[i] = __byte_perm(a[i], b[i], 0x7250);
  out[n + i] = __funnelshift_r(a[i], b[i], 7);
  out[2 * n + i] = __umulhi(a[i], b[i]);
  out[3 * n + i] = __popc(a[i]);
  out[4 * n + i] = __ffs((int)a[i]);
  out[5 * n + i] = __brev(a[i]);
  const unsigned long long x = (unsigned long long)a[i] << 32 | b[i], y = (unsigned long long)b[i] << 32 | a[i],
                           high = __umul64hi(x, y);
  out[6 * n + i] = (unsigned)high, out[7 * n + i] = (unsigned)(high >> 32);
}
