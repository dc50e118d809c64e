// gather.cu: the logits of the whole vocabulary on every card, each of which has computed those of its share.
//
//   out_r[t][first + i] = part[t][i]             on every card r, i < share
//
// part float32 [tokens][share] of this card; out0 ... out7: float32 [tokens][vocab] of cards 0, 1, ... flags: int
// [2][RANKS][MAX_BLOCKS] of every card, in the same order: the number of the last call for which block b of card r was
// ready, and of the last whose numbers it has written. A card is ready when all that used the memory of `out` before
// has ended. Where shares overlap, two cards write equal numbers. epochs and PHASES: all_reduce.cu.
// WIDTH: 4 where share, vocab and first are multiples of it, else 1: numbers that a thread moves at a time.
// grid min(ceil(tokens * share / 1024), MAX_BLOCKS), 256 threads. over the links 4 B a number and card.
#include "peers.cuh"

#if WIDTH == 4
typedef float4 Vector;
#else
typedef float Vector;
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    gather(const float* __restrict__ part, float* out0, float* out1, float* out2, float* out3, float* out4, float* out5,
           float* out6, float* out7, int* flags0, int* flags1, int* flags2, int* flags3, int* flags4,
           int* flags5, int* flags6, int* flags7, int* epochs, int rank, int tokens, int share, int vocab, int first) {
  float* const outs[8] = {out0, out1, out2, out3, out4, out5, out6, out7};
  int* const flags[8] = {flags0, flags1, flags2, flags3, flags4, flags5, flags6, flags7};
  wait_then_allow_next();
  const uint32_t epoch = epochs[blockIdx.x] + 1;
  auto signal = [&](int kind) {
    if (threadIdx.x == 0)
      UNROLL for (int r = 0; r < RANKS; r++)
        *(volatile int*)(flags[r] + (kind * RANKS + rank) * MAX_BLOCKS + blockIdx.x) = epoch;
  };
  auto await = [&](int kind) {
    UNROLL for (int r = 0; r < RANKS; r++)
      if (r == rank && threadIdx.x < RANKS)
        wait_for(flags[r] + (kind * RANKS + threadIdx.x) * MAX_BLOCKS + blockIdx.x, epoch);
    __threadfence_system();
  };
  if (PHASES & READY) signal(0);
  if (PHASES & PUSH) {
    await(0);
    __syncthreads();
    const int vectors = share / WIDTH, stride = gridDim.x * THREADS;
#pragma unroll 4
    for (int n = blockIdx.x * THREADS + threadIdx.x; n < tokens * vectors; n += stride) {
      const int t = n / vectors, i = n % vectors * WIDTH;
      const Vector x = *(const Vector*)(part + (size_t)t * share + i);
      UNROLL for (int r = 0; r < RANKS; r++) *(Vector*)(outs[r] + (size_t)t * vocab + first + i) = x;
    }
    __threadfence_system();
    __syncthreads();
    signal(1);
  }
  if (!(PHASES & COLLECT)) return;
  await(1);
  count_call(epochs, epoch);
}
