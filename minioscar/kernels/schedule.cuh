// schedule.cuh: the list of work items and which warp takes which of them, found from the lengths once a step.
//
// The list: sequence after sequence, kv head after kv head, in each its pages, then its tiles. Blocks take equal,
// contiguous shares of it, and so do the warps of a block. Where shares differ by an item, the larger ones are spread
// evenly over the blocks, so that heads of one size end at the end of a block if their number allows it. A type Items
// says how many items a length makes, and which block has a page (attention.cuh).
//
// tasks [blocks][2 * BLOCK_WARPS + 2] int4: for each block its warps' tasks, then the two heads that it shares.
// grid (blocks of the attention kernel), BLOCK_WARPS * 32 threads, 4 * (2 * batch + 1) bytes of dynamic shared memory.
// reads 4 B a sequence in every block, writes 32 B a warp: some microseconds, for all layers of a step.
#ifndef MINIOSCAR_SCHEDULE_CUH
#define MINIOSCAR_SCHEDULE_CUH
#include "common.cuh"

// Items of one kv head: its pages first, then its tiles. `item` is the next one of them.
struct Cursor { int row, head, item, num_pages, num_items, tokens; };

template <class Items> DEVICE void next_head(const Items& items, Cursor& at, const int* tokens, int batch, int heads) {
  at.item = 0;
  if (++at.head == heads) {
    at.head = 0;
    do at.row++; while (at.row < batch && tokens[at.row] <= 0);
    if (at.row == batch) return;
    at.tokens = tokens[at.row];
    items.count_items(at);
  }
}

// Task of a warp: `count` items from item `item` of head `head` of sequence `row` on; how large that head is, and which
// block has its first page, so that the first copies can be issued before lengths and table are loaded.
struct Task { int row, head, item, count, num_pages, num_items, tokens, block; };
// A head that this block shares with others, at its first or its last item: it is split over blocks from ... from +
// blocks - 1. No such head: blocks = 0. warps: where the block has items of this head alone, how many of its warps
// have some, else 0.
struct Shared { int head, blocks, from, warps; };
// Of a block, in int4: its warps' tasks, then the two shared heads.
constexpr int BLOCK_TASKS = 2 * BLOCK_WARPS + 2;

// first [batch + 1]: number of each sequence's first item, then of all items; tokens [batch]: lengths. By one warp.
template <class Items>
DEVICE void number_items(int* first, int* tokens, const Items& items, const int* lengths, int added, int batch,
                         int heads) {
  const int lane = threadIdx.x % 32;
  int sum = 0;
  for (int b = lane; b < batch + lane; b += 32) {  // every lane makes the same number of iterations
    const int length = b < batch ? lengths[b] + added : 0, n = length > 0 ? items.count(length) * heads : 0;
    int prefix = n;
    UNROLL for (int below = 1; below < 32; below *= 2) {
      const int other = __shfl_up_sync(FULL_MASK, prefix, below);
      if (lane >= below) prefix += other;
    }
    if (b < batch) {
      first[b] = sum + prefix - n;
      tokens[b] = length;
    }
    sum += __shfl_sync(FULL_MASK, prefix, 31);
  }
  if (lane == 0) first[batch] = sum;
}

// How many blocks have items. Where heads would be split over so many that reading their partials takes several trips
// to L2 (MANY_SPLITS), a block has MIN_ITEMS at least, for as many warps; the others leave their multiprocessors to the
// next launch, which loads its weights meanwhile. Heads of one size then end where blocks do.
DEVICE int blocks_used(int total, int heads, int blocks) {
  constexpr int MANY_SPLITS = 16, MIN_ITEMS = 5;
  int used = blocks;
  if (blocks > MANY_SPLITS * heads) used = min(blocks, max(total / (MIN_ITEMS * heads), 1) * heads);
  return min(total, used);
}

template <class Items>
DEVICE void schedule_block(const Items& items, const int* lengths, int added, int batch, int heads, int4* tasks) {
  extern __shared__ __align__(128) unsigned char smem[];
  int *first = (int*)smem, *tokens = first + batch + 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = blockIdx.x, blocks = gridDim.x;
  if (warp == 0) number_items(first, tokens, items, lengths, added, batch, heads);
  __syncthreads();
  const int total = first[batch], used_blocks = blocks_used(total, batch * heads, blocks);
  const int items_per_block = total / max(used_blocks, 1), extra_items = total - items_per_block * used_blocks;
  auto begin_of = [&](int b) {  // total * b / used_blocks
    return b < used_blocks ? items_per_block * b + extra_items * b / used_blocks : total;
  };
  auto owner = [&](int x) {
    return (int)(((x + 1ll) * used_blocks - 1) / total);
  };                                  // of an item: the last block that begins <= x
  auto locate = [&](int x) -> Task {  // x < total
    int row = 0, end = batch;
    while (end - row > 1) {
      const int middle = (row + end) / 2;
      if (first[middle] <= x) row = middle; else end = middle;
    }
    Cursor at = {row, 0, 0, 0, 0, tokens[row]};
    items.count_items(at);
    const int head = (x - first[row]) / at.num_items;
    return {row, head, x - first[row] - head * at.num_items, 0, at.num_pages, at.num_items, at.tokens, 0};
  };
  const int lo = begin_of(block), hi = begin_of(block + 1), num_items = hi - lo;
  // The extra items of a block's warps are spread evenly, so that heads end where warps do if they can. In a block
  // with one head the first warps take them, which the four schedulers of a multiprocessor serve in rotation; and in
  // a block with fewer items than warps, so that no idle warp stands between others.
  bool extra_first = num_items < BLOCK_WARPS;
  if (!extra_first) {
    const Task head = locate(lo);
    extra_first = lo - head.item + head.num_items >= hi;
  }
  const int items_per_warp = num_items / BLOCK_WARPS, extra = num_items % BLOCK_WARPS;
  auto begin_of_warp = [&](int w) {
    return lo + (extra_first ? w * items_per_warp + min(w, extra) : w * num_items / BLOCK_WARPS);
  };
  const int begin = begin_of_warp(warp), count = begin_of_warp(warp + 1) - begin;
  if (lane == 0) {
    const Task at = count ? locate(begin) : Task{};
    tasks[block * BLOCK_TASKS + 2 * warp] = make_int4(at.row, at.head, at.item, count);
    const int first_block = items.block_of(at.row, at.item, at.num_pages);
    tasks[block * BLOCK_TASKS + 2 * warp + 1] = make_int4(at.num_pages, at.num_items, at.tokens, first_block);
  }
  if (threadIdx.x < 2) {
    Shared shared = {0, 0, 0, 0};
    if (lo < hi) {
      const int x = threadIdx.x ? hi - 1 : lo;
      const Task head = locate(x);
      const int head_lo = x - head.item, head_hi = head_lo + head.num_items;
      if ((head_lo < lo || head_hi > hi) && !(threadIdx.x && head_lo <= lo)) {
        const int from = owner(head_lo);
        const int warps = head_lo <= lo && head_hi >= hi ? min(num_items, BLOCK_WARPS) : 0;
        shared = {head.row * heads + head.head, owner(head_hi - 1) - from + 1, from, warps};
      }
    }
    tasks[block * BLOCK_TASKS + 2 * BLOCK_WARPS + threadIdx.x] =
        make_int4(shared.head, shared.blocks, shared.from, shared.warps);
  }
}
#endif
