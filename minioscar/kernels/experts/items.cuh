// experts/items.cuh: what the products of experts in BF16 (experts.cu) and in codes (quantized.cu) share: which pairs
// take which expert, which items a block computes, and its outputs from the sums of the warps that split k.
//
// An item is 16 outputs (of gate and of up) of the pairs of one expert. A block computes TEAMS items at a time,
// TEAM_WARPS warps each. FEW (up to 8 tokens, the columns of an MMA): each block finds the tokens' experts itself from
// the router's logits (route.cuh), none for a row that is not in use (lengths[m] < 0; lengths may be null); a column is
// a token. Else route.cu has made a list of entries; a column is a pair.
//
// Set by -D: FEW, TEAM_WARPS, COLUMN_TILES (FEW: 1), and the macros of route.cuh and linear.cuh; WARPS is 16.
#ifndef MINIOSCAR_EXPERT_ITEMS_CUH
#define MINIOSCAR_EXPERT_ITEMS_CUH
#include "../linear_vector.cuh"
#include "route.cuh"

constexpr int ENTRY_PAIRS = COLUMNS * COLUMN_TILES, TEAMS = WARPS / TEAM_WARPS;
constexpr int ROUND_SUMS = WARPS * BRANCHES * 16 * ENTRY_PAIRS;
constexpr bool SUMMED = FEW && !SILU;  // a block adds the pairs of a token
static_assert(EXPERTS <= THREADS, "a thread looks after an expert");

// The choices of up to 8 tokens.
struct Few {
  signed char slots[EXPERTS][8];  // token m has expert e as its slots[e][m]-th choice; -1: it has not
  int experts[EXPERTS];           // that are taken, ascending
  float weights[8 * TOP_K];
  int warp_counts[WARPS], entries;

  DEVICE void clear() {
    for (int i = threadIdx.x; i < EXPERTS * 2; i += THREADS) ((int*)slots)[i] = -1;
    __syncthreads();
  }
  DEVICE void fill(const float* logits, const int* lengths, int tokens) {
    const int e = threadIdx.x, warp = e / 32, lane = e % 32;
    if (warp < tokens && !(lengths && lengths[warp] < 0)) {
      const Choice own = choose(logits + warp * EXPERTS);
      if (lane < TOP_K) {
        slots[own.expert][warp] = lane;
        weights[warp * TOP_K + lane] = own.weight;
      }
    }
    __syncthreads();
    const int2 both = e < EXPERTS ? *(const int2*)slots[e] : make_int2(-1, -1);
    const bool taken = (both.x & both.y) != -1;
    const unsigned of_warp = __ballot_sync(FULL_MASK, taken);
    if (lane == 0) warp_counts[warp] = __popc(of_warp);
    __syncthreads();
    int before = __popc(of_warp & ((1u << lane) - 1));
    for (int w = 0; w < warp; w++) before += warp_counts[w];
    if (taken) experts[before] = e;
    if (e == THREADS - 1) entries = before + taken;
    __syncthreads();
  }
  DEVICE int count() const { return entries; }
  DEVICE int expert(int entry) const { return experts[entry]; }
  DEVICE int pair(int entry, int column) const {  // -1: there is none
    const int slot = slots[experts[entry]][column];
    return slot < 0 ? -1 : column * TOP_K + slot;
  }
};

// What route.cu has made.
struct Many {
  const int* sorted;
  const int4* entries;
  const float* weights;

  DEVICE int count() const { return entries[0].x; }
  DEVICE int expert(int entry) const { return entries[1 + entry].x; }
  DEVICE int pair(int entry, int column) const {
    const int4 own = entries[1 + entry];
    return column < own.z ? sorted[own.y + column] : -1;
  }
};

struct Item { int entry, tile; bool exists; };

// Which items a block computes, round after round. SUMMED: all entries of a tile of outputs, then of the next one; else
// the items of all blocks stand side by side, so that those of one expert are computed at about the same time.
struct Rounds {
  int entries, tiles;

  DEVICE int of_tile() const { return max((entries + TEAMS - 1) / TEAMS, 1); }
  DEVICE int count() const {
    if (SUMMED) return (tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x * of_tile();
    const int all = (entries * tiles + TEAMS - 1) / TEAMS;
    return (all - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
  }
  DEVICE Item at(int round, int team) const {
    if (SUMMED) {
      const int entry = round % of_tile() * TEAMS + team, tile = blockIdx.x + round / of_tile() * gridDim.x;
      return {entry, tile, entry < entries && tile < tiles};
    }
    const int item = (round * gridDim.x + blockIdx.x) * TEAMS + team;
    return {item / tiles, item % tiles, item < entries * tiles};
  }
};

// The outputs of a round, from the sums of its warps [WARPS][BRANCHES][16][ENTRY_PAIRS]. total: SUMMED, of the output
// that this thread finishes, over the rounds of a tile; added to the residual then.
template <class Work>
DEVICE void finish_round(const float* sums, const Work& work, const Rounds& rounds, int round, const bf16* residual,
                         Output* out, int tokens, int rows, float& total) {
  if (SUMMED) {
    const int m = threadIdx.x / 16, n = rounds.at(round, 0).tile * 16 + threadIdx.x % 16;
    if (m >= tokens || n >= rows) return;
    // A token that does not take an expert gets zeros from it.
    for (int v = 0; v < WARPS; v++) total += sums[(v * 16 + threadIdx.x % 16) * ENTRY_PAIRS + m];
    if ((round + 1) % rounds.of_tile()) return;
    out[(size_t)m * rows + n] = to_output(total + to_float(residual[(size_t)m * rows + n]));
    total = 0.f;
    return;
  }
  for (int o = threadIdx.x; o < TEAMS * 16 * ENTRY_PAIRS; o += THREADS) {
    const int i = o % 16, column = o / 16 % ENTRY_PAIRS, of = o / (16 * ENTRY_PAIRS);
    const Item finished = rounds.at(round, of);
    const int n = finished.tile * 16 + i, pair = finished.exists ? work.pair(finished.entry, column) : -1;
    if (pair < 0 || n >= rows) continue;
    float z[BRANCHES];
    UNROLL for (int t = 0; t < BRANCHES; t++) {
      z[t] = 0.f;
      for (int v = of * TEAM_WARPS; v < (of + 1) * TEAM_WARPS; v++)
        z[t] += sums[((v * BRANCHES + t) * 16 + i) * ENTRY_PAIRS + column];
    }
    out[(size_t)pair * rows + n] = to_output(SILU ? activated(z) * work.weights[pair] : z[0]);
  }
}
#endif
