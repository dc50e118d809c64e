// schedule.cuh: the list of units and which warp takes which of them, found from the sequences' lengths once a step.
//
// The list: sequence after sequence, kv head after kv head, in each its pages, then its tiles. Blocks take equal, contiguous parts of it, and
// so do the warps of a block. A unit that some have more is spread evenly over the blocks, so that heads of one size end where blocks do if
// their number allows it. A type Units says how many units a length makes (attention.cuh).
//
// tasks [blocks][2 * BLOCK_WARPS + 2] int4: of each block its warps' tasks, then the two heads that it shares with others.
// reads 4 B a sequence in every block, writes 32 B a warp: some microseconds, for all layers of a step.
#ifndef MINIOSCAR_SCHEDULE_CUH
#define MINIOSCAR_SCHEDULE_CUH

constexpr unsigned FULL = 0xffffffffu;

// Units of one kv head: its pages first, then its tiles. `unit` is the next one of them.
struct Cursor { int row, head, unit, pages, units, tokens; };

template <class Units>
__device__ __forceinline__ void next_head(const Units& units, Cursor& at, const int* tokens, int batch, int heads) {
  at.unit = 0;
  if (++at.head == heads) {
    at.head = 0;
    do at.row++; while (at.row < batch && tokens[at.row] <= 0);
    if (at.row == batch) return;
    at.tokens = tokens[at.row];
    units.measure(at);
  }
}

// What a warp does: `count` units from unit `unit` of head `head` of sequence `row` on; and how large that head is, so that the first
// copies can be asked for without a look at the lengths.
struct Task { int row, head, unit, count, pages, units, tokens, unused; };
// A head that this block shares with others, at its begin or its end: blocks from ... from + blocks - 1 have parts. No such head: blocks = 0.
// warps: where the block has nothing but this head, how many of its warps have some of it, else 0.
struct Shared { int head, blocks, from, warps; };
// Of a block, in int4: its warps' tasks, then the two heads.
constexpr int BLOCK_TASKS = 2 * BLOCK_WARPS + 2;

// Grid (blocks of the attention kernel), BLOCK_WARPS * 32 threads, 4 * (2 * batch + 1) bytes of dynamic shared memory.
template <class Units>
__device__ __forceinline__ void schedule_block(const Units& units, const int* lengths, int added, int batch, int heads, int4* tasks) {
  extern __shared__ __align__(128) unsigned char smem[];
  int* first = (int*)smem;  // [batch + 1] number of each sequence's first unit
  int* tokens = first + batch + 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = blockIdx.x, blocks = gridDim.x;
  if (warp == 0) {
    int sum = 0;
    for (int b = lane; b < batch + lane; b += 32) {  // as many rounds for every lane
      const int length = b < batch ? lengths[b] + added : 0, n = length > 0 ? units.count(length) * heads : 0;
      int upto = n;
#pragma unroll
      for (int below = 1; below < 32; below *= 2) {
        const int other = __shfl_up_sync(FULL, upto, below);
        if (lane >= below) upto += other;
      }
      if (b < batch) first[b] = sum + upto - n, tokens[b] = length;
      sum += __shfl_sync(FULL, upto, 31);
    }
    if (lane == 0) first[batch] = sum;
  }
  __syncthreads();
  const int total = first[batch], used = min(total, blocks), each = total / max(used, 1), more = total - each * used;
  auto begin_of = [&](int b) { return b < used ? each * b + more * b / used : total; };  // b * total / used
  auto owner = [&](int x) { return (int)(((x + 1ll) * used - 1) / total); };             // of a unit: the last block that begins before x + 1
  auto locate = [&](int x) -> Task {  // x < total
    int row = 0, end = batch;
    while (end - row > 1) {
      const int middle = (row + end) / 2;
      if (first[middle] <= x) row = middle; else end = middle;
    }
    Cursor at = {row, 0, 0, 0, 0, tokens[row]};
    units.measure(at);
    const int head = (x - first[row]) / at.units;
    return {row, head, x - first[row] - head * at.units, 0, at.pages, at.units, at.tokens, 0};
  };
  const int lo = begin_of(block), hi = begin_of(block + 1), units_here = hi - lo;
  // A unit that some warps have more is spread evenly, so that heads end where warps do if they can. In a block with one head the first warps have
  // it, which the four schedulers of a multiprocessor take in turn; and in one with few units, so that no warp without stands between others.
  bool to_first = units_here < BLOCK_WARPS;
  if (!to_first) {
    const Task where = locate(lo);
    to_first = lo - where.unit + where.units >= hi;
  }
  const int fewest = units_here / BLOCK_WARPS, rest = units_here % BLOCK_WARPS;
  auto begin_of_warp = [&](int w) { return lo + (to_first ? w * fewest + min(w, rest) : w * units_here / BLOCK_WARPS); };
  const int begin = begin_of_warp(warp), count = begin_of_warp(warp + 1) - begin;
  if (lane == 0) {
    const Task at = count ? locate(begin) : Task{};
    tasks[block * BLOCK_TASKS + 2 * warp] = make_int4(at.row, at.head, at.unit, count);
    tasks[block * BLOCK_TASKS + 2 * warp + 1] = make_int4(at.pages, at.units, at.tokens, 0);
  }
  if (threadIdx.x < 2) {
    Shared mine = {0, 0, 0, 0};
    if (lo < hi) {
      const int x = threadIdx.x ? hi - 1 : lo;
      const Task where = locate(x);
      const int head_lo = x - where.unit, head_hi = head_lo + where.units;
      if ((head_lo < lo || head_hi > hi) && !(threadIdx.x && head_lo <= lo)) {
        const int from = owner(head_lo);
        const int warps = head_lo <= lo && head_hi >= hi ? min(units_here, BLOCK_WARPS) : 0;
        mine = {where.row * heads + where.head, owner(head_hi - 1) - from + 1, from, warps};
      }
    }
    tasks[block * BLOCK_TASKS + 2 * BLOCK_WARPS + threadIdx.x] = make_int4(mine.head, mine.blocks, mine.from, mine.warps);
  }
}
#endif
