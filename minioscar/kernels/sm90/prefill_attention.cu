// sm90/prefill_attention.cu: what the general prefill_attention.cu computes, with the warpgroup instructions of
// compute capability 9.0 (compiled for sm_90a). They multiply asynchronously, from shared memory, at nearly twice the
// rate of mma.sync.
//
// A work item is 128 rows of a kv head, (token, q head) pairs, head by head of token after token, and the keys that
// they see. A block takes several, grid (at most a block a multiprocessor); one pass covers as many heads as L2 holds
// the keys and values of. Two warpgroups have 64 rows each, q in registers; a warp beside them copies tiles of 128
// keys and values ahead, each as soon as both have read the tile before in its slot, and continues with the next item
// while the others finish one. A warpgroup issues the logits of tile j and p . v of tile j - 1 together, and computes
// exp of the logits while the latter, and then the other warpgroup's products, run: they alternate (ping-pong), so
// that one computes exponentials while the other multiplies.
// Softmax with a running max m, at first the first tile's largest logit. BF16 has float32's exponents, so p may be
// large: p = 2^(x - m) is computed without searching for the largest x. Only where the sums exceed 2^60, which hardly
// ever happens, the logits are computed again and m rises. p is rounded to BF16, at most 2^-8 of it.
//
// keys, values: tiles as prefill_tiles.cu and unpack.cu write them, [tiles][kv_heads][TILE_BYTES], in the order that
// wgmma reads from shared memory: a tile is one copy. Sequence s has those from first_tiles[s] on. Tokens past its
// last one are never seen, but are finite.
//
// Few new tokens after a long past are too few items for a card: then the keys are split, split_tiles tiles an item.
// The sums of the splits go to workspace, float32 [sequences][kv_heads][blocks of rows][splits][128 rows](D sums),
// then (m, l), and the block that counts last in split_counter, int [sequences][kv_heads][blocks of rows], zero
// before and after, adds them in their order. They carry weights 2^(m_i - m), and the two warpgroups count as one, so
// split_merge.cuh does not fit.
//
// Shared memory: STAGES tiles of keys | of values | q of the next item | mbarriers.
// Operations: 4 D for each q head, query and key that it sees; 64 KB from L2 for 8.4 million of them (D = 128). Of
// shared memory's 128 bytes a clock wgmma takes 64, operand b once for each warpgroup; copies take up to 32 more, and
// q, were it there, half of 32.
//
// With FULL, of towers, every row sees all keys of its sequence. With CHANNELS, a multiple of 8 less than HEAD_DIM, a
// head has so many channels in q and out; in tiles and shared memory zeros follow, which change no sum. As many of
// them are multiplied as make whole steps of 16 channels: 80 for heads of 72.
//
// Set by -D: HEAD_DIM (64, 128), Q_PER_KV (any), STAGES.
#include "../common.cuh"
#include "tile.cuh"
#include "wgmma.cuh"

constexpr int D = HEAD_DIM, STEPS = (CHANNELS + 15) / 16, GROUPS = 2, GROUP_THREADS = 128, BLOCK_ROWS = 64 * GROUPS,
              THREADS = (GROUPS + 1) * GROUP_THREADS;
constexpr int KEY_TILES = TILE / 8, CHANNEL_TILES = 2 * STEPS, Q_BYTES = BLOCK_ROWS * D * 2, PATTERN = 1024;
constexpr int VALUES_OFFSET = STAGES * TILE_BYTES, Q_OFFSET = VALUES_OFFSET + STAGES * TILE_BYTES,
              BARRIERS_OFFSET = Q_OFFSET + Q_BYTES;
constexpr int IS_LAST_OFFSET = BARRIERS_OFFSET + 4 * STAGES * 8;
constexpr int PINGPONG_BARRIER = 1,
              MERGE_BARRIER = PINGPONG_BARRIER + GROUPS;  // named barriers; the first one for each warpgroup
constexpr float MAX_SUM = 0x1p60f;

// 128 rows of one kv head of a sequence, and the keys that they see, or a split of these.
struct Item {
  int sequence, head, block, split, splits, rows, start, first, end, from, tiles;  // splits: of these rows

  // Of those that a row sees.
  DEVICE int last_key(int row) const {
#ifdef FULL
    return end - 1;
#else
    return start + row / Q_PER_KV;
#endif
  }
};

struct Items {
  const int *starts, *counts;
  int kv_heads, heads_per_pass, sequences, blocks, splits, split_tiles, total;

  // The first of this block's items from number i on that is not empty. Passes of `heads_per_pass` heads; in a pass
  // items with the most keys first, and each block gets as many of the longer as of the shorter ones.
  DEVICE bool seek(int& i, Item& x) const {
    for (; i * (int)gridDim.x < total; i++) {
      int n = i * gridDim.x + (i % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
      if (n >= total) continue;
      const int heads = blocks * splits * sequences * heads_per_pass, before = n / heads * heads_per_pass;
      n -= before / heads_per_pass * heads;
      x.split = n % splits;
      n /= splits;
      x.head = before + n % heads_per_pass;
      n /= heads_per_pass;
      x.sequence = n % sequences;
      x.block = blocks - 1 - n / sequences;
      x.rows = counts[x.sequence] * Q_PER_KV;
      x.start = starts[x.sequence];
      x.first = x.block * BLOCK_ROWS;
#ifdef FULL
      x.end = x.start + counts[x.sequence];
#else
      x.end = x.start + (min(x.first + BLOCK_ROWS, x.rows) - 1) / Q_PER_KV + 1;  // of the keys that any row sees
#endif
      const int all = (x.end + TILE - 1) / TILE;
      x.from = x.split * split_tiles;
      x.tiles = min(all - x.from, split_tiles);
      x.splits = (all + split_tiles - 1) / split_tiles;
      if (x.first < x.rows && x.tiles > 0) return true;
    }
    return false;
  }
};

struct Slot {  // of a tile in a ring, and the parity of the ring's round
  int index, parity;
  DEVICE Slot next() const { return index + 1 == STAGES ? Slot{0, parity ^ 1} : Slot{index + 1, parity}; }
};

struct Ring {  // of tiles of keys or of values
  unsigned char* tiles;
  uint64_t *full, *empty;
  DEVICE unsigned char* tile(Slot at) const { return tiles + at.index * TILE_BYTES; }
  DEVICE void fill(Slot at, const unsigned char* from) const {  // by a warp
    mbarrier_wait(empty + at.index, at.parity ^ 1);
    if (elect_one()) {
      mbarrier_arrive_expect_tx(full + at.index, TILE_BYTES);
      bulk_copy(tile(at), from, TILE_BYTES, full + at.index);
    }
  }
  DEVICE void wait(Slot at) const { mbarrier_wait(full + at.index, at.parity); }
  DEVICE void release(Slot at) const {
    mbarrier_arrive(empty + at.index);
  }  // by every thread, for what it has read itself
};

// x: q . k of 64 rows and the keys of a tile. Issued, not complete.
DEVICE void multiply_keys(float (&x)[KEY_TILES][4], const uint32_t (&q)[STEPS][4], const unsigned char* keys) {
  const uint64_t b = wgmma_operand(keys, PATTERN, 0);
  UNROLL for (int s = 0; s < STEPS; s++) {
    const int at = (s / 4 * HALF_BYTES + s % 4 * 32) >> 4;  // the address is the descriptor's lowest field
    if (s == 0) wgmma_bf16_k_major<true>(x, q[s], b);
    else wgmma_bf16_k_major<false>(x, q[s], b + at);
  }
}

DEVICE void multiply_values(float (&o)[CHANNEL_TILES][4], const uint32_t (&p)[TILE / 16][4],
                            const unsigned char* values) {
  const uint64_t b = wgmma_operand(values, PATTERN, HALF_BYTES);
  UNROLL for (int s = 0; s < TILE / 16; s++) wgmma_bf16(o, p[s], b + (s * 16 * 128 >> 4));
}

// The logits of a tile once more, of a warp's sixteen rows alone and without wgmma.
DEVICE void multiply_keys_again(float (&x)[KEY_TILES][4], const uint32_t (&q)[STEPS][4], const unsigned char* keys) {
  const int lane = threadIdx.x % 32;
  clear(x);
  UNROLL for (int n = 0; n < KEY_TILES; n += 2)
    UNROLL for (int s = 0; s < STEPS; s++) {
      uint32_t k[4];
      ldmatrix_x4(k, keys + swizzled_offset(8 * n + lane / 16 * 8 + lane % 8, 2 * s + lane / 8 % 2));
      mma_m16n8k16_bf16(x[n], q[s][0], q[s][1], q[s][2], q[s][3], k[0], k[1]);
      mma_m16n8k16_bf16(x[n + 1], q[s][0], q[s][1], q[s][2], q[s][3], k[2], k[3]);
    }
}

// Rows r and r + 8 of a warp's sixteen, for lane 4r + c.
struct Softmax {
  float m[2], l[2], factor[2];  // l: of this lane's keys

  // Row i sees the keys of this tile up to last[i].
  DEVICE static void apply_causal_mask(float (&x)[KEY_TILES][4], int last0, int last1) {
    const int c = threadIdx.x % 4;
    UNROLL for (int n = 0; n < KEY_TILES; n++)
      UNROLL for (int k = 0; k < 4; k++)
        if (8 * n + 2 * c + k % 2 > (k < 2 ? last0 : last1)) x[n][k] = MASKED;
  }

  // m becomes the largest of x, or such that l becomes 1 to 2 if that is more. The sums so far are to be multiplied
  // by `factor`.
  DEVICE void update_max(const float (&x)[KEY_TILES][4], float scale_log2) {
    UNROLL for (int i = 0; i < 2; i++) {
      float y = MASKED;
      UNROLL for (int n = 0; n < KEY_TILES; n++) y = fmaxf(y, fmaxf(x[n][2 * i], x[n][2 * i + 1]));
      y = fmaxf(y * scale_log2, m[i] + (float)max((int)(__float_as_uint(l[i]) >> 23) - 127, 0));
      y = quad_max(y);
      factor[i] = ex2(m[i] - y);
      m[i] = y;
      l[i] *= factor[i];
    }
  }

  // x becomes p = 2^(x * scale_log2 - m). Returns whether a sum of the warp is too large now.
  DEVICE bool exp_scores(float (&x)[KEY_TILES][4], float scale_log2) {
    UNROLL for (int n = 0; n < KEY_TILES; n++)
      UNROLL for (int k = 0; k < 4; k++) {
        x[n][k] = ex2(fmaf(x[n][k], scale_log2, -m[k / 2]));
        l[k / 2] += x[n][k];
      }
    return __any_sync(FULL_MASK, l[0] > MAX_SUM || l[1] > MAX_SUM);
  }

  DEVICE void rescale(float (&o)[CHANNEL_TILES][4]) const {
    UNROLL for (int n = 0; n < CHANNEL_TILES; n++)
      UNROLL for (int k = 0; k < 4; k++) o[n][k] *= factor[k / 2];
  }
};

DEVICE void round_p(uint32_t (&p)[TILE / 16][4], const float (&x)[KEY_TILES][4]) {
  UNROLL for (int s = 0; s < TILE / 16;
              s++)  // two column tiles of an accumulator, side by side, are laid out like operand a
      UNROLL for (int k = 0; k < 4; k++) p[s][k] =
          pack_bf16x2(x[2 * s + k / 2][k % 2 * 2], x[2 * s + k / 2][k % 2 * 2 + 1]);
}

// Writes the sums of a split and counts it. Returns true in the block that counts last, and o and state.l are then
// those of all splits.
DEVICE bool merge_splits(
    float (&o)[CHANNEL_TILES][4], Softmax& state, float* sums, int* split_counter, int split, int splits, int* last) {
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  float2* const scales = (float2*)(sums + (size_t)splits * BLOCK_ROWS * D);
  UNROLL for (int i = 0; i < 2; i++) {
    const size_t n = split * BLOCK_ROWS + row + 8 * i;
    if (c == 0) __stcg(scales + n, make_float2(state.m[i], state.l[i]));
    UNROLL for (int k = 0; k < CHANNEL_TILES; k++)
      __stcg((float2*)(sums + n * D + 8 * k + 2 * c), make_float2(o[k][2 * i], o[k][2 * i + 1]));
  }
  named_barrier_wait(MERGE_BARRIER, GROUPS * GROUP_THREADS);
  if (threadIdx.x == 0) {
    *last = atomic_add_acq_rel(split_counter, 1) == splits - 1;
    if (*last) *split_counter = 0;
  }
  named_barrier_wait(MERGE_BARRIER, GROUPS * GROUP_THREADS);
  if (!*last) return false;
  UNROLL for (int i = 0; i < 2; i++) {
    float m = INITIAL_MAX, l = 0.f;
    for (int s = 0; s < splits; s++) m = fmaxf(m, __ldcg(scales + s * BLOCK_ROWS + row + 8 * i).x);
    UNROLL for (int k = 0; k < CHANNEL_TILES; k++) o[k][2 * i] = o[k][2 * i + 1] = 0.f;
    for (int s = 0; s < splits; s++) {
      const size_t n = s * BLOCK_ROWS + row + 8 * i;
      const float2 scale = __ldcg(scales + n);
      const float weight = ex2(scale.x - m);
      l += weight * scale.y;
      UNROLL for (int k = 0; k < CHANNEL_TILES; k++) {
        const float2 y = __ldcg((float2*)(sums + n * D + 8 * k + 2 * c));
        o[k][2 * i] += weight * y.x;
        o[k][2 * i + 1] += weight * y.y;
      }
    }
    state.l[i] = l;
  }
  return true;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    prefill_attention(const bf16* q, const unsigned char* key_tiles, const unsigned char* value_tiles,
                      const int* first_tiles, const int* first_rows, const int* starts, const int* counts, bf16* out,
                      float* workspace, int* split_counter, int q_stride, int kv_heads, int heads_per_pass,
                      int sequences, int blocks, int splits, int split_tiles, float scale_log2) {
  wait_then_allow_next();
  extern __shared__ __align__(1024) unsigned char smem[];
  uint64_t* barriers = (uint64_t*)(smem + BARRIERS_OFFSET);
  const Ring keys = {smem, barriers, barriers + STAGES};
  const Ring values = {smem + VALUES_OFFSET, barriers + 2 * STAGES, barriers + 3 * STAGES};
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(keys.full + s, 1);
      mbarrier_init(values.full + s, 1);
      mbarrier_init(keys.empty + s, GROUPS * GROUP_THREADS);
      mbarrier_init(values.empty + s, GROUPS * GROUP_THREADS);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  const Items items = {starts, counts, kv_heads, heads_per_pass, sequences,
                       blocks, splits, split_tiles, blocks * splits * kv_heads * sequences};
  Item item;
  int number = 0;  // of items
  Slot at = {0, 0};
  const int group = __shfl_sync(FULL_MASK, threadIdx.x / GROUP_THREADS, 0);
  if (group == GROUPS) {
    decrease_registers<24>();
    if (threadIdx.x >= GROUPS * GROUP_THREADS + 32) return;
    for (; items.seek(number, item); number++) {
      int tile = (first_tiles[item.sequence] + item.from) * kv_heads + item.head;
      for (int j = 0; j < item.tiles; j++, at = at.next(), tile += kv_heads) {
        const size_t from = (size_t)tile * TILE_BYTES;
        keys.fill(at, key_tiles + from);
        values.fill(at, value_tiles + from);
      }
    }
    return;
  }

  increase_registers<240>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const size_t out_stride = (size_t)kv_heads * Q_PER_KV * CHANNELS;
  auto head_at = [&](const Item& x, size_t stride) {
    return first_rows[x.sequence] * stride + x.head * Q_PER_KV * CHANNELS;
  };
  unsigned char* const own_q = smem + Q_OFFSET + warp * 16 * D * 2;  // the warp's sixteen rows
  auto q_vector = [&](int r, int vector) { return own_q + r * D * 2 + (vector ^ r % 8) * 16; };
  auto copy_q = [&](const Item& x) {
    const bf16* from = q + head_at(x, q_stride);
    for (int i = lane; i < 16 * FILLED; i += 32) {
      const int r = i / FILLED, n = min(x.first + warp * 16 + r, x.rows - 1);  // rows past the end repeat the last row
      const bf16* token = from + (size_t)(n / Q_PER_KV) * q_stride;
      cp_async_16(q_vector(r, i % FILLED), token + n % Q_PER_KV * CHANNELS + i % FILLED * 8);
    }
  };
  auto wait_pingpong = [&] { named_barrier_wait(PINGPONG_BARRIER + group, 2 * GROUP_THREADS); };
  auto pass_pingpong = [&] { named_barrier_arrive(PINGPONG_BARRIER + (group ^ 1), 2 * GROUP_THREADS); };

  if (FILLED < 2 * STEPS && lane < 16) *(uint4*)q_vector(lane, FILLED) = make_uint4(0, 0, 0, 0);
  bool has_item = items.seek(number, item);
  if (has_item) copy_q(item);
  if (group == 1) pass_pingpong();  // warpgroup 0 goes first
  while (has_item) {
    const int warp_row = item.first + warp * 16, own_row = warp_row + lane / 4;
    float x[KEY_TILES][4], o[CHANNEL_TILES][4];
    uint32_t p[TILE / 16][4], rows[STEPS][4];
    Softmax state = {{INITIAL_MAX, INITIAL_MAX}, {0.f, 0.f}, {0.f, 0.f}};
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    UNROLL for (int s = 0; s < STEPS; s++) ldmatrix_x4(rows[s], q_vector(lane % 16, 2 * s + lane / 16));
    __syncwarp();
    clear(o);
    // Logits of tile j of the item to p; then waits for the operands of the next products. Returns whether the sums
    // are to be multiplied by state.factor.
    auto scores_to_p = [&](int j) {
      const int first = (item.from + j) * TILE;
      const int last0 = item.last_key(own_row) - first, last1 = item.last_key(own_row + 8) - first;
      const bool sees_all = item.last_key(warp_row) - first >= TILE - 1;  // every row of the warp, all keys of the tile
      const float before[2] = {state.l[0], state.l[1]};
      bool rescaled = j == 0;
      if (!sees_all) state.apply_causal_mask(x, last0, last1);
      if (rescaled) state.update_max(x, scale_log2);
      while (state.exp_scores(x, scale_log2)) {
        multiply_keys_again(x, rows, keys.tile(at));
        if (!sees_all) state.apply_causal_mask(x, last0, last1);
        state.l[0] = before[0];
        state.l[1] = before[1];
        rescaled = true;
        state.update_max(x, scale_log2);
      }
      compiler_fence(x);
      keys.release(at);
      if (j + 1 < item.tiles) keys.wait(at.next());
      values.wait(at);
      return rescaled;
    };
    keys.wait(at);
    wait_pingpong();
    compiler_fence(x);
    compiler_fence(rows);
    wgmma_fence();
    multiply_keys(x, rows, keys.tile(at));
    wgmma_commit();
    pass_pingpong();
    Item next;
    number++;
    has_item = items.seek(number, next);
    if (has_item) copy_q(next);
    wgmma_wait<0>();
    compiler_fence(x);
    compiler_fence(rows);
    scores_to_p(0);
    round_p(p, x);
    Slot before = at;
    at = at.next();
    for (int j = 1; j < item.tiles; j++, before = at, at = at.next()) {
      wait_pingpong();
      compiler_fence(x);
      compiler_fence(o);
      compiler_fence(p);
      compiler_fence(rows);
      wgmma_fence();
      multiply_keys(x, rows, keys.tile(at));
      wgmma_commit();
      multiply_values(o, p, values.tile(before));
      wgmma_commit();
      pass_pingpong();
      wgmma_wait<1>();
      compiler_fence(x);
      compiler_fence(rows);
      const bool rescaled = scores_to_p(j);
      wgmma_wait<0>();
      compiler_fence(o);
      compiler_fence(p);
      values.release(before);
      if (rescaled) state.rescale(o);
      round_p(p, x);
    }
    compiler_fence(o);
    compiler_fence(p);
    wgmma_fence();
    multiply_values(o, p, values.tile(before));
    wgmma_commit();
    wgmma_wait<0>();
    compiler_fence(o);
    values.release(before);

    UNROLL for (int i = 0; i < 2; i++) state.l[i] = quad_sum(state.l[i]);
    bool is_last = true;
    if (item.splits > 1) {
      const size_t index = ((size_t)item.sequence * kv_heads + item.head) * blocks + item.block;
      float* sums = workspace + index * splits * BLOCK_ROWS * (D + 2);
      is_last =
          merge_splits(o, state, sums, split_counter + index, item.split, item.splits, (int*)(smem + IS_LAST_OFFSET));
    }
    bf16* result = out + head_at(item, out_stride) + 2 * (lane % 4);
    UNROLL for (int i = 0; i < 2; i++) {
      const float inverse = 1.f / state.l[i];
      const int row = own_row + 8 * i;
      if (row >= item.rows || !is_last) continue;
      bf16* to = result + row / Q_PER_KV * out_stride + row % Q_PER_KV * CHANNELS;
      UNROLL for (int k = 0; k < FILLED; k++)
        *(uint32_t*)(to + 8 * k) = pack_bf16x2(o[k][2 * i] * inverse, o[k][2 * i + 1] * inverse);
    }
    item = next;
  }
  if (group == 0) wait_pingpong();  // for the other warpgroup's last arrival
}
