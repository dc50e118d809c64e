// attention.cuh: what the two decode kernels share. The cache of all sequences is one long list of units, sequence after sequence, kv head
// after kv head; a unit is what one warp copies and attends to at a time: a packed page of 64 tokens, or a tile of BF16 tokens of about as
// many bytes. Every warp of the grid takes an equal, contiguous part of the list. Which one, `schedule` finds from the lengths in device
// memory, once a step for all layers; so a fixed grid serves every step of a captured graph and sequences of unequal length. A warp copies
// STAGES units ahead into its own ring.
//
// A head that one warp has whole goes straight out; else the warps' parts meet in shared memory, the blocks' parts in `workspace`, where
// the last to arrive merges them. All merging is in list order: equal inputs give equal bits. No float atomics.
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
#include "device.cuh"
#include "output.cuh"
#include "schedule.cuh"

constexpr int D = HEAD_DIM, TOKEN_BYTES = D * 2 * 2;  // of a BF16 token: key and value
constexpr int TILE_TOKENS = UNIT_BYTES / TOKEN_BYTES < 16 ? UNIT_BYTES / TOKEN_BYTES : 16;
constexpr int OUT = Q_PER_KV * D, HEAD_STRIDE = D + 2;  // + 2: the heads of a store in other banks
constexpr int PAIRS = OUT / 2, SLICES = (PAIRS + 31) / 32;  // of the channels of all q heads: what a lane, what a warp merges
constexpr int CHANNEL_TILES = D / 16;
constexpr int HALVES = Q_PER_KV <= 4 ? 2 : 1, COLUMNS = 8 / HALVES;
constexpr float LOWEST = -1e30f, NEVER = -1e38f, LN2 = 0.69314718f;

// The q head in column n; columns without one repeat the last.
__device__ __forceinline__ int head_of_column(int n) { return min(n % COLUMNS, Q_PER_KV - 1); }

// Where the results go. Heads here are kv heads (times SHARE) of all sequences, one after another, each with Q_PER_KV rows of D.
struct Results {
  Output* out;        // [heads, Q_PER_KV, D]
  float* lse;         // [heads, Q_PER_KV] natural logarithm of the sum of exp(logit), or null
  float4* workspace;  // [2 * gridDim.x, PAIRS]: parts of heads that blocks share
  int* arrived;       // [gridDim.x, SLICES], of the head that begins in a block and goes on in others; zero before and after
};

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
};

// --- the parts of a head that several warps or blocks have

// Shared memory: the warps' rings | first parts | (m, l) of first and last parts | their heads | barriers | the sequences' tokens
constexpr int RING_BYTES = STAGES * UNIT_BYTES, PART_BYTES = Q_PER_KV * HEAD_STRIDE * 4;
constexpr int AT_PARTS = BLOCK_WARPS * RING_BYTES, AT_ML = AT_PARTS + BLOCK_WARPS * PART_BYTES;
constexpr int AT_HEADS = AT_ML + BLOCK_WARPS * 2 * Q_PER_KV * 8, AT_BARRIERS = (AT_HEADS + BLOCK_WARPS * 8 + 15) / 16 * 16;
constexpr int AT_ROWS = AT_BARRIERS + BLOCK_WARPS * STAGES * 8;
static_assert(RING_BYTES >= PART_BYTES && UNIT_BYTES % 16 == 0, "the last part goes into the drained ring");
static_assert(2 * BLOCK_WARPS <= 32, "a lane a part");

__device__ __forceinline__ float* part_o(unsigned char* smem, int part) {  // part 2w: first of warp w, 2w + 1: its last
  return (float*)(part % 2 ? smem + part / 2 * RING_BYTES : smem + AT_PARTS + part / 2 * PART_BYTES);
}

__device__ __forceinline__ void store_lse(const Results& to, int head, int q_head, float m, float l) {
  if (to.lse) to.lse[(size_t)head * Q_PER_KV + q_head] = (m + log2f(l)) * LN2;
}

// The sums of a head that a warp has: to the output if the head is whole, else to shared memory as `part`.
template <class Units>
__device__ __forceinline__ void store_sums(const State& state, unsigned char* smem, const Results& to, int head, bool whole, int part) {
  constexpr int RUN = Units::RUN, BOTH = HALVES * RUN, EACH = (CHANNEL_TILES + BOTH - 1) / BOTH * RUN;
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, first = 2 * c % COLUMNS;
  const bool second = HALVES == 2 && c >= 2;  // the column half whose tiles this lane stores
  const int row = value_channel(0, r) + (second ? value_channel(RUN, 0) : 0);
  const float l[2] = {state.sums[2], state.sums[3]}, inverse[2] = {rcp_approx(l[0]), rcp_approx(l[1])};
  float* partial = part_o(smem, part) + first * HEAD_STRIDE + row;
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
      else partial[i % 2 * HEAD_STRIDE + channel + i / 2 * 2] = y;
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

// Two neighbouring channels of a q head: sums of p * value (x, y), the reference m (z), the sum of p (w).
__device__ __forceinline__ float4 nothing() { return make_float4(0.f, 0.f, LOWEST, 0.f); }

// Takes parts in, in their order.
template <int N>
__device__ __forceinline__ void take(float4& sum, const float4 (&parts)[N]) {
  float m = sum.z;
#pragma unroll
  for (int u = 0; u < N; u++) m = fmaxf(m, parts[u].z);
  const float f = ex2(sum.z - m);
  sum = make_float4(f * sum.x, f * sum.y, m, f * sum.w);
#pragma unroll
  for (int u = 0; u < N; u++) {
    const float g = ex2(parts[u].z - m);
    sum.x += g * parts[u].x, sum.y += g * parts[u].y, sum.w += g * parts[u].w;
  }
}

// The parts of a head that warps of this block have (bits of `parts`), of pair `at` of its channels.
__device__ __forceinline__ float4 merge_warps(unsigned char* smem, unsigned parts, int at) {
  const int q_head = at / (D / 2), channel = at % (D / 2) * 2;
  float4 sum = nothing();
  do {
    float4 batch[4];  // loads that do not wait for each other
#pragma unroll
    for (int u = 0; u < 4; u++) {
      batch[u] = nothing();
      if (parts) {
        const int p = __ffs(parts) - 1;
        const float2 o = *(const float2*)(part_o(smem, p) + q_head * HEAD_STRIDE + channel), ml = ((const float2*)(smem + AT_ML))[p * Q_PER_KV + q_head];
        batch[u] = make_float4(o.x, o.y, ml.x, ml.y);
      }
      parts &= parts - 1;
    }
    take(sum, batch);
  } while (parts);
  return sum;
}

// The parts that blocks from, from + 1 ... have of a head they share. In the workspace a block has two places: for a head that goes on from
// the block before, and for one that begins in it.
__device__ __forceinline__ float4 merge_blocks(const Results& to, int from, int blocks, int at) {
  const float4* part = to.workspace + (size_t)2 * from * PAIRS + at;
  float4 sum = nothing();
  int k = 0;
  do {
    float4 batch[16];
#pragma unroll
    for (int u = 0; u < 16; u++) {
      batch[u] = nothing();
      if (k + u < blocks) batch[u] = __ldcg(part + (u || k ? 0 : PAIRS) + 2 * u * PAIRS);
    }
    take(sum, batch);
    part += 2 * 16 * PAIRS, k += 16;
  } while (k < blocks);
  return sum;
}

// The parts of this block, by slices: a warp merges 64 channels of a head. Of a head that other blocks have parts of too it then writes its own
// and counts it; the last warp to arrive at a slice merges the blocks' parts of it. No slice waits for another.
__device__ __forceinline__ void merge(unsigned char* smem, const Results& to, const Shared* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = blockIdx.x;
  // Parts are in list order, so those of a head are neighbours: a head begins where the part before, of those that there are, is another's.
  const int own = lane < 2 * BLOCK_WARPS ? ((const int*)(smem + AT_HEADS))[lane] : -1;
  const unsigned there = __ballot_sync(FULL, own >= 0), below = there & ((1u << lane) - 1);
  const int previous = __shfl_sync(FULL, own, below ? 31 - __clz(below) : lane);
  unsigned begins = __ballot_sync(FULL, own >= 0 && !(below && previous == own));
  while (begins) {
    const int first = __ffs(begins) - 1, head = __shfl_sync(FULL, own, first);
    begins &= begins - 1;
    const unsigned parts = there & ~((1u << first) - 1) & (begins ? (begins & -begins) - 1 : FULL);
    const Shared begin = shared[0], end = shared[1];
    const bool at_begin = begin.blocks && begin.head == head, is_shared = at_begin || (end.blocks && end.head == head);
    const int from = at_begin ? begin.from : end.from, with = at_begin ? begin.blocks : end.blocks;
    for (int slice = warp; slice < SLICES; slice += BLOCK_WARPS) {
      const int at = slice * 32 + lane;
      const bool inside = PAIRS % 32 == 0 || at < PAIRS;
      float4 sum = nothing();
      if (inside) sum = merge_warps(smem, parts, at);
      if (is_shared) {
        int* arrived = to.arrived + from * SLICES + slice;
        if (inside) __stcg(to.workspace + (size_t)(2 * block + (block == from)) * PAIRS + at, sum);
        __syncwarp();
        int before = 0;
        if (lane == 0) before = atomic_add_acq_rel(arrived, 1);
        __syncwarp();
        if (__shfl_sync(FULL, before, 0) + 1 < with) continue;
        if (lane == 0) *arrived = 0;
        if (inside) sum = merge_blocks(to, from, with, at);
      }
      if (!inside) continue;
      Output* out = to.out + (size_t)head * OUT + 2 * at;
      const float inverse = rcp_approx(sum.w);
      out[0] = to_output(sum.x * inverse), out[1] = to_output(sum.y * inverse);
      if (at % (D / 2) == 0) store_lse(to, head, at / (D / 2), sum.z, sum.w);
    }
  }
}

// --- the walk over the list

// Units: count(tokens) of a sequence's heads; measure(cursor) sets pages and units; copy_page(ring, slot, cursor) and copy_tile copy
// one; load_query(q) makes a Query of a head's q; attend_page(state, query, data, unit) and attend(state, data, tile query,
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
  // One unit before the wait, but the last of a head, which holds the newest token: the launch before this one may be writing that still.
  // One only: more of them, from blocks that begin early, delay the others' last trips to L2 by more than they are worth.
  unsigned turn = at.unit + 1 < at.units;  // of the ring: its slot turn % STAGES
  if (turn) request(0, 0);
  __syncthreads();  // `tokens` are there
  wait_for_previous(), allow_next();
#pragma unroll 1  // code that runs once is fetched once: less of it
  for (; turn < STAGES; turn++) request(turn, turn);
  turn = 0;

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
      const typename Units::Query query = Units::load_query(q + (size_t)(at.row * heads + at.head) * OUT);
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
    if (left) next_head(units, at, tokens, batch, heads);
  }
  __syncthreads();
  merge(smem, to, (const Shared*)shared_heads);
#pragma unroll 1
  for (int b = block; b < batch; b += blocks)
    if (tokens[b] <= 0)
#pragma unroll 1
      for (int i = threadIdx.x; i < heads * OUT; i += BLOCK_WARPS * 32) to.out[(size_t)b * heads * OUT + i] = to_output(0.f);
}
#endif
