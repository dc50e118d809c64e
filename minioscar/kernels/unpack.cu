// unpack.cu: the past of sequences in BF16, for a prefill that goes on over it. The inverse of pack.cu.
//
//   keys[t] = (step * code + min) * norm[t]; values[t] = step * code + min, symmetric: step * (code - TOP / 2); sinks and window as they are
//
// Float32 in oscar.py's order, rounded to BF16 once: bit for bit its numbers, rounded. (step * code is exact, 11 bits times at most 4, so that
// a fused multiply-add rounds as oscar.py's sum does.)
// Sequence s: tokens 0 ... starts[s] - 1 of row slots[s] of the cache -> keys, values [s][kv_heads][capacity][HEAD_DIM], as prefill_attention.cu
// reads them, or, if TILED, the tiles of tile.cuh from number first_tiles[s] on, for prefill_attention_sm90.cu.
// grid (pages, kv_heads, sequences), 2 * HEAD_DIM threads: a warp has 64 tokens x 32 channels of keys, or 8 tiles of values, as in pack.cu.
// A lane loads its words once (LAYOUT.md), has 8 neighbouring channels of 8 (token, chunk) pairs in them, and stores 16 bytes of each: with its
// three neighbours whole pieces of 64. Reads BITS / 8 B and the steps, and writes 2 B an element.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "device.cuh"
#include "layout.cuh"
#include "tile.cuh"

typedef __nv_bfloat16 bf16;
constexpr int TOP = (1 << BITS) - 1;

// The upper or lower half of a word.
__device__ __forceinline__ float half_of(uint32_t word, int upper) { return __half2float(__ushort_as_half((unsigned short)(word >> (16 * upper)))); }

struct Eight { float x[8]; };
__device__ __forceinline__ Eight halves(uint4 raw) {
  Eight y;
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 8; i++) y.x[i] = half_of(words[i / 2], i % 2);
  return y;
}
// The code at a place of the upper or lower half of a word, minus `from` (a multiple of 1/2). Not shifted down but left where it is, in the
// mantissa of a power of two large enough that it counts as a whole number there.
__device__ __forceinline__ float code_at(uint32_t word, int place, bool upper, float from) {
  const int bit = place * BITS + 1;  // one to the left: a half must have a bit too
  const uint32_t power = (127 + 23 - bit) << 23;
  return __fsub_rn(__uint_as_float(((upper ? word >> 15 : word << 1) & TOP << bit) | power), __uint_as_float(power) + from);
}

__device__ __forceinline__ void store(bf16* to, const Eight& y) {
  __stcg((uint4*)to, make_uint4(pack_bf16x2(y.x[0], y.x[1]), pack_bf16x2(y.x[2], y.x[3]), pack_bf16x2(y.x[4], y.x[5]), pack_bf16x2(y.x[6], y.x[7])));
}

// Where the 8 channels `piece` of a page's token stand, from the page's first number on.
__device__ __forceinline__ int place_of(int token, int piece) { return TILED ? place(token, piece) / 2 : token * DIM + piece * 8; }

// 64 tokens x 32 channels (chunk); norms, out: of the page's first token.
__device__ __forceinline__ void unpack_keys(const unsigned char* page, int chunk, const float* norms, bf16* out) {
  constexpr int LOADS = 8 / TILES, N = 8 / KEY_GROUPS;  // N of a lane's 8 tokens are of one group
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  uint32_t words[LOADS][4];
#pragma unroll
  for (int i = 0; i < LOADS; i++) {
    const uint4 raw = ((const uint4*)page)[(chunk * LOADS + i) * 32 + lane];
    words[i][0] = raw.x, words[i][1] = raw.y, words[i][2] = raw.z, words[i][3] = raw.w;
  }
  const uint4 *steps = (const uint4*)(page + KEY_STEP), *minima = (const uint4*)(page + KEY_MIN);
  float norm[8];
  if (SCALED) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float4 four = *(const float4*)(norms + 32 * i + 4 * r);
      norm[4 * i] = four.x, norm[4 * i + 1] = four.y, norm[4 * i + 2] = four.z, norm[4 * i + 3] = four.w;
    }
  }
  Eight least[2];  // of one group: all in the first; of two: of a k step each, [pair][group][2 channels]
#pragma unroll
  for (int i = 0; i < KEY_GROUPS; i++) least[i] = halves(minima[(chunk * KEY_GROUPS + i) * 4 + c]);
#pragma unroll
  for (int g = 0; g < KEY_GROUPS; g++) {
    const Eight step = halves(steps[(chunk * KEY_GROUPS + g) * 4 + c]);
#pragma unroll
    for (int i = N * g; i < N * (g + 1); i++) {
      const int token = token_of(i / 2, i % 2, r);
      Eight y;
#pragma unroll
      for (int k = 0; k < 8; k++) {
        const int tile = key_tile(i / 2, k / 4), pair = k / 2 % 2;
        const float minimum = KEY_GROUPS == 2 ? least[k / 4].x[pair * 4 + g * 2 + k % 2] : least[0].x[pair * 4 + k / 4 * 2 + k % 2];
        const float code = code_at(words[tile / TILES][2 * pair + i % 2], tile % TILES, k % 2, 0.f);
        y.x[k] = __fmaf_rn(code, step.x[k], minimum);
        if (SCALED) y.x[k] = __fmul_rn(y.x[k], norm[i]);
      }
      store(out + place_of(token, 4 * chunk + c), y);
    }
  }
}

// Value tiles 8 * part ... 8 * part + 7: four times 16 tokens x 32 channels.
__device__ __forceinline__ void unpack_values(const unsigned char* page, int part, bf16* out) {
  constexpr int LOADS = 8 / TILES, UNITS = TILES / 2;
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
#pragma unroll
  for (int load = 0; load < LOADS; load++) {
    const uint4 raw = ((const uint4*)(page + VALUE_CODES))[(part * LOADS + load) * 32 + lane];
    const uint32_t words[4] = {movmatrix(raw.x), movmatrix(raw.y), movmatrix(raw.z), movmatrix(raw.w)};  // to (token, channels)
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      const int unit = 4 * part + load * UNITS + u, step = unit / CHUNKS, chunk = unit % CHUNKS;
      const int at = (step * 4 + r / 2) * VALUE_GROUPS + value_group_place(chunk * 32 / VALUE_GROUP);  // [half][2 tokens] each
      const uint2 steps = ((const uint2*)(page + VALUE_STEP))[at], minima = SYMMETRIC ? steps : ((const uint2*)(page + VALUE_MIN))[at];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const float width = half_of(i ? steps.y : steps.x, r % 2), minimum = half_of(i ? minima.y : minima.x, r % 2);
        Eight y;
#pragma unroll
        for (int k = 0; k < 8; k++) {
          const float code = code_at(words[2 * i + k / 2 % 2], 2 * u + k / 4, k % 2, SYMMETRIC ? TOP * 0.5f : 0.f);
          y.x[k] = SYMMETRIC ? __fmul_rn(code, width) : __fmaf_rn(code, width, minimum);
        }
        store(out + place_of(token_of(step, i, r), 4 * chunk + c), y);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(2 * HEAD_DIM, 512 / HEAD_DIM) unpack(const unsigned char* __restrict__ pages,
    const float* __restrict__ norms, const bf16* __restrict__ sink_keys, const bf16* __restrict__ sink_values, const bf16* __restrict__ window_keys,
    const bf16* __restrict__ window_values, const int* __restrict__ slots, const int* __restrict__ starts,
    const int* __restrict__ first_tiles, bf16* __restrict__ keys, bf16* __restrict__ values, int kv_heads, int page_count, int norm_stride,
    int sinks, int capacity) {
  wait_for_previous(), allow_next();
  const int sequence = blockIdx.z, head = blockIdx.y, first = blockIdx.x * PAGE_TOKENS, start = starts[sequence], packed = start - start % WINDOW;
  if (first >= start) return;
  const int slot = slots ? slots[sequence] : sequence, warp = threadIdx.x / 32;
  const size_t row = (size_t)slot * kv_heads + head;
  const size_t out = TILED ? ((size_t)(first_tiles[sequence] + first / TILE) * kv_heads + head) * (TILE_BYTES / 2) + place_of(first % TILE, 0)
                           : (((size_t)sequence * kv_heads + head) * capacity + first) * DIM;
  const bool of_window = first >= packed;  // and else a page, whose first tokens may be sinks
  if (!of_window) {
    const unsigned char* page = pages + (row * page_count + blockIdx.x) * PAGE_BYTES;
    if (warp < CHUNKS) unpack_keys(page, warp, norms + (size_t)slot * norm_stride + first, keys + out);
    else unpack_values(page, warp - CHUNKS, values + out);
  }
  const int kept = min((of_window ? start : sinks) - first, PAGE_TOKENS);
  if (kept <= 0) return;
  __syncthreads();  // sinks have codes too, which have just been written
  const size_t from = of_window ? (row * WINDOW + first - packed) * DIM : (row * sinks + first) * DIM;
  const uint4 *kept_keys = (const uint4*)((of_window ? window_keys : sink_keys) + from), *kept_values = (const uint4*)((of_window ? window_values : sink_values) + from);
#pragma unroll 1
  for (int i = threadIdx.x; i < kept * (DIM / 8); i += 2 * DIM) {
    const int to = place_of(i / (DIM / 8), i % (DIM / 8));
    *(uint4*)(keys + out + to) = kept_keys[i];
    *(uint4*)(values + out + to) = kept_values[i];
  }
}
