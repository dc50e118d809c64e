// sm90/prefill_tiles.cu: keys and values of a prefill into the tiles of tile.cuh, which prefill_attention.cu copies
// as they are.
//
// Sequence s: tokens starts[s] ... are rows first_rows[s] ... of new_keys, new_values, [rows][kv_heads][CHANNELS]
// whose rows are key_stride, value_stride numbers apart; older ones, if they are plain BF16, [row
// slots[s]][kv_heads][capacity][HEAD_DIM] of past_keys, past_values. If these are null, unpack.cu has put the older
// tokens into the tiles. The tiles of sequence s begin at number first_tiles[s]; past its last token they are 0.
// grid (tiles, kv_heads, sequences): those of the longest sequence, without a plain past from the first with a new
// token on; 256 threads.
// Reads and writes 2 B an element.
#include "../common.cuh"
#include "tile.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    prefill_tiles(const bf16* new_keys, const bf16* new_values, const bf16* past_keys, const bf16* past_values,
                  const int* first_rows, const int* slots, const int* starts, const int* counts, const int* first_tiles,
                  unsigned char* key_tiles, unsigned char* value_tiles, int key_stride, int value_stride,
                  int capacity) {
  wait_then_allow_next();
  const int head = blockIdx.y, kv_heads = gridDim.y, sequence = blockIdx.z;
  const int start = starts[sequence], end = start + counts[sequence],
            tile = blockIdx.x + (past_keys ? 0 : start / TILE);
  if (tile * TILE >= end) return;
  const size_t to = ((size_t)(first_tiles[sequence] + tile) * kv_heads + head) * TILE_BYTES;
  const size_t past = ((size_t)(slots ? slots[sequence] : sequence) * kv_heads + head) * capacity * HEAD_DIM;
  const size_t row = first_rows[sequence];
#pragma unroll 4
  for (int i = threadIdx.x; i < TILE * VECTORS; i += THREADS) {
    const int r = i / VECTORS, vector = i % VECTORS, t = tile * TILE + r;
    uint4 key = make_uint4(0, 0, 0, 0), value = key;
    if (t >= start && t < end && vector < FILLED) {
      key = *(const uint4*)(new_keys + (row + t - start) * key_stride + head * CHANNELS + vector * 8);
      value = *(const uint4*)(new_values + (row + t - start) * value_stride + head * CHANNELS + vector * 8);
    } else if (t < start) {
      if (!past_keys) continue;
      key = *(const uint4*)(past_keys + past + (size_t)t * HEAD_DIM + vector * 8);
      value = *(const uint4*)(past_values + past + (size_t)t * HEAD_DIM + vector * 8);
    }
    *(uint4*)(key_tiles + to + swizzled_offset(r, vector)) = key;
    *(uint4*)(value_tiles + to + swizzled_offset(r, vector)) = value;
  }
}
