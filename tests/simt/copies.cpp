// copies.cpp: copies that run beside the threads. Their destination can be read only after the wait that CUDA asks
// for; until then it holds poison.
#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#include "runtime.h"

namespace simt {

struct Copy { char* to; std::vector<char> data; };
struct Group { int number; Copy copy; };
struct Queue { std::vector<Group> copies; int committed; };  // cp.async of one thread

struct Mbarrier {
  int count, missing;         // arrivals
  long transfer;              // bytes announced less bytes landed
  unsigned phase;
  Clocks clocks;
  std::vector<Copy> copies;
  std::vector<int> waiting;
};

static Queue queues[MAX_THREADS];
static std::map<void*, Mbarrier> mbarriers;

void copies_begin_block() {
  for (int i = 0; i < launch.threads; i++) queues[i] = Queue{};
  mbarriers.clear();
}

static Copy start(void* to, const void* from, size_t bytes, size_t source_bytes, void* pc) {
  Copy c{(char*)to, std::vector<char>(bytes)};
  access(from, source_bytes, READ, pc);
  memcpy(c.data.data(), from, source_bytes);
  access(to, bytes, WRITE, pc);
  in_flight(to, bytes);
  return c;
}

static void land(const Copy& c, int writer) {
  memcpy(c.to, c.data.data(), c.data.size());
  landed(c.to, c.data.size(), writer);
}

void copy_async(void* to, const void* from, int bytes, int source_bytes) {
  if ((uintptr_t)to % bytes || (source_bytes && (uintptr_t)from % bytes))
    fault(SIMT_PC, from, "cp.async of %d bytes from or to an address that is not aligned to them", bytes);
  Queue& q = queues[current->index];
  q.copies.push_back({q.committed, start(to, from, bytes, source_bytes, SIMT_PC)});
}

void copy_commit() { queues[current->index].committed++; }

void copy_wait(int groups) {
  Queue& q = queues[current->index];
  auto done = [&](const Group& g) { return g.number < q.committed - groups; };
  for (auto& g : q.copies) if (done(g)) land(g.copy, current->index);
  q.copies.erase(std::remove_if(q.copies.begin(), q.copies.end(), done), q.copies.end());
}

// ---- mbarrier and bulk copies.
static Mbarrier& find(void* barrier, void* pc) {
  auto it = mbarriers.find(barrier);
  if (it == mbarriers.end()) fault(pc, barrier, "no mbarrier was initialized at @");
  access(barrier, 8, ATOMIC, pc);
  return it->second;
}

static void maybe_complete(Mbarrier& b) {
  if (b.missing || b.transfer) return;
  b.missing = b.count, b.phase++;
  for (int t : b.waiting) make_ready(threads[t]);
  b.waiting.clear();
}

void mbarrier_init(void* barrier, int count) {
  access(barrier, 8, WRITE, SIMT_PC);
  mbarriers[barrier] = Mbarrier{count, count, 0, 0, {}, {}, {}};
}

void mbarrier_arrive(void* barrier, unsigned transfer_bytes) {
  Mbarrier& b = find(barrier, SIMT_PC);
  if (!b.missing) fault(SIMT_PC, barrier, "more arrivals at the mbarrier at @ than it counts (%d)", b.count);
  b.missing--, b.transfer += transfer_bytes;
  release(current->index, b.clocks);
  maybe_complete(b);
}

void mbarrier_wait(void* barrier, unsigned parity, int line) {
  Mbarrier& b = find(barrier, SIMT_PC);
  while ((b.phase & 1) == parity) {  // the phase of that parity has not completed
    current->line = line;
    b.waiting.push_back(current->index);
    park(State::mbarrier);
  }
  acquire(current->index, b.clocks);
}

void copy_bulk(void* to, const void* from, unsigned bytes, void* barrier) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16 || bytes % 16)
    fault(SIMT_PC, from, "bulk copy of %u bytes: addresses and size must be multiples of 16", bytes);
  Mbarrier& b = find(barrier, SIMT_PC);
  b.copies.push_back(start(to, from, bytes, bytes, SIMT_PC));
}

void copy_tensor_box(void* to, const Tensor& from, int column, int row, void* barrier) {
  const bool swizzled = from.swizzled;
  if ((uintptr_t)to % (swizzled ? 1024 : 128))
    fault(SIMT_PC, to, swizzled ? "box of a tensor to @: the pattern of swizzling begins at a multiple of 1024 bytes"
                                : "box of a tensor to @, which is no multiple of 128 bytes");
  if ((uintptr_t)from.base % 16 || from.row_bytes % 16 || from.box_row_bytes % 16)
    fault(SIMT_PC, from.base, "a tensor whose rows do not begin at multiples of 16 bytes");
  Mbarrier& b = find(barrier, SIMT_PC);
  const uint64_t vectors = from.box_row_bytes / 16, first = (uint64_t)column * (swizzled ? 2 : 8);
  Copy c{(char*)to, std::vector<char>(from.box_rows * from.box_row_bytes)};
  for (uint64_t r = 0; r < from.box_rows; r++)
    for (uint64_t vector = 0; vector < vectors; vector++) {
      const uint64_t y = row + r, x = first + 16 * vector;
      if (y >= from.rows || x >= from.row_bytes) continue;  // stays zero
      const char* source = from.base + y * from.row_bytes + x;
      access(source, 16, READ, SIMT_PC);
      memcpy(&c.data[(r * vectors + (swizzled ? vector ^ r % 8 : vector)) * 16], source, 16);
    }
  access(to, c.data.size(), WRITE, SIMT_PC);
  in_flight(to, c.data.size());
  b.copies.push_back(std::move(c));
}

bool copies_deliver_one() {  // only what somebody waits for: a read without the wait never finds the data there by luck
  std::vector<Mbarrier*> some;
  for (auto& [address, b] : mbarriers) if (!b.waiting.empty() && !b.copies.empty()) some.push_back(&b);
  if (some.empty()) return false;
  Mbarrier& b = *some[random_below(some.size())];
  std::swap(b.copies[random_below(b.copies.size())], b.copies.back());
  const Copy c = std::move(b.copies.back());
  b.copies.pop_back();
  land(c, ENGINE);
  b.transfer -= c.data.size();
  release_engine(b.clocks);
  maybe_complete(b);
  return true;
}

bool bulk_pending() {
  for (auto& [address, b] : mbarriers) if (!b.copies.empty()) return true;
  return false;
}

const char* copy_in_flight(const void* address, size_t bytes) {
  auto covers = [&](const Copy& c) { return (char*)address < c.to + c.data.size() && (char*)address + bytes > c.to; };
  for (int i = 0; i < launch.threads; i++)
    for (auto& g : queues[i].copies)
      if (covers(g.copy)) return "that a cp.async in flight will write: its wait is missing";
  for (auto& [at, b] : mbarriers)
    for (auto& c : b.copies)
      if (covers(c)) return "that a bulk copy in flight will write: nobody has waited for its mbarrier";
  return nullptr;
}
}  // namespace simt
