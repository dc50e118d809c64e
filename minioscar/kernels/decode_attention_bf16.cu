// decode_attention_bf16.cu: one query token per sequence attends to a plain BF16 cache, which is read once: the baseline.
//
//   out[b,h,:] = softmax_t(scale * <q[b,h,:], keys[b,t,:]>) . values[b,t,:]          q heads h share the kv head h / (SHARE * Q_PER_KV)
//
// keys, values [batch, kv_heads, capacity, D] bf16; a unit is a tile of 16 tokens of one kv head, 8 KB at D = 128. See attention.cuh.
#define UNIT_BYTES (16 * HEAD_DIM * 4)
#include "attention.cuh"

struct Tiles {
  const bf16 *keys, *values;
  int kv_heads, capacity;
  float scale_log2;
  struct Query {};

  __device__ __forceinline__ static int count(int tokens) { return (tokens + TILE_TOKENS - 1) / TILE_TOKENS; }
  __device__ __forceinline__ static void measure(Cursor& at) { at.pages = 0, at.units = count(at.tokens); }
  __device__ __forceinline__ static int valid(const Cursor& at) { return min(TILE_TOKENS, at.tokens - at.unit * TILE_TOKENS); }
  __device__ __forceinline__ void copy_page(Ring&, int, const Cursor&) const {}
  __device__ __forceinline__ void copy_tile(Ring& ring, int slot, const Cursor& at) const {
    const size_t from = ((size_t)(at.row * kv_heads + at.head / SHARE) * capacity + at.unit * TILE_TOKENS) * D;
    const int n = valid(at) * D * 2;
    unsigned char* to = ring.slot_at(slot);
    ring.fill(slot, {{to, keys + from, n}, {to + TILE_TOKENS * D * 2, values + from, n}});
  }
  __device__ __forceinline__ static Query make_query(const TileQuery&) { return {}; }
  __device__ __forceinline__ static void finish_pages(State&) {}
  __device__ __forceinline__ void attend_page(State&, const Query&, const unsigned char*, int) const {}
  __device__ __forceinline__ void attend(State& state, const unsigned char* data, const TileQuery& query, const Cursor& at) const {
    attend_tile<Tiles>(state, data, query, valid(at), scale_log2);
  }
  __device__ __forceinline__ static float unit_scale(int) { return 1.f; }
  __device__ __forceinline__ static uint32_t unit_bf16x2(int) { return ONE_BF16X2; }
  static constexpr int RUN = 1;
  __device__ __forceinline__ static float2 zero_term(const State&, int) { return make_float2(0.f, 0.f); }
};

extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, 1)
decode_attention_bf16(const bf16* q, const bf16* __restrict__ keys, const bf16* __restrict__ values, const int* __restrict__ lengths,
                      const int4* __restrict__ tasks, Output* __restrict__ out, float* __restrict__ lse, float4* __restrict__ workspace, int* __restrict__ arrived,
                      int batch, int kv_heads, int capacity, int added, int turn, float scale_log2) {
  attend(Tiles{keys, values, kv_heads, capacity, scale_log2}, q, lengths, tasks, added, batch, kv_heads * SHARE, {out, lse, workspace, arrived, turn});
}

extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, 1)
schedule(const int* __restrict__ lengths, int4* __restrict__ tasks, float4* __restrict__ workspace, int batch, int kv_heads, int sinks, int added) {
  wait_for_previous(), allow_next();
  empty_first_half(workspace);
  schedule_block(Tiles{}, lengths, added, batch, kv_heads * SHARE, tasks);
}
