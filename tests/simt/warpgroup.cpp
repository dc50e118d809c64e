// warpgroup.cpp: wgmma.mma_async. Its operands are read and its sums written at the wait, not before; until then the
// sums are NaN.
//
// A warp has 16 of the 64 rows, so it needs nothing of the other three, but that they come too.
#include <algorithm>
#include <map>
#include <vector>

#include "warp_operation.h"
#include "runtime.h"

namespace simt {

struct Product {
  int group, n;
  bool fresh, n_major;
  float* d;
  const uint32_t* a;  // in registers, or null
  uint32_t a_values[4];
  uint64_t a_shared, b;
};
struct Wgmmas {  // of one thread
  std::vector<Product> products;
  std::map<float*, std::vector<float>> sums;  // of those under way; d itself is poisoned
  int committed;
  bool fenced;
};
static Wgmmas all[MAX_THREADS];
constexpr uint32_t POISON = 0xFFFFFFFF;

void wgmma_begin_block() {
  for (int i = 0; i < launch.threads; i++) all[i] = Wgmmas{};
}
bool wgmma_pending() {
  return std::any_of(all, all + launch.threads, [](const Wgmmas& w) { return !w.products.empty(); });
}

// Shared address of element k of row (or column) mn: PTX manual, "Shared memory matrix layout", 128-byte swizzling.
static uint32_t element_address(uint64_t descriptor, bool mn_major, int mn, int k) {
  const uint32_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4,
                 stride = (descriptor >> 32 & 0x3FFF) << 4;
  const uint32_t linear = mn_major ? start + mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * 128
                                   : start + mn / 8 * stride + mn % 8 * 128 + k * 2;
  return linear ^ (linear >> 7 & 7) << 4;
}

static void check(uint64_t descriptor, bool mn_major) {
  const uint32_t start = (descriptor & 0x3FFF) << 4;
  if (descriptor >> 62 != 1)
    fault(nullptr, nullptr, "wgmma with swizzle mode %d: only 1, 128 bytes, is simulated", int(descriptor >> 62));
  if (descriptor >> 49 & 7 || start & 0x380)
    fault(nullptr, nullptr, "wgmma whose pattern of swizzling does not begin at a multiple of 1024 bytes");
  if (mn_major ? start & 0x70 : (start & 127) > 96)
    fault(nullptr, nullptr, "wgmma from the middle of a row of 128 bytes");
}

// 16 numbers of every row (column) from `first` on, a multiple of 8: x[k][mn], with all checks of memory.
static void load(float* x, int first, int count, uint64_t descriptor, bool mn_major) {
  check(descriptor, mn_major);
  for (int outer = 0; outer < (mn_major ? 16 : count); outer++)
    for (int inner = 0; inner < (mn_major ? count : 16); inner += 8) {  // sixteen bytes lie together
      const int mn = mn_major ? inner : outer, k = mn_major ? outer : inner;
      const uint16_t* from = (const uint16_t*)shared_pointer(element_address(descriptor, mn_major, first + mn, k));
      access(from, 16, READ, nullptr);
      for (int i = 0; i < 8; i++) x[mn_major ? k * count + mn + i : (k + i) * count + mn] = widen(from[i], true);
    }
}

static bool poisoned(const float* d, int n) {
  return std::all_of((const uint32_t*)d, (const uint32_t*)d + n / 2, [](uint32_t x) { return x == POISON; });
}

// The 16 rows of a that the warp of thread `base` has, of operand a in shared memory.
static void load_a(float* x, int base, const Product& p) { load(x, base / 32 % 4 * 16, 16, p.a_shared, false); }

void wgmma(float* d, int n, bool fresh, const uint32_t* a, uint64_t a_shared, uint64_t b, bool b_n_major, int line) {
  Wgmmas& own = all[current->index];
  if (!own.fenced) fault(SIMT_PC, nullptr, "wgmma without a wgmma.fence since the last wait");
  Product p{own.committed, n, fresh, b_n_major, d, a, {}, a_shared, b};
  if (a) std::copy(a, a + 4, p.a_values);
  if (!own.sums.count(d)) own.sums[d].assign(d, d + n / 2), std::fill((uint32_t*)d, (uint32_t*)d + n / 2, POISON);
  else if (!poisoned(d, n)) fault(SIMT_PC, nullptr, "the sums of a wgmma in flight were written");
  own.products.push_back(p);
  warp_operation<Product>(SIMT_PC, ~0u, "wgmma", line, p,
                          [](Product** lane, uint32_t) {  // what it reads must be there from now on
                            static float x[16 * 256];
                            for (int l = 0; l < 32; l++)
                              if (lane[l]->b != lane[0]->b || lane[l]->a_shared != lane[0]->a_shared)
                                fault(nullptr, nullptr, "wgmma whose lanes have different descriptors");
                            load(x, 0, lane[0]->n, lane[0]->b, lane[0]->n_major);
                            if (!lane[0]->a) load_a(x, current->index & ~31, *lane[0]);
                          });
}

void wgmma_fence() { all[current->index].fenced = true; }
void wgmma_commit() { all[current->index].committed++; }

// One product of the warp whose first thread is `base`; its index in every lane's queue is 0.
static void multiply(int base) {
  static float a[16][16], b[16 * 256];
  static double sum[16][256];
  const Product& first = all[base].products[0];
  const int n = first.n;
  load(b, 0, n, first.b, first.n_major);
  if (!first.a) load_a(&a[0][0], base, first);
  for (int l = 0; l < 32; l++) {
    const Product& p = all[base + l].products[0];
    const std::vector<float>& d = all[base + l].sums[p.d];
    const int g = l / 4, c = l % 4;
    if (p.a && !std::equal(p.a, p.a + 4, p.a_values))
      fault(nullptr, nullptr, "operand a of a wgmma in flight was written");
    for (int r = 0; p.a && r < 4; r++)
      for (int x = 0; x < 2; x++) a[2 * c + 8 * (r >> 1) + x][g + 8 * (r & 1)] = widen(p.a_values[r] >> (16 * x), true);
    for (int i = 0; i < n / 2; i++) sum[g + 8 * (i >> 1 & 1)][i / 4 * 8 + 2 * c + (i & 1)] = first.fresh ? 0 : d[i];
  }
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++) {
      const double x = a[k][m];
      for (int j = 0; j < n; j++) sum[m][j] += x * b[k * n + j];
    }
  for (int l = 0; l < 32; l++) {
    float* d = all[base + l].sums[all[base + l].products[0].d].data();
    for (int i = 0; i < n / 2; i++) d[i] = float(sum[l / 4 + 8 * (i >> 1 & 1)][i / 4 * 8 + 2 * (l % 4) + (i & 1)]);
    all[base + l].products.erase(all[base + l].products.begin());
  }
}

void wgmma_wait(int groups, int line) {
  int until = all[current->index].committed - groups;  // groups from this number on may go on
  warp_operation<int>(SIMT_PC, ~0u, "wgmma.wait_group", line, until, [](int** lane, uint32_t mask) {
    const int base = current->index & ~31;
    if (mask != ~0u) fault(nullptr, nullptr, "wgmma in a warp of fewer than 32 threads");
    for (int l = 0; l < 32; l++)
      if (all[base + l].products.size() != all[base].products.size())
        fault(nullptr, nullptr, "lanes of a warp that did not ask for the same wgmmas");
    while (!all[base].products.empty() && all[base].products[0].group < *lane[0]) multiply(base);
    for (int l = 0; l < 32; l++) {
      Wgmmas& own = all[base + l];
      own.fenced = false;
      for (auto it = own.sums.begin(); it != own.sums.end();) {
        auto& [d, sums] = *it;
        const bool busy =
            std::any_of(own.products.begin(), own.products.end(), [d = d](const Product& p) { return p.d == d; });
        if (busy) { it++; continue; }
        if (!poisoned(d, 2 * sums.size())) fault(nullptr, nullptr, "the sums of a wgmma in flight were written");
        std::copy(sums.begin(), sums.end(), d);
        it = own.sums.erase(it);
      }
    }
  });
}
}  // namespace simt
