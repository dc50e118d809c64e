// decode_merge.cuh: merges the splits of a head over several warps and blocks (attention.cuh).
//
//   m = max m_i, l = sum 2^(m_i - m) l_i, o = sum 2^(m_i - m) o_i, output = o / l
//
// Partials are added in list order: equal inputs give equal bits. No float atomics. Warps' partials meet in shared
// memory, blocks' in `workspace`, slice by slice of 64 or 128 channels: a warp counts its block's partial and writes
// it, and the warp that counts last merges them. All of that follows a launch's last page, and nothing overlaps it, so
// it takes as few round trips to L2 as possible (an H200: 0.3 to 0.8 us each). That is why it does not use
// split_merge.cuh, whose counter is ordered after the write and costs one more:
// - The count is in flight while the warps' partials are merged. It announces that a partial is going to be written,
//   and no fence orders the two. Each word of the workspace says itself whether it has been written: an empty one is
//   a NaN that no arithmetic produces. If one is empty, all partials are loaded again.
// - The workspace has two halves. A launch writes into one, which must be empty, and clears the other, which nobody
//   reads any more, for the next launch. Launches alternate: parity 0, 1, 0 ...; the first one after `schedule`,
//   which clears half 0, has parity 0.
//
// writes and reads a partial of 4.5 * OUT bytes a block and head that it shares, 2.3 KB for 4 x 128 channels, in L2;
// and clears as much.
#ifndef MINIOSCAR_DECODE_MERGE_CUH
#define MINIOSCAR_DECODE_MERGE_CUH
#include "schedule.cuh"

// Channels of all q heads, in quads: a lane merges one, a warp a slice of 16, or of 32 where its warps would have to
// merge more than one slice of a head.
constexpr int OUT = Q_PER_KV * D, QUADS = OUT / 4;
#ifndef ROTATED  // heads of the output times H, as rotate_heads would leave them; then a slice is of whole heads
#define ROTATED 0
#endif
constexpr int SLICE_QUADS = QUADS > 16 * BLOCK_WARPS || ROTATED && D > 64 ? 32 : 16;
static_assert(!ROTATED || D == 64 || D == 128, "heads that a slice holds");
constexpr int SLICES = (QUADS + SLICE_QUADS - 1) / SLICE_QUADS;
constexpr int SLOT_QUADS = QUADS + QUADS / 8;  // float4 of a workspace slot: its sums, then (m, l) of each 32 channels
constexpr int MAX_TRIES = 8;                   // reads of partials before a NaN counts as one of q, keys or values
constexpr float LN2 = 0.69314718f;

// Heads here are kv heads (times Q_GROUPS) of all sequences, one after another, each with Q_PER_KV rows of D.
struct Results {
  Output* out;         // [heads, Q_PER_KV, D]
  float* lse;          // [heads, Q_PER_KV] natural logarithm of the sum of exp(logit), or null
  float4* workspace;   // [2 halves, gridDim.x, 2, SLOT_QUADS]: partials of heads that blocks share
  int* split_counter;  // [gridDim.x, SLICES], of the head whose first block this is; zero before and after
  int parity;          // the half of the workspace that is empty
};

// Shared memory: the warps' rings | first partials | (m, l) of first and last partials | their heads | barriers | the
// sequences' lengths
constexpr int PARTIAL_BYTES = OUT * 4;
constexpr int PARTIALS_OFFSET = BLOCK_WARPS * RING_BYTES, ML_OFFSET = PARTIALS_OFFSET + BLOCK_WARPS * PARTIAL_BYTES;
constexpr int HEADS_OFFSET = ML_OFFSET + BLOCK_WARPS * 2 * Q_PER_KV * 8;
constexpr int BARRIERS_OFFSET = (HEADS_OFFSET + BLOCK_WARPS * 8 + 15) / 16 * 16;
constexpr int LENGTHS_OFFSET = BARRIERS_OFFSET + BLOCK_WARPS * STAGES * 8;
static_assert(RING_BYTES >= PARTIAL_BYTES && RING_BYTES % 16 == 0, "the last partial reuses the drained ring");
static_assert(2 * BLOCK_WARPS <= 32, "a lane a partial");

// Sums of partial 2w, the first of warp w, or 2w + 1, its last.
DEVICE float* partial_sums(unsigned char* smem, int index) {
  return (float*)(index % 2 ? smem + index / 2 * RING_BYTES : smem + PARTIALS_OFFSET + index / 2 * PARTIAL_BYTES);
}

DEVICE void store_lse(const Results& to, int head, int q_head, float m, float l) {
  if (to.lse) to.lse[(size_t)head * Q_PER_KV + q_head] = (m + log2f(l)) * LN2;
}

// Four neighbouring channels of a q head: sums of p * value; the running max and the sum of p.
struct Partial { float4 o; float2 ml; };

// Adds partials to `sum`, in their order.
template <int N> DEVICE void add_partials(Partial& sum, const Partial (&partials)[N]) {
  float m = sum.ml.x, l = 0.f;
  float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
  UNROLL for (int u = 0; u < N; u++) m = fmaxf(m, partials[u].ml.x);
  auto add = [&](const Partial& partial) {
    const float f = ex2(partial.ml.x - m);
    const float4& x = partial.o;
    o = make_float4(fmaf(f, x.x, o.x), fmaf(f, x.y, o.y), fmaf(f, x.z, o.z), fmaf(f, x.w, o.w));
    l = fmaf(f, partial.ml.y, l);
  };
  add(sum);
  UNROLL for (int u = 0; u < N; u++) add(partials[u]);
  sum = {o, make_float2(m, l)};
}

// Merges `count` partials, partial(k, u, exists) the one of number k + u, of no weight where there is none, loading N
// at a time. Slices of 16: the lower half of the warp merges the first half of them and the upper half the others; the
// lower half returns the merge of all.
template <int N, class Load> DEVICE Partial merge_partials(int count, const Load& partial) {
  const bool upper = SLICE_QUADS == 16 && threadIdx.x % 32 >= 16;
  const int middle = SLICE_QUADS == 16 ? (count + 1) / 2 : count, end = upper ? count : middle;
  Partial sum = {make_float4(0.f, 0.f, 0.f, 0.f), make_float2(INITIAL_MAX, 0.f)};
#pragma unroll 1
  for (int k = 0; k < middle; k += N) {
    Partial batch[N];
    const int from = k + (upper ? middle : 0);
    UNROLL for (int u = 0; u < N; u++) batch[u] = partial(from, u, from + u < end);
    add_partials(sum, batch);
  }
  if (SLICE_QUADS > 16) return sum;
  auto above = [](float x) { return __shfl_down_sync(FULL_MASK, x, 16); };
  const float4 o = make_float4(above(sum.o.x), above(sum.o.y), above(sum.o.z), above(sum.o.w));
  const Partial others[1] = {{o, make_float2(above(sum.ml.x), above(sum.ml.y))}};
  add_partials(sum, others);
  return sum;
}

// Partials first ... last of this block, of one head and of quad `at` of its channels: neighbours, all of which but
// perhaps the last are the last ones of their warps.
DEVICE Partial merge_warps(unsigned char* smem, unsigned first, unsigned last, int at) {
  const float2* ml = (const float2*)(smem + ML_OFFSET) + at / (D / 4);
  return merge_partials<(BLOCK_WARPS + 1) / 2>(last / 2 - first / 2 + 1, [=](int k, int u, bool exists) -> Partial {
    const unsigned p = min((first | 1) + 2 * (k + u), last);  // past the end the last one again, without weight
    Partial own = {((const float4*)partial_sums(smem, p))[at], ml[p * Q_PER_KV]};
    if (!exists) own.ml.x = INITIAL_MAX;
    return own;
  });
}

// A block's two slots in half `half` of the workspace: for a head that continues from the block before, and for one
// that begins in it.
DEVICE float4* slot_of(const Results& to, int half, int block, bool begins) {
  return to.workspace + (size_t)((half * gridDim.x + block) * 2 + begins) * SLOT_QUADS;
}
// Canonical NaN is 0x7fffffff (PTX ISA), of a matrix product too.
DEVICE float4 empty_word() {
  const float empty = __uint_as_float(FULL_MASK);
  return make_float4(empty, empty, empty, empty);
}
DEVICE bool is_empty(float x) { return __float_as_uint(x) == FULL_MASK; }
DEVICE bool is_nan(const Partial& sum) { return isnan(sum.o.x + sum.o.y + sum.o.z + sum.o.w + sum.ml.y); }

// Partial k + u of a head that blocks from, from + 1 ... share, of quad `at` of its channels; words of it may be empty.
DEVICE Partial load_partial(const Results& to, int from, int k, int u, int at) {
  const float4* slot = slot_of(to, to.parity, from + k, u == 0 && k == 0) + 2 * u * SLOT_QUADS;
  return {load_relaxed(slot + at), load_relaxed((const float2*)(slot + QUADS) + at / 8)};
}
// Spins until no word of any of them is empty.
DEVICE void wait_for_partials(const Results& to, int from, int blocks, int at) {
#pragma unroll 1
  for (int k = 0; k < blocks; k++) {
    Partial p;
    do p = load_partial(to, from, k, 0, at);
    while (is_empty(p.o.x) || is_empty(p.o.y) || is_empty(p.o.z) || is_empty(p.o.w) || is_empty(p.ml.x) ||
           is_empty(p.ml.y));
  }
  __syncwarp();
}

// All blocks' partials, which have been counted.
DEVICE Partial merge_blocks(const Results& to, int from, int blocks, int at) {
#pragma unroll 1
  for (int tries = 0;; tries++) {
    if (tries == MAX_TRIES) wait_for_partials(to, from, blocks, at);
    const Partial sum = merge_partials<SLICE_QUADS / 2>(blocks, [=](int k, int u, bool exists) -> Partial {
      if (!exists) return {make_float4(0.f, 0.f, 0.f, 0.f), make_float2(INITIAL_MAX, 0.f)};
      return load_partial(to, from, k, u, at);
    });
    if (tries == MAX_TRIES || !__any_sync(FULL_MASK, is_nan(sum))) return sum;
  }
}

// By a block of `schedule`, whose grid is that of the launches after it.
DEVICE void clear_first_half(float4* workspace) {
  for (int k = threadIdx.x; k < 2 * SLOT_QUADS; k += BLOCK_WARPS * 32)
    workspace[(size_t)2 * blockIdx.x * SLOT_QUADS + k] = empty_word();
}
// By one warp: the slots that the next launch will write into.
DEVICE void clear_other_half(const Results& to, const Shared* shared) {
#pragma unroll 1
  for (int i = 0; i < 2; i++) {
    if (!shared[i].blocks) continue;
    float4* slot = slot_of(to, 1 - to.parity, blockIdx.x, (int)blockIdx.x == shared[i].from);
    for (int k = threadIdx.x % 32; k < SLOT_QUADS; k += 32) store_relaxed(slot + k, empty_word());
  }
}

// o times H, the normalized Walsh-Hadamard matrix: a lane has four channels of a head, D / 4 neighbours all of them.
DEVICE float4 rotated(float4 o) {
  const float a = o.x + o.y, b = o.x - o.y, c = o.z + o.w, d = o.z - o.w;
  float x[4] = {a + c, b + d, a - c, b - d};
  UNROLL for (int other = 1; other < D / 4; other *= 2) {
    const float sign = threadIdx.x & other ? -1.f : 1.f;
    UNROLL for (int i = 0; i < 4; i++) x[i] = fmaf(sign, x[i], __shfl_xor_sync(FULL_MASK, x[i], other));
  }
  const float factor = rsqrtf((float)D);
  return make_float4(x[0] * factor, x[1] * factor, x[2] * factor, x[3] * factor);
}

// Merges partials first ... last of this block, all of this head, which is split over blocks from ... from + blocks -
// 1; blocks = 0: over this one alone. Slices go to the warps round-robin: `slice` is the next one of this warp. No
// slice waits for another.
DEVICE void merge_head(
    unsigned char* smem, const Results& to, int head, unsigned first, unsigned last, int from, int blocks, int& slice) {
  const int lane = threadIdx.x % 32, block = blockIdx.x;
#pragma unroll 1
  for (; slice < SLICES; slice += BLOCK_WARPS) {
    const int at = min(slice * SLICE_QUADS + lane % SLICE_QUADS, QUADS - 1);
    const bool own = lane < SLICE_QUADS && slice * SLICE_QUADS + lane < QUADS;  // this lane writes this quad
    int* split_counter = to.split_counter + from * SLICES + slice;
    int before = 0;
    if (blocks && lane == 0) before = atomic_add_relaxed(split_counter, 1);
    Partial sum = merge_warps(smem, first, last, at);
    if (blocks) {
      float4* slot = slot_of(to, to.parity, block, block == from);
      if (own) store_relaxed(slot + at, sum.o);
      if (own && at % 8 == 0) store_relaxed((float2*)(slot + QUADS) + at / 8, sum.ml);
      if (__shfl_sync(FULL_MASK, before, 0) + 1 < blocks) continue;
      if (lane == 0) store_relaxed(split_counter, 0);
      sum = merge_blocks(to, from, blocks, at);
    }
    const float inverse = rcp_approx(sum.ml.y);
    float4 o = make_float4(sum.o.x * inverse, sum.o.y * inverse, sum.o.z * inverse, sum.o.w * inverse);
    if (ROTATED) o = rotated(o);
    if (!own) continue;
    store_output(to.out + (size_t)head * OUT + 4 * at, o.x, o.y, o.z, o.w);
    if (at % (D / 4) == 0) store_lse(to, head, at / (D / 4), sum.ml.x, sum.ml.y);
  }
  slice -= SLICES;
}

// Merges all partials of this block. first_shared, last_shared: the heads that it shares with other blocks.
DEVICE void merge(unsigned char* smem, const Results& to, const Shared& first_shared, const Shared& last_shared) {
  const int lane = threadIdx.x % 32;
  int head = first_shared.head, from = first_shared.from, blocks = first_shared.blocks, slice = threadIdx.x / 32;
  unsigned first = 1,
           last = 2 * first_shared.warps - 1;  // of a block with one head alone: the last partial of each warp
  int own = -1;
  unsigned present = 0, begins = 0;
  if (!first_shared.warps) {
    // Partials are in list order, so those of a head are neighbours: a head begins where the previous one present is
    // of another head.
    if (lane < 2 * BLOCK_WARPS) own = ((const int*)(smem + HEADS_OFFSET))[lane];
    present = __ballot_sync(FULL_MASK, own >= 0);
    const unsigned below = present & ((1u << lane) - 1);
    const int previous = __shfl_sync(FULL_MASK, own, below ? 31 - __clz(below) : lane);
    begins = __ballot_sync(FULL_MASK, own >= 0 && !(below && previous == own));
    if (!begins) return;
  }
#pragma unroll 1
  do {
    if (!first_shared.warps) {
      first = __ffs(begins) - 1;
      head = __shfl_sync(FULL_MASK, own, first);
      begins &= begins - 1;
      last = 31 - __clz(present & (begins ? (begins & -begins) - 1 : FULL_MASK));
      const bool at_begin = first_shared.blocks && first_shared.head == head;
      from = at_begin ? first_shared.from : last_shared.from;
      blocks = at_begin ? first_shared.blocks : last_shared.head == head ? last_shared.blocks : 0;
    }
    merge_head(smem, to, head, first, last, from, blocks, slice);
  } while (begins);
}
#endif
