// experts/quantized.cu: experts.cu for weights in 4 and 8 bits.
//
//   weight[e, n, k] = (code[e, n, k] - zero[e, n, g]) * scale[e, n, g] * row_scale[e, n]        g: the group of k
//
// codes, scales, row_scale: minioscar/quantized, of a matrix [EXPERTS * N][K], N (up: N / 2) a multiple of 16: the
// tiles of an expert stand one after another. All else is experts.cu's; x is multiplied by 2^100 (quantized/codes.cuh).
// Zeros and scales are applied to the sums of groups, row scales to those of warps, in float32; K and TEAM_WARPS decide
// the order of sums.
//
// The time is that of the codes of the experts that are taken, 4.25 or 8.25 bits each (groups of 128), read once for up
// to ENTRY_PAIRS pairs of one. A warp has runs of 64 k of 16 rows (of gate and of up), RUNS of them ahead in registers,
// codes and scales; the warps of a team take a run each in rotation.
//
// grid (blocks), 512 threads, one block a multiprocessor; dynamic shared memory as in experts.cu.
//
// Set by -D: RUNS, GROUP (k whose sum is scaled at once: 32 or 64), KIND, and the macros of items.cuh.
constexpr int WARPS = 16;
#include "items.cuh"
#include "../quantized/codes.cuh"

constexpr int ROUND_RUNS = RUNS * TEAM_WARPS, FOLDS = 64 / GROUP;
// Runs whose x is loaded together: as many as registers allow.
constexpr int AT_ONCE = FEW || COLUMN_TILES > 1 ? 1 : RUNS;

// A run of a lane: of each branch its codes, and the scales of rows 2r and 2r + 1 (e4m3: of the tile, in x).
struct Run {
  uint4 codes[BRANCHES][LOADS];
  uint2 scales[BRANCHES][FOLDS];
};

// The next run that a warp loads.
struct Prefetch {
  const uint4* codes;
  const uint32_t* scales;
  int tiles, K, shift;  // of 16 rows, of a branch of an expert
  uint32_t first[BRANCHES], group[BRANCHES];  // this lane's first vector of a tile; its first scale
  int expert;
  int run, runs;  // runs: 0 where there is no such item

  DEVICE void seek(int new_expert, const Item& item) {
    const int of_tile = (K + 63) / 64, groups = ((K - 1) >> shift) + 1, r = threadIdx.x % 32 / 4;
    expert = new_expert;
    run = threadIdx.x / 32 % TEAM_WARPS;
    runs = item.exists ? of_tile : 0;
    UNROLL for (int t = 0; t < BRANCHES; t++) {
      const uint32_t tile = tile_of(t, item);
      first[t] = tile * of_tile * TILE_VECTORS + threadIdx.x % 32;
      group[t] = HAS_ZERO ? tile * groups * 16 + 2 * r : tile * groups;
    }
  }
  DEVICE uint32_t tile_of(int branch, const Item& item) const {
    return (expert * BRANCHES + branch) * tiles + item.tile;
  }
  DEVICE void load(Run& to, int ahead) const {
    const int own = opaque(run + ahead * TEAM_WARPS);  // else addresses would hold registers
    UNROLL for (int t = 0; t < BRANCHES; t++) {
      UNROLL for (int i = 0; i < LOADS; i++)
        load_once(to.codes[t][i], codes + (first[t] + own * TILE_VECTORS + 32 * i), own < runs);
      UNROLL for (int f = 0; f < FOLDS; f++) {
        const int k = own * 64 + f * GROUP;
        const uint32_t* from = scales + (group[t] + (k >> shift) * (HAS_ZERO ? 16 : 1));
        const bool exists = own < runs && k < K;
        if (HAS_ZERO) load_once(to.scales[t][f], from, exists);
        else load_once(to.scales[t][f].x, from, exists);
      }
    }
  }
};

// y += a run times x. b: a lane's x of the columns of each tile, 2^100 times as large.
DEVICE void multiply(float (&y)[BRANCHES][COLUMN_TILES][4], const Run& run, const uint4 (&b)[COLUMN_TILES][2]) {
  float sum[BRANCHES][COLUMN_TILES][4], x_sum[COLUMN_TILES][4];  // of a group
  UNROLL for (int s = 0; s < 4; s++) {
    const bool begins = s * 16 % GROUP == 0;
    UNROLL for (int n = 0; n < COLUMN_TILES && HAS_ZERO; n++) add_x(x_sum[n], b[n], s, begins);
    UNROLL for (int t = 0; t < BRANCHES; t++) {
      uint32_t a[4];
      operand(a, run.codes[t], s);
      UNROLL for (int n = 0; n < COLUMN_TILES; n++) multiply(sum[t][n], a, b[n], s, begins);
    }
    if ((s + 1) * 16 % GROUP != 0) continue;
    UNROLL for (int t = 0; t < BRANCHES; t++) {
      RowScales of_rows;
      of_rows.set(run.scales[t][s * 16 / GROUP]);
      UNROLL for (int n = 0; n < COLUMN_TILES; n++)
        of_rows.add(y[t][n], sum[t][n], HAS_ZERO ? sums_of_x(x_sum[n]) : make_float2(0.f, 0.f));
    }
  }
}

// ptxas spills some words without it for later cards, and with it for earlier ones.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define BLOCK_BOUNDS THREADS, 1
#else
#define BLOCK_BOUNDS THREADS
#endif

// The arguments are those of experts.cu, with a matrix in codes; shift: a group has 2^shift columns.
extern "C" __global__ void __launch_bounds__(BLOCK_BOUNDS)
    experts(const bf16* x, const bf16* norm, const uint4* codes, const uint32_t* scales, const float* row_scale,
            const bf16* residual, const float* logits, const int* lengths, const int* sorted, const int4* entries,
            const float* weights, Output* out, int tokens, int K, int N, int shift, float eps) {
  extern __shared__ __align__(128) unsigned char smem[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, team = warp / TEAM_WARPS;
  const int rows = N / BRANCHES, stride = (K * 2 + 127) / 128 * 128 + 64;
  float* sum_buffers = (float*)(smem + rows_of_x(tokens) * stride);  // [2][WARPS][BRANCHES][16][ENTRY_PAIRS]
  Rounds rounds(rows / 16);
  Position at = rounds.begin();
#if FEW
  Few& work = *(Few*)(smem + opaque(rows_of_x(tokens) * stride + 8 * ROUND_SUMS));
  work.clear();
  if (SILU) {  // x is older than the launch before, which has the logits
    uint4 first = make_uint4(0, 0, 0, 0);
    load_once(first, norm + 8 * threadIdx.x, threadIdx.x < K / 8);
    norm_x(smem, stride, sum_buffers, x, norm, first, eps, tokens, K, ScaledX());
    wait_then_allow_next();
  }
  const Ranked ranked = work.fill(logits, lengths, tokens);
#else
  if (SILU) wait_then_allow_next();
  const Many work = {sorted, entries, weights};
#endif
  rounds.entries = work.count();
  Prefetch prefetch = {codes, scales, rows / 16, K, shift};
#if FEW
  auto seek = [&](const Position& at) {
    const Item item = rounds.item(at, team);
    prefetch.seek(item.exists ? work.expert(item.entry) : 0, item);
  };
#else
  // A round's entry is asked for two rounds ahead and its pairs one: an item is as short as these trips to L2.
  __shared__ Column columns[2][TEAMS * ENTRY_PAIRS];
  int pairs[COLUMN_TILES];  // of this lane's columns
  int expert = 0, first_pair = 0, num_pairs = 0;
  auto ask_for_entry = [&](const Position& at) {
    const Item item = rounds.item(at, team);
    const int* entry = (const int*)(entries + 1 + item.entry);
    expert = item.exists ? entry[0] : 0;
    first_pair = item.exists ? entry[1] : 0;
    num_pairs = item.exists ? entry[2] : 0;
  };
  ask_for_entry(at);
  auto seek = [&](const Position& at) {
    prefetch.seek(expert, rounds.item(at, team));
    UNROLL for (int n = 0; n < COLUMN_TILES; n++)
      pairs[n] = 8 * n + r < num_pairs ? sorted[first_pair + 8 * n + r] : -1;
    ask_for_entry(rounds.next(at));
  };
#endif
  seek(at);
  Run loaded[RUNS] = {};
  UNROLL for (int a = 0; a < RUNS; a++) prefetch.load(loaded[a], a);
  if (!SILU) wait_then_allow_next();
#if FEW
  if (SILU) work.weigh(ranked, tokens);
  if (!SILU) stage_x(smem, stride, x, work.in_use, rows_of_x(tokens), K, ScaledX());
#endif
  OwnSum own_sum;
  for (bool odd = false; rounds.exists(at); odd = !odd) {
    // Two buffers: a round's sums are read while the next ones are written; a barrier comes before the ones after that.
    float* sums = sum_buffers + odd * ROUND_SUMS;
    const Item item = rounds.item(at, team);
    own_sum.begin(at, residual, tokens, rows);
    uint32_t own[COLUMN_TILES];  // where the x of this lane's columns begins
    bool has_x[COLUMN_TILES];
    UNROLL for (int n = 0; n < COLUMN_TILES; n++) {
#if FEW
      const int pair = item.exists ? work.pair(item.entry, 8 * n + r) : -1;
#else
      const int pair = pairs[n];
      if (warp % TEAM_WARPS == 0 && c == 0)
        columns[odd][team * ENTRY_PAIRS + 8 * n + r] = {pair, SILU && pair >= 0 ? weights[pair] : 1.f};
#endif
      const int from = SILU ? pair / TOP_K : pair;
      has_x[n] = pair >= 0;
      own[n] = (uint32_t)max(from, 0) * (FEW ? stride : K * 2);
    }
    float y[BRANCHES][COLUMN_TILES][4];
    // float32, of rows 2r and 2r + 1; asked for at once where registers allow.
    uint2 row_scales[BRANCHES];
    uint32_t first_row[BRANCHES];
    UNROLL for (int t = 0; t < BRANCHES; t++) {
      clear(y[t]);
      row_scales[t] = make_uint2(0, 0);
      first_row[t] = prefetch.tile_of(t, item) * 16 + 2 * r;
      if (COLUMN_TILES == 1) load_once(row_scales[t], row_scale + first_row[t], item.exists);
    }
    for (int first = 0; first * 64 < K; first += ROUND_RUNS) {
      prefetch.run += ROUND_RUNS;
      if ((first + ROUND_RUNS) * 64 >= K) seek(rounds.next(at));
      UNROLL for (int ahead = 0; ahead < RUNS; ahead += AT_ONCE) {
        uint4 b[AT_ONCE][COLUMN_TILES][2];
        UNROLL for (int a = 0; a < AT_ONCE; a++)
          UNROLL for (int n = 0; n < COLUMN_TILES; n++)
            UNROLL for (int half = 0; half < 2; half++) {
              const int k = (first + (ahead + a) * TEAM_WARPS + warp % TEAM_WARPS) * 64 + half * 32 + 8 * c;
              const unsigned char* all_x = FEW ? smem : (const unsigned char*)x;
              b[a][n][half] = has_x[n] && k < K ? *(const uint4*)(all_x + (own[n] + 2 * k)) : make_uint4(0, 0, 0, 0);
            }
        UNROLL for (int a = 0; a < AT_ONCE; a++) {
          UNROLL for (int n = 0; n < COLUMN_TILES && !FEW; n++)
            UNROLL for (int half = 0; half < 2; half++) b[a][n][half] = ScaledX()(b[a][n][half]);
          multiply(y, loaded[ahead + a], b[a]);
          prefetch.load(loaded[ahead + a], ahead + a);
        }
      }
    }
    UNROLL for (int t = 0; t < BRANCHES; t++)
      if (COLUMN_TILES > 1) load_once(row_scales[t], row_scale + first_row[t], item.exists);
    UNROLL for (int t = 0; t < BRANCHES; t++)
      UNROLL for (int n = 0; n < COLUMN_TILES; n++)
        UNROLL for (int i = 0; i < 2; i++) {
          const float scale = __uint_as_float(i ? row_scales[t].y : row_scales[t].x);
          float* two = sums + ((warp * BRANCHES + t) * 16 + 2 * r + i) * ENTRY_PAIRS + 8 * n + 2 * c;
          const float(&of)[4] = y[t][n];
          *(float2*)two = make_float2(to_result(of[2 * i], i) * scale, to_result(of[2 * i + 1], i) * scale);
        }
    __syncthreads();
    auto column_of = [&](const Item& of, int own_team, int column) {
#if FEW
      return find_column(work, of, column);
#else
      return columns[odd][own_team * ENTRY_PAIRS + column];
#endif
    };
    finish_round(sums, column_of, rounds, at, out, tokens, rows, own_sum);
    at = rounds.next(at);
  }
}
