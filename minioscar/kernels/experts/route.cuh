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

constexpr int PER_LANE = (EXPERTS + 31) / 32, TAKEN = 1 << 31;  // TAKEN: below the key of every number
static_assert(TOP_K <= 32 && TOP_K <= EXPERTS, "a lane keeps one choice");

struct Choice { int expert; float weight; };

// Integers in the order of the numbers; 0 and -0 are equal.
DEVICE int ordered(float x) {
  const int bits = __float_as_int(x == x ? x + 0.f : __int_as_float(0xff800000));
  return bits ^ (bits >> 31 & 0x7fffffff);
}

// Of the token of this warp: lane s gets the choice that comes s-th.
DEVICE Choice choose(const float* logits) {
  const int lane = threadIdx.x % 32;
  float x[PER_LANE], largest = 0.f, all = 0.f;
  int keys[PER_LANE];
  UNROLL for (int i = 0; i < PER_LANE; i++) {
    const int e = lane * PER_LANE + i;
    x[i] = e < EXPERTS ? logits[e] : 0.f;
    keys[i] = e < EXPERTS ? ordered(x[i]) : TAKEN;
  }
  Choice own = {0, 0.f};
  for (int s = 0; s < TOP_K; s++) {
    int best = keys[0];
    UNROLL for (int i = 1; i < PER_LANE; i++) best = max(best, keys[i]);
    const int top = __reduce_max_sync(FULL_MASK, best), owner = __ffs(__ballot_sync(FULL_MASK, best == top)) - 1;
    Choice found = {0, 0.f};
    bool open = lane == owner;
    UNROLL for (int i = 0; i < PER_LANE; i++)
      if (open && keys[i] == top) {
        found = {lane * PER_LANE + i, x[i]};
        keys[i] = TAKEN;
        open = false;
      }
    found = {__shfl_sync(FULL_MASK, found.expert, owner), __shfl_sync(FULL_MASK, found.weight, owner)};
    if (s == 0) largest = found.weight;
    if (s == lane) own = found;
  }
  UNROLL for (int i = 0; i < PER_LANE; i++) all += lane * PER_LANE + i < EXPERTS ? __expf(x[i] - largest) : 0.f;
  const float p = lane < TOP_K ? __expf(own.weight - largest) : 0.f;
  own.weight = p / warp_sum(NORMALIZED ? p : all);
  return own;
}
#endif
