// unpack.cu: the past of sequences back to BF16, for a prefill that continues it. The inverse of pack.cu.
//
//   keys[t] = (step * code + min) * norm[t]; values[t] = step * code + min, symmetric: step * (code - VALUE_CENTRE);
//   sinks and window as they are
//
// Float32 in oscar.py's order, rounded to BF16 once: its numbers bit for bit, rounded. (step * code is exact, 11 bits
// times at most 4, so that a fused multiply-add rounds as oscar.py's sum does.)
// Sequence s: tokens 0 ... starts[s] - 1 of row slots[s] of the cache, the first packed[s] of them packed (no array:
// packed_tokens(starts[s])) -> keys, values
// [s][kv_heads][capacity][HEAD_DIM], as prefill_attention.cu reads them, or, if TILED, the tiles of sm90/tile.cuh from
// number first_tiles[s] on, for sm90/prefill_attention.cu.
// grid (pages, kv_heads, sequences), 2 * HEAD_DIM threads: a warp has 64 tokens x 32 channels of keys, or 8 tiles of
// values, as in pack.cu. A lane loads its words once (LAYOUT.md), has 8 neighbouring channels of 8 (token, chunk) pairs
// in them, and stores 16 bytes of each: with its three neighbours a run of 64. reads the codes' bits and the
// steps, and writes 2 B an element.
#include <cuda_fp16.h>
#include "layout.cuh"
#include "sm90/tile.cuh"

constexpr float VALUE_CENTRE = ((1 << VALUE_BITS) - 1) * 0.5f;

// The upper or lower half of a word.
DEVICE float half_of(uint32_t word, int upper) {
  return __half2float(__ushort_as_half((unsigned short)(word >> (16 * upper))));
}

struct Channels { float x[8]; };
DEVICE Channels halves(uint4 raw) {
  Channels y;
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  UNROLL for (int i = 0; i < 8; i++) y.x[i] = half_of(words[i / 2], i % 2);
  return y;
}
// The code in bit slot `slot` of the upper or lower half of a word, minus `from` (a multiple of 1/2). The code is not
// shifted: it stays in place, in the mantissa of the power of two that makes it count as a whole number.
template <int BITS> DEVICE float code_at(uint32_t word, int slot, bool upper, float from) {
  const int bit = slot_bit(BITS, slot) + 1, mask = (1 << BITS) - 1;  // one to the left, so that 1/2 has a bit too
  const uint32_t power = (127 + 23 - bit) << 23;
  return __fsub_rn(__uint_as_float(((upper ? word >> 15 : word << 1) & mask << bit) | power),
                   __uint_as_float(power) + from);
}

DEVICE void store(bf16* to, const Channels& y) {
  auto pair = [&](int i) { return pack_bf16x2(y.x[2 * i], y.x[2 * i + 1]); };
  __stcg((uint4*)to, make_uint4(pair(0), pair(1), pair(2), pair(3)));
}

// Offset of 8 channels, vector `vector` of a token, in numbers from the page's first.
DEVICE int vector_offset(int token, int vector) {
  return TILED ? swizzled_offset(token, vector) / 2 : token * DIM + vector * 8;
}

// Unpacks 64 tokens x 32 channels (chunk) of page `index`. norms, out: of the page's first token.
DEVICE void unpack_keys(const unsigned char* page, int index, int chunk, const float* norms, bf16* out) {
  constexpr int N = 8 / KEY_GROUPS;  // N of a lane's 8 tokens are of one group
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const OctetWords<KEY_BITS> words = load_codes<KEY_BITS>(page, chunk);
  const uint4 *steps = (const uint4*)(page + key_step(index)), *minima = (const uint4*)(page + key_min(index));
  float norm[8];
  if (SCALED) {
    UNROLL for (int i = 0; i < 2; i++) {
      const float4 n = *(const float4*)(norms + 32 * i + 4 * r);
      const float four[4] = {n.x, n.y, n.z, n.w};
      UNROLL for (int j = 0; j < 4; j++) norm[4 * i + j] = four[j];
    }
  }
  Channels minima_of[2];  // one group: all in the first; two: one for each k step, [pair][group][2 channels]
  UNROLL for (int i = 0; i < KEY_GROUPS; i++) minima_of[i] = halves(minima[(chunk * KEY_GROUPS + i) * 4 + c]);
  UNROLL for (int g = 0; g < KEY_GROUPS; g++) {
    const Channels step = halves(steps[(chunk * KEY_GROUPS + g) * 4 + c]);
    UNROLL for (int i = N * g; i < N * (g + 1); i++) {
      const int token = token_of(i / 2, i % 2, r);
      Channels y;
      UNROLL for (int k = 0; k < 8; k++) {
        const int tile = key_tile(i / 2, k / 4), pair = k / 2 % 2;
        const float minimum = KEY_GROUPS == 2 ? minima_of[k / 4].x[pair * 4 + g * 2 + k % 2]
                                              : minima_of[0].x[pair * 4 + k / 4 * 2 + k % 2];
        const uint32_t word = words.w[tile / KEY_TILES][2 * pair + i % 2];
        const float code = code_at<KEY_BITS>(word, tile % KEY_TILES, k % 2, 0.f);
        y.x[k] = __fmaf_rn(code, step.x[k], minimum);
        if (SCALED) y.x[k] = __fmul_rn(y.x[k], norm[i]);
      }
      store(out + vector_offset(token, 4 * chunk + c), y);
    }
  }
}

// Unpacks value tiles 8 * octet ... 8 * octet + 7: four times 16 tokens x 32 channels.
DEVICE void unpack_values(const unsigned char* page, int octet, bf16* out) {
  constexpr int LOADS = 8 / VALUE_TILES, LOAD_CHUNKS = VALUE_TILES / 2;
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const OctetWords<VALUE_BITS> raw = load_codes<VALUE_BITS>(page + VALUE_CODES, octet);
  UNROLL for (int load = 0; load < LOADS; load++) {
    uint32_t words[4];  // to (token, channels)
    UNROLL for (int w = 0; w < 4; w++) words[w] = movmatrix(raw.w[load][w]);
    UNROLL for (int u = 0; u < LOAD_CHUNKS; u++) {
      const int index = 4 * octet + load * LOAD_CHUNKS + u, step = index / CHUNKS, chunk = index % CHUNKS;
      // [half][2 tokens] each
      const int at = (step * 4 + r / 2) * VALUE_GROUPS + value_group_slot(chunk * 32 / VALUE_GROUP);
      const uint2 steps = ((const uint2*)(page + VALUE_STEP))[at];
      const uint2 minima = SYMMETRIC ? steps : ((const uint2*)(page + VALUE_MIN))[at];
      UNROLL for (int i = 0; i < 2; i++) {
        const float width = half_of(i ? steps.y : steps.x, r % 2), minimum = half_of(i ? minima.y : minima.x, r % 2);
        Channels y;
        UNROLL for (int k = 0; k < 8; k++) {
          const float centre = SYMMETRIC ? VALUE_CENTRE : 0.f;
          const float code = code_at<VALUE_BITS>(words[2 * i + k / 2 % 2], 2 * u + k / 4, k % 2, centre);
          y.x[k] = SYMMETRIC ? __fmul_rn(code, width) : __fmaf_rn(code, width, minimum);
        }
        store(out + vector_offset(token_of(step, i, r), 4 * chunk + c), y);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(2 * HEAD_DIM, 512 / HEAD_DIM)
    unpack(const unsigned char* __restrict__ pages, const float* __restrict__ norms, const int* __restrict__ table,
           const bf16* __restrict__ sink_keys, const bf16* __restrict__ sink_values,
           const bf16* __restrict__ window_keys, const bf16* __restrict__ window_values, const int* __restrict__ slots,
           const int* __restrict__ starts, const int* __restrict__ packed, const int* __restrict__ first_tiles,
           bf16* __restrict__ keys, bf16* __restrict__ values, int kv_heads, int table_stride, int sinks,
           int capacity) {
  wait_then_allow_next();
  const int sequence = blockIdx.z, head = blockIdx.y, first = blockIdx.x * PAGE_TOKENS;
  const int start = starts[sequence], end = packed ? packed[sequence] : packed_tokens(start);
  if (first >= start) return;
  const int slot = slots ? slots[sequence] : sequence, warp = threadIdx.x / 32;
  const size_t row = (size_t)slot * kv_heads + head;
  const size_t out = TILED ? ((size_t)(first_tiles[sequence] + first / TILE) * kv_heads + head) * (TILE_BYTES / 2) +
                                 vector_offset(first % TILE, 0)
                           : (((size_t)sequence * kv_heads + head) * capacity + first) * DIM;
  const bool of_window = first >= end;  // else a page, whose first tokens may be sinks
  if (!of_window) {
    const int index = blockIdx.x, block = Table{table, table_stride}.block_of(slot, index);
    const unsigned char* page = pages + page_offset(block, kv_heads, head, index);
    if (warp < CHUNKS) unpack_keys(page, index, warp, norms + norm_offset(block, index), keys + out);
    else unpack_values(page, warp - CHUNKS, values + out);
  }
  const int copied = min((of_window ? start : sinks) - first, PAGE_TOKENS);
  if (copied <= 0) return;
  __syncthreads();  // sinks have codes too, which have just been written
  const size_t from = of_window ? (row * RING + first % RING) * DIM : (row * sinks + first) * DIM;
  const uint4* plain_keys = (const uint4*)((of_window ? window_keys : sink_keys) + from);
  const uint4* plain_values = (const uint4*)((of_window ? window_values : sink_values) + from);
#pragma unroll 1
  for (int i = threadIdx.x; i < copied * (DIM / 8); i += 2 * DIM) {
    const int to = vector_offset(i / (DIM / 8), i % (DIM / 8));
    *(uint4*)(keys + out + to) = plain_keys[i];
    *(uint4*)(values + out + to) = plain_values[i];
  }
}
