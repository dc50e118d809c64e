// rotate_scale.cu: from the qkv projection to what attention and the cache take (oscar.py, steps 1 and 2), in one launch.
//
//   x = QK-norm(x) (where the model has it), RoPE(x) (half-split pairs), x . H (where the scheme rotates)      x: heads of q, then k
//   norms[t] = || K'[t,:,:] || over all kv heads, 1 where that is 0
//
// qkv [tokens, (q_heads + 2 kv_heads) * d] bf16; q_out [tokens, q_heads, d]; cos, sin [positions, d/2] float32.
// Keys go to k_out [tokens, kv_heads, d] if it is given (prefill), else with the values to their place in the cache (decode):
// [slot, kv_heads, places, d] at position % places (128: a window; the context: a plain BF16 cache). norms [slot, norm_stride].
// H = Sylvester(d / m) (x) P / sqrt(d), P the symmetric Paley matrix of order m = 12 or 20 (d = 96, 80), m = 1 for powers of two.
// grid (tokens, 1 + ceil(others / 8)), 8 warps, a warp a head; the first block of a token has its keys, so that it can sum their
// norm in a fixed order. Everything between input and output is float32; K' is rounded to bf16 before its norm is taken.
// reads and writes 2 B an element. A token at position < 0 is skipped.
#include <cuda_bf16.h>
#include "device.cuh"

typedef __nv_bfloat16 bf16;
constexpr unsigned FULL = 0xffffffffu;
constexpr int DIM = HEAD_DIM, ORDER = DIM % 3 == 0 ? 12 : DIM % 5 == 0 ? 20 : 1, EACH = (DIM + 31) / 32, BLOCK_WARPS = 8;
constexpr bool POWER_OF_TWO = ORDER == 1;
static_assert(DIM == 64 || DIM == 80 || DIM == 96 || DIM == 128 || DIM == 256, "head_dim");

// Channel of a lane's number i. Powers of two: half of a lane's numbers are neighbours in the lower half of the head, the other half
// their partners in RoPE. Otherwise every 32nd.
__device__ __forceinline__ int channel(int lane, int i) {
  if (!POWER_OF_TWO) return lane + 32 * i;
  return lane * (EACH / 2) + i % (EACH / 2) + i / (EACH / 2) * (DIM / 2);
}
__device__ __forceinline__ bool present(int lane, int i) { return DIM % 32 == 0 || lane + 32 * i < DIM; }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int other = 16; other; other /= 2) x += __shfl_xor_sync(FULL, x, other);
  return x;
}

// Sign of P[i][j] is negative: Paley's first construction for q = ORDER - 1, its core on i + j (oscar.py, _paley).
__device__ __forceinline__ bool paley_negative(int i, int j) {
  constexpr int q = ORDER - 1;
  constexpr unsigned negative = ORDER == 12 ? 0x23bu : 0x30af3u;  // 0 and the squares modulo 11, 19
  if (i == 0 || j == 0) return false;
  const int s = i + j - 2 >= q ? i + j - 2 - q : i + j - 2;
  return negative >> s & 1;
}

// x . H for the head that a warp holds; `line` is DIM floats of shared memory of this warp.
__device__ __forceinline__ void hadamard(float (&x)[EACH], float* line, int lane) {
  const float factor = rsqrtf((float)DIM);
  if constexpr (POWER_OF_TWO) {
#pragma unroll
    for (int stride = 1; stride < EACH; stride *= 2)  // channels of one lane: the last round pairs the two halves of the head
#pragma unroll
      for (int i = 0; i < EACH; i++)
        if (!(i & stride)) {
          const float a = x[i], b = x[i + stride];
          x[i] = a + b, x[i + stride] = a - b;
        }
#pragma unroll
    for (int other = 1; other < 32; other *= 2)
#pragma unroll
      for (int i = 0; i < EACH; i++) {
        const float y = __shfl_xor_sync(FULL, x[i], other);
        x[i] = lane & other ? y - x[i] : x[i] + y;
      }
#pragma unroll
    for (int i = 0; i < EACH; i++) x[i] *= factor;
  } else {
#pragma unroll
    for (int stride = ORDER; stride < DIM; stride *= 2) {
#pragma unroll
      for (int i = 0; i < EACH; i++)
        if (present(lane, i)) line[channel(lane, i)] = x[i];
      __syncwarp();
#pragma unroll
      for (int i = 0; i < EACH; i++) {
        const int at = channel(lane, i);
        if (present(lane, i)) x[i] = at / stride % 2 ? line[at - stride] - x[i] : x[i] + line[at + stride];
      }
      __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < EACH; i++)
      if (present(lane, i)) line[channel(lane, i)] = x[i];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int at = channel(lane, i), block = at / ORDER * ORDER;
      float sum = 0.f;
      if (present(lane, i))
        for (int j = 0; j < ORDER; j++) sum += paley_negative(j, at - block) ? -line[block + j] : line[block + j];
      x[i] = sum * factor;
    }
    __syncwarp();
  }
}

extern "C" __global__ void __launch_bounds__(32 * BLOCK_WARPS, 1)
rotate_scale(const bf16* __restrict__ qkv, const bf16* __restrict__ q_weight, const bf16* __restrict__ k_weight, const float* __restrict__ cosines,
             const float* __restrict__ sines, const int* __restrict__ positions, const int* __restrict__ slots, bf16* __restrict__ q_out,
             bf16* __restrict__ k_out, bf16* __restrict__ keys, bf16* __restrict__ values, float* __restrict__ norms,
             int q_heads, int kv_heads, int places, int norm_stride, int rotate, float eps) {
  wait_for_previous(), allow_next();
  __shared__ float lines[BLOCK_WARPS][POWER_OF_TWO ? 1 : DIM];
  __shared__ float squares[BLOCK_WARPS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, position = positions[blockIdx.x];
  if (position < 0) return;
  const size_t token = blockIdx.x, slot = slots ? slots[token] : token;
  const bool keys_here = blockIdx.y == 0;
  float sum = 0.f;
  const int first = keys_here ? warp : (blockIdx.y - 1) * BLOCK_WARPS + warp, end = keys_here ? kv_heads : q_heads + (k_out ? 0 : kv_heads);
  for (int h = first; h < end; h += keys_here ? BLOCK_WARPS : end) {
    const bool is_value = !keys_here && h >= q_heads;
    const int head = is_value ? h - q_heads : h;  // among its own kind
    const bf16* in = qkv + (token * (q_heads + 2 * kv_heads) + (keys_here ? q_heads : is_value ? q_heads + kv_heads : 0) + head) * DIM;
    const size_t place = ((slot * kv_heads + head) * places + position % places) * DIM;
    float x[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) x[i] = present(lane, i) ? __bfloat162float(in[channel(lane, i)]) : 0.f;
    if (is_value) {
#pragma unroll
      for (int i = 0; i < EACH; i++)
        if (present(lane, i)) values[place + channel(lane, i)] = __float2bfloat16_rn(x[i]);
      continue;
    }
    const bf16* weight = keys_here ? k_weight : q_weight;
    if (weight) {
      float square = 0.f;
#pragma unroll
      for (int i = 0; i < EACH; i++) square += x[i] * x[i];
      const float scale = rsqrtf(warp_sum(square) / (float)DIM + eps);
#pragma unroll
      for (int i = 0; i < EACH; i++)
        if (present(lane, i)) x[i] *= scale * __bfloat162float(weight[channel(lane, i)]);
    }
    if constexpr (POWER_OF_TWO) {
#pragma unroll
      for (int i = 0; i < EACH / 2; i++) {
        const size_t at = (size_t)position * (DIM / 2) + channel(lane, i);
        const float cosine = cosines[at], sine = sines[at], a = x[i], b = x[i + EACH / 2];
        x[i] = a * cosine - b * sine, x[i + EACH / 2] = b * cosine + a * sine;
      }
    } else {
      float* line = lines[warp];
#pragma unroll
      for (int i = 0; i < EACH; i++)
        if (present(lane, i)) line[channel(lane, i)] = x[i];
      __syncwarp();
#pragma unroll
      for (int i = 0; i < EACH; i++)
        if (present(lane, i)) {
          const int at = channel(lane, i), low = at % (DIM / 2);
          const float cosine = cosines[(size_t)position * (DIM / 2) + low], sine = sines[(size_t)position * (DIM / 2) + low];
          x[i] = at < DIM / 2 ? x[i] * cosine - line[at + DIM / 2] * sine : x[i] * cosine + line[low] * sine;
        }
      __syncwarp();
    }
    if (rotate) hadamard(x, lines[warp], lane);
    bf16* out = !keys_here ? q_out + (token * q_heads + head) * DIM : k_out ? k_out + (token * kv_heads + head) * DIM : keys + place;
#pragma unroll
    for (int i = 0; i < EACH; i++)
      if (present(lane, i)) {
        const bf16 rounded = __float2bfloat16_rn(x[i]);
        out[channel(lane, i)] = rounded;
        sum += __bfloat162float(rounded) * __bfloat162float(rounded);
      }
  }
  if (!keys_here || !norms || position >= norm_stride) return;
  sum = warp_sum(sum);
  if (lane == 0) squares[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.f;
    for (int w = 0; w < BLOCK_WARPS; w++) total += squares[w];
    norms[slot * norm_stride + position] = total == 0.f ? 1.f : total * rsqrtf(total);
  }
}
