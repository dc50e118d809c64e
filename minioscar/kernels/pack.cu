// pack.cu: quantizes tokens, FLUSH at a time, and packs them into pages (oscar.py, step 3; the page: LAYOUT.md).
//
//   codes, step, min of keys[t,:] / norm[t] in groups of KEY_GROUP tokens of a channel,
//   and of values[t,:] in groups of VALUE_GROUP channels of a token; DITHERED: plus an offset where they repeat
//
// pack: a sequence holds starts[s] tokens, packed[s] of them packed (no array: packed_tokens(starts[s])), and gets
// counts[s] new ones; packs what packed_tokens says of all. A token older than starts[s] comes from the window, a newer
// one from new_keys, new_values. grid (2 * pages, kv_heads, sequences). pack_step: after the attention of a decode
// step, whose new token, number lengths[row] of each row, is in the window already: packs the oldest tokens of full
// windows, in all layers. A block looks at all rows: one for each would be
// 55,296 blocks for 48 rows of a Qwen3-8B, 68 us to find nothing. grid (2 * pages of FLUSH, layers * kv_heads).
// fill_window: the new tokens that are not packed go to the window. grid (kv_heads, sequences). Blocks of pack
// and pack_step take keys and values alternately; each of HEAD_DIM / 32 warps takes 64 tokens x 32 channels. A lane
// holds 64 numbers in registers; nothing goes through shared memory.
// reads 2 B and writes the codes' bits of an element (and the steps); float32 in oscar.py's order, so codes, steps and
// minima equal its own.
#include <cuda_fp16.h>
#include "layout.cuh"

DEVICE constexpr int top_code(int bits) { return (1 << bits) - 1; }

// Division of many x by one y. Gives the IEEE quotient unless something under- or overflows: with r = RN(1/y) and
// its error `low`, q = RN(x * (r + low)) is one of the two floats around x / y, and then RN(q + (x - y q) r) is the
// nearer one (Markstein, IBM J. Res. Dev. 34(1), 1990, theorem on division by the correctly rounded reciprocal).
struct Divisor {
  float y, r, low;
  DEVICE explicit Divisor(float divisor) : y(divisor), r(rcp_approx(divisor)) {
    UNROLL for (int i = 0; i < 2; i++) r = __fmaf_rn(__fmaf_rn(-y, r, 1.f), r, r);
    low = __fmul_rn(__fmaf_rn(-y, r, 1.f), r);
  }
  DEVICE float divide(float x) const {
    const float q = __fmaf_rn(x, r, __fmul_rn(x, low));
    return __fmaf_rn(__fmaf_rn(-y, q, x), r, q);
  }
};

DEVICE float rounded_to_half(float x) { return __half2float(__float2half_rn(x)); }
DEVICE uint16_t half_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }

// Stored parameters of a group: x = step * code + minimum or, symmetric, step * (code - top_code / 2).
struct GroupParams { float step, minimum; };

template <int BITS> DEVICE GroupParams asymmetric(float low, float high, float shrink) {
  const float width = __fsub_rn(high, low), span = __fmul_rn(width, shrink);
  return {rounded_to_half(Divisor((float)top_code(BITS)).divide(span)),
          rounded_to_half(__fadd_rn(low, __fmul_rn(__fsub_rn(width, span), 0.5f)))};
}
DEVICE GroupParams symmetric(float largest, float factor) { return {rounded_to_half(__fmul_rn(largest, factor)), 0.f}; }

constexpr float CODE_BIAS = 8388608.f;  // 2^23: adding it rounds to a whole number, ties to even

// Codes of the numbers of a group: round((x - minimum) / step), or round(x / step + TOP / 2), clipped; a step of 0
// gives codes 0. For 2 bits, comparisons replace the division and decide exactly as it does, all roundings included:
// float32 numbers next to step / 2, 3 step / 2, 5 step / 2 (exact: a step has 11 bits) differ from these by more than
// 2^-24 of them, so the quotient's distance to 1/2, 3/2, 5/2 survives its rounding; a quotient equal to them rounds
// to even, hence >, >=, >. Symmetric, x has 8 bits and a step 11, so that x / step is +-1 or at least 2^-11 away from
// it; and x / step + 3/2 rounds up to 3/2 from -2^-24 on. The upper two codes are compared after subtracting 2 step,
// which is exact where it matters. An offset (DITHERED), an odd number of sixteenths, is added to TOP / 2; then the
// edges of codes are exact, and x / step is one of them or at least 2^-15 away.
template <int BITS, bool CENTRED> struct Coder {
  static constexpr int TOP = top_code(BITS);
  float minimum, step, offset, low, middle;
  Divisor divisor;
  DEVICE explicit Coder(const GroupParams& g, float offset = 0.f)
      : minimum(g.minimum), step(g.step), offset(offset), divisor(g.step == 0.f ? 1.f : g.step) {
    low = CENTRED ? (-1.f - offset) * step : 0.5f * step;
    middle = CENTRED ? (offset == 0.f ? -5.9604645e-8f : -offset) * step : 1.5f * step;
    if (step == 0.f) low = middle = __uint_as_float(0x7f800000u);
  }
  DEVICE void put(float x, int shift, float& half) const {
    const float weight = (float)(1 << shift);
    float d = CENTRED ? x : __fsub_rn(x, minimum);
    if (BITS == 2) {
      const float upper = set_ge(d, middle);
      half = __fmaf_rn(upper, 2.f * weight, half);
      half = __fmaf_rn(set_gt(__fmaf_rn(upper, -2.f * step, d), low), weight, half);
    } else {
      const float y = __fadd_rn(divisor.divide(d), CENTRED ? TOP * 0.5f + offset : 0.f);
      const float code = __fsub_rn(__fadd_rn(fminf(fmaxf(y, 0.f), (float)TOP), CODE_BIAS), CODE_BIAS);
      half = __fmaf_rn(step == 0.f ? 0.f : code, weight, half);
    }
  }
  // x - (what its code reads back as).
  DEVICE float error(float x) const {
    float code = 0.f;
    put(x, 0, code);
    return __fsub_rn(x, __fmaf_rn(code, step, minimum));
  }
};

// A word of codes, gathered as two float32 numbers of 16 bits above 2^23: sums of codes are exact, and their bits are
// those of the word. No initializers: nvcc 13.0 forgets them in arrays of arrays.
struct Word {
  float halves[2];
  DEVICE void clear() { halves[0] = halves[1] = CODE_BIAS; }
  DEVICE uint32_t bits() const { return __byte_perm(__float_as_uint(halves[0]), __float_as_uint(halves[1]), 0x5410); }
};

// The 8 numbers that a lane owns of one token and chunk.
struct Row { float x[8]; };
DEVICE Row unpack(uint4 raw) {
  Row row;
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  UNROLL for (int i = 0; i < 4; i++) {
    row.x[2 * i] = low(words[i]);
    row.x[2 * i + 1] = high(words[i]);
  }
  return row;
}

// Offset of dither.py for the token in row r, half i of token step `step` (token_of).
DEVICE float dither_offset(int step, int i, int r) {
  return 0.125f * (float)(4 * i + step % 2 * 2 + r % 2) - 0.4375f;  // the lowest three bits of the token, reversed
}
// The largest |a - b| of a pair of tokens, in a chunk of 32 channels.
DEVICE float pair_distance(const Row& a, const Row& b) {
  float largest = 0.f;
  UNROLL for (int k = 0; k < 8; k++) largest = fmaxf(largest, fabsf(__fsub_rn(a.x[k], b.x[k])));
  UNROLL for (int other = 1; other < 4; other *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(FULL_MASK, largest, other));
  return largest;
}

// Lane r gets the largest of channel k = r over all lanes, negated first if `negate`: in each round a lane sends half
// of its numbers to a partner.
DEVICE float channel_max(Row row, bool negate) {
  const int r = threadIdx.x % 32 / 4;
  if (negate) {
    UNROLL for (int k = 0; k < 8; k++) row.x[k] = -row.x[k];
  }
  UNROLL for (int half = 4; half; half /= 2)
    UNROLL for (int k = 0; k < half; k++) {
      const float sent = r & half ? row.x[k] : row.x[k + half], kept = r & half ? row.x[k + half] : row.x[k];
      row.x[k] = fmaxf(kept, __shfl_xor_sync(FULL_MASK, sent, 4 * half));
    }
  return row.x[0];
}

// Keys or values of one kv head: the window holds the tokens before `start`, token t of a page in slot t - base,
// `recent` the rest.
struct Source {
  const bf16 *window, *recent;
  int base, start, stride;
  // 16 bytes at `at` of N tokens first + token(i), of one page.
  template <int N, class Token> DEVICE void load(uint4 (&raw)[N], int first, int at, Token token) const {
    if (first >= start) {
      const bf16* from = recent + (size_t)(first - start) * stride + at;
      UNROLL for (int i = 0; i < N; i++) raw[i] = *(const uint4*)(from + (size_t)token(i) * stride);
    } else {
      UNROLL for (int i = 0; i < N; i++) {
        const int t = first + token(i);
        raw[i] = *(const uint4*)((t < start ? window + (t - base) * DIM : recent + (size_t)(t - start) * stride) + at);
      }
    }
  }
};

// Keys of a page's tokens, a lane's 8 numbers of each of 8, divided by the norms.
DEVICE void scaled_keys(Row (&rows)[8], const uint4 (&raw)[8], const float* norms) {
  const int r = threadIdx.x % 32 / 4;
  UNROLL for (int i = 0; i < 8; i++) {
    rows[i] = unpack(raw[i]);
    if (SCALED) {
      const Divisor divisor(norms[token_of(i / 2, i % 2, r)]);
      UNROLL for (int k = 0; k < 8; k++) rows[i].x[k] = divisor.divide(rows[i].x[k]);
    }
  }
}

// Widens low and high, one number a channel, to N rows from `first` on.
template <int N> DEVICE void widen(Row& low, Row& high, const Row (&rows)[8], int first) {
  UNROLL for (int i = first; i < first + N; i++)
    UNROLL for (int k = 0; k < 8; k++) {
      low.x[k] = fminf(low.x[k], rows[i].x[k]);
      high.x[k] = fmaxf(high.x[k], rows[i].x[k]);
    }
}

#include "error_feedback.cuh"

// Packs 64 tokens x 32 channels (chunk) of keys. norms: of the page's tokens; sink: row of the page's first token, of
// which the first `num_sinks` tokens are stored in BF16 too. feedback [DIM][DIM]: of the kv head, if SHAPED.
DEVICE void pack_keys(const Source& from, int first, int chunk, const float* norms, float shrink, const float* feedback,
                      unsigned char* page, bf16* sink, int num_sinks) {
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, at = 32 * chunk + 8 * c;
  uint4 raw[8];
  from.load(raw, first, at, [=](int i) { return token_of(i / 2, i % 2, r); });
  if (num_sinks > 0) {
    UNROLL for (int i = 0; i < 8; i++)
      if (token_of(i / 2, i % 2, r) < num_sinks) *(uint4*)(sink + token_of(i / 2, i % 2, r) * DIM + at) = raw[i];
  }
  Row rows[8], other_low, other_high;  // other: of the page that shares this one's groups
  if (PAIRED) {
    const int other = first ^ PAGE_TOKENS;
    uint4 raw_other[8];
    from.load(raw_other, other, at, [=](int i) { return token_of(i / 2, i % 2, r); });
    scaled_keys(rows, raw_other, norms + (other - first));
    other_low = other_high = rows[0];
    widen<7>(other_low, other_high, rows, 1);
  }
  scaled_keys(rows, raw, norms);
  Word words[8 / KEY_TILES][4];
  UNROLL for (int i = 0; i < 8 / KEY_TILES; i++)
    UNROLL for (int w = 0; w < 4; w++) words[i][w].clear();
  constexpr int N = 8 / KEY_GROUPS;  // of a lane's 8 tokens
  GroupParams params[KEY_GROUPS];    // of channel r of the lane's 8
  auto choose_params = [&](int g) {
    Row low = rows[N * g], high = rows[N * g];
    widen<N - 1>(low, high, rows, N * g + 1);
    if (PAIRED) {
      UNROLL for (int k = 0; k < 8; k++) {
        low.x[k] = fminf(low.x[k], other_low.x[k]);
        high.x[k] = fmaxf(high.x[k], other_high.x[k]);
      }
    }
    params[g] = asymmetric<KEY_BITS>(-channel_max(low, true), channel_max(high, false), shrink);
    // Two groups: a word of minima for each (k step, half of it, group); one group: for each (half, k step).
    const int two = ((chunk * 2 + r / 4) * 4 + c) * 8 + r % 4 / 2 * 4 + g * 2 + r % 2;
    const int one = (chunk * 4 + c) * 8 + r % 4 / 2 * 4 + r / 4 * 2 + r % 2;
    const int index = first / PAGE_TOKENS;
    if (!PAIRED || index % 2 == 0) {  // what two pages share the first one writes
      ((uint16_t*)(page + key_step(index)))[((chunk * KEY_GROUPS + g) * 4 + c) * 8 + r] = half_bits(params[g].step);
      ((uint16_t*)(page + key_min(index)))[KEY_GROUPS == 2 ? two : one] = half_bits(params[g].minimum);
    }
  };
  auto put_codes = [&](int g) {
    UNROLL for (int k = 0; k < 8; k++) {
      const float step = __shfl_sync(FULL_MASK, params[g].step, 4 * k + c);
      const Coder<KEY_BITS, false> coder({step, __shfl_sync(FULL_MASK, params[g].minimum, 4 * k + c)});
      UNROLL for (int i = N * g; i < N * g + N; i++) {
        const int tile = key_tile(i / 2, k / 4), word = k / 2 % 2 * 2 + i % 2;
        Word& to = words[tile / KEY_TILES % (8 / KEY_TILES)][word];
        coder.put(rows[i].x[k], slot_bit(KEY_BITS, tile % KEY_TILES), to.halves[k % 2]);
      }
    }
  };
  UNROLL for (int g = 0; g < KEY_GROUPS; g++) {
    choose_params(g);
    if (!SHAPED) put_codes(g);
  }
  if (SHAPED) {
    feed_back(rows, params, chunk, feedback);
    UNROLL for (int g = 0; g < KEY_GROUPS; g++) put_codes(g);
  }
  OctetWords<KEY_BITS> codes;
  UNROLL for (int i = 0; i < 8 / KEY_TILES; i++) {
    UNROLL for (int w = 0; w < 4; w++) codes.w[i][w] = words[i][w].bits();
    store_codes<KEY_BITS>(page, chunk, i, codes);
  }
}

// Packs value tiles 8 * octet ... 8 * octet + 7: four times 16 tokens x 32 channels, 8 tokens at a time.
DEVICE void pack_values(const Source& from, int first, int octet, float factor, unsigned char* page, bf16* sink,
                        int num_sinks) {
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  uint4 raw[4][2];
  UNROLL for (int u = 0; u < 4; u++) {
    const int step = (4 * octet + u) / CHUNKS, at = (4 * octet + u) % CHUNKS * 32 + 8 * c;
    from.load(raw[u], first, at, [=](int i) { return token_of(step, i, r); });
    if (num_sinks > 0) {
      UNROLL for (int i = 0; i < 2; i++)
        if (token_of(step, i, r) < num_sinks) *(uint4*)(sink + token_of(step, i, r) * DIM + at) = raw[u][i];
    }
  }
  OctetWords<VALUE_BITS> codes;  // (channel, tokens)
  UNROLL for (int load = 0; load < 8 / VALUE_TILES; load++) {
    constexpr int LOAD_CHUNKS = VALUE_TILES / 2;
    Word words[4];
    UNROLL for (int w = 0; w < 4; w++) words[w].clear();
    float distance[LOAD_CHUNKS];
    UNROLL for (int u = 0; u < LOAD_CHUNKS; u++) {
      const uint4(&two)[2] = raw[load * LOAD_CHUNKS + u];
      distance[u] = DITHERED ? pair_distance(unpack(two[0]), unpack(two[1])) : 0.f;
    }
    UNROLL for (int i = 0; i < 2; i++) {
      Row rows[LOAD_CHUNKS];
      float low[LOAD_CHUNKS], high[LOAD_CHUNKS];
      UNROLL for (int u = 0; u < LOAD_CHUNKS; u++) {
        rows[u] = unpack(raw[load * LOAD_CHUNKS + u][i]);
        low[u] = SYMMETRIC ? 0.f : rows[u].x[0];  // symmetric: high = max |x|
        high[u] = SYMMETRIC ? 0.f : rows[u].x[0];
        UNROLL for (int k = 0; k < 8; k++) {
          if (!SYMMETRIC) low[u] = fminf(low[u], rows[u].x[k]);
          high[u] = fmaxf(high[u], SYMMETRIC ? fabsf(rows[u].x[k]) : rows[u].x[k]);
        }
        UNROLL for (int other = 1; other < 4; other *= 2) {
          if (!SYMMETRIC) low[u] = fminf(low[u], __shfl_xor_sync(FULL_MASK, low[u], other));
          high[u] = fmaxf(high[u], __shfl_xor_sync(FULL_MASK, high[u], other));
        }
      }
      UNROLL for (int u = 0; u < LOAD_CHUNKS; u++) {
        const int pair = VALUE_GROUP == 64 ? u ^ 1 : u;
        const float l = fminf(low[u], low[pair]), h = fmaxf(high[u], high[pair]);
        const int index = 4 * octet + load * LOAD_CHUNKS + u, step = index / CHUNKS, chunk = index % CHUNKS;
        const bool near = DITHERED && fmaxf(distance[u], distance[pair]) <= 0.25f * h;
        const bool repeats = DITHERED && near & __shfl_xor_sync(FULL_MASK, near, 4);  // token t ^ 4
        const float width = repeats ? 2.f / top_code(VALUE_BITS) : factor;
        const GroupParams group = SYMMETRIC ? symmetric(h, width) : asymmetric<VALUE_BITS>(l, h, factor);
        const Coder<VALUE_BITS, SYMMETRIC> coder(group, repeats ? dither_offset(step, i, r) : 0.f);
        const int at =
            ((step * 4 + r / 2) * VALUE_GROUPS + value_group_slot(chunk * 32 / VALUE_GROUP)) * 4 + 2 * i + r % 2;
        if (c == 0 && chunk * 32 % VALUE_GROUP == 0) ((uint16_t*)(page + VALUE_STEP))[at] = half_bits(group.step);
        if (c == 1 && chunk * 32 % VALUE_GROUP == 0 && !SYMMETRIC)
          ((uint16_t*)(page + VALUE_MIN))[at] = half_bits(group.minimum);
        UNROLL for (int k = 0; k < 8; k++)  // channel 8c + k of the chunk: tile 2u + k/4, rows +8 if k/2 is odd
          coder.put(rows[u].x[k], slot_bit(VALUE_BITS, 2 * u + k / 4), words[2 * i + k / 2 % 2].halves[k % 2]);
      }
    }
    UNROLL for (int w = 0; w < 4; w++) codes.w[load][w] = movmatrix(words[w].bits());
    store_codes<VALUE_BITS>(page + VALUE_CODES, octet, load, codes);
  }
}

struct Cache {
  const bf16 *window_keys, *window_values;
  bf16 *sink_keys, *sink_values;
  const float* norms;
  unsigned char* pages;
  int kv_heads, sinks;
  float shrink, factor;
  const float* feedback;  // of this kv head

  // Packs this warp's share of the page that begins with token `first` of a row, into a block. Tokens before `start`
  // are in the window, later ones in `recent`.
  DEVICE void pack(int row, size_t block, int head, bool keys, int first, int start, const bf16* recent,
                   int stride) const {
    const int cell = row * kv_heads + head, warp = threadIdx.x / 32;
    // Error feedback goes from chunk to chunk: blocks of one multiprocessor begin with different warps (schedulers).
    // (The shuffle tells the compiler that a warp's chunk is uniform.)
    const int chunk = SHAPED ? __shfl_sync(FULL_MASK, (warp + first / PAGE_TOKENS + head) % CHUNKS, 0) : warp;
    const int num_sinks = sinks - first;  // tokens of this page that are sinks, if positive
    const Source from = {(keys ? window_keys : window_values) + (size_t)cell * (RING * DIM), recent,
                         first / RING * RING, start, stride};
    unsigned char* page = pages + page_offset(block, kv_heads, head, first / PAGE_TOKENS);
    const float* norms_of_page = norms + norm_offset(block, first / PAGE_TOKENS);
    bf16* sink = (keys ? sink_keys : sink_values) + ((long long)cell * sinks + first) * DIM;
    if (keys) pack_keys(from, first, chunk, norms_of_page, shrink, feedback, page, sink, num_sinks);
    else pack_values(from, first, warp, factor, page, sink, num_sinks);
  }
};

extern "C" __global__ void __launch_bounds__(HEAD_DIM, 512 / HEAD_DIM)
    pack(const bf16* __restrict__ new_keys, const bf16* __restrict__ new_values, const int* __restrict__ first_rows,
         const int* __restrict__ slots, const int* __restrict__ starts, const int* __restrict__ counts,
         const int* __restrict__ packed, const bf16* __restrict__ window_keys, const bf16* __restrict__ window_values,
         bf16* __restrict__ sink_keys, bf16* __restrict__ sink_values, const float* __restrict__ norms,
         unsigned char* __restrict__ pages, const int* __restrict__ table, int key_stride, int value_stride,
         int kv_heads, int table_stride, int sinks, float shrink, float factor, const float* __restrict__ feedback) {
  wait_then_allow_next();
  const int s = blockIdx.z, head = blockIdx.y, n = blockIdx.x / 2, start = starts[s];
  const int first = (packed ? packed[s] : packed_tokens(start)) + n * PAGE_TOKENS;
  if (first >= packed_tokens(start + counts[s])) return;
  const bool keys = blockIdx.x % 2 == 0;
  const int stride = keys ? key_stride : value_stride;
  const Cache cache = {window_keys, window_values, sink_keys, sink_values, norms, pages,
                       kv_heads,    sinks,         shrink,    factor,      feedback + head * (DIM * DIM)};
  const int row = slots ? slots[s] : s, block = Table{table, table_stride}.block_of(row, first / PAGE_TOKENS);
  cache.pack(row, block, head, keys, first, start,
             (keys ? new_keys : new_values) + (size_t)first_rows[s] * stride + head * DIM, stride);
}

extern "C" __global__ void __launch_bounds__(HEAD_DIM, 512 / HEAD_DIM)
    pack_step(const int* __restrict__ lengths, const bf16* __restrict__ window_keys,
              const bf16* __restrict__ window_values, bf16* __restrict__ sink_keys, bf16* __restrict__ sink_values,
              const float* __restrict__ norms, unsigned char* __restrict__ pages, const int* __restrict__ table,
              int batch, int num_blocks, int kv_heads, int table_stride, int sinks, float shrink, float factor,
              const float* __restrict__ feedback) {
  wait_then_allow_next();
  const int layer = blockIdx.y / kv_heads, head = blockIdx.y % kv_heads, n = blockIdx.x / 2;
  const Cache cache = {window_keys, window_values, sink_keys, sink_values, norms, pages,
                       kv_heads,    sinks,         shrink,    factor,      feedback + (size_t)blockIdx.y * (DIM * DIM)};
  for (int first_row = 0; first_row < batch; first_row += 32) {  // a lane a row
    const int lane_row = first_row + threadIdx.x % 32, length = lane_row < batch ? lengths[lane_row] : -1;
    unsigned full = __ballot_sync(FULL_MASK, length >= RING - 1 && length % FLUSH == FLUSH - 1);
    for (; full; full &= full - 1) {
      const int row = first_row + __ffs(full) - 1, first = lengths[row] + 1 - RING + n * PAGE_TOKENS;
      const int end = first + (PAIRED ? KEY_GROUP : PAGE_TOKENS);  // of all that is read, from the window
      const size_t block = (size_t)layer * num_blocks + Table{table, table_stride}.block_of(row, first / PAGE_TOKENS);
      cache.pack(layer * batch + row, block, head, blockIdx.x % 2 == 0, first, end, nullptr, 0);
    }
  }
}

extern "C" __global__ void fill_window(const bf16* __restrict__ new_keys, const bf16* __restrict__ new_values,
                                       const int* __restrict__ first_rows, const int* __restrict__ slots,
                                       const int* __restrict__ starts, const int* __restrict__ counts,
                                       bf16* __restrict__ window_keys, bf16* __restrict__ window_values, int key_stride,
                                       int value_stride, int kv_heads) {
  wait_then_allow_next();
  const int s = blockIdx.y, head = blockIdx.x, start = starts[s], end = start + counts[s];
  const int first = max(start, packed_tokens(end));
  const size_t cell = ((size_t)(slots ? slots[s] : s) * kv_heads + head) * RING;
  for (int i = threadIdx.x; i < (end - first) * (DIM / 8); i += blockDim.x) {
    const int t = first + i / (DIM / 8), at = i % (DIM / 8);
    const size_t row = (size_t)first_rows[s] + t - start, to = (cell + t % RING) * DIM;
    ((uint4*)(window_keys + to))[at] = ((const uint4*)(new_keys + row * key_stride + head * DIM))[at];
    ((uint4*)(window_values + to))[at] = ((const uint4*)(new_values + row * value_stride + head * DIM))[at];
  }
}
