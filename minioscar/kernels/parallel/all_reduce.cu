// all_reduce.cu: the sum over cards of what each has computed with its share of a matrix, on every card.
//
//   out[i] = residual[i] + sum_r part_r[i]       r = 0 ... RANKS - 1 in this order, float32, rounded once
//
// part, residual, out: bf16 [count], count a multiple of 4, of this card; residual may be null, out may be either.
// inbox: uint64 [2][RANKS][capacity] of every card, this one's and, in turn, those of cards rank + 1, rank + 2, ...
// Each card writes its part into the others' memory: a word has two numbers in its low half and the call's number in
// its high half, so that a card that reads the number has the numbers, too: no flag, no fence, one way over the link.
// Calls take the two halves of an inbox in turn. A card that makes call n has everybody's words of call n - 1, so
// everybody has ended call n - 2, whose words it overwrites. epochs: int [MAX_BLOCKS], the number of the last call.
// Equal inputs give equal bits, on all cards the same: a card takes its own part rounded, as the others see it.
// PHASES: a launch does all of them; the simulator, which runs one launch after the other, takes them singly.
// grid min(ceil(count / 1024), 64), 256 threads of four numbers. over the links 4 B a number and card.
#include "peers.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    all_reduce(const uint2* part, const uint2* residual, uint2* out, int* epochs, volatile uint64_t* inbox,
               volatile uint64_t* peer1, volatile uint64_t* peer2, volatile uint64_t* peer3, volatile uint64_t* peer4,
               volatile uint64_t* peer5, volatile uint64_t* peer6, volatile uint64_t* peer7, int rank, int count,
               int capacity) {
  volatile uint64_t* const peers[7] = {peer1, peer2, peer3, peer4, peer5, peer6, peer7};
  const int first = blockIdx.x * THREADS + threadIdx.x, stride = gridDim.x * THREADS;
  wait_then_allow_next();
  const uint32_t epoch = epochs[blockIdx.x] + 1;
  const size_t half = (size_t)(epoch & 1) * RANKS * capacity;
  if (PHASES & PUSH)
    for (int i = first; i < count / 4; i += stride) {
      const uint2 own = part[i];
      UNROLL for (int peer = 0; peer < RANKS - 1; peer++) {
        volatile uint64_t* to = peers[peer] + half + (size_t)rank * capacity + 2 * i;
        to[0] = (uint64_t)epoch << 32 | own.x;
        to[1] = (uint64_t)epoch << 32 | own.y;
      }
    }
  if (!(PHASES & COLLECT)) return;
  for (int i = first; i < count / 4; i += stride) {
    const uint2 old = residual ? residual[i] : make_uint2(0, 0);
    float sum[4] = {low(old.x), high(old.x), low(old.y), high(old.y)};
    const uint2 own = part[i];
    UNROLL for (int r = 0; r < RANKS; r++) {
      volatile uint64_t* from = inbox + half + (size_t)r * capacity + 2 * i;
      const uint2 x = r == rank ? own : make_uint2(word_of(from, epoch), word_of(from + 1, epoch));
      accumulate(sum, make_float4(low(x.x), high(x.x), low(x.y), high(x.y)));
    }
    out[i] = make_uint2(pack_bf16x2(sum[0], sum[1]), pack_bf16x2(sum[2], sum[3]));
  }
  count_call(epochs, epoch);
}
