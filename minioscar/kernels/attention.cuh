// attention.cuh: what the two decode kernels share: a warp's walk over its work items.
//
//   m = running max of x, l = sum 2^(x - m), o = sum 2^(x - m) value            x = logit * log2(e); output = o / l
//
// The cache of all sequences is one long list of work items, sequence after sequence, kv head after kv head. An item
// is what one warp copies and attends to at a time: a packed page of 64 tokens, or a tile of BF16 tokens of about as
// many bytes. Every warp of the grid takes an equal, contiguous share of the list. `schedule` finds the shares from
// the lengths in device memory, once a step for all layers; so a fixed grid serves every step of a captured graph and
// sequences of unequal length. A warp copies STAGES items ahead into its ring.
//
// A head that one warp has whole is stored directly; else the partial sums of warps and blocks are merged
// (decode_merge.cuh) in list order: equal inputs give equal bits.
//
// q is the small operand of every MMA, a column a head. Up to 4 heads fill the 8 columns twice (COLUMN_HALVES), so
// that the two halves can multiply different groups of steps (decode_attention.cu).
//
// Set by -D: HEAD_DIM, Q_PER_KV (1..8 q heads of a work item), Q_GROUPS (how many such groups share a kv head),
// BLOCK_WARPS, STAGES, OUT_BF16. The including file defines ITEM_BYTES (of an item in the ring) and a type Items:
//   count(tokens)            items of a kv head of a sequence; count_items(cursor) sets num_pages and num_items
//   block_of(row, item, num_pages)    block of the cache that has a page
//   copy_page, copy_tile     (ring, slot, cursor): start the copies of one item; of a page, (..., block)
//   make_query(q)            q as attend_page takes it
//   attend_page, attend      attend to a page, to a tile; finish_pages(state) comes between them
//   output_scale(j), offset_term(state, j)    turn the sums of channel tile j into true numbers
//   HALF_TILES               channel tiles in a row that one column half is for
#ifndef MINIOSCAR_ATTENTION_CUH
#define MINIOSCAR_ATTENTION_CUH

constexpr int D = HEAD_DIM, TOKEN_BYTES = D * 2 * 2;  // of a BF16 token: key and value
constexpr int TILE_TOKENS = ITEM_BYTES / TOKEN_BYTES < 16 ? ITEM_BYTES / TOKEN_BYTES : 16;
constexpr int RING_BYTES = STAGES * ITEM_BYTES;
constexpr int FIRST_WARPS = (BLOCK_WARPS + 1) / 2;  // warps that issue early copies first
constexpr int MIN_ITEMS_FOR_TWO = 6;                // from which on a warp issues two early copies
#include "decode_merge.cuh"
#include "sm90/bulk_copies.cuh"

constexpr int CHANNEL_TILES = D / 16;
constexpr int COLUMN_HALVES = Q_PER_KV <= 4 ? 2 : 1, COLUMNS = 8 / COLUMN_HALVES;

// The q head in column n; columns without one repeat the last.
DEVICE int head_of_column(int n) { return min(n % COLUMNS, Q_PER_KV - 1); }

// Sums of a warp for one head: of p * value, 1 / output_scale as large; of p * parameter (rows 0..7: sums[0],
// sums[1]) and of p (rows 8..15: sums[2], sums[3]); and the running max m: p = 2^(x - m). A lane holds columns 2c and
// 2c + 1.
struct State {
  float o[CHANNEL_TILES][4];
  float sums[4];
  float m0, m1;
  bool is_first;
  DEVICE void reset() {
    clear(o);
    clear(sums);
    m0 = m1 = 0.f;
    is_first = true;
  }
  // Raises the running maxima by x0, x1 and rescales the sums.
  DEVICE void rescale(float x0, float x1) {
    const float factor[2] = {ex2(-x0), ex2(-x1)};
    m0 += x0;
    m1 += x1;
    is_first = false;
    UNROLL for (int j = 0; j < CHANNEL_TILES; j++)
      UNROLL for (int i = 0; i < 4; i++) o[j][i] *= factor[i % 2];
    UNROLL for (int i = 0; i < 4; i++) sums[i] *= factor[i % 2];
  }
};

// By how much the running maxima must rise; x0, x1: how far this lane's largest logits are above them. To the largest
// of all lanes of the head plus 3, so that few later logits surpass it; never down, but the first time.
DEVICE void max_increase(float& x0, float& x1, bool is_first) {
  UNROLL for (int other = COLUMN_HALVES == 2 ? 2 : 4; other < 32; other *= 2) {
    x0 = fmaxf(x0, __shfl_xor_sync(FULL_MASK, x0, other));
    x1 = fmaxf(x1, __shfl_xor_sync(FULL_MASK, x1, other));
  }
  x0 += 3.f;
  x1 += 3.f;
  if (is_first) return;
  x0 = fmaxf(x0, 0.f);
  x1 = fmaxf(x1, 0.f);
}

// Channel of row `row` (0..15) of channel tile j, the sum of those of row 0 and of tile 0: a lane's 16-byte load of 8
// neighbouring channels then feeds two tiles (LAYOUT.md).
DEVICE int value_channel(int j, int row) { return j / 2 * 32 + row % 8 / 2 * 8 + j % 2 * 4 + row / 8 * 2 + row % 2; }

constexpr uint32_t ONE_BF16X2 = 0x3f803f80u;
DEVICE uint32_t scaled_bf16x2(uint32_t p, uint32_t scale) { return scale == ONE_BF16X2 ? p : mul_bf16x2(p, scale); }

// A head's q [Q_PER_KV][D] as attend_tile takes it.
struct TileQuery { uint4 b[D / 32]; };
DEVICE TileQuery load_tile_query(const bf16* q) {
  TileQuery query;
  const int lane = threadIdx.x % 32;
  UNROLL for (int i = 0; i < D / 32; i++) query.b[i] =
      *(const uint4*)(q + head_of_column(lane / 4) * D + i * 32 + lane % 4 * 8);
  return query;
}

// Attends to one tile of `valid` (1..TILE_TOKENS) BF16 tokens in shared memory: keys [TILE_TOKENS][D], then values.
template <class Items>
DEVICE void attend_tile(State& state, const unsigned char* tile, const TileQuery& query, int valid, float scale_log2) {
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const uint4 none = make_uint4(0, 0, 0, 0);
  const bool has0 = r < valid, has1 = r + 8 < valid;
  float x[4] = {0.f, 0.f, 0.f, 0.f};
  UNROLL for (int i = 0; i < D / 32; i++) {
    const int at = i * 64 + c * 16;
    const uint4 k0 = has0 ? *(const uint4*)(tile + r * D * 2 + at) : none;
    const uint4 k1 = has1 ? *(const uint4*)(tile + (r + 8) * D * 2 + at) : none;
    const uint4 b = query.b[i];
    mma_m16n8k16_bf16(x, k0.x, k1.x, k0.y, k1.y, b.x, b.y);
    mma_m16n8k16_bf16(x, k0.z, k1.z, k0.w, k1.w, b.z, b.w);
  }
  const float m[2] = {state.m0, state.m1};
  UNROLL for (int i = 0; i < 4; i++) x[i] = (i < 2 ? has0 : has1) ? fmaf(x[i], scale_log2, -m[i % 2]) : MASKED;
  if (__any_sync(FULL_MASK, state.is_first || fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])) > 1.f)) {
    float x0 = fmaxf(x[0], x[2]), x1 = fmaxf(x[1], x[3]);
    max_increase(x0, x1, state.is_first);
    state.rescale(x0, x1);
    UNROLL for (int i = 0; i < 4; i++) x[i] -= i % 2 ? x1 : x0;
  }
  uint32_t high_p[2], low_p[2];  // p as the sum of two bf16: 16 bits of mantissa
  UNROLL for (int i = 0; i < 2; i++) {
    const float p0 = ex2(x[2 * i]), p1 = ex2(x[2 * i + 1]);
    high_p[i] = pack_bf16x2(p0, p1);
    low_p[i] = pack_bf16x2(p0 - low(high_p[i]), p1 - high(high_p[i]));
    high_p[i] = movmatrix(high_p[i]);
    low_p[i] = movmatrix(low_p[i]);
  }
  mma_m16n8k16_bf16(state.sums, 0, ONE_BF16X2, 0, ONE_BF16X2, high_p[0], high_p[1]);
  mma_m16n8k16_bf16(state.sums, 0, ONE_BF16X2, 0, ONE_BF16X2, low_p[0], low_p[1]);
  const unsigned char* values = tile + TILE_TOKENS * D * 2;
  UNROLL for (int j = 0; j < CHANNEL_TILES; j += 2) {
    const int at = j * 32 + c * 16;
    const uint4 v0 = has0 ? *(const uint4*)(values + r * D * 2 + at) : none;
    const uint4 v1 = has1 ? *(const uint4*)(values + (r + 8) * D * 2 + at) : none;
    const uint32_t a[2][4] = {{movmatrix(v0.x), movmatrix(v0.y), movmatrix(v1.x), movmatrix(v1.y)},
                              {movmatrix(v0.z), movmatrix(v0.w), movmatrix(v1.z), movmatrix(v1.w)}};
    UNROLL for (int u = 0; u < 2; u++) {
      const uint32_t scale = Items::p_scale_bf16x2(j + u);  // an exact power of two
      float(&o)[4] = state.o[j + u];
      const uint32_t h0 = scaled_bf16x2(high_p[0], scale), h1 = scaled_bf16x2(high_p[1], scale);
      mma_m16n8k16_bf16(o, a[u][0], a[u][1], a[u][2], a[u][3], h0, h1);
      const uint32_t l0 = scaled_bf16x2(low_p[0], scale), l1 = scaled_bf16x2(low_p[1], scale);
      mma_m16n8k16_bf16(o, a[u][0], a[u][1], a[u][2], a[u][3], l0, l1);
    }
  }
}

// --- copies

struct Copy { void* to; const void* from; int bytes; };

// A warp's ring of items in shared memory, filled STAGES ahead.
struct Ring {
  unsigned char* slots;
  uint64_t* barriers;
  uint64_t policy;

  DEVICE void setup(unsigned char* memory, uint64_t* bars) {
    slots = memory;
    barriers = bars;
#if BULK_COPIES
    policy = l2_evict_first();
    if (threadIdx.x % 32 == 0) {
      for (int i = 0; i < STAGES; i++) mbarrier_init(&barriers[i], 1);
      mbarrier_init_fence();
    }
    __syncwarp();
#endif
  }
  DEVICE unsigned char* slot_at(int slot) const { return slots + slot * ITEM_BYTES; }

  // Starts the copies that fill a slot, all sizes multiples of 16 bytes and perhaps 0.
  template <int N> DEVICE void fill(int slot, const Copy (&copies)[N]) {
#if BULK_COPIES
    if (elect_one()) {
      int bytes = 0;
      UNROLL for (int i = 0; i < N; i++) bytes += copies[i].bytes;
      mbarrier_arrive_expect_tx(&barriers[slot], bytes);
      UNROLL for (int i = 0; i < N; i++)
        if (copies[i].bytes) bulk_copy(copies[i].to, copies[i].from, copies[i].bytes, &barriers[slot], policy);
    }
#else
    UNROLL for (int k = 0; k < N; k++)
      for (int i = threadIdx.x % 32 * 16; i < copies[k].bytes; i += 512)
        cp_async_16((char*)copies[k].to + i, (const char*)copies[k].from + i);
#endif
  }
  DEVICE void commit() {  // after the copies of a slot, also where no items are left
#if !BULK_COPIES
    cp_async_commit();
#endif
  }
  DEVICE void wait(int slot, uint32_t parity) {
#if BULK_COPIES
    mbarrier_wait(&barriers[slot], parity);
#else
    cp_async_wait<STAGES - 1>();
    __syncwarp();
#endif
  }
  // Waits for the first item in a slot of another warp, `warps` further on. No overlap without mbarriers.
  DEVICE void wait_for_other(int warps, int slot) {
#if BULK_COPIES
    mbarrier_wait(barriers + warps * STAGES + slot, 0);
#endif
  }
};

// y times H, of which each channel has a place: the bits of its number are those of n, of i / 2, of the lane's row and
// of its column half, in some order, and H is a product over them.
template <int N> DEVICE void rotate_sums(float (&y)[N][4]) {
  static_assert((N & (N - 1)) == 0 && N * 2 * 8 * COLUMN_HALVES == D, "a power of two each");
  UNROLL for (int n = 0; n < N; n++)
    UNROLL for (int i = 0; i < 2; i++) {
      const float a = y[n][i], b = y[n][i + 2];
      y[n][i] = a + b;
      y[n][i + 2] = a - b;
    }
  UNROLL for (int stride = 1; stride < N; stride *= 2)
    UNROLL for (int n = 0; n < N; n++)
      UNROLL for (int i = 0; i < 4; i++) {
        if (n & stride) continue;
        const float a = y[n][i], b = y[n + stride][i];
        y[n][i] = a + b;
        y[n + stride][i] = a - b;
      }
  UNROLL for (int other = COLUMN_HALVES == 2 ? 2 : 4; other < 32; other *= 2) {
    const float sign = threadIdx.x & other ? -1.f : 1.f;
    UNROLL for (int n = 0; n < N; n++)
      UNROLL for (int i = 0; i < 4; i++) y[n][i] = fmaf(sign, y[n][i], __shfl_xor_sync(FULL_MASK, y[n][i], other));
  }
  UNROLL for (int n = 0; n < N; n++)
    UNROLL for (int i = 0; i < 4; i++) y[n][i] *= rsqrtf((float)D);
}

// Stores a warp's sums of a head: to the output if the warp has the WHOLE head, else as partial `index`.
template <bool WHOLE, class Items>
DEVICE void store_sums(const State& state, unsigned char* smem, const Results& to, int head, int index) {
  constexpr int RUN = Items::HALF_TILES, BOTH = COLUMN_HALVES * RUN,
                LANE_TILES = (CHANNEL_TILES + BOTH - 1) / BOTH * RUN;
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, first = 2 * c % COLUMNS;
  const bool second = COLUMN_HALVES == 2 && c >= 2;  // the column half whose tiles this lane stores
  const int row = value_channel(0, r) + (second ? value_channel(RUN, 0) : 0);
  const float l[2] = {state.sums[2], state.sums[3]}, inverse[2] = {rcp_approx(l[0]), rcp_approx(l[1])};
  float* sums = partial_sums(smem, index) + first * D + row;
  Output* out = to.out + (size_t)head * OUT + first * D + row;
  float2 offset;
  float y[LANE_TILES][4];
  UNROLL for (int n = 0; n < LANE_TILES; n++) {
    const int j = n / RUN * BOTH + n % RUN, above = min(j + RUN, CHANNEL_TILES - 1);
    if (n % RUN == 0) offset = Items::offset_term(state, second ? above : j);
    const float scale = second ? Items::output_scale(above) : Items::output_scale(j);
    UNROLL for (int i = 0; i < 4; i++) {
      y[n][i] = fmaf(second ? state.o[above][i] : state.o[j][i], scale, i % 2 ? offset.y : offset.x);
      if (WHOLE) y[n][i] *= inverse[i % 2];
    }
  }
#if ROTATED
  if (WHOLE) rotate_sums(y);
#endif
  UNROLL for (int n = 0; n < LANE_TILES; n++) {
    const int j = n / RUN * BOTH + n % RUN, channel = value_channel(j, 0);
    if (second && j + RUN >= CHANNEL_TILES) continue;
    UNROLL for (int i = 0; i < 4; i++) {
      if (first + i % 2 >= Q_PER_KV) continue;
      if (WHOLE) out[i % 2 * D + channel + i / 2 * 2] = to_output(y[n][i]);
      else sums[i % 2 * D + channel + i / 2 * 2] = y[n][i];
    }
  }
  if (r || c >= COLUMNS / 2) return;
  UNROLL for (int i = 0; i < 2; i++) {
    const int q_head = 2 * c + i;
    const float m = i ? state.m1 : state.m0;
    if (q_head >= Q_PER_KV) continue;
    if (WHOLE) store_lse(to, head, q_head, m, l[i]);
    else ((float2*)(smem + ML_OFFSET))[index * Q_PER_KV + q_head] = make_float2(m, l[i]);
  }
}

// --- the walk over the list

// lengths [batch]; a sequence has lengths[b] + added tokens, and none where that is not positive: its output is 0.
// q [batch, heads, Q_PER_KV, D]. Dynamic shared memory: LENGTHS_OFFSET + 4 * batch bytes.
template <class Items>
DEVICE void attend(const Items& items, const bf16* q, const int* lengths, const int4* tasks, int added, int batch,
                   int heads, const Results& to) {
  extern __shared__ __align__(128) unsigned char smem[];
  __shared__ int4 shared_heads[2];
  __shared__ int early_copies[BLOCK_WARPS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = blockIdx.x, blocks = gridDim.x;
  int* tokens = (int*)(smem + LENGTHS_OFFSET);
  int* partial_head = (int*)(smem + HEADS_OFFSET);
  Ring ring;
  const int4 task = tasks[block * BLOCK_TASKS + 2 * warp], size = tasks[block * BLOCK_TASKS + 2 * warp + 1];
  const int first_block = size.w;  // else the first copy would wait for one load more
  ring.setup(smem + warp * RING_BYTES, (uint64_t*)(smem + BARRIERS_OFFSET) + warp * STAGES);
  // Load lengths before issuing copies; a later load would queue behind them.
#pragma unroll 1
  for (int b = threadIdx.x; b < batch; b += BLOCK_WARPS * 32) tokens[b] = lengths[b] + added;
  if (threadIdx.x < 2) shared_heads[threadIdx.x] = tasks[block * BLOCK_TASKS + 2 * BLOCK_WARPS + threadIdx.x];
  if (lane < 2) partial_head[2 * warp + lane] = -1;

  Cursor at = {task.x, task.y, task.z, size.x, size.y, size.z};
  int remaining = task.w;  // items of this warp
  auto load_query = [&] { return load_tile_query(q + (size_t)(at.row * heads + at.head) * OUT); };
  auto copy_item = [&](int slot, int ahead) {
    if (ahead < remaining) {
      Cursor of = at;
      for (of.item += ahead; of.item >= of.num_items;) {
        const int beyond = of.item - of.num_items;
        next_head(items, of, tokens, batch, heads);
        of.item = beyond;
      }
      if (of.item < of.num_pages)
        items.copy_page(ring, slot, of, ahead ? items.block_of(of.row, of.item, of.num_pages) : first_block);
      else items.copy_tile(ring, slot, of);
    }
    ring.commit();
  };
  // Copies one item before wait_for_previous, or two of a long share, but not the last of a head, which holds the
  // newest token: the previous launch may still be writing that. Half of the warps issue theirs when the other half's
  // have landed, and the last blocks, which start last, issue one only: more at a time would delay the previous
  // launch's last pages and L2 accesses by more than it gains.
  const int early = at.item + 1 >= at.num_items ? 0
                    : remaining >= MIN_ITEMS_FOR_TWO && at.item + 2 < at.num_items && block < blocks * 3 / 4 ? 2 : 1;
  unsigned step = 0;  // of the ring: uses slot step % STAGES
  if (early && warp < FIRST_WARPS) {
    copy_item(0, 0);
    step = 1;
  }
  if (lane == 0) early_copies[warp] = early;
  __syncthreads();  // `tokens` are visible
#pragma unroll 1
  for (; step < early; step++) {
    const int other = warp + (warp < FIRST_WARPS ? FIRST_WARPS : -FIRST_WARPS),
              its = warp < FIRST_WARPS ? step - 1 : step;
    if (other < BLOCK_WARPS && its < early_copies[other]) ring.wait_for_other(other - warp, its);
    copy_item(step, step);
  }
  wait_then_allow_next();
  TileQuery raw = load_query();  // before the remaining copies
#pragma unroll 1  // runs once: less code to fetch
  for (; step < STAGES; step++) copy_item(step, step);
  step = 0;
  if (warp == 0) clear_other_half(to, (const Shared*)shared_heads);

#pragma unroll 1
  while (remaining) {
    const int first = at.item;  // of this warp's items of this head
    State state;
    state.reset();
    auto done = [&]() {
      __syncwarp();
      copy_item(step % STAGES, STAGES);
      at.item++;
      remaining--;
      step++;
    };
    if (at.item < at.num_pages) {
      const typename Items::Query query = Items::make_query(raw);
      do {
        ring.wait(step % STAGES, step / STAGES % 2);
        items.attend_page(state, query, ring.slot_at(step % STAGES), at.item);
        done();
      } while (remaining && at.item < at.num_pages);
    }
    Items::finish_pages(state);
    if (remaining && at.item < at.num_items) {
      const TileQuery query = load_query();
      do {
        ring.wait(step % STAGES, step / STAGES % 2);
        items.attend(state, ring.slot_at(step % STAGES), query, at);
        done();
      } while (remaining && at.item < at.num_items);
    }
    const int head = at.row * heads + at.head, index = 2 * warp + !remaining;
    const bool whole = first == 0 && at.item == at.num_items;
    if (whole) store_sums<true, Items>(state, smem, to, head, index);
    else store_sums<false, Items>(state, smem, to, head, index);
    if (!whole && lane == index % 2) partial_head[index] = head;
    __syncwarp();
    if (remaining) {
      next_head(items, at, tokens, batch, heads);
      raw = load_query();
    }
  }
  const Shared first_shared = ((const Shared*)shared_heads)[0], last_shared = ((const Shared*)shared_heads)[1];
  __syncthreads();
  merge(smem, to, first_shared, last_shared);
#pragma unroll 1
  for (int b = block; b < batch; b += blocks)
    if (tokens[b] <= 0)
#pragma unroll 1
      for (int i = threadIdx.x; i < heads * OUT; i += BLOCK_WARPS * 32)
        to.out[(size_t)b * heads * OUT + i] = to_output(0.f);
}
#endif
