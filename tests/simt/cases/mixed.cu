// mixed.cu: a struct as parameter, a table, and classes in shared memory of both kinds.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

__constant__ float table[4] = {1, 2, 3, 4};
struct Arrays { const float* x; float* y; int n; float k[5]; };
template <class T, int N>
struct Box {
  T v[N];
  __device__ T sum() const {
    T s = v[0];
    for (int i = 1; i < N; i++) s += v[i];
    return s;
  }
};

extern "C" __global__ void __launch_bounds__(1024)
    mixed(const Arrays a, bool more, unsigned char small, long long large) {
  __shared__ __half halves[1024];
  __shared__ __nv_bfloat162 pairs[4];
  __shared__ Box<float, 4> boxes[2];
  extern __shared__ __align__(16) float numbers[];
  const int t = threadIdx.x;
  halves[t] = __float2half(a.x[t]);
  if (t < 4) pairs[t] = __floats2bfloat162_rn(t, 2 * t);
  if (t < 8) boxes[t / 4].v[t % 4] = t;
  numbers[t] = table[t & 3];
  __syncthreads();
  a.y[t] = __half2float(halves[1023 - t]) + __low2float(pairs[t & 3]) + boxes[t & 1].sum() + numbers[t ^ 1] +
           a.k[t % 5] + (more ? small : 0) + large;
  if (t == 0) atomicMax((int*)&a.y[a.n], 5);
}
