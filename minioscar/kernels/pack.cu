// pack.cu: quantizes full blocks of 128 tokens and packs them into pages (oscar.py, step 3; the page: LAYOUT.md).
//
//   codes, step, min of keys[t,:] / norm[t] in groups of KEY_GROUP tokens of a channel, of values[t,:] in groups of VALUE_GROUP channels
//
// pack: a sequence holds starts[s] tokens and gets counts[s] new ones; every block that is full then is packed. A token older than
//   starts[s] comes from the window, a newer one from new_keys, new_values. Without those (null) the new tokens are in the window
//   already and counts is not read but taken as 1: the decode step, which mostly finds nothing full and returns.
// fill_window: the new tokens after the last full block go to the window.
// pack: grid (pages, layers * kv_heads, sequences), HEAD_DIM / 16 warps: half of them take 64 tokens x 32 channels of keys each,
//   half as many values; a lane holds 64 numbers in registers and nothing goes through shared memory.
// reads 2 B and writes BITS / 8 B an element (and the steps); float32 in oscar.py's order, so codes, steps and minima equal its own.
// Division is a product with the reciprocal and two corrections, which gives the IEEE quotient while nothing under- or overflows.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "device.cuh"
#include "layout.cuh"

#ifndef SCALED
#define SCALED 1
#endif

typedef __nv_bfloat16 bf16;
constexpr unsigned FULL = 0xffffffffu;
constexpr int TOP = (1 << BITS) - 1;

struct Group {  // x = step * (code - centre) + minimum
  float step, reciprocal, minimum, centre;
};

// 1 / y to the last bit or next to it: what `divide` starts from.
__device__ __forceinline__ float reciprocal_of(float y) {
  const float r = rcp_approx(y);
  return __fmaf_rn(__fmaf_rn(-y, r, 1.f), r, r);
}

__device__ __forceinline__ float divide(float x, float y, float reciprocal) {
  float q = __fmul_rn(x, reciprocal);
  q = __fmaf_rn(__fmaf_rn(-y, q, x), reciprocal, q);
  return __fmaf_rn(__fmaf_rn(-y, q, x), reciprocal, q);
}

__device__ __forceinline__ float rounded_to_half(float x) { return __half2float(__float2half_rn(x)); }

__device__ __forceinline__ Group with_reciprocal(float step, float minimum, float centre) {
  return {step, step == 0.f ? 0.f : reciprocal_of(step), minimum, step == 0.f ? 0.f : centre};  // a step of 0 gives codes 0
}

__device__ __forceinline__ Group asymmetric(float low, float high, float shrink) {
  const float width = __fsub_rn(high, low), span = __fmul_rn(width, shrink);
  return with_reciprocal(rounded_to_half(divide(span, (float)TOP, 1.f / TOP)), rounded_to_half(__fadd_rn(low, __fmul_rn(__fsub_rn(width, span), 0.5f))), 0.f);
}

__device__ __forceinline__ Group symmetric(float largest, float factor) {
  return with_reciprocal(rounded_to_half(__fmul_rn(largest, factor)), 0.f, TOP * 0.5f);
}

__device__ __forceinline__ uint32_t code(float x, const Group& g) {
  const float y = __fadd_rn(divide(__fsub_rn(x, g.minimum), g.step, g.reciprocal), g.centre);
  return __float_as_uint(__fadd_rn(fminf(fmaxf(y, 0.f), (float)TOP), 8388608.f)) & TOP;  // 2^23 + y rounds y to even
}

__device__ __forceinline__ uint16_t half_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }

// The 8 numbers that a lane owns of one token and chunk.
struct Row { float x[8]; };
__device__ __forceinline__ Row unpack(uint4 raw) {
  Row row;
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) row.x[2 * i] = __uint_as_float(words[i] << 16), row.x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  return row;
}

// Where the tokens of one page come from and go to, for one kv head.
struct Source {
  const bf16 *window_keys, *window_values, *new_keys, *new_values;  // row of token `base`'s window slot 0; new: row of token `start`
  int base, start, key_stride, value_stride;
  __device__ __forceinline__ const bf16* key(int t) const {
    return t < start ? window_keys + (t - base) * DIM : new_keys + (size_t)(t - start) * key_stride;
  }
  __device__ __forceinline__ const bf16* value(int t) const {
    return t < start ? window_values + (t - base) * DIM : new_values + (size_t)(t - start) * value_stride;
  }
};

// 64 tokens x 32 channels (chunk) of keys; norms: of the page's tokens; sink: row of the page's first token, its first `kept` tokens stay.
__device__ __forceinline__ void pack_keys(const Source& from, int first, int chunk, const float* norms, float shrink, unsigned char* page, bf16* sink, int kept) {
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  uint4 raw[8];
  float norm[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    raw[i] = *(const uint4*)(from.key(first + 8 * i + r) + 32 * chunk + 8 * c);
    norm[i] = SCALED ? norms[8 * i + r] : 1.f;
  }
  Row rows[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (8 * i + r < kept) *(uint4*)(sink + (8 * i + r) * DIM + 32 * chunk + 8 * c) = raw[i];
    rows[i] = unpack(raw[i]);
    if (SCALED) {
      const float reciprocal = reciprocal_of(norm[i]);
#pragma unroll
      for (int k = 0; k < 8; k++) rows[i].x[k] = divide(rows[i].x[k], norm[i], reciprocal);
    }
  }
  uint32_t words[TILES == 8 ? 1 : 2][4] = {};
#pragma unroll
  for (int g = 0; g < KEY_GROUPS; g++) {
    constexpr int N = 8 / KEY_GROUPS;  // of a lane's 8 tokens
#pragma unroll
    for (int k = 0; k < 8; k++) {
      float low = rows[N * g].x[k], high = low;
#pragma unroll
      for (int i = 1; i < N; i++) low = fminf(low, rows[N * g + i].x[k]), high = fmaxf(high, rows[N * g + i].x[k]);
#pragma unroll
      for (int other = 4; other < 32; other *= 2) {
        low = fminf(low, __shfl_xor_sync(FULL, low, other));
        high = fmaxf(high, __shfl_xor_sync(FULL, high, other));
      }
      const Group group = asymmetric(low, high, shrink);
      const int at = (((chunk * 4 + c) * 2 + k / 4) * KEY_GROUPS + g) * 4 + k % 4;
      if (r == 0) ((uint16_t*)(page + KEY_STEP))[at] = half_bits(group.step);
      if (r == 1) ((uint16_t*)(page + KEY_MIN))[at] = half_bits(group.minimum);
#pragma unroll
      for (int i = N * g; i < N * g + N; i++) {
        const int tile = key_tile(i / 2, k / 4), word = k / 2 % 2 * 2 + i % 2;  // token 16 * (i/2) + 8 * (i%2) + r
        words[tile / TILES % (8 / TILES)][word] |= code(rows[i].x[k], group) << (16 * (k % 2) + tile % TILES * BITS);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 8 / TILES; i++)
    ((uint4*)page)[(chunk * (8 / TILES) + i) * 32 + lane] = make_uint4(words[i][0], words[i][1], words[i][2], words[i][3]);
}

// Value tiles 8 * part ... 8 * part + 7: four times 16 tokens x 32 channels.
__device__ __forceinline__ void pack_values(const Source& from, int first, int part, float shrink, float factor, unsigned char* page, bf16* sink, int kept) {
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  uint4 raw[4][2];
#pragma unroll
  for (int u = 0; u < 4; u++)
#pragma unroll
    for (int i = 0; i < 2; i++)
      raw[u][i] = *(const uint4*)(from.value(first + (4 * part + u) / CHUNKS * 16 + 8 * i + r) + (4 * part + u) % CHUNKS * 32 + 8 * c);
#pragma unroll
  for (int load = 0; load < 8 / TILES; load++) {
    constexpr int UNITS = TILES / 2;
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      Row rows[UNITS];
      float low[UNITS], high[UNITS];
#pragma unroll
      for (int u = 0; u < UNITS; u++) {
        rows[u] = unpack(raw[load * UNITS + u][i]);
        low[u] = SYMMETRIC ? 0.f : rows[u].x[0], high[u] = SYMMETRIC ? 0.f : rows[u].x[0];  // symmetric: high = max |x|
#pragma unroll
        for (int k = 0; k < 8; k++) {
          if (!SYMMETRIC) low[u] = fminf(low[u], rows[u].x[k]);
          high[u] = fmaxf(high[u], SYMMETRIC ? fabsf(rows[u].x[k]) : rows[u].x[k]);
        }
#pragma unroll
        for (int other = 1; other < 4; other *= 2) {
          if (!SYMMETRIC) low[u] = fminf(low[u], __shfl_xor_sync(FULL, low[u], other));
          high[u] = fmaxf(high[u], __shfl_xor_sync(FULL, high[u], other));
        }
      }
#pragma unroll
      for (int u = 0; u < UNITS; u++) {
        const int pair = VALUE_GROUP == 64 ? u ^ 1 : u;
        const float l = fminf(low[u], low[pair]), h = fmaxf(high[u], high[pair]);
        const Group group = SYMMETRIC ? symmetric(h, factor) : asymmetric(l, h, shrink);
        const int unit = 4 * part + load * UNITS + u, step = unit / CHUNKS, chunk = unit % CHUNKS, t = step * 16 + 8 * i + r;
        const int at = ((step * 4 + r / 2) * VALUE_GROUPS + chunk * 32 / VALUE_GROUP) * 4 + 2 * i + r % 2;
        if (c == 0 && chunk * 32 % VALUE_GROUP == 0) ((uint16_t*)(page + VALUE_STEP))[at] = half_bits(group.step);
        if (c == 1 && chunk * 32 % VALUE_GROUP == 0 && !SYMMETRIC) ((uint16_t*)(page + VALUE_MIN))[at] = half_bits(group.minimum);
        if (t < kept) *(uint4*)(sink + t * DIM + 32 * chunk + 8 * c) = raw[load * UNITS + u][i];
#pragma unroll
        for (int k = 0; k < 8; k++) {  // channel 8c + k of the chunk: tile 2u + k/4, rows +8 if k/2 is odd
          const int word = 2 * i + k / 2 % 2, shift = 16 * (k % 2) + (2 * u + k / 4) * BITS;
          words[word] |= code(rows[u].x[k], group) << shift;
        }
      }
    }
#pragma unroll
    for (int w = 0; w < 4; w++) words[w] = movmatrix(words[w]);  // from (token, channels) to (channel, tokens)
    ((uint4*)(page + VALUE_CODES))[(part * (8 / TILES) + load) * 32 + lane] = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

extern "C" __global__ void __launch_bounds__(HEAD_DIM * 2, HEAD_DIM > 128 ? 1 : 256 / HEAD_DIM)
pack(const bf16* __restrict__ new_keys, const bf16* __restrict__ new_values, const int* __restrict__ first_rows, const int* __restrict__ slots,
     const int* __restrict__ starts, const int* __restrict__ counts, const bf16* __restrict__ window_keys, const bf16* __restrict__ window_values,
     bf16* __restrict__ sink_keys, bf16* __restrict__ sink_values, const float* __restrict__ norms, unsigned char* __restrict__ pages,
     int key_stride, int value_stride, int batch, int kv_heads, int norm_stride, int page_capacity, int sinks, float shrink, float factor) {
  const int s = blockIdx.z, layer = blockIdx.y / kv_heads, head = blockIdx.y % kv_heads, warp = threadIdx.x / 32;
  const int start = starts[s], count = new_keys ? counts[s] : 1, base = start / WINDOW * WINDOW;
  if (start < 0 || (int)blockIdx.x >= (start - base + count) / WINDOW * (WINDOW / PAGE_TOKENS)) return;
  const size_t row = (size_t)layer * batch + (slots ? slots[s] : s), cell = row * kv_heads + head;
  const int first = base + blockIdx.x * PAGE_TOKENS, kept = sinks - first;  // tokens of this page that are sinks, if positive
  const size_t fresh = new_keys ? first_rows[s] : 0;
  const Source from = {window_keys + cell * WINDOW * DIM, window_values + cell * WINDOW * DIM, new_keys + fresh * key_stride + head * DIM,
                       new_values + fresh * value_stride + head * DIM, base, new_keys ? start : first + PAGE_TOKENS, key_stride, value_stride};
  unsigned char* page = pages + (cell * page_capacity + first / PAGE_TOKENS) * PAGE_BYTES;
  const size_t sink = (cell * sinks + first) * DIM;
  if (warp < CHUNKS) pack_keys(from, first, warp, norms + row * norm_stride + first, shrink, page, sink_keys + sink, kept);
  else pack_values(from, first, warp - CHUNKS, shrink, factor, page, sink_values + sink, kept);
}

// grid (kv_heads, sequences)
extern "C" __global__ void fill_window(const bf16* __restrict__ new_keys, const bf16* __restrict__ new_values, const int* __restrict__ first_rows,
                                       const int* __restrict__ slots, const int* __restrict__ starts, const int* __restrict__ counts,
                                       bf16* __restrict__ window_keys, bf16* __restrict__ window_values, int key_stride, int value_stride, int kv_heads) {
  const int s = blockIdx.y, head = blockIdx.x, start = starts[s], end = start + counts[s], first = max(start, end / WINDOW * WINDOW);
  const size_t cell = ((size_t)(slots ? slots[s] : s) * kv_heads + head) * WINDOW;
  for (int i = threadIdx.x; i < (end - first) * (DIM / 8); i += blockDim.x) {
    const int t = first + i / (DIM / 8), at = i % (DIM / 8);
    const size_t row = (size_t)first_rows[s] + t - start, to = (cell + t % WINDOW) * DIM;
    ((uint4*)(window_keys + to))[at] = ((const uint4*)(new_keys + row * key_stride + head * DIM))[at];
    ((uint4*)(window_values + to))[at] = ((const uint4*)(new_values + row * value_stride + head * DIM))[at];
  }
}
