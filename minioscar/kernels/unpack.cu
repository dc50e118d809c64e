// unpack.cu: the past of sequences in BF16, for a prefill that goes on over it (prefill_attention.cu). The inverse of pack.cu.
//
//   keys[t] = (step * code + min) * norm[t]; values[t] = step * code + min, symmetric: step * (code - TOP / 2); sinks and window as they are
//
// Float32 in oscar.py's order, rounded to BF16 once: bit for bit its numbers, rounded.
// Sequence s: tokens 0 ... starts[s] - 1 of row slots[s] of the cache -> keys, values [s][kv_heads][capacity][HEAD_DIM].
// grid (pages, kv_heads, sequences), 256 threads, 8 channels of a token a thread and round. Reads BITS / 8 B and writes 2 B an element.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "device.cuh"
#include "layout.cuh"

typedef __nv_bfloat16 bf16;
constexpr int TOP = (1 << BITS) - 1, PIECES = DIM / 8;  // of 16 bytes in a token's keys

// Where a token stands among the rows of its page's token tiles: the inverse of token_of.
struct Row {
  int tile, half, r;
  __device__ __forceinline__ explicit Row(int token) : tile(token / 32 * 2 + token % 4 / 2), half(token % 2), r(token % 32 / 4) {}
};

__device__ __forceinline__ float half_at(const unsigned char* page, int byte, int i) { return __half2float(((const __half*)(page + byte))[i]); }

// The code in half `upper` of word `word` of a lane, of MMA tile `tile`.
__device__ __forceinline__ float code_at(const unsigned char* codes, int tile, int lane, int word, int upper) {
  const uint32_t w = ((const uint32_t*)codes)[(tile / TILES * 32 + lane) * 4 + word];
  return (float)(w >> (16 * upper + tile % TILES * BITS) & TOP);
}

// Channels 8 * piece + k of a token's key, divided by its norm; of its value. LAYOUT.md has the places.
__device__ __forceinline__ float key_at(const unsigned char* page, int token, int piece, int k) {
  const Row row(token);
  const int chunk = piece / 4, c = piece % 4, group = token / KEY_GROUP, step = k / 4, pair = k / 2 % 2;
  const float code = code_at(page, key_tile(row.tile, 2 * chunk + step), 4 * row.r + c, 2 * pair + row.half, k % 2);
  const int at = KEY_GROUPS == 2 ? (((chunk * 2 + step) * 4 + c) * 2 + pair) * 2 + group : ((chunk * 4 + c) * 2 + pair) * 2 + step;
  const float width = half_at(page, KEY_STEP, ((chunk * KEY_GROUPS + group) * 4 + c) * 8 + k);
  return __fadd_rn(__fmul_rn(code, width), half_at(page, KEY_MIN, 2 * at + k % 2));
}
__device__ __forceinline__ float value_at(const unsigned char* page, int token, int piece, int k) {
  const Row row(token);
  const int chunk = piece / 4, lane = (2 * (piece % 4) + k % 2) * 4 + row.r / 2;
  const float code = code_at(page + VALUE_CODES, value_tile(row.tile, 2 * chunk + k / 4), lane, 2 * row.half + k / 2 % 2, row.r % 2);
  const int place = value_group_place((8 * piece + k) / VALUE_GROUP);
  const int at = (((row.tile * 4 + row.r / 2) * VALUE_GROUPS + place) * 2 + row.half) * 2 + row.r % 2;
  const float width = half_at(page, VALUE_STEP, at);
  if (SYMMETRIC) return __fmul_rn(__fsub_rn(code, TOP * 0.5f), width);
  return __fadd_rn(__fmul_rn(code, width), half_at(page, VALUE_MIN, at));
}

extern "C" __global__ void __launch_bounds__(256) unpack(const unsigned char* pages, const float* norms, const bf16* sink_keys,
    const bf16* sink_values, const bf16* window_keys, const bf16* window_values, const int* slots, const int* starts, bf16* keys,
    bf16* values, int kv_heads, int page_count, int norm_stride, int sinks, int capacity) {
  wait_for_previous(), allow_next();
  const int sequence = blockIdx.z, head = blockIdx.y, first = blockIdx.x * PAGE_TOKENS, start = starts[sequence];
  const size_t row = (size_t)(slots ? slots[sequence] : sequence) * kv_heads + head, out_row = (size_t)sequence * kv_heads + head;
  const int packed = start - start % WINDOW;
  const unsigned char* page = pages + (row * page_count + blockIdx.x) * PAGE_BYTES;
  for (int i = threadIdx.x; i < 2 * PAGE_TOKENS * PIECES; i += 256) {
    const bool is_key = i < PAGE_TOKENS * PIECES;
    const int token = i / PIECES % PAGE_TOKENS, piece = i % PIECES, t = first + token;
    if (t >= start) continue;
    uint4 y;
    if (t >= packed || t < sinks) {
      const bf16* kept = t < packed ? (is_key ? sink_keys : sink_values) + (row * sinks + t) * DIM
                                    : (is_key ? window_keys : window_values) + (row * WINDOW + t - packed) * DIM;
      y = *(const uint4*)(kept + 8 * piece);
    } else {
      float x[8];
      const float norm = is_key && SCALED ? norms[(size_t)(row / kv_heads) * norm_stride + t] : 1.f;
#pragma unroll
      for (int k = 0; k < 8; k++) x[k] = is_key ? __fmul_rn(key_at(page, token, piece, k), norm) : value_at(page, token, piece, k);
      y = make_uint4(pack_bf16x2(x[0], x[1]), pack_bf16x2(x[2], x[3]), pack_bf16x2(x[4], x[5]), pack_bf16x2(x[6], x[7]));
    }
    *(uint4*)((is_key ? keys : values) + (out_row * capacity + t) * DIM + 8 * piece) = y;
  }
}
