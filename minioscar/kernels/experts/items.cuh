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
  int entries;
  bool in_use[8];  // the row of a token

  DEVICE void clear() {
    UNROLL for (int first = 0; first < EXPERTS * 2; first += THREADS)
      if (first + threadIdx.x < EXPERTS * 2) ((int*)slots)[first + threadIdx.x] = -1;
    __syncthreads();
  }
  // Every block waits for this before it can ask for a weight. The last warps choose, the first ones make the list.
  DEVICE Ranked fill(const float* logits, const int* lengths, int tokens) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, token = WARPS - 1 - warp;
    bool chooses = token < tokens;
    Ranked ranked = {};
    if (chooses) {  // length and logits are one trip to L2
      const int length = lengths ? lengths[token] : 0;
      ranked = rank_logits(logits + token * EXPERTS);
      chooses = length >= 0;
      UNROLL for (int i = 0; i < PER_LANE; i++)
        if (chooses && ranked.rank[i] >= 0) slots[lane * PER_LANE + i][token] = ranked.rank[i];
      if (tokens == 1) list(ranked, chooses);
    }
    if (token < 8 && lane == 0) in_use[token] = chooses;
    __syncthreads();
    if (tokens == 1) return ranked;
    if (warp <= (EXPERTS - 1) / 32) {  // experts below, counted by each warp for itself
      int before = 0;
      bool taken = false;
      UNROLL for (int w = 0; w <= (EXPERTS - 1) / 32; w++) {  // the loads are under way together
        const int e = 32 * w + lane;
        const int2 both = e < EXPERTS ? *(const int2*)slots[e] : make_int2(-1, -1);
        const unsigned of_warp = __ballot_sync(FULL_MASK, (both.x & both.y) != -1);
        if (w < warp) before += __popc(of_warp);
        if (w != warp) continue;
        before += __popc(of_warp & ((1u << lane) - 1));
        taken = of_warp >> lane & 1;
      }
      if (taken) experts[before] = threadIdx.x;
      if (threadIdx.x == (EXPERTS - 1) / 32 * 32 + 31) entries = before + taken;
    }
    __syncthreads();
    return ranked;
  }
  // The experts of a single token, by its warp: a barrier less.
  DEVICE void list(const Ranked& ranked, bool chooses) {
    const int lane = threadIdx.x % 32;
    int before = 0;
    UNROLL for (int i = 0; i < PER_LANE; i++)
      before += __popc(__ballot_sync(FULL_MASK, ranked.rank[i] >= 0) & ((1u << lane) - 1));
    UNROLL for (int i = 0; i < PER_LANE; i++)
      if (chooses && ranked.rank[i] >= 0) experts[before++] = lane * PER_LANE + i;
    if (lane == 0) entries = chooses ? TOP_K : 0;
  }
  // Weights of pairs, which are needed later: visible from the next barrier on.
  DEVICE void weigh(const Ranked& ranked, int tokens) {
    const int lane = threadIdx.x % 32, token = WARPS - 1 - (int)threadIdx.x / 32;
    if (token >= tokens) return;
    const Choice own = choice_of(ranked);
    if (lane < TOP_K) weights[token * TOP_K + lane] = own.weight;
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
// Where a block is in its items: the first of a round.
struct Position { int entry, tile; };

// Which items a block computes, round after round. SUMMED: all entries of a tile of outputs, then of the next one; else
// the items of all blocks stand side by side, so that those of one expert are computed at about the same time. No
// division is left for the time after the wait.
struct Rounds {
  int tiles, entries, step_entries, step_tiles;  // entries: set when they are known; steps: from round to round

  DEVICE explicit Rounds(int tiles) : tiles(tiles), entries(0) {
    step_entries = SUMMED ? TEAMS : opaque(gridDim.x * TEAMS / tiles);
    step_tiles = SUMMED ? 0 : gridDim.x * TEAMS - step_entries * tiles;
  }
  DEVICE Position begin() const {
    if (SUMMED) return {0, (int)blockIdx.x};
    const int entry = opaque(blockIdx.x * TEAMS / tiles);
    return {entry, (int)blockIdx.x * TEAMS - entry * tiles};
  }
  DEVICE bool ends_tile(const Position& at) const { return at.entry + TEAMS >= entries; }  // SUMMED
  DEVICE Position next(const Position& at) const {
    if (SUMMED && ends_tile(at)) return {0, at.tile + (int)gridDim.x};
    const Position to = {at.entry + step_entries, at.tile + step_tiles};
    return SUMMED || to.tile < tiles ? to : Position{to.entry + 1, to.tile - tiles};
  }
  DEVICE bool exists(const Position& at) const { return SUMMED ? at.tile < tiles : at.entry < entries; }
  DEVICE Item item(const Position& at, int team) const {
    int entry = at.entry, tile = at.tile;
    if (SUMMED) entry += team; else tile += team;
    if (!SUMMED && TEAMS > 1)
      for (; tile >= tiles; tile -= tiles) entry++;
    return {entry, tile, entry < entries && tile < tiles};
  }
};

// FEW: the x that columns read in shared memory, rows `stride` bytes apart: up has the tokens', down the pairs'.
DEVICE int rows_of_x(int tokens) { return !FEW ? 0 : SILU ? tokens : tokens * TOP_K; }
// down, after its wait, by all threads: one trip to L2 for all rounds.
template <class Then = Unchanged>
DEVICE void stage_x(unsigned char* to, int stride, const bf16* x, const bool* in_use, int pairs, int K,
                    Then then = Then()) {
  const int vectors = K / 8;
  for (int half = threadIdx.x / 32; half < 2 * pairs; half += WARPS) {  // two warps a pair
    const int pair = half / 2;
    if (!in_use[pair / TOP_K]) continue;
#pragma unroll 2
    for (int i = half % 2 * 32 + threadIdx.x % 32; i < vectors; i += 64)
      *(uint4*)(to + pair * stride + 16 * i) = then(((const uint4*)x)[pair * vectors + i]);
  }
  __syncthreads();
}

struct Column { int pair; float weight; };  // pair: -1: there is none

// The column of an item that has to be looked for.
template <class Work> DEVICE Column find_column(const Work& work, const Item& item, int column) {
  const int pair = item.exists ? work.pair(item.entry, column) : -1;
  return {pair, SILU && pair >= 0 ? work.weights[pair] : 1.f};
}

// SUMMED: of an output that this thread finishes, over the rounds of a tile, and the number that it is added to, which
// is loaded before the products.
struct OwnSum {
  float sum;
  bf16 residual;

  DEVICE void begin(const Position& at, const bf16* all, int tokens, int rows) {
    if (!SUMMED || at.entry) return;
    const int m = threadIdx.x / 16, n = at.tile * 16 + threadIdx.x % 16;
    const bf16 zero = 0;
    sum = 0.f;
    residual = !ALONE && m < tokens && n < rows ? all[(size_t)m * rows + n] : zero;
  }
};

// The outputs of a round, from the sums of its warps [WARPS][BRANCHES][16][ENTRY_PAIRS]. column_of(item, team,
// column).
template <class ColumnOf>
DEVICE void finish_round(const float* sums, const ColumnOf& column_of, const Rounds& rounds, const Position& at,
                         Output* out, int tokens, int rows, OwnSum& own) {
  if (SUMMED) {
    const int m = threadIdx.x / 16, n = at.tile * 16 + threadIdx.x % 16;
    if (m >= tokens || n >= rows) return;
    // A token that does not take an expert gets zeros from it.
    for (int v = 0; v < WARPS; v++) own.sum += sums[(v * 16 + threadIdx.x % 16) * ENTRY_PAIRS + m];
    if (rounds.ends_tile(at)) out[(size_t)m * rows + n] = to_output(own.sum + to_float(own.residual));
    return;
  }
  for (int o = threadIdx.x; o < TEAMS * 16 * ENTRY_PAIRS; o += THREADS) {
    const int i = o % 16, column = o / 16 % ENTRY_PAIRS, of = o / (16 * ENTRY_PAIRS);
    const Item finished = rounds.item(at, of);
    const Column own = column_of(finished, of, column);
    const int n = finished.tile * 16 + i;
    if (own.pair < 0 || n >= rows) continue;
    float z[BRANCHES];
    UNROLL for (int t = 0; t < BRANCHES; t++) {
      z[t] = 0.f;
      for (int v = of * TEAM_WARPS; v < (of + 1) * TEAM_WARPS; v++)
        z[t] += sums[((v * BRANCHES + t) * 16 + i) * ENTRY_PAIRS + column];
    }
    out[(size_t)own.pair * rows + n] = to_output(SILU ? activated(z) * own.weight : z[0]);
  }
}
#endif
