// peers.cuh: what the kernels share that write into the memory of other cards.
#ifndef MINIOSCAR_PEERS_CUH
#define MINIOSCAR_PEERS_CUH
#include "../common.cuh"

constexpr int THREADS = 256, MAX_BLOCKS = 128;
constexpr int READY = 1, PUSH = 2, COLLECT = 4;  // bits of PHASES
constexpr int MAX_POLLS = 1 << 26;  // some 30 s: then another card has failed, and this one gives up, too

// The low half of a word of the inbox, once its high half is the number of this call. An access of 64 bits is one:
// both halves are of the same store.
DEVICE uint32_t word_of(const volatile uint64_t* from, uint32_t epoch) {
  for (int polls = 0;; polls++) {
    const uint64_t word = *from;
    if ((uint32_t)(word >> 32) == epoch) return (uint32_t)word;
    if (polls == MAX_POLLS) __trap();
  }
}

// Waits until a flag is the number of this call, or of a later one.
DEVICE void wait_for(const volatile int* flag, uint32_t epoch) {
  for (int polls = 0; (int)(*flag - epoch) < 0; polls++)
    if (polls == MAX_POLLS) __trap();
}

// Every block counts the calls for itself; blocks that this grid does not have are counted by those that it has.
DEVICE void count_call(int* epochs, uint32_t epoch) {
  __syncthreads();
  for (int block = blockIdx.x + threadIdx.x * gridDim.x; block < MAX_BLOCKS; block += THREADS * gridDim.x)
    epochs[block] = epoch;
}
#endif
