// decode_attention.cu: one query token per sequence attends to its whole quantized cache, which is read once.
//
//   out[b,h,:] = softmax_t(scale * <q'[b,h,:], key[b,t,:]>) . value[b,t,:]
//   a packed token: key = norm[b,t] * (key_step * code + key_min), value = value_step * code + value_min (or step *
//   (code - centre))
//
// Of a sequence of n tokens the first packed_tokens(n - 1) are packed, the rest is in the window (BF16); the first
// `sinks` of the packed ones are read from the BF16 sinks instead. Work items (attention.cuh): pages of 64 tokens,
// then tiles of sinks and of the window.
// grid (blocks of DecodePlan), BLOCK_WARPS * 32 threads; tasks: what each warp attends to, by `schedule`.
// reads per packed token and kv head, D = 128: int2 88 B, oscar 96 B, int2-compact 76 B, k3v3 and k4v2 104 B; and
// 4 B of norm a token, shared by the heads.
//
// Codes are multiplied where they are: a 2-bit code at bit 2j of a 16-bit half, all else masked out, is exactly the
// fp16 number code * 4^j * 2^-24. So a word of 16 codes feeds 8 MMAs with one AND each and one shift; the float32 sum
// is multiplied by 2^24 / 4^j. Steps multiply the small operand: q * key_step, p * value_step. The minima are small
// products of their own, and so is sum p.
//
// COLUMN_HALVES = 2: up to 4 heads fill the 8 columns twice. Columns 0..3 are for the first group of keys (tokens
// 0..31) and 4..7 for the second, so that a lane multiplies q by one group's steps only, and takes exp of one group's
// logits only. Of the values, columns 0..3 are for the even groups of channels and 4..7 for the odd ones. What a
// column computes for the other half is not used.
#include "layout.cuh"
#define ITEM_BYTES (COPIED_BYTES + (SCALED ? 256 : 0))
#include "attention.cuh"

constexpr int K_STEPS = D / 16;
constexpr float LIFT = SCALED ? 32.f : 0.125f;  // keeps q * key_step in the normal range of fp16
constexpr float ZERO_POINT = SYMMETRIC ? -((1 << VALUE_BITS) - 1) / 2.f : 1.f;  // factor of sum p * parameter
constexpr bool SPLIT_KEYS = COLUMN_HALVES == 2 && KEY_GROUPS == 2,
               SPLIT_VALUES = COLUMN_HALVES == 2 && VALUE_GROUPS > 1;
// Whether one small operand multiplies all codes of a byte: then they need not be separated (Codes).
constexpr bool NESTED_KEYS = SPLIT_KEYS || KEY_GROUPS == 1, NESTED_VALUES = SPLIT_VALUES || VALUE_GROUP == 64;
constexpr int LANE_TILES = 4 / COLUMN_HALVES;                           // token tiles whose logits a lane takes
constexpr int LANE_GROUPS = SPLIT_VALUES ? EVEN_GROUPS : VALUE_GROUPS;  // of values, whose steps multiply a lane's p
static_assert(VALUE_GROUPS <= 8, "groups of values are rows of one MMA tile");

// Of the MMA tiles of a load, half are in the low bytes of the words' halves; the others need a shift by 8.
DEVICE constexpr int byte_slots(int bits) { return tiles_of_load(bits) / 2; }
// The lowest bit of a tile's codes within their byte: a masked code is too large by 2^low_bit.
DEVICE constexpr int low_bit(int bits, int tile) { return slot_bit(bits, tile % byte_slots(bits)); }
DEVICE constexpr float power_of_two(int n) { return (float)(1 << n); }
DEVICE constexpr int group_of(int channel_tile) { return channel_tile * 16 / VALUE_GROUP; }

// MMA operands of tiles 0, 1, 2 ... of one load after the other: the codes of a tile, masked; or, nested, together
// with those of the lower slots of the byte, whose product is subtracted afterwards: one mask fewer a byte, no shift.
template <int BITS, bool NESTED> struct Codes {
  static constexpr int TILES = tiles_of_load(BITS), BYTE_SLOTS = byte_slots(BITS);
  uint4 bits;
  DEVICE void advance(const unsigned char* codes, int tile) {
    if (tile % 8 == 0) words = load_codes<BITS>(codes, tile / 8);
    if (tile % BYTE_SLOTS) return;
    const uint32_t(&w)[4] = words.w[tile % 8 / TILES];
    const bool upper = tile % TILES;
    auto byte = [=](uint32_t w, bool pairs) {  // pairs: its lowest two bits are of other codes (3 bits)
      if (!NESTED) return upper ? w >> 8 : w;
      const uint32_t mask = pairs ? 0x00fc00fcu : 0x00ff00ffu;
      return !upper ? w & mask : pairs ? __byte_perm(w, 0, 0x4341) & mask : __byte_perm(w, 0, 0x4341);
    };
    const bool xy = BITS == 3, zw = BITS == 3 && tile % 8 < TILES;
    bits = make_uint4(byte(w[0], xy), byte(w[1], xy), byte(w[2], zw), byte(w[3], zw));
  }
  DEVICE uint4 operands(int tile) const {
    return make_uint4(operand(bits.x, tile), operand(bits.y, tile), operand(bits.z, tile), operand(bits.w, tile));
  }
  DEVICE static uint32_t operand(uint32_t bits, int tile) {
    const int low = low_bit(BITS, tile);
    if (!NESTED) return bits & (((1u << BITS) - 1) * 0x00010001u << low);
    return low == 8 - BITS ? bits : bits & ((1u << (low + BITS)) - 1) * 0x00010001u;
  }
 private:
  OctetWords<BITS> words;
};

// Sums of nested codes to those of each tile: subtracts the sum of the tile before, which has the lower slots.
template <int BITS, int N> DEVICE void subtract_nested(float (&sum)[N][4]) {
  UNROLL for (int j = N - 1; j > 0; j--)
    UNROLL for (int i = 0; i < 4; i++)
      if (j % byte_slots(BITS)) sum[j][i] -= sum[j - 1][i];
}

struct PageItems {
  const unsigned char* data;
  const float* norms;
  const bf16 *sink_keys, *sink_values, *window_keys, *window_values;
  Table table;
  int kv_heads, sinks;
  float scale_log2;
  struct Query { uint32_t b[K_STEPS][2]; };
  struct Tile { int first, valid; bool sink; };

  DEVICE static int packed(int tokens) { return packed_tokens(tokens - 1); }  // the last one is new
  DEVICE int pages(int packed) const { return packed ? packed / PAGE_TOKENS - sinks / PAGE_TOKENS : 0; }
  DEVICE int sink_tiles(int packed) const { return packed ? (sinks + TILE_TOKENS - 1) / TILE_TOKENS : 0; }
  DEVICE int tiles(int tokens, int packed) const {
    return sink_tiles(packed) + (tokens - packed + TILE_TOKENS - 1) / TILE_TOKENS;
  }
  DEVICE int count(int tokens) const { return pages(packed(tokens)) + tiles(tokens, packed(tokens)); }
  DEVICE void count_items(Cursor& at) const {
    at.num_pages = pages(packed(at.tokens));
    at.num_items = at.num_pages + tiles(at.tokens, packed(at.tokens));
  }
  // The block that has item `item`, if it is a page.
  DEVICE int block_of(int row, int item, int num_pages) const {
    return item < num_pages ? table.block_of(row, item + sinks / PAGE_TOKENS) : 0;
  }
  DEVICE void copy_page(Ring& ring, int slot, const Cursor& at, int block) const {
    const int page = at.item + sinks / PAGE_TOKENS;
    unsigned char* to = ring.slot_at(slot);
    const size_t from = page_offset(block, kv_heads, at.head / Q_GROUPS, page) - copied_offset(page);
    ring.fill(slot, {{to, data + from, COPIED_BYTES},
                     {to + COPIED_BYTES, norms + norm_offset(block, page), SCALED ? 256 : 0}});
  }
  DEVICE Tile tile(const Cursor& at) const {
    const int old = packed(at.tokens), before = sink_tiles(old), t = at.item - at.num_pages;
    const bool sink = t < before;
    const int from = (sink ? t : t - before) * TILE_TOKENS;
    return {from, min(TILE_TOKENS, (sink ? sinks : at.tokens - old) - from), sink};
  }
  DEVICE void copy_tile(Ring& ring, int slot, const Cursor& at) const {
    const Tile t = tile(at);
    const bool wraps = KEEP && !t.sink;  // the window then begins anywhere, and a tile may go round the ring's end
    const int first = wraps ? (packed(at.tokens) + t.first) % RING : t.first;
    const size_t from = ((size_t)(at.row * kv_heads + at.head / Q_GROUPS) * (t.sink ? sinks : RING) + first) * D;
    const size_t begin = from - first * D;
    const int n = (wraps ? min(t.valid, RING - first) : t.valid) * D * 2, rest = wraps ? t.valid * D * 2 - n : 0;
    unsigned char* to = ring.slot_at(slot);
    ring.fill(slot, {{to, (t.sink ? sink_keys : window_keys) + from, n},
                     {to + TILE_TOKENS * D * 2, (t.sink ? sink_values : window_values) + from, n},
                     {to + n, window_keys + begin, rest},
                     {to + TILE_TOKENS * D * 2 + n, window_values + begin, rest}});
  }
  DEVICE static Query make_query(const TileQuery& raw) {
    Query query;
    auto half2 = [](uint32_t w) { return pack_f16x2(low(w) * LIFT, high(w) * LIFT); };
    UNROLL for (int i = 0; i < D / 32; i++) {
      const uint4 w = raw.b[i];
      query.b[2 * i][0] = half2(w.x);
      query.b[2 * i][1] = half2(w.y);
      query.b[2 * i + 1][0] = half2(w.z);
      query.b[2 * i + 1][1] = half2(w.w);
    }
    return query;
  }
  DEVICE static float output_scale(int j) { return power_of_two(24 - low_bit(VALUE_BITS, value_tile(0, j))); }
  DEVICE static uint32_t p_scale_bf16x2(int j) {  // 1 / output_scale
    const uint32_t bits = (uint32_t)(127 - 24 + low_bit(VALUE_BITS, value_tile(0, j))) << 7;
    return bits | bits << 16;
  }
  DEVICE static void finish_pages(State& state) {
    if (NESTED_VALUES) subtract_nested<VALUE_BITS>(state.o);
  }
  static constexpr int HALF_TILES = VALUE_GROUPS > 1 ? VALUE_GROUP / 16 : 1;
  DEVICE static float2 offset_term(const State& state, int j) {
    const int from = value_group_slot(group_of(j)) * 4 + threadIdx.x % 4;
    return make_float2(ZERO_POINT * __shfl_sync(FULL_MASK, state.sums[0], from),
                       ZERO_POINT * __shfl_sync(FULL_MASK, state.sums[1], from));
  }
  DEVICE void attend(State& state, const unsigned char* data, const TileQuery& query, const Cursor& at) const {
    attend_tile<PageItems>(state, data, query, tile(at).valid, scale_log2);
  }

  // Logits minus the running max: x[j][i] of the lane's token tile j (of the page's: LANE_TILES * half + j), row r or
  // r + 8, column 2c + i % 2. copied: what copy_page brought of page `page`.
  DEVICE void logits(float (&x)[LANE_TILES][4], const State& state, const Query& query, const unsigned char* copied,
                     int page) const {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    const bool second = COLUMN_HALVES == 2 && c >= 2;  // the half whose logits this lane takes
    const unsigned char* data = copied + copied_offset(page);
    const unsigned char* steps = data + key_step(page) + c * 16 + (SPLIT_KEYS && r >= 4 ? 64 : 0);  // its column's half
    float sum[4][4], minima[3 - KEY_GROUPS][4];
    uint4 minimum = {};
    Codes<KEY_BITS, NESTED_KEYS> codes;
    UNROLL for (int s = 0; s < K_STEPS; s++) {
      const uint32_t q0 = query.b[s][0], q1 = query.b[s][1];
      uint32_t b[2][2];
      UNROLL for (int g = 0; g < (SPLIT_KEYS ? 1 : KEY_GROUPS); g++) {
        const uint4 step = *(const uint4*)(steps + (s / 2 * KEY_GROUPS + g) * 64);
        b[g][0] = mul_f16x2(q0, s % 2 ? step.z : step.x);
        b[g][1] = mul_f16x2(q1, s % 2 ? step.w : step.y);
      }
      // Rows 0..7 and 8..15 of the minima: the first and the second group; of one group: the even and the odd k steps.
      const int load = KEY_GROUPS == 2 ? s : s / 2, m = KEY_GROUPS == 2 ? 0 : s % 2;
      if (KEY_GROUPS == 2 || s % 2 == 0) minimum = *(const uint4*)(data + key_min(page) + (load * 4 + c) * 16);
      if (s > m) mma_m16n8k16_f16(minima[m], minimum.x, minimum.y, minimum.z, minimum.w, q0, q1);
      else mma_m16n8k16_f16_zero(minima[m], minimum.x, minimum.y, minimum.z, minimum.w, q0, q1);
      UNROLL for (int j = 0; j < 4; j++) {
        const int tile = key_tile(j, s), g = SPLIT_KEYS ? 0 : j * 16 / KEY_GROUP;
        codes.advance(data, tile);
        const uint4 a = codes.operands(tile);
        if (s) mma_m16n8k16_f16(sum[j], a.x, a.y, a.z, a.w, b[g][0], b[g][1]);
        else mma_m16n8k16_f16_zero(sum[j], a.x, a.y, a.z, a.w, b[g][0], b[g][1]);
      }
    }
    if (NESTED_KEYS) subtract_nested<KEY_BITS>(sum);
    if (KEY_GROUPS == 1)
      UNROLL for (int i = 0; i < 2; i++) minima[0][i] = minima[0][2 + i] = minima[0][i] + minima[2 - KEY_GROUPS][2 + i];
    const float factor = scale_log2 / LIFT;
    auto scale_of = [](int tile) { return power_of_two(24 - low_bit(KEY_BITS, key_tile(tile, 0))); };
    UNROLL for (int j = 0; j < LANE_TILES; j += 2) {
      const int above = j + LANE_TILES % 4;  // the same tile of the second half
      float norm[4] = {factor, factor, factor, factor};
      if (SCALED) {
        const float* norms_of_page = (const float*)(copied + COPIED_BYTES);
        const float4 n = *(const float4*)(norms_of_page + (COLUMN_HALVES == 2 ? second : j / 2) * 32 + 4 * r);
        const float four[4] = {n.x, n.y, n.z, n.w};
        UNROLL for (int i = 0; i < 4; i++) norm[i] *= four[i];
      }
      UNROLL for (int u = 0; u < 2; u++) {
        const float scale = second ? scale_of(above + u) : scale_of(j + u);
        UNROLL for (int i = 0; i < 4; i++) {
          const float y = second ? sum[above + u][i] : sum[j + u][i];
          const float offset = second ? minima[0][2 + i % 2] : minima[0][j / 2 * 2 + i % 2];
          x[j + u][i] = fmaf(fmaf(y, scale, offset), norm[2 * u + i / 2], i % 2 ? -state.m1 : -state.m0);
        }
      }
    }
  }

  // p = 2^x of the page as operand B, transposed: rows are tokens, and every head's column has those of the whole page.
  DEVICE void exp_scores(uint32_t (&p)[4][2], State& state, const float (&x)[LANE_TILES][4], int r) const {
    // p stays below 2 (bit 14 of an fp16 clear). A page that breaks this rescales; most pages pay a few ORs and a vote.
    uint32_t own_p[LANE_TILES][2], any = 0;
    UNROLL for (int j = 0; j < LANE_TILES; j++)
      UNROLL for (int i = 0; i < 2; i++) {
        own_p[j][i] = pack_f16x2(ex2(x[j][2 * i]), ex2(x[j][2 * i + 1]));
        any |= own_p[j][i];
      }
    if (__any_sync(FULL_MASK, state.is_first || (any & 0x40004000u))) {
      float x0 = fmaxf(x[0][0], x[0][2]), x1 = fmaxf(x[0][1], x[0][3]);
      UNROLL for (int j = 1; j < LANE_TILES; j++) {
        x0 = fmaxf(x0, fmaxf(x[j][0], x[j][2]));
        x1 = fmaxf(x1, fmaxf(x[j][1], x[j][3]));
      }
      max_increase(x0, x1, state.is_first);
      state.rescale(x0, x1);
      UNROLL for (int j = 0; j < LANE_TILES; j++)
        UNROLL for (int i = 0; i < 2; i++) own_p[j][i] = pack_f16x2(ex2(x[j][2 * i] - x0), ex2(x[j][2 * i + 1] - x1));
    }
    UNROLL for (int j = 0; j < LANE_TILES; j++)
      UNROLL for (int i = 0; i < 2; i++) {
        const uint32_t own = movmatrix(own_p[j][i]);
        if (COLUMN_HALVES == 2) {
          const uint32_t other = __shfl_xor_sync(FULL_MASK, own, 16);
          p[j][i] = r < 4 ? own : other;
          p[j + LANE_TILES % 4][i] = r < 4 ? other : own;
        } else {
          p[j][i] = own;
        }
      }
  }

  DEVICE void attend_page(State& state, const Query& query, const unsigned char* copied, int item) const {
    const int page = item + sinks / PAGE_TOKENS;
    const unsigned char* data = copied + copied_offset(page);
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    float x[LANE_TILES][4];
    logits(x, state, query, copied, page);
    const int skipped = sinks - page * PAGE_TOKENS;  // tokens that are read from the sinks
    if (skipped > 0) {
      UNROLL for (int j = 0; j < LANE_TILES; j++)
        UNROLL for (int i = 0; i < 4; i++)
          if (token_of(COLUMN_HALVES == 2 ? c / 2 * 2 + j : j, i / 2, r) < skipped) x[j][i] = MASKED;
    }
    uint32_t p[4][2];
    exp_scores(p, state, x, r);
    constexpr uint32_t ONES = 0x3c003c00u;
    const int first = SPLIT_VALUES && r >= 4 ? EVEN_GROUPS : 0;  // slot of the first group of this lane's column half
    Codes<VALUE_BITS, NESTED_VALUES> codes;
    UNROLL for (int s = 0; s < 4; s++) {
      const unsigned char* params = data + (s * 4 + c) * VALUE_GROUPS * 8;
      const unsigned char* offsets = params + (SYMMETRIC ? VALUE_STEP : VALUE_MIN);
      const uint2 offset = *(const uint2*)(offsets + min(r, VALUE_GROUPS - 1) * 8);
      mma_m16n8k16_f16(state.sums, offset.x, ONES, offset.y, ONES, p[s][0], p[s][1]);
      uint32_t b[LANE_GROUPS][2];
      UNROLL for (int g = 0; g < LANE_GROUPS; g++) {
        uint2 step;
        if (LANE_GROUPS % 2 == 0 && VALUE_GROUPS % 2 == 0) {
          const uint4 both = *(const uint4*)(params + VALUE_STEP + (first + g / 2 * 2) * 8);
          step = g % 2 ? make_uint2(both.z, both.w) : make_uint2(both.x, both.y);
        } else {
          step = *(const uint2*)(params + VALUE_STEP + min(first + g, VALUE_GROUPS - 1) * 8);
        }
        b[g][0] = mul_f16x2(p[s][0], step.x);
        b[g][1] = mul_f16x2(p[s][1], step.y);
      }
      UNROLL for (int j = 0; j < CHANNEL_TILES; j++) {
        const int tile = value_tile(s, j), g = value_group_slot(group_of(j)) % LANE_GROUPS;
        codes.advance(data + VALUE_CODES, tile);
        const uint4 a = codes.operands(tile);
        mma_m16n8k16_f16(state.o[j], a.x, a.y, a.z, a.w, b[g][0], b[g][1]);
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, 1)
    decode_attention(const bf16* q, const unsigned char* __restrict__ pages, const float* __restrict__ norms,
                     const bf16* __restrict__ sink_keys, const bf16* __restrict__ sink_values,
                     const bf16* __restrict__ window_keys, const bf16* __restrict__ window_values,
                     const int* __restrict__ table, const int* __restrict__ lengths, const int4* __restrict__ tasks,
                     Output* __restrict__ out, float* __restrict__ lse, float4* __restrict__ workspace,
                     int* __restrict__ split_counter, int batch, int kv_heads, int table_stride, int sinks, int added,
                     int parity, float scale_log2) {
  const PageItems items = {pages, norms, sink_keys, sink_values, window_keys, window_values,
                           {table, table_stride}, kv_heads, sinks, scale_log2};
  attend(items, q, lengths, tasks, added, batch, kv_heads * Q_GROUPS, {out, lse, workspace, split_counter, parity});
}

extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, 1)
    schedule(const int* __restrict__ lengths, const int* __restrict__ table, int4* __restrict__ tasks,
             float4* __restrict__ workspace, int batch, int kv_heads, int sinks, int added, int table_stride) {
  wait_then_allow_next();
  clear_first_half(workspace);
  PageItems items = {};
  items.sinks = sinks;
  items.table = {table, table_stride};
  schedule_block(items, lengths, added, batch, kv_heads * Q_GROUPS, tasks);
}
