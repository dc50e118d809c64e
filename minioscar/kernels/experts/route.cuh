// experts/route.cuh: which experts a token takes, from its router's logits.
//
//   the TOP_K largest logits, of equal ones the first; weight = exp(logit - largest) / their sum, or with
//   NORMALIZED=0 / the sum over all experts. Float32.
//
// A warp has a token and lane l its experts l * PER_LANE ...; a step finds the largest that is left: the maximum of the
// lanes' maxima, then the first lane that has it. Logits that are NaN are the smallest; they make the weights NaN.
// Set by -D: EXPERTS, TOP_K (at most 32), NORMALIZED; ALONE=1: the experts' sum is added to nothing.
#ifndef MINIOSCAR_ROUTE_CUH
#define MINIOSCAR_ROUTE_CUH
#include "../common.cuh"
#ifndef ALONE
#define ALONE 0
#endif

constexpr int PER_LANE = (EXPERTS + 31) / 32, TAKEN = 1 << 31;  // TAKEN: some keys from it on are of no number
static_assert(TOP_K <= 32 && TOP_K <= EXPERTS, "a lane keeps one choice");

struct Choice { int expert; float weight; };

// Integers in the order of the numbers; 0 and -0 are equal.
DEVICE int ordered(float x) {
  const int bits = __float_as_int(x == x ? x + 0.f : __int_as_float(0xff800000));
  return bits ^ (bits >> 31 & 0x7fffffff);
}

// The logits of the token of this warp and which of them are chosen. Of its experts lane * PER_LANE + i: x[i] and
// rank[i], -1 where it is none of the TOP_K.
struct Ranked {
  float x[PER_LANE];
  int rank[PER_LANE];
};

// Ranks the TOP_K largest keys. ONE_BY_ONE: of equal ones the first; else all of them take a rank together, and the
// result is false. What a step waits for is then short: the maxima of a lane and of the warp, and a comparison.
template <bool ONE_BY_ONE> DEVICE bool rank_keys(Ranked& ranked, const int (&all)[PER_LANE]) {
  constexpr int RANKED = TAKEN + 1;  // + rank: the key of one that is taken
  const int lane = threadIdx.x % 32;
  int keys[PER_LANE], count = 0;
  UNROLL for (int i = 0; i < PER_LANE; i++) keys[i] = all[i];
  UNROLL for (int s = 0; s < TOP_K; s++) {
    int best = keys[0];
    UNROLL for (int i = 1; i < PER_LANE; i++) best = max(best, keys[i]);
    const int top = __reduce_max_sync(FULL_MASK, best);
    const unsigned holders = ONE_BY_ONE ? __ballot_sync(FULL_MASK, best == top) : 0;
    bool open = !ONE_BY_ONE || (best == top && !(holders & ((1u << lane) - 1)));  // the first lane, then its first key
    UNROLL for (int i = 0; i < PER_LANE; i++) {
      const bool own = open && keys[i] == top;
      keys[i] = own ? RANKED + s : keys[i];
      if (ONE_BY_ONE) open = open && !own;
    }
  }
  UNROLL for (int i = 0; i < PER_LANE; i++) {
    const bool taken = keys[i] >= RANKED && keys[i] < RANKED + TOP_K;
    ranked.rank[i] = taken ? keys[i] - RANKED : -1;
    count += taken;
  }
  return __reduce_add_sync(FULL_MASK, count) == TOP_K;
}

DEVICE Ranked rank_logits(const float* logits) {
  Ranked ranked;
  int keys[PER_LANE];
  UNROLL for (int i = 0; i < PER_LANE; i++) {
    const int e = threadIdx.x % 32 * PER_LANE + i;
    ranked.x[i] = e < EXPERTS ? logits[e] : 0.f;
    keys[i] = e < EXPERTS ? ordered(ranked.x[i]) : TAKEN;
  }
  // Where all experts are taken, as many are ranked even if some are equal.
  if (TOP_K == EXPERTS || !rank_keys<false>(ranked, keys)) rank_keys<true>(ranked, keys);
  return ranked;
}

// Lane s gets the choice that comes s-th.
DEVICE Choice choice_of(const Ranked& ranked) {
  const int lane = threadIdx.x % 32;
  unsigned ranks = 0;  // of this lane's experts
  UNROLL for (int i = 0; i < PER_LANE; i++)
    if (ranked.rank[i] >= 0) ranks |= 1u << ranked.rank[i];
  int owner = 0;
  UNROLL for (int s = 0; s < TOP_K; s++) {
    const unsigned holder = __ballot_sync(FULL_MASK, ranks >> s & 1);
    if (s == lane) owner = __ffs(holder) - 1;
  }
  Choice own = {0, 0.f};
  UNROLL for (int i = 0; i < PER_LANE; i++) {
    const int rank = __shfl_sync(FULL_MASK, ranked.rank[i], owner);
    const float x = __shfl_sync(FULL_MASK, ranked.x[i], owner);
    if (rank == lane) own = {owner * PER_LANE + i, x};
  }
  const float largest = __shfl_sync(FULL_MASK, own.weight, 0);
  float all = 0.f;
  UNROLL for (int i = 0; i < PER_LANE; i++)
    all += lane * PER_LANE + i < EXPERTS ? __expf(ranked.x[i] - largest) : 0.f;
  const float p = lane < TOP_K ? __expf(own.weight - largest) : 0.f;
  own.weight = p / warp_sum(NORMALIZED ? p : all);
  return own;
}
#endif
