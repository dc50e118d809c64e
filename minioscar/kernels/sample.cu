// sample.cu: the next token of every sequence, from its logits: what sampling.py does, on the device.
//
//   temperature 0: the largest logit, the first of equal ones. Else p = exp((logit - max) / temperature), cut by top-k, top-p and min-p
//   in this order, and of the tokens that are in the one whose (logit - max) / temperature - log(e) is largest (Gumbel-max), the first of
//   equal ones. Before all that: penalties, and end tokens are out until there are min_tokens tokens.
//
// logits float32 [batch][vocab]; every row has Settings of its own. e = -log(1 - v), v = (word >> 11) / 2^53, at least 2^-54: token i has word
// i % 4 of block i / 4 of Philox4x64-10 (Salmon et al., SC 2011) under `seed`, at the row's [sequence, step], as NumPy counts them.
// tokens[i] = -1 where a logit is NaN or the largest is infinite. So a draw depends on the row alone, and on no order of threads or blocks.
//
// e and its logarithm are float32, made from v or from 1 - v, whichever is smaller and therefore exact to a relative 2^-24. With distances
// of up to 60 octaves a score is off by less than 2^-17, so that the token is another one than in float64 where the two largest scores are
// nearer than that: a few draws in a million.
//
// For top-p p is kept as a whole number of 2^-40 of the largest: sums are exact, so equal in every order. (A token below 2^-41 is then out.)
// Tokens stand in bins by how far p is below the largest: 24 bins an octave, 42 octaves; with top-k or top-p what is beyond is out.
// The launches:
//   sample_adjust  of penalties and min_tokens: logits to a buffer of their own. It counts the token that the step was fed with.
//   sample_max     the largest logit; of top-k the last bin that is needed, since the k-th largest of the maxima of groups of tokens is not
//                  above the k-th largest token. A greedy token needs nothing else.
//   sample_mass    of top-p without top-k: the sum of p of every bin, and so the bin in which top-p cuts.
//   sample_draw    bins before `first` are in, those after `last` out; the few tokens between go to a list, where the cut is found exactly.
//                  Each block finds the largest score of its tokens that are in, the last one that of these and of the list's.
// Each: grid (parts of PART tokens, batch), 256 threads, a thread's tokens four neighbours at a time; each reads the logits once, and the last
// block of a row goes on alone. A list that is too long (8,192) is no list: that block reads the row itself, slowly.
//
// Set by -D: TOKENS, of a thread, a multiple of 4.
#include "device.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32, PART = THREADS * TOKENS;
constexpr int BINS = 1024, LIST = 8192, GROUPS = THREADS / 8;  // groups of a part: 8 lanes' tokens each
constexpr float BINS_PER_OCTAVE = 24.f;
constexpr int ALL = BINS + 1;                              // `first` where neither top-k nor top-p cuts
constexpr float NEVER_DRAWN = -60.f;                       // octaves: e is at least 2^-54, and of the likeliest token below 2^5.2
constexpr unsigned FULL = 0xffffffffu;

struct Settings {  // of a row, raw_dense.SETTINGS
  uint64_t seed;
  double top_p;
  float scale, min_p;  // scale: log2(e) / temperature, 0 where that is 0
  int top_k;
  unsigned sequence;
  float repetition, presence, frequency;
  int min_tokens;

  __device__ __forceinline__ bool penalizes() const { return repetition != 1.f || presence != 0.f || frequency != 0.f; }
};

// Order-preserving: a < b as floats where key(a) < key(b); NaN above all.
__device__ __forceinline__ uint32_t key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.f);  // -0 is 0
  return x != x ? ~0u : bits ^ (bits >> 31 ? ~0u : 0x80000000u);
}
__device__ __forceinline__ float logit_of(uint32_t key) { return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key); }
// Larger for the larger logit and, of equal ones, for the smaller id.
__device__ __forceinline__ uint64_t value(float logit, int id) { return (uint64_t)key(logit) << 32 | (0xffffffffu - id); }

__device__ __forceinline__ uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

// The sum over the block, and over the threads before this one.
__device__ __forceinline__ uint64_t block_sum(uint64_t x, uint64_t* before = nullptr) {
  __shared__ uint64_t warps[WARPS];
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
#pragma unroll
  for (int w = 0; w < WARPS; w++) ahead += w < warp ? warps[w] : 0, total += warps[w];
  if (before) *before = ahead + x - own;
  return total;
}

// Sums of 64 bits in shared memory, by the atomics of 32 bits that there are: whoever makes the lower half run over adds the carry.
template <int N>
struct Histogram {
  uint32_t low[N], high[N];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < N / THREADS; i++) low[i * THREADS + threadIdx.x] = high[i * THREADS + threadIdx.x] = 0;
  }
  __device__ __forceinline__ void add(int i, uint64_t x) {
    const uint32_t old = atomicAdd(low + i, (uint32_t)x), carry = old + (uint32_t)x < old, upper = (uint32_t)(x >> 32) + carry;
    if (upper) atomicAdd(high + i, upper);
  }
  __device__ __forceinline__ uint64_t at(int i) const { return (uint64_t)high[i] << 32 | low[i]; }
};

// Of numbers of which thread t has EACH * t + {0 ... EACH - 1}: the first at which their sum from 0 on reaches `wanted` (-1: none does), that
// number, and the sum of those before it.
struct Reached { int at; uint64_t before, own; };
template <int EACH>
__device__ __forceinline__ Reached reach(const uint64_t (&own)[EACH], uint64_t wanted) {
  __shared__ Reached found;
  uint64_t sum = 0, before;
#pragma unroll
  for (int i = 0; i < EACH; i++) sum += own[i];
  const uint64_t total = block_sum(sum, &before);
  if (total < wanted) return {-1, total, 0};
  if (before < wanted && before + sum >= wanted) {
    int at = EACH * threadIdx.x;
    uint64_t here = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++)
      if (before < wanted) before += here = own[i], at = EACH * threadIdx.x + i;
    found = {at, before - here, here};
  }
  __syncthreads();
  return found;
}

// The largest bound of bits 63 ... `end` such that the weights of the entries of at least this value reach `wanted`, or a smaller one that no
// other entry of a weight passes; 0 if all together do not. weigh(i, value) sets entry i's value and returns its weight. Eight bits a round.
template <class Weigh>
__device__ __forceinline__ uint64_t bound_of(int n, int end, uint64_t wanted, Weigh weigh) {
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

struct State {  // of a row, from launch to launch
  uint64_t wanted;      // of top-p without top-k: what the tokens of bin `first` are to add to those before them
  float max;
  int first, last;      // bins before `first` are in, those after `last` out
  int arrived, listed;  // zero before and after a launch
};

// Workspace, `words` of 64 bits a row, zero at first: State, sums of bins (zero before and after), a number of each part, maxima of groups,
// the list. raw_dense.sample_words.
struct Row {
  const float* logits;
  const Settings* settings;  // written once, long ago
  State* state;
  uint64_t *bins, *parts;
  float* maxima;
  uint64_t* list;
  int vocab;
  float max, scale;

  __device__ __forceinline__ Row(const float* all, const uint64_t* rows, uint64_t* workspace, int words, int vocab)
      : logits(all + (size_t)blockIdx.y * vocab), settings((const Settings*)rows + blockIdx.y), vocab(vocab), max(0.f), scale(settings->scale) {
    uint64_t* own = workspace + (size_t)blockIdx.y * words;
    state = (State*)own, bins = own + sizeof(State) / 8, parts = bins + BINS, maxima = (float*)(parts + gridDim.x);
    list = (uint64_t*)(maxima + gridDim.x * GROUPS);
  }

  static __device__ __forceinline__ int id(int i) { return blockIdx.x * PART + (i / 4 * THREADS + threadIdx.x) * 4 + i % 4; }
  __device__ __forceinline__ void load(float (&x)[TOKENS]) const {
    const float out = -__uint_as_float(0x7f800000u);
    if (vocab % 4 == 0) {
#pragma unroll
      for (int i = 0; i < TOKENS; i += 4) {
        const float4 four = id(i) < vocab ? __ldcg((const float4*)(logits + id(i))) : make_float4(out, out, out, out);
        x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < TOKENS; i++) x[i] = id(i) < vocab ? __ldcg(logits + id(i)) : out;
    }
  }
  // False where the row's token is known already.
  __device__ __forceinline__ bool take_max() {
    max = state->max;
    return fabsf(max) <= 3.4028235e38f && scale > 0.f;
  }
  // True in the block that comes last, which sees what the others have written.
  __device__ __forceinline__ bool last_block() const {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
      last = atomic_add_acq_rel(&state->arrived, 1) == (int)gridDim.x - 1;
      if (last) state->arrived = 0;
    }
    __syncthreads();
    return last;
  }

  __device__ __forceinline__ float octaves(float logit) const { return (logit - max) * scale; }
  __device__ __forceinline__ float weight(float logit) const { return exp2f(octaves(logit)); }
  static __device__ __forceinline__ uint64_t mass(float weight) { return (uint64_t)(weight * 1099511627776.f + 0.5f); }
  // Never smaller for a smaller logit. BINS: the mass is 0.
  __device__ __forceinline__ int bin(float logit) const {
    const float distance = (max - logit) * (scale * BINS_PER_OCTAVE);
    return distance < BINS ? (int)distance : BINS;
  }
};

struct Words {
  uint64_t a, b, c, d;
  __device__ __forceinline__ uint64_t at(int i) const { return i < 2 ? (i == 0 ? a : b) : i == 2 ? c : d; }
};

// What NumPy's Philox(key=seed, counter=[0, 0, sequence, step]) gives 4 * block numbers later: it counts up before it draws.
__device__ __forceinline__ Words philox(uint64_t seed, uint64_t block, uint64_t sequence, uint64_t step) {
  uint64_t c[4] = {block + 1, 0, sequence, step}, k[2] = {seed, 0};
#pragma unroll 1
  for (int round = 0; round < 10; round++) {
    const uint64_t m0 = 0xD2E7470EE14C6C93ull, m1 = 0xCA5A826395121157ull;
    const uint64_t high0 = __umul64hi(m0, c[0]), high1 = __umul64hi(m1, c[2]), low0 = m0 * c[0], low1 = m1 * c[2];
    c[0] = high1 ^ c[1] ^ k[0], c[1] = low1, c[2] = high0 ^ c[3] ^ k[1], c[3] = low0;
    k[0] += 0x9E3779B97F4A7C15ull, k[1] += 0xBB67AE8584CAA73Bull;
  }
  return {c[0], c[1], c[2], c[3]};
}

// log2(e) of the header.
__device__ __forceinline__ float log2_exponential(uint64_t word) {
  const uint64_t above = word >> 11, one = 1ull << 53;
  const float unit = 1.1102230246251565e-16f;  // 2^-53
  const bool small = above < one / 2;
  const float v = fmaxf((float)(small ? above : one - above), 0.5f) * unit;  // or 1 - v
  return log2f(small ? -log1pf(-v) : -logf(v));
}

// How much of `total` top-p is to keep.
__device__ __forceinline__ uint64_t part_of(double top_p, uint64_t total) {
  const uint64_t wanted = (uint64_t)ceil(top_p * (double)total);
  return wanted < total ? wanted : total;
}

__device__ __forceinline__ uint64_t block_max(uint64_t x) {
  __shared__ uint64_t warps[WARPS];
  for (int other = 1; other < 32; other *= 2) x = larger(x, __shfl_xor_sync(FULL, x, other));
  __syncthreads();  // whoever reads the last maxima is through
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS; w++) x = larger(x, warps[w]);
  return x;
}

// ends int [batch][width], -1 where there are no more; history int [batch][vocab]: 2 * times drawn + (1 if the prompt has it), null without
// penalties. The operations are rounded one by one, as NumPy does them.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
sample_adjust(const float* logits, const uint64_t* rows, const int* steps, const int* tokens, const int* ends, int width, int* history,
              float* adjusted, int vocab) {
  const Settings& s = ((const Settings*)rows)[blockIdx.y];
  wait_for_previous(), allow_next();
  const size_t row = (size_t)blockIdx.y * vocab;
  const bool penalizes = history && s.penalizes();
  const int fed = tokens[blockIdx.y];
#pragma unroll
  for (int i = 0; i < TOKENS; i++) {
    const int id = Row::id(i);
    if (id >= vocab) continue;
    float x = logits[row + id];
    int seen = penalizes ? history[row + id] : 0;
    if (penalizes && id == fed) history[row + id] = seen += 2;
    if (seen > 0) {
      const float times = (float)(seen >> 1);
      x = x > 0.f ? __fdiv_rn(x, s.repetition) : __fmul_rn(x, s.repetition);
      x = __fsub_rn(x, __fadd_rn(__fmul_rn(s.frequency, times), times > 0.f ? s.presence : 0.f));
    }
    adjusted[row + id] = x;
  }
  if (steps[blockIdx.y] >= s.min_tokens) return;
  __syncthreads();
  for (int i = threadIdx.x; i < width; i += THREADS)
    if (const int id = ends[blockIdx.y * width + i]; id >= 0 && id / PART == (int)blockIdx.x) adjusted[row + id] = -__uint_as_float(0x7f800000u);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
sample_max(const float* logits, const uint64_t* rows, uint64_t* workspace, int words, int* tokens, int vocab) {
  wait_for_previous(), allow_next();
  __shared__ Histogram<BINS> histogram;
  Row row(logits, rows, workspace, words, vocab);
  const int top_k = row.settings->top_k;
  float x[TOKENS];
  row.load(x);
  uint64_t largest = 0;
#pragma unroll
  for (int i = 0; i < TOKENS; i++) largest = larger(largest, value(x[i], row.id(i)));
  if (top_k > 0) {
    uint64_t group = largest;
    for (int other = 1; other < 8; other *= 2) group = larger(group, __shfl_xor_sync(FULL, group, other));
    if (threadIdx.x % 8 == 0) row.maxima[blockIdx.x * GROUPS + threadIdx.x / 8] = logit_of(group >> 32);
  }
  largest = block_max(largest);
  if (threadIdx.x == 0) row.parts[blockIdx.x] = largest;
  if (!row.last_block()) return;

#pragma unroll 1
  for (int i = threadIdx.x; i < (int)gridDim.x; i += THREADS) largest = larger(largest, row.parts[i]);
  largest = block_max(largest);
  const int likeliest = (int)(0xffffffffu - (uint32_t)largest);
  row.max = row.logits[likeliest];
  const bool finite = fabsf(row.max) <= 3.4028235e38f;
  int last = BINS - 1;
  if (finite && top_k > 0) {
    histogram.clear();
    __syncthreads();
    for (int i = threadIdx.x; i < (int)gridDim.x * GROUPS; i += THREADS)
      if (const int bin = row.bin(row.maxima[i]); bin < BINS) histogram.add(bin, 1);
    __syncthreads();
    uint64_t own[BINS / THREADS];
#pragma unroll
    for (int i = 0; i < BINS / THREADS; i++) own[i] = histogram.at(BINS / THREADS * threadIdx.x + i);
    const Reached reached = reach(own, top_k);
    if (reached.at >= 0) last = reached.at;
  }
  if (threadIdx.x > 0) return;
  if (row.scale == 0.f || !finite) tokens[blockIdx.y] = finite ? likeliest : -1;
  row.state->max = row.max, row.state->first = top_k > 0 ? 0 : ALL, row.state->last = last;
}

// bins: those after so many are out, whatever the logits; raw_dense.py has the reason.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
sample_mass(const float* logits, const uint64_t* rows, uint64_t* workspace, int words, int bins, int vocab) {
  __shared__ Histogram<BINS> histogram;
  Row row(logits, rows, workspace, words, vocab);
  const double top_p = row.settings->top_p;
  const bool cuts = top_p < 1 && row.settings->top_k == 0;
  float x[TOKENS];
  if (cuts) row.load(x);  // two launches old
  histogram.clear();
  __syncthreads();
  wait_for_previous(), allow_next();
  if (!cuts || !row.take_max()) return;
  uint64_t sum = 0;
#pragma unroll
  for (int i = 0; i < TOKENS; i++) {
    const int bin = row.bin(x[i]);
    if (bin == BINS) continue;
    const uint64_t mass = row.mass(row.weight(x[i]));
    sum += mass;
    if (bin < bins) histogram.add(bin, mass);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) row.parts[blockIdx.x] = sum;
  for (int i = threadIdx.x; i < bins; i += THREADS)
    if (const uint64_t mass = histogram.at(i)) atomicAdd(row.bins + i, mass);
  if (!row.last_block()) return;

  uint64_t total = 0, own[BINS / THREADS];
#pragma unroll 1
  for (int i = threadIdx.x; i < (int)gridDim.x; i += THREADS) total += row.parts[i];
  total = block_sum(total);
#pragma unroll
  for (int i = 0; i < BINS / THREADS; i++) {
    uint64_t& bin = row.bins[BINS / THREADS * threadIdx.x + i];
    own[i] = bin, bin = 0;
  }
  const uint64_t wanted = part_of(top_p, total);
  const Reached reached = reach(own, wanted);
  if (threadIdx.x == 0) row.state->wanted = wanted - reached.before, row.state->first = row.state->last = reached.at;
}

extern "C" __global__ void __launch_bounds__(THREADS, 3)
sample_draw(const float* logits, const uint64_t* rows, uint64_t* workspace, int words, const int* steps, int* tokens, int vocab) {
  Row row(logits, rows, workspace, words, vocab);
  const Settings& s = *row.settings;
  float x[TOKENS];
  row.load(x);  // two launches old
  wait_for_previous(), allow_next();
  if (!row.take_max()) return;
  const int first = row.state->first, last = row.state->last, step = steps[blockIdx.y];
  auto draws = [&](float logit) { return row.octaves(logit) > NEVER_DRAWN && row.weight(logit) >= s.min_p; };
  auto score = [&](float logit, int id, uint64_t word) { return value(row.octaves(logit) - log2_exponential(word), id); };
  uint64_t best = 0;
#pragma unroll
  for (int i = 0; i < TOKENS; i += 4) {
    unsigned in = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int bin = row.bin(x[i + j]);
      if (bin < first) in |= (unsigned)draws(x[i + j]) << j;
      else if (bin <= last) {
        const int at = atomicAdd(&row.state->listed, 1);
        if (at < LIST) row.list[at] = value(x[i + j], row.id(i + j));
      }
    }
    if (in) {
      const Words four = philox(s.seed, row.id(i) / 4, s.sequence, step);
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (in >> j & 1) best = larger(best, score(x[i + j], row.id(i + j), four.at(j)));
    }
  }
  best = block_max(best);
  if (threadIdx.x == 0) row.parts[blockIdx.x] = best;
  if (!row.last_block()) return;

  const bool listed = row.state->listed <= LIST;
  const int n = listed ? row.state->listed : vocab;
  auto candidate = [&](int i) -> uint64_t {  // its value, 0: none
    if (listed) return row.list[i];
    const int bin = row.bin(row.logits[i]);
    return bin >= first && bin <= last ? value(row.logits[i], i) : 0;
  };
  uint64_t edge = 0;  // of the candidates those of a value below are out
  if (s.top_k > 0)
    edge = bound_of(n, 32, s.top_k, [&](int i, uint64_t& value) -> uint64_t { return (value = candidate(i)) > 0; });
  if (s.top_p < 1) {
    auto weigh = [&](int i, uint64_t& value) -> uint64_t {
      value = candidate(i);
      return value > 0 && value >= edge ? row.mass(row.weight(logit_of(value >> 32))) : 0;
    };
    uint64_t wanted = row.state->wanted;
    if (s.top_k > 0) {
      uint64_t total = 0, value;
#pragma unroll 1
      for (int i = threadIdx.x; i < n; i += THREADS) total += weigh(i, value);
      wanted = part_of(s.top_p, block_sum(total));
    }
    edge = larger(edge, bound_of(n, 0, wanted, weigh));
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += THREADS) {
    const uint64_t value = candidate(i);
    const float logit = logit_of(value >> 32);
    if (value == 0 || value < edge || !draws(logit)) continue;
    const int id = (int)(0xffffffffu - (uint32_t)value);
    const Words four = philox(s.seed, id / 4, s.sequence, step);
    best = larger(best, score(logit, id, four.at(id % 4)));
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < (int)gridDim.x; i += THREADS) best = larger(best, row.parts[i]);
  best = block_max(best);
  if (threadIdx.x == 0) row.state->listed = 0, tokens[blockIdx.y] = (int)(0xffffffffu - (uint32_t)best);
}
