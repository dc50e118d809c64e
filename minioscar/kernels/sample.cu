// sample.cu: the next token of every sequence, from its logits: what sampling.py does, on the device.
//
//   temperature 0: the largest logit, the first of equal ones. Else p = exp((logit - max) / temperature), cut by top-k, top-p and min-p
//   in this order, and the first token at which the sum of p, in the order of ids, passes u * (sum of all).
//
// logits float32 [batch][vocab]; token i gets the u of [sequences[i], steps[i]] from Philox4x64-10 (Salmon et al., SC 2011) under `seed`, as
// NumPy draws it. tokens[i] = -1 where a logit is NaN or the largest is infinite.
// p is kept as a whole number of 2^-40 of the largest: sums are exact, so equal in every order. (A token below 2^-41 is never drawn.)
// grid (batch), 1,024 threads. Reads the logits, out of L2, once for the largest, 16 times for top-k, 17 for top-p, twice for the draw.
#include "device.cuh"

constexpr int THREADS = 1024;
constexpr unsigned FULL = 0xffffffffu;

// Order-preserving: a < b as floats where key(a) < key(b); NaN above all.
__device__ __forceinline__ uint32_t key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.f);  // -0 is 0
  return x != x ? ~0u : bits ^ (bits >> 31 ? ~0u : 0x80000000u);
}

// The sum over the block, and over the threads before this one.
__device__ __forceinline__ uint64_t block_sum(uint64_t x, uint64_t* before = nullptr) {
  __shared__ uint64_t warps[THREADS / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint64_t own = x;
  for (int n = 1; n < 32; n *= 2) {
    const uint64_t left = __shfl_up_sync(FULL, x, n);
    if (lane >= n) x += left;
  }
  __syncthreads();  // whoever reads the last sums is through
  if (lane == 31) warps[warp] = x;
  __syncthreads();
  uint64_t total = 0, ahead = 0;
  for (int w = 0; w < THREADS / 32; w++) ahead += w < warp ? warps[w] : 0, total += warps[w];
  if (before) *before = ahead + x - own;
  return total;
}

struct Row {
  const float* logits;
  int vocab;
  float max, scale;  // scale: log2(e) / temperature

  __device__ __forceinline__ float weight(float logit) const { return exp2f((logit - max) * scale); }
  __device__ __forceinline__ uint64_t mass(float logit) const { return (uint64_t)(weight(logit) * 1099511627776.f + 0.5f); }

  // Of all tokens whose key is at least `bound`: how many there are, or their mass.
  __device__ __forceinline__ uint64_t above(uint32_t bound, bool counted) const {
    uint64_t sum = 0;
    for (int i = threadIdx.x; i < vocab; i += THREADS)
      if (key(logits[i]) >= bound) sum += counted ? 1 : mass(logits[i]);
    return block_sum(sum);
  }
  // The largest bound for which `above` reaches `wanted`, not below `least`; two bits a round.
  __device__ __forceinline__ uint32_t bound_of(uint64_t wanted, bool counted, uint32_t least) const {
    uint32_t bound = 0;
    for (int shift = 30; shift >= 0; shift -= 2) {
      uint64_t sums[3] = {0, 0, 0};
      for (int i = threadIdx.x; i < vocab; i += THREADS) {
        const uint32_t k = key(logits[i]);
        if (k < least) continue;
        const uint64_t x = counted ? 1 : mass(logits[i]);
#pragma unroll
        for (uint32_t c = 1; c < 4; c++) sums[c - 1] += k >= (bound | c << shift) ? x : 0;
      }
      uint32_t step = 0;
#pragma unroll
      for (uint32_t c = 1; c < 4; c++) step = block_sum(sums[c - 1]) >= wanted ? c : step;
      bound |= step << shift;
    }
    return bound;
  }
};

// The first number that NumPy's Philox(key=seed, counter=[0, 0, sequence, step]) gives: it counts up before it draws.
__device__ __forceinline__ uint64_t philox(uint64_t seed, uint64_t sequence, uint64_t step) {
  uint64_t c[4] = {1, 0, sequence, step}, k[2] = {seed, 0};
  for (int round = 0; round < 10; round++) {
    const uint64_t m0 = 0xD2E7470EE14C6C93ull, m1 = 0xCA5A826395121157ull;
    const uint64_t high0 = __umul64hi(m0, c[0]), high1 = __umul64hi(m1, c[2]), low0 = m0 * c[0], low1 = m1 * c[2];
    c[0] = high1 ^ c[1] ^ k[0], c[1] = low1, c[2] = high0 ^ c[3] ^ k[1], c[3] = low0;
    k[0] += 0x9E3779B97F4A7C15ull, k[1] += 0xBB67AE8584CAA73Bull;
  }
  return c[0];
}

extern "C" __global__ void __launch_bounds__(THREADS) sample(const float* logits, const int* sequences, const int* steps, int* tokens, int vocab,
                                                             float scale, int top_k, double top_p, float min_p, unsigned long long seed) {
  wait_for_previous(), allow_next();
  __shared__ uint64_t best[THREADS / 32];
  Row row = {logits + (size_t)blockIdx.x * vocab, vocab, 0.f, scale};
  uint64_t largest = 0;  // key, then the smaller id
  for (int i = threadIdx.x; i < vocab; i += THREADS) {
    const uint64_t candidate = (uint64_t)key(row.logits[i]) << 32 | (0xffffffffu - i);
    largest = candidate > largest ? candidate : largest;
  }
  for (int other = 16; other; other /= 2) {
    const uint64_t candidate = __shfl_xor_sync(FULL, largest, other);
    largest = candidate > largest ? candidate : largest;
  }
  if (threadIdx.x % 32 == 0) best[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int w = 0; w < THREADS / 32; w++) largest = best[w] > largest ? best[w] : largest;
  const int likeliest = (int)(0xffffffffu - (uint32_t)largest);
  row.max = row.logits[likeliest];
  const bool finite = fabsf(row.max) <= 3.4028235e38f;
  if (scale == 0.f || !finite) {
    if (threadIdx.x == 0) tokens[blockIdx.x] = finite ? likeliest : -1;
    return;
  }

  uint32_t least = 0, edge = 0;  // keys below `least` are out; of those equal to `edge` the first `ties` are in, below it none
  uint64_t ties = ~0ull;
  if (top_k > 0 && top_k < vocab) least = row.bound_of(top_k, true, 0);
  if (top_p < 1) {
    const uint64_t wanted = (uint64_t)ceil(top_p * (double)row.above(least, false));
    edge = row.bound_of(wanted, false, least);
    const uint64_t more = edge == ~0u ? 0 : row.above(edge + 1, false);
    const uint32_t bits = edge >> 31 ? edge ^ 0x80000000u : ~edge;
    const uint64_t each = row.mass(__uint_as_float(bits));
    ties = (wanted - more + each - 1) / each;
  }

  // A thread has a stretch of neighbouring ids, so that sums run in their order.
  const int stretch = (vocab + THREADS - 1) / THREADS, first = min((int)threadIdx.x * stretch, vocab), last = min(first + stretch, vocab);
  uint64_t rank = 0, equal = 0;
  if (edge) {
    for (int i = first; i < last; i++) equal += key(row.logits[i]) == edge;
    block_sum(equal, &rank);
  }
  auto mass_of = [&](int i, uint64_t& seen) -> uint64_t {
    const float logit = row.logits[i];
    const uint32_t k = key(logit);
    const bool in = k > edge || (k == edge && seen++ < ties);
    return in && k >= least && row.weight(logit) >= min_p ? row.mass(logit) : 0;
  };
  uint64_t sum = 0, before, seen = rank;
  for (int i = first; i < last; i++) sum += mass_of(i, seen);
  const uint64_t total = block_sum(sum, &before);
  const uint64_t drawn = philox(seed, sequences[blockIdx.x], steps[blockIdx.x]) >> 11 << 11;  // 53 bits of it: u = drawn / 2^64
  const uint64_t target = __umul64hi(drawn, total);
  if (before > target || before + sum <= target) return;
  seen = rank;
  for (int i = first; i < last; i++) {
    before += mass_of(i, seen);
    if (before > target) {
      tokens[blockIdx.x] = i;
      return;
    }
  }
}
