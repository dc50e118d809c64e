// decode_attention.cu: one query token per sequence attends to its whole quantized cache, which is read once.
//
//   out[b,h,:] = softmax_t(scale * <q'[b,h,:], key[b,t,:]>) . value[b,t,:]
//   a packed token: key = norm[b,t] * (key_step * code + key_min), value = value_step * code + value_min (or step * (code - centre))
//
// Of a sequence of n tokens the first (n - 1) / 128 * 128 are packed, the rest is in the window (BF16); the first `sinks` of the packed
// ones are read from the BF16 sinks instead. Units (attention.cuh): pages of 64 tokens, then tiles of sinks and of the window.
// reads per packed token and kv head, D = 128: int2 88 B, oscar 96 B, int2-compact 76 B; and 4 B of norm a token, shared by the heads.
//
// Mask and go: a 2-bit code at bit 2j of a 16-bit half, masked in place, is the fp16 number code * 4^j * 2^-24, exactly. So a word of 16
// codes feeds 8 MMAs with one AND each and one shift; 2^24 / 4^j goes into the float32 sum. Steps go into the small operand: q * key_step,
// p * value_step. The minima are small products of their own, and so is sum p.
//
// Two halves: where 4 heads stand in the 8 columns twice, columns 0..3 are about the first group of keys (tokens 0..31) and 4..7 about the
// second, so that each lane multiplies q by one group's steps only, and takes the logarithms' inverse of one group's logits only. Of the
// values, columns 0..3 are about the even groups of channels and 4..7 about the odd ones. What a column makes of the other half is not used.
#include "layout.cuh"
#define UNIT_BYTES (PAGE_BYTES + (SCALED ? 256 : 0))
#include "attention.cuh"

constexpr int K_STEPS = D / 16;
constexpr float LIFT = SCALED ? 32.f : 0.125f;  // keeps q * key_step in the normal range of fp16
constexpr float ZERO = SYMMETRIC ? -((1 << BITS) - 1) / 2.f : 1.f;
constexpr bool TWO_KEYS = HALVES == 2 && KEY_GROUPS == 2, TWO_VALUES = HALVES == 2 && VALUE_GROUPS > 1;
// Whether all codes of a byte meet the same small operand: then they need not be separated (Codes).
constexpr bool NESTED_KEYS = TWO_KEYS || KEY_GROUPS == 1, NESTED_VALUES = D % 64 == 0 && (TWO_VALUES || VALUE_GROUP == 64);
constexpr int LANE_TILES = 4 / HALVES;                             // token tiles whose logits a lane takes
constexpr int LANE_GROUPS = TWO_VALUES ? VALUE_PAIRS : VALUE_GROUPS;  // groups of values whose steps a lane multiplies p by
static_assert(VALUE_GROUPS <= 8, "groups of values are rows of one MMA tile");

// 2^BITS to the power of a place: by how much a masked code is too large. Where a channel tile meets several places (D = 96), p is
// lifted to the largest.
__device__ __forceinline__ constexpr int place(int tile) { return tile % TILES % PLACES; }
__device__ __forceinline__ constexpr int value_place(int channel_tile) {
  int most = 0;
  for (int s = 0; s < 4; s++) most = place(value_tile(s, channel_tile)) > most ? place(value_tile(s, channel_tile)) : most;
  return most;
}
__device__ __forceinline__ constexpr int value_lift(int s, int channel_tile) { return BITS * (value_place(channel_tile) - place(value_tile(s, channel_tile))); }
__device__ __forceinline__ constexpr float power_of_two(int n) { return (float)(1 << n); }
__device__ __forceinline__ constexpr uint32_t half2_power_of_two(int n) { return (uint32_t)(15 + n) << 10 | (uint32_t)(15 + n) << 26; }
__device__ __forceinline__ constexpr int group_of(int channel_tile) { return channel_tile * 16 / VALUE_GROUP; }

// The operands of tiles 0, 1, 2 ... of one load after the other. A tile's codes, masked in place; or, nested, with those of the places below
// them in the byte, whose product is then subtracted from this one: a mask fewer a byte, and no shift.
template <bool NESTED>
struct Codes {
  uint4 bits;
  __device__ __forceinline__ void advance(const unsigned char* codes, int tile) {
    if (tile % TILES == 0) word = ((const uint4*)codes)[tile / TILES * 32 + threadIdx.x % 32];
    if (tile % PLACES) return;
    const bool upper = tile % TILES;
    auto byte = [=](uint32_t w) { return !NESTED ? upper ? w >> 8 : w : upper ? __byte_perm(w, 0, 0x4341) : w & 0x00ff00ffu; };
    bits.x = byte(word.x), bits.y = byte(word.y), bits.z = byte(word.z), bits.w = byte(word.w);
  }
  __device__ __forceinline__ static uint32_t operand(uint32_t bits, int tile) {
    if (!NESTED) return bits & (((1u << BITS) - 1) * 0x00010001u << (place(tile) * BITS));
    return place(tile) == PLACES - 1 ? bits : bits & ((1u << (place(tile) + 1) * BITS) - 1) * 0x00010001u;
  }
 private:
  uint4 word;
};

struct Pages {
  const unsigned char* data;
  const float* norms;
  const bf16 *sink_keys, *sink_values, *window_keys, *window_values;
  int kv_heads, page_capacity, norm_stride, sinks;
  float scale_log2;
  struct Query { uint32_t b[K_STEPS][2]; };

  __device__ __forceinline__ static int packed_tokens(int tokens) { return (tokens - 1) / WINDOW * WINDOW; }
  __device__ __forceinline__ int pages(int packed) const { return packed ? packed / PAGE_TOKENS - sinks / PAGE_TOKENS : 0; }
  __device__ __forceinline__ int sink_tiles(int packed) const { return packed ? (sinks + TILE_TOKENS - 1) / TILE_TOKENS : 0; }
  __device__ __forceinline__ int tiles(int tokens, int packed) const { return sink_tiles(packed) + (tokens - packed + TILE_TOKENS - 1) / TILE_TOKENS; }
  __device__ __forceinline__ int count(int tokens) const { return pages(packed_tokens(tokens)) + tiles(tokens, packed_tokens(tokens)); }
  __device__ __forceinline__ void measure(Cursor& at) const {
    const int packed = packed_tokens(at.tokens);
    at.pages = pages(packed), at.units = at.pages + tiles(at.tokens, packed);
  }
  __device__ __forceinline__ void copy_page(Ring& ring, int slot, const Cursor& at) const {
    const int page = at.unit + sinks / PAGE_TOKENS;
    unsigned char* to = ring.slot_at(slot);
    ring.fill(slot, {{to, data + ((size_t)(at.row * kv_heads + at.head / SHARE) * page_capacity + page) * PAGE_BYTES, PAGE_BYTES},
                     {to + PAGE_BYTES, norms + (size_t)at.row * norm_stride + page * PAGE_TOKENS, SCALED ? 256 : 0}});
  }
  struct Tile { int first, valid; bool sink; };
  __device__ __forceinline__ Tile tile(const Cursor& at) const {
    const int packed = packed_tokens(at.tokens), before = sink_tiles(packed), t = at.unit - at.pages;
    const bool sink = t < before;
    const int from = (sink ? t : t - before) * TILE_TOKENS;
    return {from, min(TILE_TOKENS, (sink ? sinks : at.tokens - packed) - from), sink};
  }
  __device__ __forceinline__ void copy_tile(Ring& ring, int slot, const Cursor& at) const {
    const Tile t = tile(at);
    const size_t from = ((size_t)(at.row * kv_heads + at.head / SHARE) * (t.sink ? sinks : WINDOW) + t.first) * D;
    const int n = t.valid * D * 2;
    unsigned char* to = ring.slot_at(slot);
    ring.fill(slot, {{to, (t.sink ? sink_keys : window_keys) + from, n},
                     {to + TILE_TOKENS * D * 2, (t.sink ? sink_values : window_values) + from, n}});
  }
  __device__ __forceinline__ static Query make_query(const TileQuery& raw) {
    Query query;
    auto half2 = [](uint32_t w) { return pack_f16x2(__uint_as_float(w << 16) * LIFT, __uint_as_float(w & 0xffff0000u) * LIFT); };
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
      const uint4 w = raw.b[i];
      query.b[2 * i][0] = half2(w.x), query.b[2 * i][1] = half2(w.y), query.b[2 * i + 1][0] = half2(w.z), query.b[2 * i + 1][1] = half2(w.w);
    }
    return query;
  }
  __device__ __forceinline__ static float unit_scale(int j) { return power_of_two(24 - BITS * value_place(j)); }
  __device__ __forceinline__ static uint32_t unit_bf16x2(int j) {  // 1 / unit_scale
    const uint32_t bits = (uint32_t)(127 - 24 + BITS * value_place(j)) << 7;
    return bits | bits << 16;
  }
  __device__ __forceinline__ static void finish_pages(State& state) {
    if (!NESTED_VALUES) return;
#pragma unroll
    for (int j = CHANNEL_TILES - 1; j > 0; j--)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (j % PLACES) state.o[j][i] -= state.o[j - 1][i];
  }
  static constexpr int RUN = VALUE_GROUPS > 1 ? VALUE_GROUP / 16 : 1;
  __device__ __forceinline__ static float2 zero_term(const State& state, int j) {
    const int from = value_group_place(group_of(j)) * 4 + threadIdx.x % 4;
    return make_float2(ZERO * __shfl_sync(FULL, state.sums[0], from), ZERO * __shfl_sync(FULL, state.sums[1], from));
  }
  __device__ __forceinline__ void attend(State& state, const unsigned char* data, const TileQuery& query, const Cursor& at) const {
    attend_tile<Pages>(state, data, query, tile(at).valid, scale_log2);
  }

  // Logits above the references: x[j][i] of the lane's token tile j (of the page's: LANE_TILES * half + j), row r or r + 8, column 2c + i % 2.
  __device__ __forceinline__ void logits(float (&x)[LANE_TILES][4], const State& state, const Query& query, const unsigned char* data) const {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    const bool second = HALVES == 2 && c >= 2;                     // the half that this lane takes logits of
    const unsigned char* steps = data + KEY_STEP + c * 16 + (TWO_KEYS && r >= 4 ? 64 : 0);  // the half that its column of q is for
    float sum[4][4], minima[3 - KEY_GROUPS][4];
    uint4 low = {};
    Codes<NESTED_KEYS> codes;
#pragma unroll
    for (int s = 0; s < K_STEPS; s++) {
      const uint32_t q0 = query.b[s][0], q1 = query.b[s][1];
      uint32_t b[2][2];
#pragma unroll
      for (int g = 0; g < (TWO_KEYS ? 1 : KEY_GROUPS); g++) {
        const uint4 step = *(const uint4*)(steps + (s / 2 * KEY_GROUPS + g) * 64);
        b[g][0] = mul_f16x2(q0, s % 2 ? step.z : step.x), b[g][1] = mul_f16x2(q1, s % 2 ? step.w : step.y);
      }
      // rows 0..7 and 8..15 of the minima: the first and the second group; of one group: the even and the odd k steps
      if (KEY_GROUPS == 2 || s % 2 == 0) low = *(const uint4*)(data + KEY_MIN + ((KEY_GROUPS == 2 ? s : s / 2) * 4 + c) * 16);
      const int m = KEY_GROUPS == 2 ? 0 : s % 2;
      if (s > m) mma_m16n8k16_f16(minima[m], low.x, low.y, low.z, low.w, q0, q1);
      else mma_m16n8k16_f16_fresh(minima[m], low.x, low.y, low.z, low.w, q0, q1);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int tile = key_tile(j, s), g = TWO_KEYS ? 0 : j * 16 / KEY_GROUP;
        codes.advance(data, tile);
        const uint32_t a0 = codes.operand(codes.bits.x, tile), a1 = codes.operand(codes.bits.y, tile);
        const uint32_t a2 = codes.operand(codes.bits.z, tile), a3 = codes.operand(codes.bits.w, tile);
        if (s) mma_m16n8k16_f16(sum[j], a0, a1, a2, a3, b[g][0], b[g][1]);
        else mma_m16n8k16_f16_fresh(sum[j], a0, a1, a2, a3, b[g][0], b[g][1]);
      }
    }
    if (NESTED_KEYS) {
#pragma unroll
      for (int j = 3; j > 0; j--)
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (j % PLACES) sum[j][i] -= sum[j - 1][i];
    }
    if (KEY_GROUPS == 1) {
#pragma unroll
      for (int i = 0; i < 2; i++) minima[0][i] = minima[0][2 + i] = minima[0][i] + minima[2 - KEY_GROUPS][2 + i];
    }
    const float factor = scale_log2 / LIFT;
    auto unit_of = [](int tile) { return power_of_two(24 - BITS * place(key_tile(tile, 0))); };
#pragma unroll
    for (int j = 0; j < LANE_TILES; j += 2) {
      const int above = j + LANE_TILES % 4;  // the same tiles of the second half
      float norm[4] = {factor, factor, factor, factor};
      if (SCALED) {
        const float4 n = *(const float4*)(data + PAGE_BYTES + ((HALVES == 2 ? second : j / 2) * 32 + 4 * r) * 4);
        norm[0] *= n.x, norm[1] *= n.y, norm[2] *= n.z, norm[3] *= n.w;
      }
#pragma unroll
      for (int u = 0; u < 2; u++) {
        const float unit = second ? unit_of(above + u) : unit_of(j + u);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float y = second ? sum[above + u][i] : sum[j + u][i], low = second ? minima[0][2 + i % 2] : minima[0][j / 2 * 2 + i % 2];
          x[j + u][i] = fmaf(fmaf(y, unit, low), norm[2 * u + i / 2], i % 2 ? -state.m1 : -state.m0);
        }
      }
    }
  }

  __device__ __forceinline__ void attend_page(State& state, const Query& query, const unsigned char* data, int unit) const {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    float x[LANE_TILES][4];
    logits(x, state, query, data);
    const int skipped = sinks - (unit + sinks / PAGE_TOKENS) * PAGE_TOKENS;  // tokens of this page that are read from the sinks
    if (skipped > 0) {
#pragma unroll
      for (int j = 0; j < LANE_TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (token_of(HALVES == 2 ? c / 2 * 2 + j : j, i / 2, r) < skipped) x[j][i] = NEVER;
    }
    // p is kept below 2 (bit 14 of an fp16 clear): a page that breaks this moves the references, so most pay a few ORs and a vote.
    uint32_t here[LANE_TILES][2], any = 0;
#pragma unroll
    for (int j = 0; j < LANE_TILES; j++)
#pragma unroll
      for (int i = 0; i < 2; i++) here[j][i] = pack_f16x2(ex2(x[j][2 * i]), ex2(x[j][2 * i + 1])), any |= here[j][i];
    if (__any_sync(FULL, state.fresh || (any & 0x40004000u))) {
      float x0 = fmaxf(x[0][0], x[0][2]), x1 = fmaxf(x[0][1], x[0][3]);
#pragma unroll
      for (int j = 1; j < LANE_TILES; j++) x0 = fmaxf(x0, fmaxf(x[j][0], x[j][2])), x1 = fmaxf(x1, fmaxf(x[j][1], x[j][3]));
      reference_step(x0, x1, state.fresh);
      state.move(x0, x1);
#pragma unroll
      for (int j = 0; j < LANE_TILES; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) here[j][i] = pack_f16x2(ex2(x[j][2 * i] - x0), ex2(x[j][2 * i + 1] - x1));
    }
    uint32_t p[4][2];  // transposed: rows are tokens, as B wants them, and every head has those of the whole page
#pragma unroll
    for (int j = 0; j < LANE_TILES; j++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t own = movmatrix(here[j][i]);
        if (HALVES == 2) {
          const uint32_t other = __shfl_xor_sync(FULL, own, 16);
          p[j][i] = r < 4 ? own : other, p[j + LANE_TILES % 4][i] = r < 4 ? other : own;
        } else {
          p[j][i] = own;
        }
      }

    constexpr uint32_t ONES = 0x3c003c00u;
    const int first = TWO_VALUES && r >= 4 ? VALUE_PAIRS : 0;  // where the groups that this lane's column is for begin
    Codes<NESTED_VALUES> codes;
#pragma unroll
    for (int s = 0; s < 4; s++) {
      const unsigned char* params = data + (s * 4 + c) * VALUE_GROUPS * 8;
      const uint2 offset = *(const uint2*)(params + (SYMMETRIC ? VALUE_STEP : VALUE_MIN) + min(r, VALUE_GROUPS - 1) * 8);
      mma_m16n8k16_f16(state.sums, offset.x, ONES, offset.y, ONES, p[s][0], p[s][1]);
      uint32_t b[LANE_GROUPS][2];
#pragma unroll
      for (int g = 0; g < LANE_GROUPS; g++) {
        uint2 step;
        if (LANE_GROUPS % 2 == 0 && VALUE_GROUPS % 2 == 0) {
          const uint4 both = *(const uint4*)(params + VALUE_STEP + (first + g / 2 * 2) * 8);
          step = g % 2 ? make_uint2(both.z, both.w) : make_uint2(both.x, both.y);
        } else {
          step = *(const uint2*)(params + VALUE_STEP + min(first + g, VALUE_GROUPS - 1) * 8);
        }
        b[g][0] = mul_f16x2(p[s][0], step.x), b[g][1] = mul_f16x2(p[s][1], step.y);
        const int even = value_lift(s, tile_of_place(g)), odd = TWO_VALUES ? value_lift(s, tile_of_place(min(VALUE_PAIRS + g, VALUE_GROUPS - 1))) : even;
        if (even || odd) {
          const uint32_t lift = first ? half2_power_of_two(odd) : half2_power_of_two(even);
          b[g][0] = mul_f16x2(b[g][0], lift), b[g][1] = mul_f16x2(b[g][1], lift);
        }
      }
#pragma unroll
      for (int j = 0; j < CHANNEL_TILES; j++) {
        const int tile = value_tile(s, j), g = value_group_place(group_of(j)) % LANE_GROUPS;
        codes.advance(data + VALUE_CODES, tile);
        const uint32_t a0 = codes.operand(codes.bits.x, tile), a1 = codes.operand(codes.bits.y, tile);
        const uint32_t a2 = codes.operand(codes.bits.z, tile), a3 = codes.operand(codes.bits.w, tile);
        mma_m16n8k16_f16(state.o[j], a0, a1, a2, a3, b[g][0], b[g][1]);
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, 1)
decode_attention(const bf16* q, const unsigned char* __restrict__ pages, const float* __restrict__ norms,
                 const bf16* __restrict__ sink_keys, const bf16* __restrict__ sink_values, const bf16* __restrict__ window_keys,
                 const bf16* __restrict__ window_values, const int* __restrict__ lengths, const int4* __restrict__ tasks, Output* __restrict__ out,
                 float* __restrict__ lse, float4* __restrict__ workspace, int* __restrict__ arrived, int batch, int kv_heads, int page_capacity,
                 int norm_stride, int sinks, int added, int turn, float scale_log2) {
  attend(Pages{pages, norms, sink_keys, sink_values, window_keys, window_values, kv_heads, page_capacity, norm_stride, sinks, scale_log2},
         q, lengths, tasks, added, batch, kv_heads * SHARE, {out, lse, workspace, arrived, turn});
}

extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, 1)
schedule(const int* __restrict__ lengths, int4* __restrict__ tasks, float4* __restrict__ workspace, int batch, int kv_heads, int sinks, int added) {
  wait_for_previous(), allow_next();
  empty_first_half(workspace);
  Pages pages = {};
  pages.sinks = sinks;
  schedule_block(pages, lengths, added, batch, kv_heads * SHARE, tasks);
}
