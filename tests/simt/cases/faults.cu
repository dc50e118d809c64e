// faults.cu: small kernels that are right with fault = 0 and have one planted fault otherwise.
#include "device.cuh"

extern "C" __global__ void shift_left(const float* x, float* out, int n, int fault) {  // out[i] = x[i + 1]
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = x[i + (i < n - 1 || fault)];
}

extern "C" __global__ void rotate(const float* x, float* out, int n, int fault) {  // out[t] = x[(t + 1) % n], twice
  extern __shared__ __align__(16) float held[];
  const int t = threadIdx.x;
  held[t + (fault == 1)] = x[t];                          // 1: one word too far
  if (fault != 2) __syncthreads();                        // 2: no barrier before the words of others are read
  out[t] = held[fault == 3 ? t + 1 : (t + 1) % n];        // 3: reads one word too far
  if (fault == 4 && t < 16) __syncthreads();              // 4: not by all
  if (fault != 5) __syncthreads();                        // 5: no barrier before they are overwritten
  held[t] = 2.f * x[t];
  __syncthreads();
  out[t] = held[(t + 1) % n] - out[t];
}

extern "C" __global__ void average(const float* x, float* out, int n, int fault) {  // of neighbours in a warp
  __shared__ float first[32], second[32];
  float* p = fault == 1 ? second + 1 : second;            // 1: past the end, behind the compiler's back
  const int t = threadIdx.x;
  if (fault != 2 || t > 0) first[t] = x[t];               // 2: one word stays unwritten
  if (fault != 3) __syncwarp();                           // 3: no order between lanes
  p[t] = first[t ^ 1] + first[t];
  __syncwarp();
  out[t] = .5f * second[t];
  if (fault == 4 && t < 16) out[t] += __shfl_xor_sync(0xffffffffu, x[t], 1);  // 4: half of the lanes stay away
}

extern "C" __global__ void stream(const uint4* x, uint4* out, int n, int fault) {  // by cp.async; out = x
  __shared__ uint4 buffer[2][32];
  const int t = threadIdx.x;
  cp_async_16(&buffer[0][t], &x[t]);
  cp_async_commit();
  for (int i = 0; i < n; i++) {
    if (i + 1 < n) cp_async_16(&buffer[(i + 1) & 1][t], &x[32 * (i + 1) + t]);
    cp_async_commit();
    if (fault == 1) cp_async_wait<2>();                   // 1: waits for too few
    else cp_async_wait<1>();
    if (fault != 2) __syncthreads();                      // 2: others' copies are not visible yet
    out[32 * i + (t ^ 1)] = buffer[i & 1][t ^ 1];
    if (fault != 3) __syncthreads();                      // 3: the next copy overwrites what others still read
  }
}

extern "C" __global__ void sum_of_blocks(const float* x, float* out, float* part, int* counter, int n, int fault) {
  __shared__ int last;
  const int t = threadIdx.x;
  part[fault == 1 ? t : blockIdx.x * blockDim.x + t] = x[blockIdx.x * blockDim.x + t];  // 1: same words
  if (fault != 2) __threadfence();                        // 2: not visible to other blocks
  if (fault != 3) __syncthreads();                        // 3: counts before all threads have written
  if (t == 0) last = atomicAdd(counter, 1) == (int)gridDim.x - 1;
  __syncthreads();
  if (last && t == 0 && fault != 4) {                     // 4: nobody writes the result
    float s = 0.f;
    for (int i = 0; i < n; i++) s += part[i];
    *out = s;
  }
}

extern "C" __global__ void words(const float* x, float* out, float* part, int* counter, int n, int fault) {  // no fence
  const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  const float2 mine = make_float2(x[i], 0.f);
  if (fault == 1) *(float2*)(part + 2 * i) = mine;        // 1: an ordinary write, while others may read
  else store_relaxed((float2*)(part + 2 * i), mine);
  __shared__ int last;
  __syncthreads();
  if (t == 0) last = atomic_add_relaxed(counter, 1) == (int)gridDim.x - 1;
  __syncthreads();
  if (!last || t) return;
  float s = 0.f;
  for (int k = 0; k < n; k++) s += fault == 2 ? part[2 * k] : load_relaxed((const float2*)(part + 2 * k)).x;
  *out = s;
  if (fault == 3) *counter = load_relaxed(counter + 1);   // 3: out of bounds
}

extern "C" __global__ void vectors(const float* x, float* out, int n, int fault) {
  const int t = threadIdx.x;
  const float4 v = *reinterpret_cast<const float4*>(x + 4 * t + (fault == 1));  // 1: misaligned
  float four[4] = {v.x, v.y, v.z, v.w};
  const int last = fault == 2 ? 5 : 4;                    // 2: an index past a local array
  for (int i = 0; i < last; i++) out[4 * t + (i & 3)] = four[i] * (float)(1u << (fault == 3 ? n + 32 : 0));  // 3: far
}
