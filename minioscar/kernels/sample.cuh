// sample.cuh: for sample.cu: settings of a row, an order of logits, sums and cuts over a block, random numbers.
#ifndef MINIOSCAR_SAMPLE_CUH
#define MINIOSCAR_SAMPLE_CUH
#include "common.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;

struct Settings {  // of a row, ops/sample.py, SETTINGS
  uint64_t seed;
  double top_p;
  float scale, min_p;  // scale: log2(e) / temperature, 0 where that is 0
  int top_k;
  unsigned sequence;
  float repetition, presence, frequency;
  int min_tokens;

  DEVICE bool penalizes() const { return repetition != 1.f || presence != 0.f || frequency != 0.f; }
};

// Order-preserving: a < b as floats where key(a) < key(b); NaN above all.
DEVICE uint32_t key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.f);  // -0 is 0
  return x != x ? ~0u : bits ^ (bits >> 31 ? ~0u : 0x80000000u);
}
DEVICE float logit_of(uint32_t key) {
  return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key);
}
// Larger for the larger logit and, of equal ones, for the smaller id.
DEVICE uint64_t value(float logit, int id) {
  return (uint64_t)key(logit) << 32 | (0xffffffffu - id);
}

DEVICE uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

DEVICE uint64_t block_max(uint64_t x) {
  __shared__ uint64_t warps[WARPS];
  for (int other = 1; other < 32; other *= 2) x = larger(x, __shfl_xor_sync(FULL_MASK, x, other));
  __syncthreads();  // whoever reads the last maxima is through
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  UNROLL for (int w = 0; w < WARPS; w++) x = larger(x, warps[w]);
  return x;
}

// The sum over the block, and over the threads before this one.
DEVICE uint64_t block_sum(uint64_t x, uint64_t* before = nullptr) {
  __shared__ uint64_t warps[WARPS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint64_t own = x;
  for (int n = 1; n < 32; n *= 2) {
    const uint64_t left = __shfl_up_sync(FULL_MASK, x, n);
    if (lane >= n) x += left;
  }
  __syncthreads();  // whoever reads the last sums is through
  if (lane == 31) warps[warp] = x;
  __syncthreads();
  uint64_t total = 0, ahead = 0;
  UNROLL for (int w = 0; w < WARPS; w++) ahead += w < warp ? warps[w] : 0, total += warps[w];
  if (before) *before = ahead + x - own;
  return total;
}

// Sums of 64 bits in shared memory, by atomics of 32 bits: whoever makes the lower half overflow adds the carry.
template <int N> struct Histogram {
  uint32_t low[N], high[N];
  DEVICE void clear() {
    UNROLL for (int i = 0; i < N / THREADS; i++) low[i * THREADS + threadIdx.x] = high[i * THREADS + threadIdx.x] = 0;
  }
  DEVICE void add(int i, uint64_t x) {
    const uint32_t old = atomicAdd(low + i, (uint32_t)x), carry = old + (uint32_t)x < old;
    const uint32_t upper = (uint32_t)(x >> 32) + carry;
    if (upper) atomicAdd(high + i, upper);
  }
  DEVICE uint64_t at(int i) const { return (uint64_t)high[i] << 32 | low[i]; }
};

// Of numbers of which thread t has EACH * t + {0 ... EACH - 1}: the first at which their running sum reaches `wanted`
// (-1: none does), that number, and the sum of those before it.
struct Reached { int at; uint64_t before, own; };
template <int EACH> DEVICE Reached reach(const uint64_t (&own)[EACH], uint64_t wanted) {
  __shared__ Reached found;
  uint64_t sum = 0, before;
  UNROLL for (int i = 0; i < EACH; i++) sum += own[i];
  const uint64_t total = block_sum(sum, &before);
  if (total < wanted) return {-1, total, 0};
  if (before < wanted && before + sum >= wanted) {
    int at = EACH * threadIdx.x;
    uint64_t here = 0;
    UNROLL for (int i = 0; i < EACH; i++)
      if (before < wanted) before += here = own[i], at = EACH * threadIdx.x + i;
    found = {at, before - here, here};
  }
  __syncthreads();
  return found;
}

// The largest bound of bits 63 ... `end` such that the weights of the entries of at least this value reach `wanted`,
// or a smaller one that no other entry of a weight passes; 0 if all together do not. weigh(i, value) sets entry i's
// value and returns its weight. Eight bits a round.
template <class Weigh> DEVICE uint64_t bound_of(int n, int end, uint64_t wanted, Weigh weigh) {
  __shared__ Histogram<256> digits;
  uint64_t bound = 0;
#pragma unroll 1
  for (int shift = 56; shift >= end; shift -= 8) {
    digits.clear();
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < n; i += THREADS) {
      uint64_t value;
      const uint64_t weight = weigh(i, value);
      if (weight && value >> shift >> 8 == bound >> shift >> 8) digits.add(255 - (int)(value >> shift & 255), weight);
    }
    __syncthreads();
    const Reached digit = reach({digits.at(threadIdx.x)}, wanted);  // the largest digit first
    if (digit.at < 0) return 0;
    bound |= (uint64_t)(255 - digit.at) << shift;
    wanted -= digit.before;
    if (wanted == digit.own) break;  // every entry that begins like this is needed
  }
  return bound;
}

// How much of `total` top-p is to keep.
DEVICE uint64_t part_of(double top_p, uint64_t total) {
  const uint64_t wanted = (uint64_t)ceil(top_p * (double)total);
  return wanted < total ? wanted : total;
}

struct Words {
  uint64_t a, b, c, d;
  DEVICE uint64_t at(int i) const { return i < 2 ? (i == 0 ? a : b) : i == 2 ? c : d; }
};

// The 128 bits of a product, in four multiplications of 32 bits.
struct Product { uint64_t high, low; };
DEVICE Product multiply(uint64_t a, uint64_t b) {
  const uint64_t a0 = (uint32_t)a, a1 = a >> 32, b0 = (uint32_t)b, b1 = b >> 32;
  const uint64_t low = a0 * b0, middle = a1 * b0 + (low >> 32), cross = a0 * b1 + (uint32_t)middle;
  return {a1 * b1 + (middle >> 32) + (cross >> 32), cross << 32 | (uint32_t)low};
}

// Words 4 * block ... 4 * block + 3 of NumPy's Philox(key=seed, counter=[0, 0, sequence, step]), which counts up first.
DEVICE Words philox(uint64_t seed, uint64_t block, uint64_t sequence, uint64_t step) {
  uint64_t c[4] = {block + 1, 0, sequence, step}, k[2] = {seed, 0};
#pragma unroll 1
  for (int round = 0; round < 10; round++) {
    const Product first = multiply(0xD2E7470EE14C6C93ull, c[0]), second = multiply(0xCA5A826395121157ull, c[2]);
    c[0] = second.high ^ c[1] ^ k[0];
    c[1] = second.low;
    c[2] = first.high ^ c[3] ^ k[1];
    c[3] = first.low;
    k[0] += 0x9E3779B97F4A7C15ull;
    k[1] += 0xBB67AE8584CAA73Bull;
  }
  return {c[0], c[1], c[2], c[3]};
}

// At most e, as sample.cu defines it, and cheap: -log(1 - v) >= v + v * v / 2, and v >= 2^-24 * (its upper 24 bits).
DEVICE float least_exponential(uint64_t word) {
  const float v = (float)(uint32_t)(word >> 40) * 5.9604645e-8f;
  return fmaf(0.5f * v, v, v);
}
// log2(e), e as sample.cu defines it.
DEVICE float log2_exponential(uint64_t word) {
  const uint64_t above = word >> 11, one = 1ull << 53;
  const float unit = 1.1102230246251565e-16f;  // 2^-53
  const bool small = above < one / 2;
  const float v = fmaxf((float)(small ? above : one - above), 0.5f) * unit;  // or 1 - v
  return log2f(small ? -log1pf(-v) : -logf(v));
}

#endif
