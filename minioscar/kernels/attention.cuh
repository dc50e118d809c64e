// attention.cuh: what the two decode kernels share. The cache of all sequences is one long list of units, sequence after sequence, kv head
// after kv head; a unit is what one warp copies and attends to at a time: a packed page of 64 tokens, or a tile of BF16 tokens of about as
// many bytes. Every warp of the grid takes an equal, contiguous part of the list. Which one, `schedule` finds from the lengths in device
// memory, once a step for all layers; so a fixed grid serves every step of a captured graph and sequences of unequal length. A warp copies
// STAGES units ahead into its own ring.
//
// A head that one warp has whole goes straight out; else the parts of it that warps and blocks have are merged (merge.cuh), in list order:
// equal inputs give equal bits.
//
// q is the small operand of every MMA, a column a head. Up to 4 heads stand in the 8 columns twice, so that the two halves can be about
// different groups of steps (decode_attention.cu).
//
// Set by -D: HEAD_DIM, Q_PER_KV (1..8 q heads that share a kv head), SHARE (how many such sets a kv head has), BLOCK_WARPS, STAGES, OUT_BF16.
// The including file says UNIT_BYTES (of a unit in the ring) and has a type Units (how many units, where each is, what to do with it).
#ifndef MINIOSCAR_ATTENTION_CUH
#define MINIOSCAR_ATTENTION_CUH
#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr int D = HEAD_DIM, TOKEN_BYTES = D * 2 * 2;  // of a BF16 token: key and value
constexpr int TILE_TOKENS = UNIT_BYTES / TOKEN_BYTES < 16 ? UNIT_BYTES / TOKEN_BYTES : 16;
constexpr int RING_BYTES = STAGES * UNIT_BYTES;
constexpr int FIRST_WARPS = (BLOCK_WARPS + 1) / 2, LONG = 6;  // warps that ask first; units from which on a warp asks for two early
#include "merge.cuh"

constexpr int CHANNEL_TILES = D / 16;
constexpr int HALVES = Q_PER_KV <= 4 ? 2 : 1, COLUMNS = 8 / HALVES;
constexpr float NEVER = -1e38f;

// The q head in column n; columns without one repeat the last.
__device__ __forceinline__ int head_of_column(int n) { return min(n % COLUMNS, Q_PER_KV - 1); }

// What a warp knows of one head: sums of p * value in units of `o` (Units::unit_scale of channel tile j), sums of p * parameter (rows 0..7:
// sums[0], sums[1]) and of p (rows 8..15: sums[2], sums[3]), and the reference m: p = 2^(x - m). A lane holds columns 2c and 2c + 1.
struct State {
  float o[CHANNEL_TILES][4];
  float sums[4];
  float m0, m1;
  bool fresh;
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < CHANNEL_TILES; j++) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0.f;
    sums[0] = sums[1] = sums[2] = sums[3] = m0 = m1 = 0.f, fresh = true;
  }
  // Moves the references up by x0, x1.
  __device__ __forceinline__ void move(float x0, float x1) {
    const float f0 = ex2(-x0), f1 = ex2(-x1);
    m0 += x0, m1 += x1, fresh = false;
#pragma unroll
    for (int j = 0; j < CHANNEL_TILES; j++) o[j][0] *= f0, o[j][1] *= f1, o[j][2] *= f0, o[j][3] *= f1;
    sums[0] *= f0, sums[1] *= f1, sums[2] *= f0, sums[3] *= f1;
  }
};

// How far the references must move for logits whose largest of this lane stand x0, x1 above them: to the largest of all lanes of the
// head plus 3, so that few later ones surpass it; never down, but the first time.
__device__ __forceinline__ void reference_step(float& x0, float& x1, bool fresh) {
#pragma unroll
  for (int other = HALVES == 2 ? 2 : 4; other < 32; other *= 2) {
    x0 = fmaxf(x0, __shfl_xor_sync(FULL, x0, other));
    x1 = fmaxf(x1, __shfl_xor_sync(FULL, x1, other));
  }
  x0 += 3.f, x1 += 3.f;
  if (!fresh) x0 = fmaxf(x0, 0.f), x1 = fmaxf(x1, 0.f);
}

// Channel of row `row` (0..15) of channel tile j, which is that of row 0 and that of tile 0 together: a lane's 16-byte load of 8 neighbouring channels then feeds two tiles (LAYOUT.md).
__device__ __forceinline__ int value_channel(int j, int row) { return j / 2 * 32 + row % 8 / 2 * 8 + j % 2 * 4 + row / 8 * 2 + row % 2; }

constexpr uint32_t ONE_BF16X2 = 0x3f803f80u;
__device__ __forceinline__ uint32_t in_units(uint32_t p, uint32_t unit) { return unit == ONE_BF16X2 ? p : mul_bf16x2(p, unit); }

// A head's q [Q_PER_KV][D] as attend_tile takes it.
struct TileQuery { uint4 b[D / 32]; };
__device__ __forceinline__ TileQuery load_tile_query(const bf16* q) {
  TileQuery query;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < D / 32; i++) query.b[i] = *(const uint4*)(q + head_of_column(lane / 4) * D + i * 32 + lane % 4 * 8);
  return query;
}

// One tile of `valid` (1..TILE_TOKENS) BF16 tokens in shared memory: keys, then values, [TILE_TOKENS][D] each.
template <class Units>
__device__ __forceinline__ void attend_tile(State& state, const unsigned char* tile, const TileQuery& query, int valid, float scale_log2) {
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const uint4 none = make_uint4(0, 0, 0, 0);
  const bool has0 = r < valid, has1 = r + 8 < valid;
  float x[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int i = 0; i < D / 32; i++) {
    const int at = i * 64 + c * 16;
    const uint4 k0 = has0 ? *(const uint4*)(tile + r * D * 2 + at) : none, k1 = has1 ? *(const uint4*)(tile + (r + 8) * D * 2 + at) : none;
    const uint4 b = query.b[i];
    mma_m16n8k16_bf16(x, k0.x, k1.x, k0.y, k1.y, b.x, b.y);
    mma_m16n8k16_bf16(x, k0.z, k1.z, k0.w, k1.w, b.z, b.w);
  }
  const float m[2] = {state.m0, state.m1};
#pragma unroll
  for (int i = 0; i < 4; i++) x[i] = (i < 2 ? has0 : has1) ? fmaf(x[i], scale_log2, -m[i % 2]) : NEVER;
  if (__any_sync(FULL, state.fresh || fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])) > 1.f)) {
    float x0 = fmaxf(x[0], x[2]), x1 = fmaxf(x[1], x[3]);
    reference_step(x0, x1, state.fresh);
    state.move(x0, x1);
    x[0] -= x0, x[1] -= x1, x[2] -= x0, x[3] -= x1;
  }
  uint32_t high[2], low[2];  // p as the sum of two bf16: 16 bits of mantissa
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float p0 = ex2(x[2 * i]), p1 = ex2(x[2 * i + 1]);
    high[i] = pack_bf16x2(p0, p1);
    low[i] = pack_bf16x2(p0 - __uint_as_float(high[i] << 16), p1 - __uint_as_float(high[i] & 0xffff0000u));
    high[i] = movmatrix(high[i]), low[i] = movmatrix(low[i]);
  }
  mma_m16n8k16_bf16(state.sums, 0, ONE_BF16X2, 0, ONE_BF16X2, high[0], high[1]);
  mma_m16n8k16_bf16(state.sums, 0, ONE_BF16X2, 0, ONE_BF16X2, low[0], low[1]);
  const unsigned char* values = tile + TILE_TOKENS * D * 2;
#pragma unroll
  for (int j = 0; j < CHANNEL_TILES; j += 2) {
    const int at = j * 32 + c * 16;
    const uint4 v0 = has0 ? *(const uint4*)(values + r * D * 2 + at) : none, v1 = has1 ? *(const uint4*)(values + (r + 8) * D * 2 + at) : none;
    const uint32_t a[2][4] = {{movmatrix(v0.x), movmatrix(v0.y), movmatrix(v1.x), movmatrix(v1.y)},
                              {movmatrix(v0.z), movmatrix(v0.w), movmatrix(v1.z), movmatrix(v1.w)}};
#pragma unroll
    for (int u = 0; u < 2; u++) {
      const uint32_t unit = Units::unit_bf16x2(j + u);  // p in units of o: an exact power of two
      mma_m16n8k16_bf16(state.o[j + u], a[u][0], a[u][1], a[u][2], a[u][3], in_units(high[0], unit), in_units(high[1], unit));
      mma_m16n8k16_bf16(state.o[j + u], a[u][0], a[u][1], a[u][2], a[u][3], in_units(low[0], unit), in_units(low[1], unit));
    }
  }
}

// --- copies

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

// Per-warp ring of units in shared memory, filled STAGES ahead.
struct Ring {
  unsigned char* slots;
  uint64_t* barriers;
  uint64_t policy;

  __device__ __forceinline__ void setup(unsigned char* memory, uint64_t* bars) {
    slots = memory, barriers = bars;
#if BULK_COPIES
    policy = l2_evict_first();
    if (threadIdx.x % 32 == 0) {
      for (int i = 0; i < STAGES; i++) mbarrier_init(&barriers[i], 1);
      mbarrier_init_fence();
    }
    __syncwarp();
#endif
  }
  __device__ __forceinline__ unsigned char* slot_at(int slot) const { return slots + slot * UNIT_BYTES; }

  // Starts the copies that fill a slot, all sizes multiples of 16 bytes and perhaps 0.
  template <int N>
  __device__ __forceinline__ void fill(int slot, const Copy (&copies)[N]) {
#if BULK_COPIES
    if (elect_one()) {
      int bytes = 0;
#pragma unroll
      for (int i = 0; i < N; i++) bytes += copies[i].bytes;
      mbarrier_arrive_expect_tx(&barriers[slot], bytes);
#pragma unroll
      for (int i = 0; i < N; i++)
        if (copies[i].bytes) bulk_copy(copies[i].to, copies[i].from, copies[i].bytes, &barriers[slot], policy);
    }
#else
#pragma unroll
    for (int k = 0; k < N; k++)
      for (int i = threadIdx.x % 32 * 16; i < copies[k].bytes; i += 512) cp_async_16((char*)copies[k].to + i, (const char*)copies[k].from + i);
#endif
  }
  __device__ __forceinline__ void end() {  // after the copies of a slot, or where there are none left
#if !BULK_COPIES
    cp_async_commit();
#endif
  }
  __device__ __forceinline__ void wait(int slot, uint32_t parity) {
#if BULK_COPIES
    mbarrier_wait(&barriers[slot], parity);
#else
    cp_async_wait<STAGES - 1>();
    __syncwarp();
#endif
  }
  // For what another warp, so many warps on, has first in a slot. Where that cannot be waited for, launches do not overlap either.
  __device__ __forceinline__ void wait_for_other(int warps, int slot) {
#if BULK_COPIES
    mbarrier_wait(barriers + warps * STAGES + slot, 0);
#endif
  }
};

// The sums of a head that a warp has: to the output if the head is whole, else to shared memory as `part`.
template <class Units>
__device__ __forceinline__ void store_sums(const State& state, unsigned char* smem, const Results& to, int head, bool whole, int part) {
  constexpr int RUN = Units::RUN, BOTH = HALVES * RUN, EACH = (CHANNEL_TILES + BOTH - 1) / BOTH * RUN;
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, first = 2 * c % COLUMNS;
  const bool second = HALVES == 2 && c >= 2;  // the column half whose tiles this lane stores
  const int row = value_channel(0, r) + (second ? value_channel(RUN, 0) : 0);
  const float l[2] = {state.sums[2], state.sums[3]}, inverse[2] = {rcp_approx(l[0]), rcp_approx(l[1])};
  float* partial = part_o(smem, part) + first * D + row;
  Output* out = to.out + (size_t)head * OUT + first * D + row;
  float2 zero;
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    const int j = n / RUN * BOTH + n % RUN, above = min(j + RUN, CHANNEL_TILES - 1), channel = value_channel(j, 0);
    if (n % RUN == 0) zero = Units::zero_term(state, second ? above : j);
    if (second && j + RUN >= CHANNEL_TILES) continue;
    const float unit = second ? Units::unit_scale(above) : Units::unit_scale(j);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (first + i % 2 >= Q_PER_KV) continue;
      const float y = fmaf(second ? state.o[above][i] : state.o[j][i], unit, i % 2 ? zero.y : zero.x);
      if (whole) out[i % 2 * D + channel + i / 2 * 2] = to_output(y * inverse[i % 2]);
      else partial[i % 2 * D + channel + i / 2 * 2] = y;
    }
  }
  if (r || c >= COLUMNS / 2) return;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int q_head = 2 * c + i;
    const float m = i ? state.m1 : state.m0;
    if (q_head >= Q_PER_KV) continue;
    if (whole) store_lse(to, head, q_head, m, l[i]);
    else ((float2*)(smem + AT_ML))[part * Q_PER_KV + q_head] = make_float2(m, l[i]);
  }
}

// --- the walk over the list

// Units: count(tokens) of a sequence's heads; measure(cursor) sets pages and units; copy_page(ring, slot, cursor) and copy_tile copy
// one; make_query(q) makes a Query of a head's q; attend_page(state, query, data, unit) and attend(state, data, tile query,
// cursor) take a page and a tile in, finish_pages(state) stands between them; unit_scale(j) and zero_term(state, j) turn sums into
// numbers true to scale; the column halves know RUN channel tiles in turn.
//
// lengths [batch]; a sequence has lengths[b] + added tokens, and none where that is not positive: its output is 0.
// q [batch, heads, Q_PER_KV, D]. Dynamic shared memory: AT_ROWS + 4 * batch bytes.
template <class Units>
__device__ __forceinline__ void attend(const Units& units, const bf16* q, const int* lengths, const int4* tasks, int added, int batch, int heads,
                                       const Results& to) {
  extern __shared__ __align__(128) unsigned char smem[];
  __shared__ int4 shared_heads[2];
  __shared__ int asked_early[BLOCK_WARPS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = blockIdx.x, blocks = gridDim.x;
  int* tokens = (int*)(smem + AT_ROWS);
  int* part_head = (int*)(smem + AT_HEADS);
  Ring ring;
  const int4 task = tasks[block * BLOCK_TASKS + 2 * warp], where = tasks[block * BLOCK_TASKS + 2 * warp + 1];
  ring.setup(smem + warp * RING_BYTES, (uint64_t*)(smem + AT_BARRIERS) + warp * STAGES);
  // Asked for before the first copy: whatever is read after it waits behind all the bytes that are under way.
#pragma unroll 1
  for (int b = threadIdx.x; b < batch; b += BLOCK_WARPS * 32) tokens[b] = lengths[b] + added;
  if (threadIdx.x < 2) shared_heads[threadIdx.x] = tasks[block * BLOCK_TASKS + 2 * BLOCK_WARPS + threadIdx.x];
  if (lane < 2) part_head[2 * warp + lane] = -1;

  Cursor at = {task.x, task.y, task.z, where.x, where.y, where.z};
  int left = task.w;  // units that this warp has before it
  auto request = [&](int slot, int ahead) {
    if (ahead < left) {
      Cursor of = at;
      for (of.unit += ahead; of.unit >= of.units;) {
        const int beyond = of.unit - of.units;
        next_head(units, of, tokens, batch, heads);
        of.unit = beyond;
      }
      if (of.unit < of.pages) units.copy_page(ring, slot, of);
      else units.copy_tile(ring, slot, of);
    }
    ring.end();
  };
  // One unit before the wait, or two of a long part, but not the last of a head, which holds the newest token: the launch before this one may be
  // writing that still. Half of the warps ask when the other half's have come, and the last blocks, which begin last, ask for one only: more at a
  // time would delay the launch before, its last pages and its trips to L2, by more than it is worth.
  const int early = at.unit + 1 >= at.units ? 0 : left >= LONG && at.unit + 2 < at.units && block < blocks * 3 / 4 ? 2 : 1;
  unsigned turn = 0;  // of the ring: its slot turn % STAGES
  if (early && warp < FIRST_WARPS) request(0, 0), turn = 1;
  if (lane == 0) asked_early[warp] = early;
  __syncthreads();  // `tokens` are there
#pragma unroll 1
  for (; turn < early; turn++) {
    const int other = warp + (warp < FIRST_WARPS ? FIRST_WARPS : -FIRST_WARPS), its = warp < FIRST_WARPS ? turn - 1 : turn;
    if (other < BLOCK_WARPS && its < asked_early[other]) ring.wait_for_other(other - warp, its);
    request(turn, turn);
  }
  wait_for_previous(), allow_next();
  TileQuery raw = load_tile_query(q + (size_t)(at.row * heads + at.head) * OUT);  // in front of the bytes of the ring
#pragma unroll 1  // code that runs once is fetched once: less of it
  for (; turn < STAGES; turn++) request(turn, turn);
  turn = 0;
  if (warp == 0) empty_other_half(to, (const Shared*)shared_heads);

#pragma unroll 1
  while (left) {
    const int first = at.unit;  // of this warp's units of this head
    State state;
    state.clear();
    auto done = [&]() {
      __syncwarp();
      request(turn % STAGES, STAGES);
      at.unit++, left--, turn++;
    };
    if (at.unit < at.pages) {
      const typename Units::Query query = Units::make_query(raw);
      do {
        ring.wait(turn % STAGES, turn / STAGES % 2);
        units.attend_page(state, query, ring.slot_at(turn % STAGES), at.unit);
        done();
      } while (left && at.unit < at.pages);
    }
    Units::finish_pages(state);
    if (left && at.unit < at.units) {
      const TileQuery query = load_tile_query(q + (size_t)(at.row * heads + at.head) * OUT);
      do {
        ring.wait(turn % STAGES, turn / STAGES % 2);
        units.attend(state, ring.slot_at(turn % STAGES), query, at);
        done();
      } while (left && at.unit < at.units);
    }
    const int head = at.row * heads + at.head, part = 2 * warp + !left;
    const bool whole = first == 0 && at.unit == at.units;
    store_sums<Units>(state, smem, to, head, whole, part);
    if (!whole && lane == part % 2) part_head[part] = head;
    __syncwarp();
    if (left) {
      next_head(units, at, tokens, batch, heads);
      raw = load_tile_query(q + (size_t)(at.row * heads + at.head) * OUT);
    }
  }
  const Shared begin = ((const Shared*)shared_heads)[0], end = ((const Shared*)shared_heads)[1];
  __syncthreads();
  merge(smem, to, begin, end);
#pragma unroll 1
  for (int b = block; b < batch; b += blocks)
    if (tokens[b] <= 0)
#pragma unroll 1
      for (int i = threadIdx.x; i < heads * OUT; i += BLOCK_WARPS * 32) to.out[(size_t)b * heads * OUT + i] = to_output(0.f);
}
#endif
