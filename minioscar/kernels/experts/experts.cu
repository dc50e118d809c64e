// experts/experts.cu: the two products of a layer of experts, for the pairs of a token and an expert that it takes.
//
//   SILU=1, up:    h[p, n] = weight_p * silu(sum_k x'[t, k] gate[e, n, k]) * sum_k x'[t, k] up[e, n, k]
//   SILU=0, down:  out[p, n] = sum_k h[p, k] down[e, n, k]; of few tokens (FEW) at once
//                  out[t, n] = x[t, n] + sum_p sum_k h[p, k] down[e, n, k], e ascending over the pairs p of t
//
// p = t * TOP_K + s is the s-th choice of token t, expert e. x' bf16 [tokens][K] (FEW, up: rms_norm(x), normed here),
// weight bf16 [EXPERTS][N][K] (up: gate rows, then up rows), h bf16 [pairs][N / 2]. Float32 inside, rounded once; K
// and TEAM_WARPS alone decide the order of a pair's sums, so a token's neighbours do not change its bits.
//
// The time is that of the weights of the experts that are taken, 2 B each, read once for up to ENTRY_PAIRS pairs of
// one. As in linear.cu they are operand A of mma.m16n8k16 as they are in memory, loaded RUNS runs of 32 k ahead into
// registers across the ends of items; an item is 16 outputs of the pairs of one expert. A block computes TEAMS items
// at a time, TEAM_WARPS warps each, which split k, two runs (a line of 128 B a row) each in rotation; the warps' sums
// meet in shared memory.
// FEW (up to 8 tokens, the columns of an MMA): each block finds the tokens' experts itself from the router's logits
// (route.cuh), none for a row that is not in use (lengths[m] < 0; lengths may be null); a column is a token. Else
// route.cu has made a list of entries; a column is a pair.
// up waits for what chooses the experts and only then asks for weights; down asks before its wait.
//
// grid (blocks), 512 threads, one block a multiprocessor; dynamic shared memory: FEW: the rows of x, 64 B past a line
// apart; then two rounds' sums; FEW: a `Few`.
//
// Set by -D: FEW, TEAM_WARPS, RUNS (even), COLUMN_TILES (FEW: 1), and the macros of route.cuh and linear.cuh.
constexpr int WARPS = 16;
#include "items.cuh"

constexpr int ROUND_K = RUNS * TEAM_WARPS * 32;  // the k of RUNS runs of a team
// Runs whose x is loaded together: as many as registers allow.
constexpr int AT_ONCE = COLUMN_TILES > 1 ? 2 / BRANCHES : SILU ? 2 : RUNS % 4 == 0 ? 4 : RUNS;
static_assert(RUNS % 2 == 0, "two runs are a line");
DEVICE constexpr int offset(int run) { return run / 2 * TEAM_WARPS * 64 + run % 2 * 32; }

// The next weights that a lane loads: rows r and r + 8 of 16 of each branch. Rows past the end repeat the last row;
// their results are discarded.
struct Prefetch {
  const bf16* from[BRANCHES][2];
  int k, k_end;  // k_end: 0 where there is no such item

  DEVICE void seek(const bf16* weight, int expert, const Item& item, int rows, int K, int lane_k) {
    k = lane_k;
    k_end = item.exists ? K : 0;
    const int row = item.tile * 16 + threadIdx.x % 32 / 4;
    UNROLL for (int t = 0; t < BRANCHES; t++)
      UNROLL for (int i = 0; i < 2; i++)
        from[t][i] = weight + ((size_t)expert * BRANCHES * rows + t * rows + min(row + 8 * i, rows - 1)) * K;
  }
  DEVICE void load(uint4 (&w)[BRANCHES][2], int run) const {
    UNROLL for (int t = 0; t < BRANCHES; t++)
      UNROLL for (int i = 0; i < 2; i++) load_once(w[t][i], from[t][i] + k + offset(run), k + offset(run) < k_end);
  }
};

// up: x, h; down: h, out, and the x that is added. FEW: logits and lengths; else what is in Many.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    experts(const bf16* x, const bf16* norm, const bf16* weight, const bf16* residual, const float* logits,
            const int* lengths, const int* sorted, const int4* entries, const float* weights, Output* out,
            int tokens, int K, int N,
            float eps) {
  extern __shared__ __align__(128) unsigned char smem[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, team = warp / TEAM_WARPS;
  const int rows = N / BRANCHES, lane_k = warp % TEAM_WARPS * 64 + 8 * c, stride = (K * 2 + 127) / 128 * 128 + 64;
  float* sum_buffers = (float*)(smem + rows_of_x(tokens) * stride);  // [2][WARPS][BRANCHES][16][ENTRY_PAIRS]
  Rounds rounds((rows + 15) / 16);
  Position at = rounds.begin();
#if FEW
  Few& work = *(Few*)(sum_buffers + 2 * ROUND_SUMS);
  work.clear();
  if (SILU) {  // x is older than the launch before, which has the logits
    uint4 first = make_uint4(0, 0, 0, 0);
    load_once(first, norm + 8 * threadIdx.x, threadIdx.x < K / 8);
    norm_x(smem, stride, sum_buffers, x, norm, first, eps, tokens, K);
    wait_then_allow_next();
  }
  const Ranked ranked = work.fill(logits, lengths, tokens);
#else
  if (SILU) wait_then_allow_next();
  const Many work = {sorted, entries, weights};
#endif
  rounds.entries = work.count();
  Prefetch prefetch;
  auto seek = [&](const Position& at) {
    const Item item = rounds.item(at, team);
    prefetch.seek(weight, item.exists ? work.expert(item.entry) : 0, item, rows, K, lane_k);
  };
  uint4 w[RUNS][BRANCHES][2];
  seek(at);
  UNROLL for (int a = 0; a < RUNS; a++) {
    UNROLL for (int t = 0; t < BRANCHES; t++) w[a][t][0] = w[a][t][1] = make_uint4(0, 0, 0, 0);
    prefetch.load(w[a], a);
  }
  if (!SILU) wait_then_allow_next();
#if FEW
  if (SILU) work.weigh(ranked, tokens);
  if (!SILU) stage_x(smem, stride, x, work.in_use, rows_of_x(tokens), K);
#endif
  OwnSum own_sum;
  for (bool odd = false; rounds.exists(at); odd = !odd) {
    // Two buffers: a round's sums are read while the next ones are written; a barrier comes before the ones after that.
    float* sums = sum_buffers + odd * ROUND_SUMS;
    const Item item = rounds.item(at, team);
    own_sum.begin(at, residual, tokens, rows);
    const unsigned char* own[COLUMN_TILES];  // the x of this lane's columns
    bool has_x[COLUMN_TILES];
    UNROLL for (int n = 0; n < COLUMN_TILES; n++) {
      const int pair = item.exists ? work.pair(item.entry, 8 * n + r) : -1, from = SILU ? pair / TOP_K : pair;
      has_x[n] = pair >= 0;
      own[n] = FEW ? smem + max(from, 0) * stride : (const unsigned char*)(x + (size_t)max(from, 0) * K);
    }
    float y[BRANCHES][COLUMN_TILES][4];
    UNROLL for (int t = 0; t < BRANCHES; t++) clear(y[t]);
    for (int first = 0; first < K; first += ROUND_K) {
      prefetch.k += ROUND_K;
      if (first + ROUND_K >= K) seek(rounds.next(at));
      UNROLL for (int run = 0; run < RUNS; run += AT_ONCE) {
        uint4 b[AT_ONCE][COLUMN_TILES];
        UNROLL for (int a = 0; a < AT_ONCE; a++)
          UNROLL for (int n = 0; n < COLUMN_TILES; n++) {
            const int k = first + lane_k + offset(run + a);
            b[a][n] = has_x[n] && k < K ? *(const uint4*)(own[n] + 2 * k) : make_uint4(0, 0, 0, 0);
          }
        UNROLL for (int a = 0; a < AT_ONCE; a++) {
          uint4(&used)[BRANCHES][2] = w[run + a];
          UNROLL for (int t = 0; t < BRANCHES; t++) {
            const Operands rows16(used[t][0], used[t][1], first + lane_k + offset(run + a) < K);
            UNROLL for (int n = 0; n < COLUMN_TILES; n++) rows16.multiply(y[t][n], b[a][n]);
          }
          prefetch.load(used, run + a);
        }
      }
    }
    UNROLL for (int t = 0; t < BRANCHES; t++)
      UNROLL for (int n = 0; n < COLUMN_TILES; n++)
        UNROLL for (int j = 0; j < 2; j++) {
          const int of = (warp * BRANCHES + t) * 16 + r + 8 * j;
          *(float2*)(sums + of * ENTRY_PAIRS + 8 * n + 2 * c) = make_float2(y[t][n][2 * j], y[t][n][2 * j + 1]);
        }
    __syncthreads();
    auto column_of = [&](const Item& of, int, int column) { return find_column(work, of, column); };
    finish_round(sums, column_of, rounds, at, out, tokens, rows, own_sum);
    at = rounds.next(at);
  }
}
