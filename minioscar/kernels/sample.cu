// sample.cu: the next token of every sequence from its logits: what sampling.py does, on the device.
//
//   1. Penalties; tokens that a mask leaves out are excluded; biases are added; end tokens are excluded before step
//      min_tokens.
//   2. temperature 0: the largest logit, the first of equal ones.
//   3. Else p = exp((logit - max) / temperature); top-k, top-p and min-p, in this order, decide which tokens are kept,
//      and the kept token with the largest (logit - max) / temperature - log(e) is drawn (Gumbel-max; the first of
//      equal ones).
//
// logits float32 [batch][vocab]. Every row has its own Settings. tokens[row] = -1 where a logit is NaN or the largest
// is infinite. e = -log(1 - v), v = max((word >> 11) / 2^53, 2^-54); token i has word i % 4 of block i / 4 of
// Philox4x64-10 (Salmon et al., SC 2011) under the row's seed at [sequence, step], in NumPy's order. A row's draw
// depends on nothing but the row: not on its neighbours, nor on the order of threads and blocks.
//
// Precision: e and its logarithm are float32, since float64 is slow on most cards. They are computed from v or from 1
// - v, whichever is smaller, which float32 holds to a relative 2^-24. With distances of up to 60 octaves a score is
// off by less than 2^-15 octaves: the token differs from float64's only where the two largest scores are nearer than
// that, which is less than one draw in 10,000.
//
// For top-p, p is an integer multiple of 2^-40 of the largest, so sums are exact in every order; a token below 2^-41
// has mass 0. Tokens are counted in bins by how far p is below the largest: 24 bins an octave, 42 octaves; with top-k
// or top-p a token beyond the last bin is not kept.
// Launches:
//   sample_adjust  only with penalties, min_tokens, masks or biases: adjusted logits to a buffer of their own. It
//                  counts the token that the step was fed with.
//   sample_max     the largest logit; for top-k also the last bin that can hold kept tokens: the k-th largest of the
//                  maxima of groups of tokens is not above the k-th largest token. Greedy rows end here.
//   sample_mass    only with top-p without top-k: the sum of p of every bin, and so the bin in which top-p cuts.
//   sample_draw    tokens in bins before `first` are kept, those after `last` are not; the few between go to a list, in
//                  which the cut is found exactly. Each block reduces the scores of its kept tokens to their maximum;
//                  the last block adds the list's.
// Each: grid (blocks of PART tokens, batch), 256 threads; a thread has groups of four neighbouring tokens. Each reads
// the logits once; the last block of a row to finish does the rest. If the list (8,192) is too short, that block reads
// the whole row again, slowly.
//
// Set by -D: TOKENS, of a thread, a multiple of 4.
#include "sample.cuh"

constexpr int PART = THREADS * TOKENS, BINS = 1024, LIST = 8192;
constexpr int GROUPS = THREADS / 8;  // of a block, for top-k: the tokens of 8 lanes each
constexpr float BINS_PER_OCTAVE = 24.f;
constexpr int ALL = BINS + 1;  // `first` where neither top-k nor top-p cuts
constexpr float NEVER_DRAWN = -60.f;  // octaves: e is at least 2^-54, and of the likeliest token below 2^5.2
constexpr float LEAST_DRAWN = 0.026f;  // below 2^-5.2: weight / e of the likeliest token is more
constexpr float SAFE = 1.001f;         // covers what float32 rounds: 2^-15 octaves of a score

struct State {  // of a row, from launch to launch
  uint64_t wanted;      // of top-p without top-k: what the tokens of bin `first` are to add to those before them
  float max;
  int first, last;      // bins before `first` are in, those after `last` out
  int arrived, listed;  // zero before and after a launch
};

// Workspace, `words` of 64 bits a row, zero at first: State, sums of bins (zero before and after), a number of each
// block, maxima of groups, the list. ops/sample.py, sample_words.
struct Row {
  const float* logits;
  const Settings* settings;  // written once, long ago
  State* state;
  uint64_t *bins, *parts;
  float* maxima;
  uint64_t* list;
  int vocab;
  float max, scale;

  DEVICE Row(const float* all, const uint64_t* rows, uint64_t* workspace, int words, int vocab)
      : logits(all + (size_t)blockIdx.y * vocab), settings((const Settings*)rows + blockIdx.y), vocab(vocab), max(0.f),
        scale(settings->scale) {
    uint64_t* own = workspace + (size_t)blockIdx.y * words;
    state = (State*)own;
    bins = own + sizeof(State) / 8;
    parts = bins + BINS;
    maxima = (float*)(parts + gridDim.x);
    list = (uint64_t*)(maxima + gridDim.x * GROUPS);
  }

  DEVICE static int id(int i) {
    return blockIdx.x * PART + (i / 4 * THREADS + threadIdx.x) * 4 + i % 4;
  }
  DEVICE void load(float (&x)[TOKENS]) const {
    const float out = -__uint_as_float(0x7f800000u);
    if (vocab % 4 == 0) {
      UNROLL for (int i = 0; i < TOKENS; i += 4) {
        const float4 four = id(i) < vocab ? __ldcg((const float4*)(logits + id(i))) : make_float4(out, out, out, out);
        x[i] = four.x;
        x[i + 1] = four.y;
        x[i + 2] = four.z;
        x[i + 3] = four.w;
      }
    } else {
      UNROLL for (int i = 0; i < TOKENS; i++) x[i] = id(i) < vocab ? __ldcg(logits + id(i)) : out;
    }
  }
  // False where the row's token is known already.
  DEVICE bool take_max() {
    max = state->max;
    return fabsf(max) <= 3.4028235e38f && scale > 0.f;
  }
  // True in the block that comes last, which sees what the others have written.
  DEVICE bool last_block() const {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
      last = atomic_add_acq_rel(&state->arrived, 1) == (int)gridDim.x - 1;
      if (last) state->arrived = 0;
    }
    __syncthreads();
    return last;
  }

  DEVICE float octaves(float logit) const { return (logit - max) * scale; }
  DEVICE float weight(float logit) const { return exp2f(octaves(logit)); }
  DEVICE static uint64_t mass(float weight) { return (uint64_t)(weight * 1099511627776.f + 0.5f); }
  // Never smaller for a smaller logit. BINS: the mass is 0.
  DEVICE int bin(float logit) const {
    const float distance = (max - logit) * (scale * BINS_PER_OCTAVE);
    return distance < BINS ? (int)distance : BINS;
  }
};

// ends int [batch][width], -1 where there are no more; history int [batch][vocab]: 2 * times drawn + (1 if the prompt
// has it), null without penalties. allowed [batch][words of 32 bits]: bit i % 32 of word i / 32 is token i; biased and
// biases [batch][room]: token ids, -1 where there are no more, and what is added to their logits; these three are null
// without rows that join. Every operation is rounded by itself, as in NumPy.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
sample_adjust(const float* logits, const uint64_t* rows, const int* steps, const int* tokens, const int* ends,
              int width, const uint32_t* allowed, const int* biased, const float* biases, int room, int* history,
              float* adjusted, int vocab) {
  const Settings& s = ((const Settings*)rows)[blockIdx.y];
  wait_then_allow_next();
  const size_t row = (size_t)blockIdx.y * vocab;
  const bool penalizes = history && s.penalizes();
  const int fed = tokens[blockIdx.y];
  UNROLL for (int i = 0; i < TOKENS; i++) {
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
    const size_t word = (size_t)blockIdx.y * ((vocab + 31) / 32) + id / 32;
    if (allowed && !(allowed[word] >> id % 32 & 1)) x = -__uint_as_float(0x7f800000u);
    adjusted[row + id] = x;
  }
  __syncthreads();
  for (int i = threadIdx.x; biased && i < room; i += THREADS) {
    const int id = biased[blockIdx.y * room + i];
    if (id < 0) break;
    if (id / PART == (int)blockIdx.x) adjusted[row + id] = __fadd_rn(adjusted[row + id], biases[blockIdx.y * room + i]);
  }
  if (steps[blockIdx.y] >= s.min_tokens) return;
  __syncthreads();
  for (int i = threadIdx.x; i < width; i += THREADS) {
    const int id = ends[blockIdx.y * width + i];
    if (id >= 0 && id / PART == (int)blockIdx.x) adjusted[row + id] = -__uint_as_float(0x7f800000u);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
sample_max(const float* logits, const uint64_t* rows, uint64_t* workspace, int words, int* tokens, int vocab) {
  wait_then_allow_next();
  __shared__ Histogram<BINS> histogram;
  Row row(logits, rows, workspace, words, vocab);
  const int top_k = row.settings->top_k;
  float x[TOKENS];
  row.load(x);
  uint64_t largest = 0;
  UNROLL for (int i = 0; i < TOKENS; i++) largest = larger(largest, value(x[i], row.id(i)));
  if (top_k > 0) {
    uint64_t group = largest;
    for (int other = 1; other < 8; other *= 2) group = larger(group, __shfl_xor_sync(FULL_MASK, group, other));
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
    UNROLL for (int i = 0; i < BINS / THREADS; i++) own[i] = histogram.at(BINS / THREADS * threadIdx.x + i);
    const Reached reached = reach(own, top_k);
    if (reached.at >= 0) last = reached.at;
  }
  if (threadIdx.x > 0) return;
  if (row.scale == 0.f || !finite) tokens[blockIdx.y] = finite ? likeliest : -1;
  row.state->max = row.max;
  row.state->first = top_k > 0 ? 0 : ALL;
  row.state->last = last;
}

// bins: those after so many are out, whatever the logits; ops/sample.py has the reason.
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
  wait_then_allow_next();
  if (!cuts || !row.take_max()) return;
  uint64_t sum = 0;
  UNROLL for (int i = 0; i < TOKENS; i++) {
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
  UNROLL for (int i = 0; i < BINS / THREADS; i++) {
    uint64_t& bin = row.bins[BINS / THREADS * threadIdx.x + i];
    own[i] = bin;
    bin = 0;
  }
  const uint64_t wanted = part_of(top_p, total);
  const Reached reached = reach(own, wanted);
  if (threadIdx.x > 0) return;
  row.state->wanted = wanted - reached.before;
  row.state->first = row.state->last = reached.at;
}

// Of a row, by its last block: the tokens between `first` and `last`, of which some are in.
struct Candidates {
  const Row& row;
  const int first, last;
  bool listed;
  int n;

  DEVICE Candidates(const Row& row, int first, int last)
      : row(row), first(first), last(last), listed(row.state->listed <= LIST),
        n(listed ? row.state->listed : row.vocab) {}
  DEVICE uint64_t value_of(int i) const {  // 0: none
    if (listed) return row.list[i];
    const int bin = row.bin(row.logits[i]);
    return bin >= first && bin <= last ? value(row.logits[i], i) : 0;
  }
};

// Candidates of a value below this are out.
DEVICE uint64_t cut(const Row& row, const Candidates& all) {
  const Settings& s = *row.settings;
  uint64_t edge = 0;
  if (s.top_k > 0)
    edge = bound_of(all.n, 32, s.top_k, [&](int i, uint64_t& value) -> uint64_t {
      value = all.value_of(i);
      return value > 0;
    });
  if (s.top_p >= 1) return edge;
  auto weigh = [&](int i, uint64_t& value) -> uint64_t {
    value = all.value_of(i);
    return value > 0 && value >= edge ? row.mass(row.weight(logit_of(value >> 32))) : 0;
  };
  uint64_t wanted = row.state->wanted;
  if (s.top_k > 0) {
    uint64_t total = 0, value;
#pragma unroll 1
    for (int i = threadIdx.x; i < all.n; i += THREADS) total += weigh(i, value);
    wanted = part_of(s.top_p, block_sum(total));
  }
  return larger(edge, bound_of(all.n, 0, wanted, weigh));
}

extern "C" __global__ void __launch_bounds__(THREADS, 3)
sample_draw(const float* logits, const uint64_t* rows, uint64_t* workspace, int words, const int* steps, int* tokens,
            int vocab) {
  Row row(logits, rows, workspace, words, vocab);
  const Settings& s = *row.settings;
  float x[TOKENS];
  row.load(x);  // two launches old
  wait_then_allow_next();
  if (!row.take_max()) return;
  const int first = row.state->first, last = row.state->last, step = steps[blockIdx.y];
  auto draws = [&](float logit) { return row.octaves(logit) > NEVER_DRAWN && row.weight(logit) >= s.min_p; };
  auto score = [&](float logit, int id, uint64_t word) {
    return value(row.octaves(logit) - log2_exponential(word), id);
  };
  uint64_t best = 0;
  float bound = LEAST_DRAWN;  // 2^score: a token of a smaller one is not drawn
  UNROLL for (int i = 0; i < TOKENS; i += 4) {
    float weights[4];
    unsigned in = 0;
    UNROLL for (int j = 0; j < 4; j++) {
      const int bin = row.bin(x[i + j]);
      weights[j] = row.weight(x[i + j]);
      if (bin < first) in |= (unsigned)draws(x[i + j]) << j;
      else if (bin <= last) {
        const int at = atomicAdd(&row.state->listed, 1);
        if (at < LIST) row.list[at] = value(x[i + j], row.id(i + j));
      }
    }
    if (!__any_sync(FULL_MASK, in)) continue;
    const Words four = philox(s.seed, row.id(i) / 4, s.sequence, step);
    UNROLL for (int j = 0; j < 4; j++) {
      const bool may = in >> j & 1 && least_exponential(four.at(j)) * bound <= weights[j] * SAFE;
      if (!__any_sync(FULL_MASK, may)) continue;
      const float own = may ? row.octaves(x[i + j]) - log2_exponential(four.at(j)) : NEVER_DRAWN;
      if (may) best = larger(best, value(own, row.id(i + j)));
      bound = fmaxf(bound, exp2f(logit_of(__reduce_max_sync(FULL_MASK, key(own)))));
    }
  }
  best = block_max(best);
  if (threadIdx.x == 0) row.parts[blockIdx.x] = best;
  if (!row.last_block()) return;

  const Candidates candidates(row, first, last);
  const uint64_t edge = cut(row, candidates);
#pragma unroll 1
  for (int i = threadIdx.x; i < candidates.n; i += THREADS) {
    const uint64_t value = candidates.value_of(i);
    const float logit = logit_of(value >> 32);
    if (value == 0 || value < edge || !draws(logit)) continue;
    const int id = (int)(0xffffffffu - (uint32_t)value);
    const Words four = philox(s.seed, id / 4, s.sequence, step);
    best = larger(best, score(logit, id, four.at(id % 4)));
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < (int)gridDim.x; i += THREADS) best = larger(best, row.parts[i]);
  best = block_max(best);
  if (threadIdx.x > 0) return;
  row.state->listed = 0;
  tokens[blockIdx.y] = (int)(0xffffffffu - (uint32_t)best);
}
