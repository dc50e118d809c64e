// warps.cu: what the threads of a warp and of a block tell each other. One block; out: [rows, threads].
extern "C" __global__ void exchange(const int* x, int* out) {
  const int t = threadIdx.x, n = blockDim.x, v = x[t];
  const unsigned all = 0xffffffffu;
  out[t] = __shfl_sync(all, v, 5);
  out[n + t] = __shfl_sync(all, v, t + 3, 8);
  out[2 * n + t] = __shfl_xor_sync(all, v, 9);
  out[3 * n + t] = __shfl_up_sync(all, v, 3);
  out[4 * n + t] = __shfl_down_sync(all, v, 3, 16);
  out[5 * n + t] = (int)__ballot_sync(all, v & 1);
  out[6 * n + t] = __any_sync(all, v == x[0]) * 2 + __all_sync(all, v >= 0);
  out[7 * n + t] = __syncthreads_count(v & 1);
  if (t % 32 < 16) out[8 * n + t] = __shfl_xor_sync(0x0000ffffu, v, 1);  // half of the lanes, and then the other half
  else out[8 * n + t] = __shfl_xor_sync(0xffff0000u, v, 2);
}

// Reverses each block's part through shared memory, static or dynamic; sums what its threads add to one counter.
template <int N>
__global__ void reverse(const float* x, float* out, int* counter) {
  __shared__ float whole[N];
  extern __shared__ __align__(16) unsigned char bytes[];
  float* again = reinterpret_cast<float*>(bytes);
  const int t = threadIdx.x + blockDim.x * threadIdx.y, i = (blockIdx.x + gridDim.x * blockIdx.y) * N + t;
  whole[t] = x[i];
  atomicAdd(counter, t);
  __syncthreads();
  again[t] = whole[N - 1 - t];
  __syncthreads();
  out[i] = again[N - 1 - (N - 1 - t)];
}
