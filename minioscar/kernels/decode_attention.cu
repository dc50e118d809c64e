// decode_attention.cu: one query token per sequence attends to its whole quantized cache, which is read once.
//
//   out[b,h,:] = softmax_t(scale * <q'[b,h,:], key[b,t,:]>) . value[b,t,:]
//   a packed token: key = norm[b,t] * (key_step * code + key_min), value = value_step * code + value_min (or step * (code - centre))
//
// Of a sequence of n tokens the first (n - 1) / 128 * 128 are packed, the rest is in the window (BF16); the first `sinks` of the packed
// ones are read from the BF16 sinks instead. Units (attention.cuh): tiles of sinks, pages of 64 tokens, tiles of the window.
// reads per packed token and kv head, D = 128: int2 88 B, oscar 96 B, int2-compact 76 B; and 4 B of norm a token, shared by the heads.
//
// Mask and go: a 2-bit code at bit 2j of a 16-bit half, masked in place, is the fp16 number code * 4^j * 2^-24, exactly. So a word of 16
// codes feeds 8 MMAs with one AND each and one shift; 2^24 / 4^j goes into the float32 sum. Steps go into the small operand: q * key_step,
// p * value_step. The minima are small products of their own, and so is sum p.
#include "layout.cuh"
#define UNIT_BYTES (PAGE_BYTES + (SCALED ? 256 : 0) > 16 * HEAD_DIM * 4 ? PAGE_BYTES + (SCALED ? 256 : 0) : 16 * HEAD_DIM * 4)
#define ONES_ROW VALUE_GROUPS
#include "attention.cuh"

constexpr int K_STEPS = D / 16;
constexpr float LIFT = SCALED ? 32.f : 0.125f;  // keeps q * key_step in the normal range of fp16
constexpr float ZERO = SYMMETRIC ? -((1 << BITS) - 1) / 2.f : 1.f;
static_assert(VALUE_GROUPS <= 8, "groups of values are rows of one MMA tile");

// 2^BITS to the power of a place: by how much a masked code is too large. Where a channel tile meets several places (D = 96), p is
// lifted to the largest.
__device__ __forceinline__ constexpr int place(int tile) { return tile % TILES % PLACES; }
__device__ __forceinline__ constexpr int value_place(int channel_tile) {
  int most = 0;
  for (int s = 0; s < 4; s++) most = place(value_tile(s, channel_tile)) > most ? place(value_tile(s, channel_tile)) : most;
  return most;
}
__device__ __forceinline__ constexpr float power_of_two(int n) { return (float)(1 << n); }
__device__ __forceinline__ constexpr uint32_t half2_power_of_two(int n) { return (uint32_t)(15 + n) << 10 | (uint32_t)(15 + n) << 26; }

__device__ __forceinline__ uint32_t masked(uint32_t word, int tile) { return word & (((1u << BITS) - 1) * 0x00010001u << (place(tile) * BITS)); }

struct Pages {
  const unsigned char* pages;
  const float* norms;
  const bf16 *sink_keys, *sink_values, *window_keys, *window_values;
  int kv_heads, share, page_capacity, norm_stride, sinks;
  float scale_log2;
  struct Query { uint32_t b[K_STEPS][2]; };

  struct Place { int page, tile, valid; bool sink; };  // page >= 0, or a tile of `valid` tokens
  __device__ __forceinline__ static int packed(int tokens) { return (tokens - 1) / WINDOW * WINDOW; }
  __device__ __forceinline__ int count(int tokens) const {
    if (tokens <= 0) return 0;
    const int old = packed(tokens), tiles = (tokens - old + TILE_TOKENS - 1) / TILE_TOKENS;
    return old ? tiles + (sinks + TILE_TOKENS - 1) / TILE_TOKENS + old / PAGE_TOKENS - sinks / PAGE_TOKENS : tiles;
  }
  __device__ __forceinline__ Place where(const Cursor& at) const {
    const int old = packed(at.tokens), sink_tiles = old ? (sinks + TILE_TOKENS - 1) / TILE_TOKENS : 0;
    if (at.unit < sink_tiles) return {-1, at.unit, min(TILE_TOKENS, sinks - at.unit * TILE_TOKENS), true};
    const int page = at.unit - sink_tiles + sinks / PAGE_TOKENS;
    if (page * PAGE_TOKENS < old) return {page, 0, 0, false};
    const int tile = old ? page - old / PAGE_TOKENS : at.unit;
    return {-1, tile, min(TILE_TOKENS, at.tokens - old - tile * TILE_TOKENS), false};
  }
  __device__ __forceinline__ void fetch(Ring& ring, int slot, const Cursor& at, const bf16* q) const {
    const Place unit = where(at);
    const size_t cell = (size_t)at.row * kv_heads + at.head / share;
    const int n = unit.valid * D * 2, more = q ? Q_BYTES : 0;
    ring.announce(slot, more + (unit.page >= 0 ? PAGE_BYTES + (SCALED ? 256 : 0) : 2 * n));
    if (q) ring.copy(slot, UNIT_BYTES, q, Q_BYTES);
    if (unit.page >= 0) {
      ring.copy(slot, 0, pages + (cell * page_capacity + unit.page) * PAGE_BYTES, PAGE_BYTES);
      if (SCALED) ring.copy(slot, PAGE_BYTES, norms + (size_t)at.row * norm_stride + unit.page * PAGE_TOKENS, 256);
    } else {
      const size_t from = (cell * (unit.sink ? sinks : WINDOW) + unit.tile * TILE_TOKENS) * D;
      ring.copy(slot, 0, (unit.sink ? sink_keys : window_keys) + from, n);
      ring.copy(slot, TILE_BYTES / 2, (unit.sink ? sink_values : window_values) + from, n);
    }
  }
  __device__ __forceinline__ Query load_query(const unsigned char* q) const {
    Query query;
    const int lane = threadIdx.x % 32;
    auto half2 = [](uint32_t w) { return pack_f16x2(__uint_as_float(w << 16) * LIFT, __uint_as_float(w & 0xffff0000u) * LIFT); };
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
      const uint4 w = *(const uint4*)(q + lane / 4 % Q_PER_KV * D * 2 + i * 64 + lane % 4 * 16);
      query.b[2 * i][0] = half2(w.x), query.b[2 * i][1] = half2(w.y), query.b[2 * i + 1][0] = half2(w.z), query.b[2 * i + 1][1] = half2(w.w);
    }
    return query;
  }
  __device__ __forceinline__ static float unit_scale(int j) { return 16777216.f / power_of_two(BITS * value_place(j)); }
  __device__ __forceinline__ float2 zero_term(const State& state, int j) const {
    const int from = j * 16 / VALUE_GROUP * 4 + threadIdx.x % 4;
    return make_float2(ZERO * __shfl_sync(FULL, state.sums[0], from), ZERO * __shfl_sync(FULL, state.sums[1], from));
  }
  __device__ __forceinline__ void attend(State& state, const Query& query, const unsigned char* data, const unsigned char* q, const Cursor& at) const {
    const Place unit = where(at);
    if (unit.page >= 0) {
      attend_page(state, query, data, unit.page);
      return;
    }
#pragma unroll
    for (int j = 0; j < CHANNEL_TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) state.o[j][i] *= unit_scale(j);
    attend_tile(state, data, q, unit.valid, scale_log2);
#pragma unroll
    for (int j = 0; j < CHANNEL_TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) state.o[j][i] *= 1.f / unit_scale(j);
  }

  // Logits above the references of 16 x 4 tokens x 8 columns: x[j][i] of token 16j + 8(i/2) + r.
  __device__ __forceinline__ void logits(float (&x)[4][4], const State& state, const Query& query, const unsigned char* data) const {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    float minima[4];
    uint4 word = {};
#pragma unroll
    for (int s = 0; s < K_STEPS; s++) {
      const uint32_t q0 = query.b[s][0], q1 = query.b[s][1];
      const unsigned char* params = data + ((s / 2 * 4 + c) * 2 + s % 2) * KEY_GROUPS * 8;
      uint32_t b[KEY_GROUPS][2];
      if (KEY_GROUPS == 2) {
        const uint4 step = *(const uint4*)(params + KEY_STEP), low = *(const uint4*)(params + KEY_MIN);
        b[0][0] = mul_f16x2(q0, step.x), b[0][1] = mul_f16x2(q1, step.y);
        b[KEY_GROUPS - 1][0] = mul_f16x2(q0, step.z), b[KEY_GROUPS - 1][1] = mul_f16x2(q1, step.w);
        if (s) mma_m16n8k16_f16(minima, low.x, low.z, low.y, low.w, q0, q1);
        else mma_m16n8k16_f16_fresh(minima, low.x, low.z, low.y, low.w, q0, q1);  // rows 0..7: first group, 8..15: second
      } else {
        const uint2 step = *(const uint2*)(params + KEY_STEP), low = *(const uint2*)(params + KEY_MIN);
        b[0][0] = mul_f16x2(q0, step.x), b[0][1] = mul_f16x2(q1, step.y);
        if (s) mma_m16n8k16_f16(minima, low.x, low.x, low.y, low.y, q0, q1);
        else mma_m16n8k16_f16_fresh(minima, low.x, low.x, low.y, low.y, q0, q1);
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int tile = key_tile(j, s), g = j * 16 / KEY_GROUP;
        if (tile % TILES == 0) word = ((const uint4*)data)[tile / TILES * 32 + lane];
        if (tile % TILES == PLACES) word.x >>= 8, word.y >>= 8, word.z >>= 8, word.w >>= 8;
        const uint32_t a0 = masked(word.x, tile), a1 = masked(word.y, tile), a2 = masked(word.z, tile), a3 = masked(word.w, tile);
        if (s) mma_m16n8k16_f16(x[j], a0, a1, a2, a3, b[g][0], b[g][1]);
        else mma_m16n8k16_f16_fresh(x[j], a0, a1, a2, a3, b[g][0], b[g][1]);
      }
    }
    const float factor = scale_log2 / LIFT;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float unit = 16777216.f / power_of_two(BITS * place(key_tile(j, 0)));
      const int g = j * 16 / KEY_GROUP;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float norm = SCALED ? ((const float*)(data + PAGE_BYTES))[16 * j + i / 2 * 8 + r] * factor : factor;
        x[j][i] = fmaf(fmaf(x[j][i], unit, minima[KEY_GROUPS == 2 ? 2 * g + i % 2 : i % 2]), norm, i % 2 ? -state.m1 : -state.m0);
      }
    }
  }

  __device__ __forceinline__ void attend_page(State& state, const Query& query, const unsigned char* data, int page) const {
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    float x[4][4];
    logits(x, state, query, data);
    const int skipped = sinks - page * PAGE_TOKENS;
    if (skipped > 0) {
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (16 * j + i / 2 * 8 + r < skipped) x[j][i] = NEVER;
    }
    // p is kept below 2 (bit 14 of an fp16 clear): a page that breaks this moves the references, so most pay four ORs and a vote.
    uint32_t p[4][2], any = 0;
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int i = 0; i < 2; i++) p[j][i] = pack_f16x2(ex2(x[j][2 * i]), ex2(x[j][2 * i + 1])), any |= p[j][i];
    if (__any_sync(FULL, state.fresh || (any & 0x40004000u))) {
      float x0 = fmaxf(x[0][0], x[0][2]), x1 = fmaxf(x[0][1], x[0][3]);
#pragma unroll
      for (int j = 1; j < 4; j++) x0 = fmaxf(x0, fmaxf(x[j][0], x[j][2])), x1 = fmaxf(x1, fmaxf(x[j][1], x[j][3]));
      reference_step(x0, x1, state.fresh);
      state.move(x0, x1);
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < 2; i++) p[j][i] = pack_f16x2(ex2(x[j][2 * i] - x0), ex2(x[j][2 * i + 1] - x1));
    }
#pragma unroll
    for (int j = 0; j < 4; j++) p[j][0] = movmatrix(p[j][0]), p[j][1] = movmatrix(p[j][1]);  // now rows are tokens, as B wants them

    const uint32_t one0 = r == ONES_ROW ? 0x3c003c00u : 0u, one1 = r + 8 == ONES_ROW ? 0x3c003c00u : 0u;
    uint4 word = {};
#pragma unroll
    for (int s = 0; s < 4; s++) {
      const unsigned char* params = data + (s * 4 + c) * VALUE_GROUPS * 8;
      uint2 offset = make_uint2(one0, one0);
      if (r < VALUE_GROUPS) offset = *(const uint2*)(params + (SYMMETRIC ? VALUE_STEP : VALUE_MIN) + r * 8);
      mma_m16n8k16_f16(state.sums, offset.x, one1, offset.y, one1, p[s][0], p[s][1]);
      uint32_t b[VALUE_GROUPS][2];
#pragma unroll
      for (int g = 0; g < VALUE_GROUPS; g++) {
        uint2 step;
        if (VALUE_GROUPS % 2 == 0) {
          const uint4 both = *(const uint4*)(params + VALUE_STEP + g / 2 * 16);
          step = g % 2 ? make_uint2(both.z, both.w) : make_uint2(both.x, both.y);
        } else {
          step = *(const uint2*)(params + VALUE_STEP + g * 8);
        }
        b[g][0] = mul_f16x2(p[s][0], step.x), b[g][1] = mul_f16x2(p[s][1], step.y);
        const int j = g * VALUE_GROUP / 16, lift = BITS * (value_place(j) - place(value_tile(s, j)));
        if (lift) b[g][0] = mul_f16x2(b[g][0], half2_power_of_two(lift)), b[g][1] = mul_f16x2(b[g][1], half2_power_of_two(lift));
      }
#pragma unroll
      for (int j = 0; j < CHANNEL_TILES; j++) {
        const int tile = value_tile(s, j), g = j * 16 / VALUE_GROUP;
        if (tile % TILES == 0) word = ((const uint4*)(data + VALUE_CODES))[tile / TILES * 32 + lane];
        if (tile % TILES == PLACES) word.x >>= 8, word.y >>= 8, word.z >>= 8, word.w >>= 8;
        mma_m16n8k16_f16(state.o[j], masked(word.x, tile), masked(word.y, tile), masked(word.z, tile), masked(word.w, tile), b[g][0], b[g][1]);
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, 1)
decode_attention(const bf16* __restrict__ q, const unsigned char* __restrict__ pages, const float* __restrict__ norms,
                 const bf16* __restrict__ sink_keys, const bf16* __restrict__ sink_values, const bf16* __restrict__ window_keys,
                 const bf16* __restrict__ window_values, const int* __restrict__ lengths, Output* __restrict__ out, float* __restrict__ lse,
                 float* __restrict__ workspace, int* __restrict__ arrived, int batch, int kv_heads, int share, int page_capacity,
                 int norm_stride, int sinks, int added, float scale_log2) {
  attend(Pages{pages, norms, sink_keys, sink_values, window_keys, window_values, kv_heads, share, page_capacity, norm_stride, sinks, scale_log2},
         q, lengths, added, batch, kv_heads * share, {out, lse, workspace, arrived});
}
