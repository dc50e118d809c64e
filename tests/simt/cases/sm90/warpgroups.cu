// warpgroups.cu: one warpgroup; b [128, 64] K-major or [16, N] N-major; a, c and d in memory as they are in
// registers, c and d [128, N / 2].
#include "sm90/wgmma.cuh"

// d = c + a . b, a [128, 4] registers, b [16, N]
template <int N>
__device__ void multiply(const uint32_t* a, const uint4* b, const float* c, float* out) {
  extern __shared__ __align__(1024) unsigned char rows[];
  const int t = threadIdx.x;
  for (int i = t; i < 16 * N / 8; i += 128) {
    const int k = i / (N / 8), piece = i % (N / 8);
    *(uint4*)(rows + piece / 8 * 2048 + k * 128 + (piece % 8 ^ k % 8) * 16) = b[i];
  }
  fence_async();
  __syncthreads();
  float d[N / 8][4];
  uint32_t own[1][4];
  for (int i = 0; i < 4; i++) own[0][i] = a[4 * t + i];
  for (int i = 0; i < N / 2; i++) d[i / 4][i % 4] = c[N / 2 * t + i];
  compiler_fence(d), compiler_fence(own);
  wgmma_fence();
  wgmma_bf16(d, own[0], wgmma_operand(rows, 1024, 2048));
  wgmma_commit();
  wgmma_wait<0>();
  compiler_fence(d);
  for (int i = 0; i < N / 2; i++) out[N / 2 * t + i] = d[i / 4][i % 4];
}
extern "C" __global__ void registers_shared_64(const uint32_t* a, const uint4* b, const float* c, float* out) {
  multiply<64>(a, b, c, out);
}
extern "C" __global__ void registers_shared_80(const uint32_t* a, const uint4* b, const float* c, float* out) {
  multiply<80>(a, b, c, out);
}
extern "C" __global__ void registers_shared_128(const uint32_t* a, const uint4* b, const float* c, float* out) {
  multiply<128>(a, b, c, out);
}

// d = c + a . b, or a . b where c is null; b [128, 64] K-major, its k from 48 on
extern "C" __global__ void registers_rows(const uint32_t* a, const uint4* b, const float* c, float* out, int fault) {
  extern __shared__ __align__(1024) unsigned char rows[];
  const int t = threadIdx.x;
  for (int i = t; i < 128 * 8; i += 128)
    *(uint4*)(rows + i / 8 * 128 + (i % 8 ^ i / 8 % 8) * 16) = b[i];  // as wgmma_operand wants them
  fence_async();
  __syncthreads();
  float d[16][4];
  uint32_t own[1][4];
  for (int i = 0; i < 4; i++) own[0][i] = a[4 * t + i];
  for (int i = 0; i < 64; i++) d[i / 4][i % 4] = c ? c[64 * t + i] : 1e30f;
  const uint64_t at = wgmma_operand(rows + (fault == 4 ? 128 : 0), 1024, 0) + 6;
  compiler_fence(d), compiler_fence(own);
  if (fault != 1) wgmma_fence();
  if (c) wgmma_bf16_k_major<false>(d, own[0], at);
  else wgmma_bf16_k_major<true>(d, own[0], at);
  wgmma_commit();
  if (fault == 2) d[3][1] = 0.f;
  if (fault == 3) rows[128 * t + (6 ^ t % 8) * 16] = 0;  // of k 48
  if (fault == 6) own[0][0]++;
  if (fault != 5) wgmma_wait<0>();
  compiler_fence(d);
  for (int i = 0; i < 64; i++) out[64 * t + i] = d[i / 4][i % 4];
}

// d = c + a . b; a [64, 64] and b [N, 64] K-major, their k from 32 on
template <int N>
__device__ void multiply_shared(const uint4* a, const uint4* b, const float* c, float* out) {
  extern __shared__ __align__(1024) unsigned char rows[];
  const int t = threadIdx.x;
  for (int i = t; i < (64 + N) * 8; i += 128)
    *(uint4*)(rows + i / 8 * 128 + (i % 8 ^ i / 8 % 8) * 16) = i < 512 ? a[i] : b[i - 512];
  fence_async();
  __syncthreads();
  float d[N / 8][4];
  for (int i = 0; i < N / 2; i++) d[i / 4][i % 4] = c[N / 2 * t + i];
  compiler_fence(d);
  wgmma_fence();
  wgmma_bf16_shared(d, wgmma_operand(rows, 1024, 0) + 4, wgmma_operand(rows + 8192, 1024, 0) + 4);
  wgmma_commit();
  wgmma_wait<0>();
  compiler_fence(d);
  for (int i = 0; i < N / 2; i++) out[N / 2 * t + i] = d[i / 4][i % 4];
}
#define SHARED(N)                                                                                     \
  extern "C" __global__ void shared_##N(const uint4* a, const uint4* b, const float* c, float* out) { \
    multiply_shared<N>(a, b, c, out);                                                                 \
  }
SHARED(16) SHARED(32) SHARED(48) SHARED(64) SHARED(96) SHARED(128)
