// scheduler.cpp: the threads of a block are fibers; between synchronization points they run in a random, seeded order.
//
// Blocks run one after another, also in a random order: a kernel may leave work to the last block that arrives, but
// no block may wait for another.
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "warp_operation.h"
#include "runtime.h"

namespace simt {

Launch launch;
Thread threads[MAX_THREADS];
Thread* current;
char *stacks, *stacks_end;
constexpr size_t STACK = 256 << 10;

static void* main_stack;
static std::vector<int> ready;      // indices of the threads that can run
static void (*entry)(void**);
static void** arguments;
static int finished, arrived, barrier_line;
static unsigned reduce_value, reduce_result;
static struct { std::vector<int> who; int arrived; Clocks clocks; } named[16];

struct Report { char text[640]; uint64_t address, pc, other_pc; };
extern "C" { Report simt_report; }

// ---- Changing stacks: the callee-saved registers go on the old stack, the new one's come back.
#if defined(__x86_64__)
extern "C" void simt_switch(void** save, void* load);
asm(R"(.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size simt_switch, .-simt_switch)");
static void* fresh_stack(char* top, void (*start)()) {
  void** sp = (void**)top - 8;  // six registers, the entry, and a null return address that keeps the ABI's alignment
  memset(sp, 0, 64), sp[6] = (void*)start;
  return sp;
}
#elif defined(__aarch64__)
extern "C" void simt_switch(void** save, void* load);
asm(R"(.text
.globl simt_switch
.type simt_switch, %function
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]; stp x25, x26, [sp, #48]; stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]; stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
  mov x9, sp; str x9, [x0]; mov sp, x1
  ldp x19, x20, [sp, #0]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, #48]; ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]; ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size simt_switch, .-simt_switch)");
static void* fresh_stack(char* top, void (*start)()) {
  void** sp = (void**)top - 20;
  memset(sp, 0, 160), sp[11] = (void*)start;
  return sp;
}
#else
#error "simt knows how to switch stacks on x86-64 and aarch64"
#endif

static Thread* pick() {
  do {
    if (size_t n = ready.size()) {
      std::swap(ready[random_below(n)], ready[n - 1]);
      int i = ready.back();
      ready.pop_back();
      return &threads[i];
    }
  } while (copies_deliver_one());
  return nullptr;
}

[[noreturn]] static void leave(Thread* next) {  // for good; null: back to simt_launch
  void* ignored;
  current = next;
  simt_switch(&ignored, next ? next->stack : main_stack);
  __builtin_unreachable();
}

void fault(void* pc, const void* address, const char* format, ...) {
  char* p = simt_report.text;
  const Index b = launch.block, t = current->id;
  p += sprintf(p, "block (%u,%u,%u) thread (%u,%u,%u): ", b.x, b.y, b.z, t.x, t.y, t.z);
  va_list list;
  va_start(list, format);
  vsnprintf(p, sizeof simt_report.text - 100, format, list);
  va_end(list);
  simt_report.address = (uint64_t)address, simt_report.pc = (uint64_t)pc;
  leave(nullptr);
}

void note_other(void* pc) { simt_report.other_pc = (uint64_t)pc; }

static const char* waiting_in(const Thread& t) {
  static char text[2][96];
  static int index;
  char* out = text[index ^= 1];
  const char* at[] = {"runs",      "waits in __syncthreads", "waits in a named barrier",
                      "waits in ", "waits for an mbarrier",  "has returned"};
  int n = sprintf(out, "thread (%u,%u,%u) %s%s", t.id.x, t.id.y, t.id.z, at[int(t.state)],
                  t.state == State::warp ? t.op : "");
  if (t.state != State::done && t.state != State::ready) sprintf(out + n, " at line %d", t.line);
  return out;
}

[[noreturn]] static void stuck(void* pc) {  // nobody can run: show one thread that waits and one that it may wait for
  Thread *a = nullptr, *b = nullptr;
  for (int i = 0; i < launch.threads; i++) {
    Thread& t = threads[i];
    if (t.state == State::warp && !a) {
      for (int l = 0; l < 32 && i / 32 * 32 + l < launch.threads; l++)
        if (Thread& o = threads[i / 32 * 32 + l]; t.mask >> l & 1 && (o.state != State::warp || o.mask != t.mask))
          a = &t, b = &o;
    }
  }
  for (int i = 0; i < launch.threads && !b; i++) {
    if (threads[i].state == State::done) continue;
    if (!a) a = &threads[i];
    else if (threads[i].state != a->state || threads[i].line != a->line) b = &threads[i];
  }
  for (int i = 0; i < launch.threads && !b; i++)
    if (threads[i].state == State::done) b = &threads[i];
  current = a;
  fault(pc, nullptr, "no thread can go on (divergent barrier?): %s%s%s", waiting_in(*a), b ? "; " : "",
        b ? waiting_in(*b) : "");
}

void make_ready(Thread& t) {
  t.state = State::ready;
  ready.push_back(t.index);
}

void park(State why) {
  Thread* self = current;
  if (why != State::ready) self->state = why;
  Thread* next = pick();
  if (!next) stuck(nullptr);
  if (next == self) return;
  current = next;
  simt_switch(&self->stack, next->stack);
}

static void run_thread() {
  entry(arguments);
  current->state = State::done;
  finished++;
  if (arrived) {
    for (int i = 0; i < launch.threads; i++)
      if (threads[i].state == State::barrier)
        fault(nullptr, nullptr, "returned without the __syncthreads at line %d where thread (%u,%u,%u) waits",
              threads[i].line, threads[i].id.x, threads[i].id.y, threads[i].id.z);
  }
  if (finished == launch.threads) {
    if (bulk_pending()) fault(nullptr, nullptr, "the block ended with a bulk copy in flight");
    if (wgmma_pending()) fault(nullptr, nullptr, "the block ended with a wgmma in flight");
    leave(nullptr);
  }
  Thread* next = pick();
  if (!next) stuck(nullptr);
  leave(next);
}

// ---- What kernels call.
Index thread_index() { return current->id; }
Index block_index() { return launch.block; }
Index block_size() { return launch.block_dim; }
Index grid_size() { return launch.grid; }
long long clock_ticks() { static long long t; return t += 100; }
void trap(const char* what) { fault(SIMT_PC, nullptr, "%s", what); }

static void arrive(void* pc, int line) {
  Thread& t = *current;
  t.line = line;
  if (finished)
    fault(pc, nullptr, "waits in __syncthreads at line %d, but %d threads of the block have returned", line, finished);
  if (!arrived) barrier_line = line;
  else if (line != barrier_line)
    fault(pc, nullptr, "divergent barrier: __syncthreads at line %d while others wait in the one at line %d", line,
          barrier_line);
  if (++arrived < launch.threads) return park(State::barrier);
  arrived = 0, reduce_result = reduce_value;
  after_block_barrier();
  for (int i = 0; i < launch.threads; i++) make_ready(threads[i]);
  park(State::ready);
}

void barrier(int line) { arrive(SIMT_PC, line); }

unsigned barrier_reduce(unsigned value, char op, int line) {
  unsigned& r = reduce_value;
  r = !arrived ? value : op == '+' ? r + value : op == '&' ? r & value : r | value;
  arrive(SIMT_PC, line);
  return reduce_result;
}

// Producers and consumers may wait at different lines; those that only arrive go on.
static void named_arrival(int id, int count, bool waits) {
  auto& b = named[id & 15];
  release(current->index, b.clocks);
  if (waits) b.who.push_back(current->index);
  if (++b.arrived > count) fault(SIMT_PC, nullptr, "more than %d threads at the named barrier %d", count, id);
  if (b.arrived < count) return waits ? park(State::named) : void();
  for (int i : b.who) acquire(i, b.clocks), make_ready(threads[i]);
  b = {};
  if (waits) park(State::ready);
}
void barrier_named(int id, int count, int line) {
  current->line = line;
  named_arrival(id, count, true);
}
void barrier_named_arrive(int id, int count) { named_arrival(id, count, false); }

void sync_warp(uint32_t mask, int line) {
  char nothing = 0;
  warp_operation<char>(SIMT_PC, mask, "__syncwarp", line, nothing,
                       [](char**, uint32_t m) { after_warp_sync(warp_of(current->index), m); });
}

struct Shuffle { uint64_t in, out; int from; };
uint64_t shuffle(uint32_t mask, uint64_t value, int from, int line) {
  if (!(mask >> from & 1)) fault(SIMT_PC, nullptr, "shuffle from lane %d, which is not in its mask %08x", from, mask);
  Shuffle args{value, 0, from};
  warp_operation<Shuffle>(SIMT_PC, mask, "a shuffle", line, args, [](Shuffle** lane, uint32_t) {
    for (int l = 0; l < 32; l++)
      if (lane[l] && !lane[lane[l]->from])
        fault(nullptr, nullptr, "shuffle from lane %d, which the block does not have", lane[l]->from);
      else if (lane[l]) lane[l]->out = lane[lane[l]->from]->in;
  });
  return args.out;
}

struct Vote { bool in; uint32_t out; };
uint32_t ballot(uint32_t mask, bool value, int line) {
  Vote args{value, 0};
  warp_operation<Vote>(SIMT_PC, mask, "a vote", line, args, [](Vote** lane, uint32_t) {
    uint32_t all = 0;
    for (int l = 0; l < 32; l++) if (lane[l] && lane[l]->in) all |= 1u << l;
    for (int l = 0; l < 32; l++) if (lane[l]) lane[l]->out = all;
  });
  return args.out;
}

// ---- -fsanitize=alignment,bounds,shift-exponent: the rest of what C++ leaves undefined and a GPU does differently.
struct TypeMismatch { void *file, *line_column, *type; unsigned char log_alignment; };
extern "C" void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, void* p) {
  if (current) fault(SIMT_PC, p, "misaligned: address @ is not a multiple of %d", 1 << data->log_alignment);
}
extern "C" void __ubsan_handle_out_of_bounds(void*, unsigned long index) {
  if (current) fault(SIMT_PC, nullptr, "out of bounds: index %ld of an array of fixed size", long(index));
}
extern "C" void __ubsan_handle_shift_out_of_bounds(void*, unsigned long, unsigned long by) {
  if (current) fault(SIMT_PC, nullptr, "shift by %ld, more than the width of the type", long(by));
}

// ---- Matrix operations of a whole warp; fragments as in the PTX manual: g = lane / 4 and c = lane % 4.
struct Mma { const uint32_t *a, *b; const float* c; float* d; bool bf16; };
void mma_16816(float* d, const uint32_t* a, const uint32_t* b, const float* c, bool bf16, int line) {
  Mma args{a, b, c, d, bf16};
  warp_operation<Mma>(SIMT_PC, ~0u, "mma", line, args, [](Mma** lane, uint32_t mask) {
    if (mask != ~0u) fault(nullptr, nullptr, "mma in a warp of fewer than 32 threads");
    float A[16][16], B[16][8];
    double D[16][8];
    for (int l = 0; l < 32; l++) {
      const int g = l / 4, c = l % 4;
      for (int x = 0; x < 2; x++) {
        for (int r = 0; r < 4; r++)
          A[g + 8 * (r & 1)][2 * c + 8 * (r >> 1) + x] = widen(lane[l]->a[r] >> (16 * x), lane[l]->bf16);
        for (int r = 0; r < 2; r++) B[2 * c + 8 * r + x][g] = widen(lane[l]->b[r] >> (16 * x), lane[l]->bf16);
        for (int r = 0; r < 2; r++) D[g + 8 * r][2 * c + x] = lane[l]->c[2 * r + x];
      }
    }
    for (int m = 0; m < 16; m++)
      for (int k = 0; k < 16; k++)
        for (int n = 0; n < 8; n++) D[m][n] += double(A[m][k]) * B[k][n];
    for (int l = 0; l < 32; l++)
      for (int r = 0; r < 4; r++) lane[l]->d[r] = float(D[l / 4 + 8 * (r >> 1)][2 * (l % 4) + (r & 1)]);
  });
}

struct Ldmatrix { uint16_t row[8]; uint32_t* out; int count; bool transposed; };
void ldmatrix(uint32_t* out, int count, bool transposed, const void* row, int line) {
  Ldmatrix args{{}, out, count, transposed};
  if ((current->index & 31) < 8 * count) {
    if ((uintptr_t)row % 16) fault(SIMT_PC, row, "ldmatrix from a row that is not aligned to 16 bytes");
    access(row, 16, READ, SIMT_PC);
    memcpy(args.row, row, 16);
  }
  warp_operation<Ldmatrix>(SIMT_PC, ~0u, "ldmatrix", line, args, [](Ldmatrix** lane, uint32_t mask) {
    if (mask != ~0u) fault(nullptr, nullptr, "ldmatrix in a warp of fewer than 32 threads");
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < lane[l]->count; i++) {
        const int g = l / 4, c = 2 * (l % 4);
        auto at = [&](int r, int k) { return uint32_t(lane[8 * i + r]->row[k]); };
        lane[l]->out[i] = lane[l]->transposed ? at(c, g) | at(c + 1, g) << 16 : at(g, c) | at(g, c + 1) << 16;
      }
  });
}

struct Movmatrix { uint32_t in, out; };
uint32_t movmatrix(uint32_t value, int line) {
  Movmatrix args{value, 0};
  warp_operation<Movmatrix>(SIMT_PC, ~0u, "movmatrix", line, args, [](Movmatrix** lane, uint32_t mask) {
    if (mask != ~0u) fault(nullptr, nullptr, "movmatrix in a warp of fewer than 32 threads");
    auto at = [&](int r, int k) { return lane[4 * r + k / 2]->in >> (16 * (k & 1)) & 0xFFFF; };
    for (int l = 0; l < 32; l++) lane[l]->out = at(2 * (l % 4), l / 4) | at(2 * (l % 4) + 1, l / 4) << 16;
  });
  return args.out;
}

// ---- Called by the driver: 0 when the kernel ran to its end, 1 when simt_report says why it did not.
extern "C" int simt_launch(void (*kernel)(void**), void** args, const unsigned* grid, const unsigned* block,
                           uint64_t seed, int checks, char* module_begin, char* module_end) {
  if (!stacks) {
    stacks = (char*)mmap(nullptr, STACK * MAX_THREADS, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    stacks_end = stacks + STACK * MAX_THREADS;
  }
  entry = kernel, arguments = args;
  launch.grid = {grid[0], grid[1], grid[2]}, launch.block_dim = {block[0], block[1], block[2]};
  launch.threads = block[0] * block[1] * block[2];
  launch.random = seed * 0x9E3779B97F4A7C15ull | 1;
  launch.checks = checks, launch.module_begin = module_begin, launch.module_end = module_end;
  memset(&simt_report, 0, sizeof simt_report);
  for (int i = 0; i < 8; i++) random_below(2);
  begin_launch();
  std::vector<unsigned> order(grid[0] * grid[1] * grid[2]);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_below(i)]);
  for (unsigned b : order) {
    launch.block = {b % grid[0], b / grid[0] % grid[1], b / grid[0] / grid[1]};
    finished = arrived = 0;
    ready.clear();
    for (auto& n : named) n = {};
    begin_block(), copies_begin_block(), wgmma_begin_block();
    for (int i = 0; i < launch.threads; i++) {
      Thread& t = threads[i] = Thread{};
      t.index = i, t.id = {i % block[0], i / block[0] % block[1], i / block[0] / block[1]};
      t.stack = fresh_stack(stacks + STACK * (i + 1) - 64 * (i % 64),
                            run_thread);  // staggered: equal offsets would share cache sets
      make_ready(t);
    }
    current = pick();
    simt_switch(&main_stack, current->stack);
    current = nullptr;
    if (simt_report.text[0]) return 1;
  }
  return 0;
}
}  // namespace simt
