// rotate_scale.cu: canalized rotation and token norms of new tokens (oscar.py, steps 1 and 2), the plain version.
//
//   q_out[t,h,:] = q[t,h,:] . H      k_out[t,h,:] = k[t,h,:] . H      norms[t] = || k_out[t,:,:] ||, 1 where that is 0
//
// q [tokens, q_heads, d], k [tokens, kv_heads, d] in bf16, after RoPE; norms float32, of k_out as rounded to bf16.
// H = Sylvester(d / m) (x) P / sqrt(d): butterflies over the 2^n blocks of m channels, then the m x m matrix P (`odd`)
// inside each block; m = 1, P = 1 for powers of two, m = 12 or 20 for 12 * 2^n and 20 * 2^n.
// grid (tokens), WARPS warps a block; a warp takes every WARPS-th head. Sums run in a fixed order.
// reads and writes 2 B an element of q and k each, and 4 B a token.
#include <cuda_bf16.h>

#define WARPS 4
#define MAX_DIM 256

extern "C" __global__ void rotate_scale(const __nv_bfloat16* __restrict__ q, const __nv_bfloat16* __restrict__ k, const float* __restrict__ odd,
                                        __nv_bfloat16* __restrict__ q_out, __nv_bfloat16* __restrict__ k_out, float* __restrict__ norms,
                                        int q_heads, int kv_heads, int d, int m, int rotate) {
  __shared__ float head[WARPS][2][MAX_DIM];
  __shared__ float squares[WARPS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const size_t token = blockIdx.x;
  float* x = head[warp][0];
  float* y = head[warp][1];
  float sum = 0.f;
  for (int h = warp; h < q_heads + kv_heads; h += WARPS) {
    const bool key = h >= q_heads;
    const size_t at = key ? (token * kv_heads + h - q_heads) * d : (token * q_heads + h) * d;
    const __nv_bfloat16* in = (key ? k : q) + at;
    __nv_bfloat16* out = (key ? k_out : q_out) + at;
    for (int c = lane; c < d; c += 32) x[c] = __bfloat162float(in[c]);
    __syncwarp();
    if (rotate) {
      for (int stride = m; stride < d; stride *= 2) {  // butterflies between blocks of m channels
        for (int c = lane; c < d; c += 32) y[c] = (c / stride) % 2 ? x[c - stride] - x[c] : x[c] + x[c + stride];
        __syncwarp();
        float* t = x; x = y; y = t;
      }
      for (int c = lane; c < d; c += 32) {
        float dot = 0.f;
        for (int i = 0; i < m; i++) dot += x[c / m * m + i] * odd[i * m + c % m];
        y[c] = dot * rsqrtf((float)d);
      }
      __syncwarp();
      float* t = x; x = y; y = t;
    }
    for (int c = lane; c < d; c += 32) {
      const __nv_bfloat16 rounded = __float2bfloat16_rn(x[c]);
      out[c] = rounded;
      if (key) { const float f = __bfloat162float(rounded); sum += f * f; }
    }
    __syncwarp();
  }
  if (norms == nullptr) return;
  for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (lane == 0) squares[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.f;
    for (int w = 0; w < WARPS; w++) total += squares[w];
    norms[token] = total == 0.f ? 1.f : sqrtf(total);
  }
}
