// rotate_scale.cu: from the qkv projection to what attention and the cache take (oscar.py, steps 1 and 2), in one launch.
//
//   x = QK-norm(x) (where the model has it), RoPE(x) (half-split pairs), x . H (where the scheme rotates)      x: heads of q, then k
//   norms[t] = || K'[t,:,:] || over all kv heads, 1 where that is 0
//
// qkv [tokens, (q_heads + 2 kv_heads) * d] bf16; q_out [tokens, q_heads, d]; cos, sin [positions, d/2] float32.
// Keys go to k_out [tokens, kv_heads, d] if it is given (prefill), else with the values to their place in the cache (decode):
// [slot, kv_heads, places, d] at position % places (128: a window; the context: a plain BF16 cache). norms [slot, norm_stride].
// H as in hadamard.cuh. Of a power of two a lane has 16 numbers, 8 neighbours and their partners in RoPE: two reads and writes of 16 bytes,
// four of the transform's stages in registers, the rest of them shuffles among the d / 16 lanes that share a head. Of 80 and 96 a warp has
// a head.
// grid (tokens, 1 + ceil(q_heads / HEADS)), a block has the lanes of HEADS heads: 16, or 8 of 80 and 96. The first block of a token has
// its keys and values, so that it can sum the keys' norm in a fixed order. All arithmetic is float32; K' is rounded to bf16 before its norm
// is taken. reads and writes 2 B an element. A token at position < 0 is skipped.
#include <cuda_bf16.h>
#include "device.cuh"
#include "hadamard.cuh"

typedef __nv_bfloat16 bf16;
constexpr unsigned FULL = 0xffffffffu;
constexpr int DIM = HEAD_DIM, ORDER = hadamard_order(DIM);
constexpr bool POWER_OF_TWO = ORDER == 1;
constexpr int EACH = POWER_OF_TWO ? 16 : (DIM + 31) / 32, LANES = POWER_OF_TWO ? DIM / EACH : 32;  // numbers of a lane; lanes of a head
constexpr int HEADS = POWER_OF_TWO ? 16 : 8, THREADS = HEADS * LANES, TOGETHER = 32 / LANES;  // TOGETHER: heads of a warp
constexpr int WORDS = POWER_OF_TWO ? EACH / 2 : EACH, ANGLES = POWER_OF_TWO ? EACH / 2 : EACH;
static_assert(DIM == 64 || DIM == 80 || DIM == 96 || DIM == 128 || DIM == 256, "head_dim");

// Channel of a lane's number i; `lane` counts among those of its head.
__device__ __forceinline__ int channel(int lane, int i) {
  return POWER_OF_TWO ? lane * (EACH / 2) + i % (EACH / 2) + i / (EACH / 2) * (DIM / 2) : lane + 32 * i;
}
__device__ __forceinline__ bool present(int lane, int i) { return POWER_OF_TWO || DIM % 32 == 0 || lane + 32 * i < DIM; }

// A lane's numbers of a head in memory, as bf16: two in a word where they are neighbours, else one in its lower half.
__device__ __forceinline__ void load(uint32_t (&words)[WORDS], const bf16* head, int lane) {
  if constexpr (POWER_OF_TWO) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 x = *(const uint4*)(head + channel(lane, half * (EACH / 2)));
      words[4 * half] = x.x, words[4 * half + 1] = x.y, words[4 * half + 2] = x.z, words[4 * half + 3] = x.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i++) words[i] = present(lane, i) ? __bfloat16_as_ushort(head[channel(lane, i)]) : 0u;
  }
}
__device__ __forceinline__ void store(bf16* head, const uint32_t (&words)[WORDS], int lane) {
  if constexpr (POWER_OF_TWO) {
#pragma unroll
    for (int half = 0; half < 2; half++)
      *(uint4*)(head + channel(lane, half * (EACH / 2))) = make_uint4(words[4 * half], words[4 * half + 1], words[4 * half + 2], words[4 * half + 3]);
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i++)
      if (present(lane, i)) head[channel(lane, i)] = __ushort_as_bfloat16((unsigned short)words[i]);
  }
}
__device__ __forceinline__ float number(const uint32_t (&words)[WORDS], int i) {
  if (!POWER_OF_TWO) return __uint_as_float(words[i] << 16);
  return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
}
// Of the pairs that a lane has a part in: row [DIM / 2] of the cosines or sines.
__device__ __forceinline__ void load_angles(float (&x)[ANGLES], const float* row, int lane) {
  if constexpr (POWER_OF_TWO) {
#pragma unroll
    for (int i = 0; i < ANGLES; i += 4) {
      const float4 four = *(const float4*)(row + channel(lane, i));
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < ANGLES; i++) x[i] = present(lane, i) ? row[channel(lane, i) % (DIM / 2)] : 0.f;
  }
}

// Over this lane and its neighbours, `lanes` in all; every one of them gets it.
__device__ __forceinline__ float sum_over(float x, int lanes) {
#pragma unroll
  for (int other = lanes / 2; other; other /= 2) x += __shfl_xor_sync(FULL, x, other);
  return x;
}

// sqrt(DIM) x . H for the head that these lanes hold; `line`: DIM floats of shared memory of this warp, where DIM is no power of two.
__device__ __forceinline__ void hadamard(float (&x)[EACH], float* line, int lane) {
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
    for (int other = 1; other < LANES; other *= 2) {
      const float sign = lane & other ? -1.f : 1.f;
#pragma unroll
      for (int i = 0; i < EACH; i++) x[i] = fmaf(sign, x[i], __shfl_xor_sync(FULL, x[i], other));  // exact but for the sum's rounding
    }
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
        for (int j = 0; j < ORDER; j++) sum += paley_negative<ORDER>(j, at - block) ? -line[block + j] : line[block + j];
      x[i] = sum;
    }
    __syncwarp();
  }
}

// 64 registers, so that a multiprocessor has 32 warps: with many tokens there is always one that computes and one that reads.
extern "C" __global__ void __launch_bounds__(THREADS, POWER_OF_TWO ? 1024 / THREADS : 1)
rotate_scale(const bf16* __restrict__ qkv, const bf16* q_weight, const bf16* k_weight, const float* cosines, const float* sines,
             const int* positions, const int* slots, bf16* __restrict__ q_out, bf16* __restrict__ k_out, bf16* __restrict__ keys,
             bf16* __restrict__ values, float* __restrict__ norms, int q_heads, int kv_heads, int places, int norm_stride, int rotate,
             float eps) {
  __shared__ float lines[THREADS / 32][POWER_OF_TWO ? 1 : DIM];
  __shared__ float squares[THREADS / 32];
  // The shuffle tells the compiler that a warp stays together; else every shuffle in the loop gets a second, slow version.
  const int warp = __shfl_sync(FULL, threadIdx.x / 32, 0), lane = threadIdx.x % LANES, position = positions[blockIdx.x];
  const bool keys_here = blockIdx.y == 0;
  // Weights, tables, positions and slots are older than the launch before this one and read while it ends. They are not __restrict__: the
  // compiler would read them behind the wait.
  const bf16* weight = keys_here ? k_weight : q_weight;
  uint32_t weights[WORDS];
  if (weight) load(weights, weight, lane);
  const size_t row = (size_t)max(position, 0) * (DIM / 2);
  float cosine[ANGLES], sine[ANGLES];
  load_angles(cosine, cosines + row, lane), load_angles(sine, sines + row, lane);
  const size_t token = blockIdx.x, slot = slots ? slots[token] : token;
  wait_for_previous(), allow_next();
  if (position < 0) return;
  const bf16* in = qkv + token * (q_heads + 2 * kv_heads) * DIM;
  float sum = 0.f;
  const int end = keys_here ? kv_heads : q_heads;
  for (int first = (keys_here ? 0 : (blockIdx.y - 1) * HEADS) + warp * TOGETHER; first < end; first += keys_here ? HEADS : end) {
    const int mine = first + threadIdx.x % 32 / LANES, head = min(mine, end - 1);  // lanes without a head compute the last one, for the shuffles
    const bool own = mine < end;
    uint32_t words[WORDS];
    load(words, in + ((keys_here ? q_heads : 0) + head) * DIM, lane);
    float x[EACH], factor = rotate ? rsqrtf((float)DIM) : 1.f;  // of a whole head, so applied last: QK-norm's and H's
#pragma unroll
    for (int i = 0; i < EACH; i++) x[i] = number(words, i);
    bf16* out = keys_here ? k_out + (token * kv_heads + head) * DIM : q_out + (token * q_heads + head) * DIM;
    if (keys_here && !k_out) {
      const size_t place = ((slot * kv_heads + head) * places + position % places) * DIM;
      load(words, in + (q_heads + kv_heads + head) * DIM, lane);
      if (own) store(values + place, words, lane);
      out = keys + place;
    }
    if (weight) {
      float square = 0.f;
#pragma unroll
      for (int i = 0; i < WORDS; i++) weights[i] = known_from_here(weights[i]);
#pragma unroll
      for (int i = 0; i < EACH; i++) square += x[i] * x[i], x[i] *= number(weights, i);
      factor *= rsqrtf(sum_over(square, LANES) / (float)DIM + eps);
    }
    if constexpr (POWER_OF_TWO) {
#pragma unroll
      for (int i = 0; i < EACH / 2; i++) {
        const float a = x[i], b = x[i + EACH / 2];
        x[i] = a * cosine[i] - b * sine[i], x[i + EACH / 2] = b * cosine[i] + a * sine[i];
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
          const int at = channel(lane, i);
          x[i] = at < DIM / 2 ? x[i] * cosine[i] - line[at + DIM / 2] * sine[i] : x[i] * cosine[i] + line[at - DIM / 2] * sine[i];
        }
      __syncwarp();
    }
    if (rotate) hadamard(x, lines[warp], lane);
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      if constexpr (POWER_OF_TWO) words[i] = pack_bf16x2(x[2 * i] * factor, x[2 * i + 1] * factor);
      else words[i] = __bfloat16_as_ushort(__float2bfloat16_rn(x[i] * factor));
    }
    if (!own) continue;
    store(out, words, lane);
    if (!keys_here) continue;
#pragma unroll
    for (int i = 0; i < EACH; i++) sum += number(words, i) * number(words, i);
  }
  if (!keys_here || !norms || position >= norm_stride) return;
  sum = sum_over(sum, 32);
  if (threadIdx.x % 32 == 0) squares[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.f;
    for (int w = 0; w < THREADS / 32; w++) total += squares[w];
    norms[slot * norm_stride + position] = total == 0.f ? 1.f : total * rsqrtf(total);
  }
}
