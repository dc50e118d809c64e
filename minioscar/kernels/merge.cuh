// merge.cuh: the parts of a head that several warps of a block have, and several blocks, become one (attention.cuh).
//
//   m = max m_i, l = sum 2^(m_i - m) l_i, o = sum 2^(m_i - m) o_i, output = o / l
//
// In list order: equal inputs give equal bits. No float atomics. Warps' parts meet in shared memory. Blocks' parts meet in `workspace`, slice by
// slice of 64 channels: a warp counts its block's part and writes it, and whoever counts the last one merges them. That is all behind a launch's
// last page, with nothing to overlap it, so it is as few trips to L2 as can be (an H200: 0.3 to 0.8 us each):
// - The count is on its way while the warps' parts are merged. So it says that a part is going to be written, and no fence, which would be one
//   more trip, orders the two. Each word of the workspace says itself whether it has been written: an empty one is a NaN that no arithmetic
//   makes. Where there is one, all parts are asked for again.
// - The workspace has two halves. A launch writes into one, which must be empty, and empties the other, which nobody reads any more, for the
//   launch after it: launches take turns, and the first one behind `schedule`, which empties half 0, has turn 0.
//
// writes and reads a part of 4.5 * OUT bytes a block and head that it shares, 2.3 KB for 4 x 128 channels, in L2; and empties as much.
#ifndef MINIOSCAR_MERGE_CUH
#define MINIOSCAR_MERGE_CUH
#include "device.cuh"
#include "output.cuh"
#include "schedule.cuh"

constexpr int OUT = Q_PER_KV * D, QUADS = OUT / 4, SLICES = (QUADS + 15) / 16;  // of the channels of all q heads: what a lane, what a warp merges
constexpr int PLACE = QUADS + QUADS / 8;  // float4 of a part in the workspace: its sums, then (m, l) of each 32 channels
constexpr int TRIES = 8;                  // to read parts, before a NaN may be one of q, keys or values
constexpr float LOWEST = -1e30f, LN2 = 0.69314718f;

// Where the results go. Heads here are kv heads (times SHARE) of all sequences, one after another, each with Q_PER_KV rows of D.
struct Results {
  Output* out;        // [heads, Q_PER_KV, D]
  float* lse;         // [heads, Q_PER_KV] natural logarithm of the sum of exp(logit), or null
  float4* workspace;  // [2 halves, gridDim.x, 2, PLACE]: parts of heads that blocks share
  int* arrived;       // [gridDim.x, SLICES], of the head that begins in a block and goes on in others; zero before and after
  int turn;           // the half of the workspace that is empty
};

// Shared memory: the warps' rings | first parts | (m, l) of first and last parts | their heads | barriers | the sequences' tokens
constexpr int PART_BYTES = OUT * 4;
constexpr int AT_PARTS = BLOCK_WARPS * RING_BYTES, AT_ML = AT_PARTS + BLOCK_WARPS * PART_BYTES;
constexpr int AT_HEADS = AT_ML + BLOCK_WARPS * 2 * Q_PER_KV * 8, AT_BARRIERS = (AT_HEADS + BLOCK_WARPS * 8 + 15) / 16 * 16;
constexpr int AT_ROWS = AT_BARRIERS + BLOCK_WARPS * STAGES * 8;
static_assert(RING_BYTES >= PART_BYTES && RING_BYTES % 16 == 0, "the last part goes into the drained ring");
static_assert(2 * BLOCK_WARPS <= 32, "a lane a part");

__device__ __forceinline__ float* part_o(unsigned char* smem, int part) {  // part 2w: first of warp w, 2w + 1: its last
  return (float*)(part % 2 ? smem + part / 2 * RING_BYTES : smem + AT_PARTS + part / 2 * PART_BYTES);
}

__device__ __forceinline__ void store_lse(const Results& to, int head, int q_head, float m, float l) {
  if (to.lse) to.lse[(size_t)head * Q_PER_KV + q_head] = (m + log2f(l)) * LN2;
}

// Four neighbouring channels of a q head: sums of p * value, the reference m, the sum of p.
struct Part { float4 o; float2 ml; };
__device__ __forceinline__ Part nothing() { return {make_float4(0.f, 0.f, 0.f, 0.f), make_float2(LOWEST, 0.f)}; }

// Takes parts in, in their order.
template <int N>
__device__ __forceinline__ void take(Part& sum, const Part (&parts)[N]) {
  float m = sum.ml.x, l = 0.f;
  float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int u = 0; u < N; u++) m = fmaxf(m, parts[u].ml.x);
  auto add = [&](const Part& part) {
    const float f = ex2(part.ml.x - m);
    o = make_float4(fmaf(f, part.o.x, o.x), fmaf(f, part.o.y, o.y), fmaf(f, part.o.z, o.z), fmaf(f, part.o.w, o.w)), l = fmaf(f, part.ml.y, l);
  };
  add(sum);
#pragma unroll
  for (int u = 0; u < N; u++) add(parts[u]);
  sum = {o, make_float2(m, l)};
}

// `count` parts, part(k) the k-th, N at a time, whose loads do not wait for each other. The lower half of the warp takes the first of them
// in and the upper half the others; what the lower half returns is all of them.
template <int N, class Load>
__device__ __forceinline__ Part merge_parts(int count, const Load& part) {
  const bool upper = threadIdx.x % 32 >= 16;
  const int middle = (count + 1) / 2, end = upper ? count : middle;
  Part sum = nothing();
#pragma unroll 1
  for (int k = 0; k < middle; k += N) {
    Part batch[N];
#pragma unroll
    for (int u = 0; u < N; u++) {
      const int at = k + u + (upper ? middle : 0);
      batch[u] = part(min(at, count - 1));  // behind the last one that once more, without weight
      if (at >= end) batch[u].ml.x = LOWEST;
    }
    take(sum, batch);
  }
  auto above = [](float x) { return __shfl_down_sync(FULL, x, 16); };
  const Part others[1] = {{make_float4(above(sum.o.x), above(sum.o.y), above(sum.o.z), above(sum.o.w)), make_float2(above(sum.ml.x), above(sum.ml.y))}};
  take(sum, others);
  return sum;
}

// The parts first ... last of this block, of a head and of quad `at` of its channels: neighbours, of which all but perhaps the last are what
// their warps have last.
__device__ __forceinline__ Part merge_warps(unsigned char* smem, unsigned first, unsigned last, int at) {
  const float2* ml = (const float2*)(smem + AT_ML) + at / (D / 4);
  return merge_parts<(BLOCK_WARPS + 1) / 2>(last / 2 - first / 2 + 1, [=](int k) -> Part {
    const unsigned p = min((first | 1) + 2 * k, last);
    return {((const float4*)part_o(smem, p))[at], ml[p * Q_PER_KV]};
  });
}

// Of a block's two places in half `half` of the workspace: for a head that goes on from the block before, and for one that begins in it.
__device__ __forceinline__ float4* place_of(const Results& to, int half, int block, bool begins) {
  return to.workspace + (size_t)((half * gridDim.x + block) * 2 + begins) * PLACE;
}
// Canonical NaN is 0x7fffffff (PTX ISA), of a matrix product too.
__device__ __forceinline__ float4 emptiness() { return make_float4(__uint_as_float(FULL), __uint_as_float(FULL), __uint_as_float(FULL), __uint_as_float(FULL)); }
__device__ __forceinline__ bool is_empty(float x) { return __float_as_uint(x) == FULL; }
__device__ __forceinline__ bool is_nan(const Part& part) { return isnan(part.o.x + part.o.y + part.o.z + part.o.w + part.ml.y); }

// Part k of a head that blocks from, from + 1 ... share, of quad `at` of its channels; words of it may be empty.
__device__ __forceinline__ Part block_part(const Results& to, int from, int k, int at) {
  const float4* place = place_of(to, to.turn, from + k, k == 0);
  return {load_relaxed(place + at), load_relaxed((const float2*)(place + QUADS) + at / 8)};
}
// Until no word of any of them is empty.
__device__ __forceinline__ void wait_for_parts(const Results& to, int from, int blocks, int at) {
#pragma unroll 1
  for (int k = 0; k < blocks; k++) {
    Part part;
    do part = block_part(to, from, k, at);
    while (is_empty(part.o.x) || is_empty(part.o.y) || is_empty(part.o.z) || is_empty(part.o.w) || is_empty(part.ml.x) || is_empty(part.ml.y));
  }
  __syncwarp();
}

// All of them, which have been counted.
__device__ __forceinline__ Part merge_blocks(const Results& to, int from, int blocks, int at) {
#pragma unroll 1
  for (int tries = 0;; tries++) {
    if (tries == TRIES) wait_for_parts(to, from, blocks, at);
    const Part sum = merge_parts<8>(blocks, [=](int k) { return block_part(to, from, k, at); });
    if (tries == TRIES || !__any_sync(FULL, is_nan(sum))) return sum;
  }
}

// By a block of `schedule`, whose grid is that of the launches behind it.
__device__ __forceinline__ void empty_first_half(float4* workspace) {
  for (int k = threadIdx.x; k < 2 * PLACE; k += BLOCK_WARPS * 32) workspace[(size_t)2 * blockIdx.x * PLACE + k] = emptiness();
}
// By one warp: the places that the launch after this one will write into.
__device__ __forceinline__ void empty_other_half(const Results& to, const Shared* shared) {
#pragma unroll 1
  for (int i = 0; i < 2; i++) {
    if (!shared[i].blocks) continue;
    float4* place = place_of(to, 1 - to.turn, blockIdx.x, (int)blockIdx.x == shared[i].from);
    for (int k = threadIdx.x % 32; k < PLACE; k += 32) store_relaxed(place + k, emptiness());
  }
}

// Parts first ... last of this block are of this head, of which blocks from ... from + with - 1 have parts; with = 0: this one alone. By slices,
// which go to the warps in turn: `turn` is the next one of this warp. No slice waits for another.
__device__ __forceinline__ void merge_head(unsigned char* smem, const Results& to, int head, unsigned first, unsigned last, int from, int with, int& turn) {
  const int lane = threadIdx.x % 32, block = blockIdx.x;
#pragma unroll 1
  for (; turn < SLICES; turn += BLOCK_WARPS) {
    const int at = min(turn * 16 + lane % 16, QUADS - 1);
    const bool own = lane < 16 && turn * 16 + lane < QUADS;  // this quad is this lane's to write
    int* arrived = to.arrived + from * SLICES + turn;
    int before = 0;
    if (with && lane == 0) before = atomic_add_relaxed(arrived, 1);
    Part sum = merge_warps(smem, first, last, at);
    if (with) {
      float4* place = place_of(to, to.turn, block, block == from);
      if (own) store_relaxed(place + at, sum.o);
      if (own && at % 8 == 0) store_relaxed((float2*)(place + QUADS) + at / 8, sum.ml);
      if (__shfl_sync(FULL, before, 0) + 1 < with) continue;
      if (lane == 0) store_relaxed(arrived, 0);
      sum = merge_blocks(to, from, with, at);
    }
    if (!own) continue;
    const float inverse = rcp_approx(sum.ml.y);
    store_output(to.out + (size_t)head * OUT + 4 * at, sum.o.x * inverse, sum.o.y * inverse, sum.o.z * inverse, sum.o.w * inverse);
    if (at % (D / 4) == 0) store_lse(to, head, at / (D / 4), sum.ml.x, sum.ml.y);
  }
  turn -= SLICES;
}

// All parts of this block; begin, end: the heads that it shares.
__device__ __forceinline__ void merge(unsigned char* smem, const Results& to, const Shared& begin, const Shared& end) {
  const int lane = threadIdx.x % 32;
  int head = begin.head, from = begin.from, with = begin.blocks, turn = threadIdx.x / 32;
  unsigned first = 1, last = 2 * begin.warps - 1;  // of a block with nothing but one head: what each warp has last
  int own = -1;
  unsigned there = 0, begins = 0;
  if (!begin.warps) {
    // Parts are in list order, so those of a head are neighbours: a head begins where the part before, of those that there are, is another's.
    if (lane < 2 * BLOCK_WARPS) own = ((const int*)(smem + AT_HEADS))[lane];
    there = __ballot_sync(FULL, own >= 0);
    const unsigned below = there & ((1u << lane) - 1);
    const int previous = __shfl_sync(FULL, own, below ? 31 - __clz(below) : lane);
    begins = __ballot_sync(FULL, own >= 0 && !(below && previous == own));
    if (!begins) return;
  }
#pragma unroll 1
  do {
    if (!begin.warps) {
      first = __ffs(begins) - 1, head = __shfl_sync(FULL, own, first);
      begins &= begins - 1;
      last = 31 - __clz(there & (begins ? (begins & -begins) - 1 : FULL));
      const bool at_begin = begin.blocks && begin.head == head;
      from = at_begin ? begin.from : end.from, with = at_begin ? begin.blocks : end.head == head ? end.blocks : 0;
    }
    merge_head(smem, to, head, first, last, from, with, turn);
  } while (begins);
}
#endif
