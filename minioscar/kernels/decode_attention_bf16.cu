// decode_attention_bf16.cu: one query token per sequence attends to a plain BF16 cache, which is read once: the baseline.
//
//   out[b,h,:] = softmax_t(scale * <q[b,h,:], keys[b,t,:]>) . values[b,t,:]          q heads h share the kv head h / Q_PER_KV
//
// keys, values [batch, kv_heads, capacity, D] bf16; a unit is a tile of 16 tokens of one kv head, 8 KB at D = 128. See attention.cuh.
#define UNIT_BYTES (16 * HEAD_DIM * 4)
#define ONES_ROW 0
#include "attention.cuh"

struct Tiles {
  const bf16 *keys, *values;
  int kv_heads, share, capacity;
  float scale_log2;
  struct Query {};

  __device__ __forceinline__ int count(int tokens) const { return tokens > 0 ? (tokens + TILE_TOKENS - 1) / TILE_TOKENS : 0; }
  __device__ __forceinline__ int valid(const Cursor& at) const { return min(TILE_TOKENS, at.tokens - at.unit * TILE_TOKENS); }
  __device__ __forceinline__ void fetch(Ring& ring, int slot, const Cursor& at, const bf16* q) const {
    const size_t from = ((size_t)(at.row * kv_heads + at.head / share) * capacity + at.unit * TILE_TOKENS) * D;
    const int n = valid(at) * D * 2;
    ring.announce(slot, 2 * n + (q ? Q_BYTES : 0));
    if (q) ring.copy(slot, UNIT_BYTES, q, Q_BYTES);
    ring.copy(slot, 0, keys + from, n);
    ring.copy(slot, TILE_BYTES / 2, values + from, n);
  }
  __device__ __forceinline__ Query load_query(const unsigned char*) const { return {}; }
  __device__ __forceinline__ void attend(State& state, const Query&, const unsigned char* data, const unsigned char* q, const Cursor& at) const {
    attend_tile(state, data, q, valid(at), scale_log2);
  }
  __device__ __forceinline__ float unit_scale(int) const { return 1.f; }
  __device__ __forceinline__ float2 zero_term(const State&, int) const { return make_float2(0.f, 0.f); }
};

extern "C" __global__ void __launch_bounds__(BLOCK_WARPS * 32, 1)
decode_attention_bf16(const bf16* __restrict__ q, const bf16* __restrict__ keys, const bf16* __restrict__ values, const int* __restrict__ lengths,
                      Output* __restrict__ out, float* __restrict__ lse, float* __restrict__ workspace, int* __restrict__ arrived,
                      int batch, int kv_heads, int share, int capacity, int added, float scale_log2) {
  attend(Tiles{keys, values, kv_heads, share, capacity, scale_log2}, q, lengths, added, batch, kv_heads * share, {out, lse, workspace, arrived});
}
