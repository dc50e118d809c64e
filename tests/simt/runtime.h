// runtime.h: the runtime's interface for kernels (upper half, used by include/*.h) and for itself (lower half).
#pragma once
#include <cstddef>
#include <cstdint>

namespace simt {

enum Kind { READ, WRITE, ATOMIC, RELAXED_READ, RELAXED_WRITE };  // the last two: atomic, but nothing is ordered by them
struct Index { unsigned x, y, z; };

// ---- Called by kernels through the headers in include/. `line` is the kernel's source line: lanes of a warp
// operation must come from the same one.
[[gnu::const]] Index thread_index();
[[gnu::const]] Index block_index();
[[gnu::const]] Index block_size();
[[gnu::const]] Index grid_size();
void barrier(int line);                                     // __syncthreads
unsigned barrier_reduce(unsigned value, char op, int line);  // __syncthreads_count, _and, _or: op '+', '&', '|'
void barrier_named(int id, int threads, int line);          // bar.sync id, threads
void barrier_named_arrive(int id, int threads);              // bar.arrive id, threads
void sync_warp(uint32_t mask, int line);
uint64_t shuffle(uint32_t mask, uint64_t value, int from, int line);
uint32_t ballot(uint32_t mask, bool value, int line);
void fence();                                               // __threadfence
void atomic(const void* address, size_t bytes, bool acquire_release = false);
void relaxed(const void* address, size_t bytes, Kind kind);
void trap(const char* what);
long long clock_ticks();

void mma_16816(float* d, const uint32_t* a, const uint32_t* b, const float* c, bool bf16, int line);
void ldmatrix(uint32_t* out, int count, bool transposed, const void* row, int line);
uint32_t movmatrix(uint32_t value, int line);

// wgmma.mma_async, m64nNk16, BF16: d[N / 2] += a . b; a in four registers of each thread or, where `a` is null, like
// b in shared memory.
void wgmma(float* d, int n, bool fresh, const uint32_t* a, uint64_t a_shared, uint64_t b, bool b_n_major, int line);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups, int line);

void copy_async(void* shared, const void* global, int bytes,
                int source_bytes);  // cp.async; bytes past source_bytes become zero
void copy_commit();
void copy_wait(int groups);                                 // until at most `groups` newest groups are in flight
void mbarrier_init(void* barrier, int count);
void mbarrier_arrive(void* barrier, unsigned transfer_bytes);
void mbarrier_wait(void* barrier, unsigned parity, int line);
void copy_bulk(void* shared, const void* global, unsigned bytes, void* barrier);
struct Tensor {  // what a tensor map says: a matrix, and a box of it
  const char* base;
  uint64_t rows, row_bytes;
  uint32_t box_rows, box_row_bytes;
  uint64_t swizzled;
};
void copy_tensor_box(void* shared, const Tensor& from, int column, int row,
                     void* barrier);                        // column: of numbers of 2 bytes where rows are swizzled, else of 8
uint32_t shared_address(const void* p);                     // the 32-bit address of PTX and back
void* shared_pointer(uint32_t address);

// ---- Inside the runtime.
constexpr int MAX_THREADS = 1024, WARPS = 32, ENGINE = MAX_THREADS;  // ENGINE: the "thread" that writes bulk copies
enum class State : uint8_t { ready, barrier, named, warp, mbarrier, done };


struct Thread {
  void* stack;              // saved stack pointer
  Index id;
  int index, line;
  State state;
  bool fenced;              // a __threadfence since its last write to global memory
  uint32_t mask;            // of the warp operation it waits in
  const char* op;           // a literal, the same one in every call of an operation
  void* args;
};

struct Launch {
  Index grid, block_dim, block;  // block: the one that runs now
  int threads;
  uint32_t start_epoch, block_epoch,
      epoch;  // one more after each block-wide barrier: of the launch's start, the block's start, now
  uint64_t random;
  bool checks;
  char *module_begin, *module_end;  // data of the kernel's own shared object: tables and __device__ variables
};

#pragma GCC visibility push(hidden)  // reached without a table of addresses
extern Launch launch;
extern Thread threads[MAX_THREADS];
extern Thread* current;     // null outside a kernel
extern char *stacks, *stacks_end;
#pragma GCC visibility pop

[[noreturn]] void fault(void* pc, const void* address, const char* format, ...) __attribute__((format(printf, 3, 4)));
void note_other(void* pc);  // the source line of the other access of a race, for the fault that follows
inline uint32_t random_below(uint32_t n) {  // xorshift64*
  uint64_t& x = launch.random;
  x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
  return uint32_t(((x * 0x2545F4914F6CDD1Dull >> 32) * n) >> 32);
}
inline int warp_of(int thread) { return thread / 32; }

void park(State why);       // the current thread waits; returns when somebody has made it ready
void make_ready(Thread& t);

// memory.cpp: every access of a kernel is checked here.
void access(const void* address, size_t bytes, Kind kind, void* pc);
void begin_block();
void begin_launch();
void after_block_barrier();
void after_warp_sync(int warp, uint32_t mask);
struct Clocks {  // what has been seen of each warp (and of ENGINE) since the last block-wide barrier, and whether of
                 // other blocks
  uint32_t epoch, warp[WARPS + 1];
  uint32_t some[WARPS + 1],
      lanes[WARPS + 1];  // and of these lanes alone: a lane's arrival is not its warp's without a __syncwarp before it
  bool acquired;
};
void release(int thread, Clocks& into);
void release_engine(Clocks& into);
void acquire(int thread, Clocks& from);
void in_flight(const void* address, size_t bytes);             // unreadable until ...
void landed(const void* address, size_t bytes, int writer);     // ... a copy has been written by this thread or ENGINE

// copies.cpp
void copies_begin_block();
bool copies_deliver_one();  // completes a bulk copy that somebody waits for; false: there is none
const char* copy_in_flight(const void* address, size_t bytes);
bool bulk_pending();

// warpgroup.cpp
void wgmma_begin_block();
bool wgmma_pending();

#define SIMT_PC __builtin_return_address(0)
}  // namespace simt
