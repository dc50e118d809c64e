// decode_attention_bf16.cu: one query token per sequence attends to a plain BF16 cache, which is read once.
//
//   out[b,h,:] = softmax_t(scale * <q[b,h,:], keys[b,t,:]>) . values[b,t,:]
//   q heads h share kv head h / (Q_GROUPS * Q_PER_KV)
//
// keys, values [batch, kv_heads, capacity, D] bf16. grid (blocks of DecodePlan), BLOCK_WARPS * 32 threads; tasks: by
// `schedule`. A work item is a tile of 16 tokens of one kv head, 8 KB at D = 128 (attention.cuh). reads 4 D bytes a
// token and kv head.
#define ITEM_BYTES (16 * HEAD_DIM * 4)
#include "attention.cuh"

struct TileItems {
  const bf16 *keys, *values;
  int kv_heads, capacity;
  float scale_log2;
  struct Query {};

  DEVICE static int count(int tokens) { return (tokens + TILE_TOKENS - 1) / TILE_TOKENS; }
  DEVICE static void count_items(Cursor& at) {
    at.num_pages = 0;
    at.num_items = count(at.tokens);
  }
  DEVICE static int valid(const Cursor& at) { return min(TILE_TOKENS, at.tokens - at.item * TILE_TOKENS); }
  DEVICE static int block_of(int, int, int) { return 0; }
  DEVICE void copy_page(Ring&, int, const Cursor&, int) const {}
  DEVICE void copy_tile(Ring& ring, int slot, const Cursor& at) const {
    const size_t head = at.row * kv_heads + at.head / Q_GROUPS, from = (head * capacity + at.item * TILE_TOKENS) * D;
    const int n = valid(at) * D * 2;
    unsigned char* to = ring.slot_at(slot);
    ring.fill(slot, {{to, keys + from, n}, {to + TILE_TOKENS * D * 2, values + from, n}});
  }
  DEVICE static Query make_query(const TileQuery&) { return {}; }
  DEVICE static void finish_pages(State&) {}
  DEVICE void attend_page(State&, const Query&, const unsigned char*, int) const {}
  DEVICE void attend(State& state, const unsigned char* data, const TileQuery& query, const Cursor& at) const {
    attend_tile<TileItems>(state, data, query, valid(at), scale_log2);
  }
  DEVICE static float output_scale(int) { return 1.f; }
  DEVICE static uint32_t p_scale_bf16x2(int) { return ONE_BF16X2; }
  static constexpr int HALF_TILES = 1;
  DEVICE static float2 offset_term(const State&, int) { return make_float2(0.f, 0.f); }
};

extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, 1)
    decode_attention_bf16(const bf16* q, const bf16* __restrict__ keys, const bf16* __restrict__ values,
                          const int* __restrict__ lengths, const int4* __restrict__ tasks, Output* __restrict__ out,
                          float* __restrict__ lse, float4* __restrict__ workspace, int* __restrict__ split_counter,
                          int batch, int kv_heads, int capacity, int added, int parity, float scale_log2) {
  const TileItems items = {keys, values, kv_heads, capacity, scale_log2};
  attend(items, q, lengths, tasks, added, batch, kv_heads * Q_GROUPS, {out, lse, workspace, split_counter, parity});
}

extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, 1)
    schedule(const int* __restrict__ lengths, int4* __restrict__ tasks, float4* __restrict__ workspace, int batch,
             int kv_heads, int sinks, int added) {
  wait_then_allow_next();
  clear_first_half(workspace);
  schedule_block(TileItems{}, lengths, added, batch, kv_heads * Q_GROUPS, tasks);
}
