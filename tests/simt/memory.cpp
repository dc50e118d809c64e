// memory.cpp: every load and store of a kernel, seen through the calls that g++ -fsanitize=thread puts before them.
//
// For each 4-byte word of global and shared memory a shadow keeps which bytes are addressable, which have been
// written, and up to four recent accesses. Two accesses to one byte by different threads, a write among them (not
// both atomic), must be ordered: by a block-wide barrier (an "epoch"), by __syncwarp inside a warp, by an mbarrier or
// named barrier that the lane or, before a __syncwarp, its warp has come to (Clocks), or, between blocks, by a
// __threadfence with an atomic after it and an atomic in the later block.
// Shuffles, votes and matrix operations do not order memory, as in CUDA's documentation.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "runtime.h"

namespace simt {

struct Cell {  // one access
  uint64_t epoch : 28, clock : 18, thread : 11, bytes : 4, write : 1, atomic : 1, unused : 1;
  void* pc;
};
static inline bool same(const Cell& a, const Cell& b) { return !memcmp(&a, &b, 8); }  // but for pc

struct Region {
  uintptr_t base;
  size_t size, used;
  uint8_t* state;       // a word: addressable bytes << 4 | written bytes
  Cell (*cells)[4];
  uint32_t live_epoch;  // accesses of earlier epochs are over and done
};

static Region global, shared;
constexpr size_t KEPT = 4 << 20;              // so much global memory stays with its shadow (16 times as large)
static uint32_t clocks[WARPS + 1];            // counts each warp's synchronizations in this epoch; [WARPS]: of ENGINE
static uint32_t warp_synced[WARPS];           // the clock after the last __syncwarp
static Clocks seen[MAX_THREADS];
static bool any_seen;                         // any non-zero entry of `seen`
static uint64_t since_switch;

struct Block {  // what a block has made visible to others, and when
  Index index;
  uint32_t start, released, warp_epoch[WARPS], warp_clock[WARPS];
};
static std::vector<Block> blocks;
static uint32_t acquired_epoch, acquired_warps;  // in the running block: by an atomic

static void* reserve(size_t bytes) {
  return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

static void create(Region& r, uintptr_t base, size_t size) {
  r.base = base, r.size = size;
  r.state = (uint8_t*)reserve(size / 4 + 64);
  r.cells = (Cell(*)[4])reserve(size / 4 * sizeof(Cell[4]));
}

static void mark(Region& r, const void* address, size_t bytes, bool addressable, bool written) {
  const size_t begin = (uintptr_t)address - r.base, end = begin + bytes;
  for (size_t o = begin; o < end;) {
    const size_t w = o / 4, stop = std::min(end, 4 * w + 4), words = (end - o) / 4;
    if (o % 4 == 0 && words) {
      memset(r.state + w, (addressable ? 0xF0 : 0) | (written ? 0x0F : 0), words);
      o += 4 * words;
      continue;
    }
    const uint8_t m = ((1 << (stop - o)) - 1) << (o % 4);
    r.state[w] = (r.state[w] & ~(m | m << 4)) | (addressable ? m << 4 : 0) | (written ? m : 0);
    o = stop;
  }
}

// ---- Order.
[[gnu::noinline]] static bool ordered_across_blocks(const Cell& c) {
  if (acquired_epoch >= launch.epoch && !(acquired_warps >> warp_of(current->index) & 1)) return false;
  auto it =
      std::upper_bound(blocks.begin(), blocks.end(), c.epoch, [](uint64_t e, const Block& b) { return e < b.start; }) -
      1;
  const int w = c.thread == ENGINE ? 0 : warp_of(c.thread);
  return c.epoch < it->released || (c.epoch == it->warp_epoch[w] && c.clock <= it->warp_clock[w]);
}

[[gnu::always_inline]] static inline bool ordered(const Cell& c) {
  if (c.epoch < launch.block_epoch) return ordered_across_blocks(c);
  if (c.epoch < launch.epoch || c.thread == uint64_t(current->index)) return true;
  const int mine = warp_of(current->index), its = warp_of(c.thread);
  if (its == mine && c.clock < warp_synced[mine]) return true;
  const Clocks& s = seen[current->index];
  return any_seen && (c.clock < s.warp[its] || (c.clock < s.some[its] && s.lanes[its] >> c.thread % 32 & 1));
}

static const char* verb(Kind kind) {
  const char* verbs[] = {"read", "write", "atomic", "relaxed read", "relaxed write"};
  return verbs[kind];
}
static bool writes(Kind kind) { return kind == WRITE || kind == ATOMIC || kind == RELAXED_WRITE; }
static bool reads(Kind kind) { return kind != WRITE && kind != RELAXED_WRITE; }

[[noreturn]] static void race(const Cell& c, Kind kind, size_t bytes, const void* address, void* pc) {
  char who[96];
  if (c.thread == ENGINE) strcpy(who, "a bulk copy whose mbarrier it has not waited for");
  else {
    const unsigned t = c.thread, x = launch.block_dim.x, y = launch.block_dim.y;
    int n = sprintf(who, "the %s by thread (%u,%u,%u)", verb(c.atomic ? ATOMIC : c.write ? WRITE : READ),
                    t % x, t / x % y, t / x / y);
    if (c.epoch < launch.block_epoch) {
      auto it = std::upper_bound(blocks.begin(), blocks.end(), c.epoch,
                                 [](uint64_t e, const Block& b) { return e < b.start; }) -
                1;
      sprintf(who + n, " of block (%u,%u,%u)", it->index.x, it->index.y, it->index.z);
    }
  }
  note_other(c.pc);
  fault(pc, address, "race: %s of %zu bytes at @ is not ordered after %s", verb(kind), bytes, who);
}

[[gnu::always_inline]] static inline Cell access_now(Kind kind, void* pc) {
  const uint64_t index = current->index;
  return Cell{launch.epoch, clocks[warp_of(index)], index, 15, writes(kind), kind >= ATOMIC, 0, pc};
}

[[gnu::always_inline]] static inline void record(Region& r, size_t word, const Cell& now, Kind kind, size_t total,
                                                 const void* address) {
  Cell *cells = r.cells[word], *put = nullptr;
  // An equal access has been compared with all before it, and all after it with that one, which stands for this too:
  // nobody can have come after it in order without its warp's clock going on.
  for (int i = 0; i < 4; i++)
    if (same(cells[i], now)) return void(cells[i].pc = now.pc);
  for (int i = 0; i < 4; i++) {
    Cell& c = cells[i];
    if (c.epoch < r.live_epoch) { put = &c; continue; }
    if (!(c.bytes & now.bytes)) continue;
    const bool conflict = (c.write || now.write) && !(c.atomic && now.atomic);
    const bool covered = !(c.bytes & ~now.bytes) && (now.write || !c.write);
    if (!conflict && (put || !covered)) continue;
    if (!ordered(c)) {
      if (conflict) race(c, kind, total, address, now.pc);
    } else if (covered) {
      put = &c;  // whoever must come after c must come after this one too
    }
  }
  if (!put) put = &cells[random_below(4)];
  *put = now;
}

[[noreturn]] static void bad(Region& r, const void* address, size_t bytes, Kind kind, void* pc) {
  const char* space = &r == &global ? "global" : "shared";
  for (size_t o = (uintptr_t)address - r.base, end = o + bytes; o < end; o++) {
    if (!(r.state[o / 4] >> (4 + o % 4) & 1))
      fault(pc, (void*)(r.base + o), "out of bounds: %s of %zu bytes of %s memory at @", verb(kind), bytes, space);
    if (r.state[o / 4] >> (o % 4) & 1) continue;
    if (const char* copy = copy_in_flight((void*)(r.base + o), 1))
      fault(pc, (void*)(r.base + o), "read of %zu bytes at @ %s", bytes, copy);
    fault(pc, (void*)(r.base + o), "read of unwritten %s memory: %zu bytes at @", space, bytes);
  }
  __builtin_unreachable();
}

static bool on_stack(const void* p) { return size_t((char*)p - stacks) < size_t(stacks_end - stacks); }

// One word of an access: now.bytes says which of its four.
[[gnu::always_inline]] static inline void access_word(Region& r, size_t word, const Cell& now, Kind kind, size_t total,
                                                      const void* address) {
  const uint8_t bytes = now.bytes, need = reads(kind) ? bytes | bytes << 4 : bytes << 4;
  if ((r.state[word] & need) != need) bad(r, address, total, kind, now.pc);
  record(r, word, now, kind, total, address);
  if (writes(kind)) r.state[word] |= bytes;
}

// Null: nothing is to be checked.
[[gnu::always_inline]] static inline Region* region(const void* address, size_t bytes, Kind kind, void* pc) {
  if (!launch.checks) return nullptr;
  if (++since_switch >> 28)
    fault(pc, address, "no end in sight: 2^28 accesses in one epoch (does it wait for another block or for a thread?)");
  const uintptr_t p = (uintptr_t)address;
  if (p - shared.base < shared.size) return &shared;
  if (p - global.base < global.size) {
    if (kind == WRITE || kind == RELAXED_WRITE) current->fenced = false;
    return &global;
  }
  if (p - (uintptr_t)launch.module_begin >= size_t(launch.module_end - launch.module_begin))
    fault(pc, address, "out of bounds: %s of %zu bytes at address %p, where no array is", verb(kind), bytes, address);
  return nullptr;
}

void access(const void* address, size_t bytes, Kind kind, void* pc) {
  if (!current || on_stack(address)) return;
  Region* r = region(address, bytes, kind, pc);
  if (!r) return;
  const size_t begin = (uintptr_t)address - r->base, end = begin + bytes;
  Cell now = access_now(kind, pc);
  for (size_t o = begin; o < end;) {
    const size_t w = o / 4, stop = std::min(end, 4 * w + 4);
    now.bytes = ((1 << (stop - o)) - 1) << (o % 4);
    access_word(*r, w, now, kind, bytes, address);
    o = stop;
  }
}

struct Variable { size_t offset, bytes, guard; };  // guard: g++'s mark that an array has been constructed: no work here
static std::vector<Variable> variables;            // what the block may use of the segment
static void poison_shared() {
  memset(shared.state, 0, shared.size / 4 + 1);
  for (const Variable& v : variables) {
    memset((char*)shared.base + v.offset, v.guard ? 1 : 0xFF, v.bytes);
    mark(shared, (char*)shared.base + v.offset, v.bytes, true, v.guard);
  }
}

void begin_launch() {
  launch.start_epoch = global.live_epoch = ++launch.epoch;
  blocks.clear();
}

void begin_block() {
  launch.block_epoch = shared.live_epoch = ++launch.epoch;
  blocks.push_back(Block{launch.block, launch.epoch});
  acquired_epoch = ~0u, acquired_warps = 0;
  after_block_barrier();
  poison_shared();
}

void after_block_barrier() {
  launch.epoch++;
  since_switch = 0;
  memset(clocks, 0, sizeof clocks);
  memset(warp_synced, 0, sizeof warp_synced);
  if (any_seen) memset(seen, 0, sizeof seen);
  any_seen = false;
}

static void take(Clocks& into, const Clocks& from) {
  for (int w = 0; w <= WARPS; w++) {
    const uint32_t whole = std::max(into.warp[w], from.warp[w]);
    into.lanes[w] = (into.some[w] > whole ? into.lanes[w] : 0) | (from.some[w] > whole ? from.lanes[w] : 0);
    into.warp[w] = whole, into.some[w] = std::max(into.some[w], from.some[w]);
  }
}

// A partial mask is taken to order the whole warp: a race may be missed, none is invented.
void after_warp_sync(int warp, uint32_t mask) {
  warp_synced[warp] = ++clocks[warp];
  if (!any_seen) return;
  Clocks all{};
  for (int l = 0; l < 32; l++)
    if (mask >> l & 1) take(all, seen[32 * warp + l]);
  for (int l = 0; l < 32; l++)
    if (mask >> l & 1) seen[32 * warp + l] = all;
}

static Clocks& today(Clocks& c) {  // what was seen before the last block-wide barrier is ordered by it
  if (c.epoch != launch.epoch) c = Clocks{launch.epoch, {}, {}, {}, false};
  return c;
}

void release(int thread, Clocks& into) {
  const int w = warp_of(thread);
  Clocks own = seen[thread];
  own.warp[w] = std::max(own.warp[w], warp_synced[w]);
  take(today(into), own);
  into.some[w] = ++clocks[w], into.lanes[w] |= 1u << thread % 32;
  if (into.lanes[w] == ~0u >> (32 - std::min(launch.threads - 32 * w, 32)))
    into.warp[w] = into.some[w], into.lanes[w] = 0;
  into.acquired |= acquired_warps >> w & 1;
}

void release_engine(Clocks& into) { today(into).warp[WARPS] = ++clocks[WARPS]; }

void acquire(int thread, Clocks& from) {
  any_seen = true;
  today(from);
  take(seen[thread], from);
  acquired_warps |= uint32_t(from.acquired) << warp_of(thread);
}

void in_flight(const void* address, size_t bytes) {
  if (launch.checks) mark(shared, address, bytes, true, false);
  memset((void*)address, 0xFF, bytes);
}

void landed(const void* address, size_t bytes, int writer) {
  if (!launch.checks) return;
  mark(shared, address, bytes, true, true);
  const size_t begin = (uintptr_t)address - shared.base;
  for (size_t w = begin / 4; w < (begin + bytes) / 4; w++) {
    memset(shared.cells[w], 0, sizeof(Cell[4]));
    const uint64_t clock = clocks[writer == ENGINE ? WARPS : warp_of(writer)];
    shared.cells[w][0] = Cell{launch.epoch, clock, uint64_t(writer), 15, true, false, 0, nullptr};
  }
}

void fence() { current->fenced = true; }

void atomic(const void* address, size_t bytes, bool acquire_release) {
  access(address, bytes, ATOMIC, SIMT_PC);
  if ((uintptr_t)address - global.base >= global.size) return;
  if (current->fenced || acquire_release) {
    Block& b = blocks.back();
    const int own = warp_of(current->index);
    for (int w = 0; w < WARPS; w++) {  // its own accesses, and what it has seen by barriers of less than the block
      const uint32_t clock = w == own ? clocks[w]++ : any_seen ? seen[current->index].warp[w] - 1 : ~0u;
      if (clock == ~0u) continue;
      b.warp_clock[w] = b.warp_epoch[w] == launch.epoch ? std::max(b.warp_clock[w], clock) : clock,
      b.warp_epoch[w] = launch.epoch;
    }
    b.released = launch.epoch;
  }
  acquired_epoch = std::min(acquired_epoch, launch.epoch);
  acquired_warps |= 1u << warp_of(current->index);
}

void relaxed(const void* address, size_t bytes, Kind kind) { access(address, bytes, kind, SIMT_PC); }

uint32_t shared_address(const void* p) {
  if ((uintptr_t)p - shared.base >= shared.size) fault(SIMT_PC, p, "not an address of shared memory");
  return uint32_t((uintptr_t)p - shared.base);
}
void* shared_pointer(uint32_t address) { return (void*)(shared.base + address); }

// ---- For the driver: global memory, and what of the module's thread-local segment is shared memory.
extern "C" void* simt_alloc(size_t bytes) {  // contents 0xFF: NaN in every float type
  if (!global.base) create(global, (uintptr_t)reserve(size_t(1) << 30), size_t(1) << 30);
  const size_t at = (global.used + 255 + 256) / 256 * 256;  // at least 256 bytes between arrays
  if (at + bytes + 256 > global.size) return nullptr;
  global.used = at + bytes;
  void* p = (void*)(global.base + at);
  memset(p, 0xFF, bytes);
  mark(global, p, bytes, true, false);
  return p;
}

extern "C" int simt_is_global(const void* p) { return (uintptr_t)p - global.base < global.size; }

extern "C" void simt_mark_written(const void* p, size_t bytes) { mark(global, p, bytes, true, true); }

extern "C" long simt_first_unwritten(const void* p, size_t bytes) {
  for (size_t o = (uintptr_t)p - global.base, end = o + bytes, first = o; o < end; o++) {
    const uint8_t state = global.state[o / 4];
    if (o % 4 == 0 && (state & 15) == 15) o += 3;  // a whole word
    else if (!(state >> o % 4 & 1)) return long(o - first);
  }
  return -1;
}

// Addresses are used again only after the last array has gone.
extern "C" void simt_free(const void* p, size_t bytes, int last) {
  mark(global, p, bytes, false, false);
  if (!last) return;
  if (global.used > KEPT) {
    madvise(global.state, global.size / 4, MADV_DONTNEED);
    madvise(global.cells, global.size / 4 * sizeof(Cell[4]), MADV_DONTNEED);
    madvise((void*)global.base, global.size, MADV_DONTNEED);
  }
  global.used = 0;
}

extern "C" void simt_shared(char* base, size_t bytes, const Variable* usable, int count) {
  if (!shared.state) create(shared, 0, 1 << 20);
  shared.base = (uintptr_t)base, shared.size = bytes;
  variables.assign(usable, usable + count);
}

// ---- The calls that the compiler inserts.
[[noreturn]] static void misaligned(void* p, size_t n, void* pc) {
  fault(pc, p, "misaligned: access of %zu bytes at @", n);
}
template <size_t n, Kind kind>
[[gnu::noinline]] static void aligned(void* p, void* pc) {  // as `access`, in whole words
  if ((uintptr_t)p % n) misaligned(p, n, pc);
  Region* r = region(p, n, kind, pc);
  if (!r) return;
  const size_t o = (uintptr_t)p - r->base;
  Cell now = access_now(kind, pc);
  if (n < 4) {
    now.bytes = ((1 << n) - 1) << (o % 4);
    access_word(*r, o / 4, now, kind, n, p);
  }
  for (size_t i = 0; i < n / 4; i++) access_word(*r, o / 4 + i, now, kind, n, p);
}
#define SIZES(F) F(1) F(2) F(4) F(8) F(16)
// Out of line what is not on the stack: that is every other access. (g++ copies structs there in chunks of any size.)
#define ALIGNED(n, kind) if (current && !on_stack(p)) aligned<n, kind>(p, SIMT_PC)
#define HOOKS(n)                                                                                       \
  extern "C" void __tsan_read##n(void* p) { ALIGNED(n, READ); }                             \
  extern "C" void __tsan_write##n(void* p) { ALIGNED(n, WRITE); }                           \
  extern "C" void __tsan_volatile_read##n(void* p) { ALIGNED(n, READ); }                    \
  extern "C" void __tsan_volatile_write##n(void* p) { ALIGNED(n, WRITE); }                  \
  extern "C" void __tsan_unaligned_read##n(void* p) { access(p, n, READ, SIMT_PC); }                    \
  extern "C" void __tsan_unaligned_write##n(void* p) { access(p, n, WRITE, SIMT_PC); }
SIZES(HOOKS)
extern "C" void __tsan_read_range(void* p, size_t n) { access(p, n, READ, SIMT_PC); }
extern "C" void __tsan_write_range(void* p, size_t n) { access(p, n, WRITE, SIMT_PC); }
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
}  // namespace simt
