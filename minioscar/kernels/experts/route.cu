// experts/route.cu: what stands around the experts' products of more than 8 tokens.
//
// choose: experts and weights of every token (route.cuh). logits float32 [tokens][EXPERTS]; chosen int, weights float32
//   [pairs]; pair t * TOP_K + s is the s-th choice of token t, -1 where the row is not in use (lengths[t] < 0;
//   lengths may be null). grid (ceil(tokens / 8)), 256 threads.
// sort: the pairs by expert (a counting sort), and the list of what the products have to do: entry i says that `count`
//   pairs, sorted[first] ..., at most `columns`, take one expert. sorted int [pairs]; entries int4: the number of
//   entries in [0].x, then (expert, first, count, 0), at most EXPERTS + pairs / columns. Pairs of one expert stand in
//   any order: every result is of one pair alone; -1 behind the last. grid (1), 512 threads.
// gather: to[i] = x[sorted[i] / TOP_K], the tokens in the order of the pairs. x bf16 [tokens][K], to bf16 [pairs][K];
//   where there is no pair, 0, and in h [pairs][N], too: sm90/experts.cu reads past the last. K, N multiples of 8.
//   grid (pairs), 128 threads.
// combine: y[t] = x[t] + sum_s parts[t * TOP_K + s], s ascending, float32, rounded once. x, y bf16 [tokens][N] (the
//   same array or two), parts float32 [pairs][N], N a multiple of 8. Rows that are not in use are left as they are.
//   grid (tokens, ceil(N / 2048)), 256 threads.
//
// reads and writes a few bytes a pair, combine 4 B a number of parts: at 48 tokens all three are latency.
#include "route.cuh"

extern "C" __global__ void __launch_bounds__(256)
    choose(const float* logits, const int* lengths, int* chosen, float* weights, int tokens) {
  wait_then_allow_next();
  const int token = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (token >= tokens) return;
  const Choice own = choice_of(rank_logits(logits + (size_t)token * EXPERTS));
  if (lane >= TOP_K) return;
  chosen[token * TOP_K + lane] = lengths && lengths[token] < 0 ? -1 : own.expert;
  weights[token * TOP_K + lane] = own.weight;
}

extern "C" __global__ void __launch_bounds__(512, 1)
    sort(const int* chosen, int* sorted, int4* entries, int pairs, int columns) {
  __shared__ int next[EXPERTS], warp_pairs[16], warp_entries[16];
  const int e = threadIdx.x, warp = e / 32, lane = e % 32;
  if (e < EXPERTS) next[e] = 0;
  wait_then_allow_next();
  __syncthreads();
#pragma unroll 4
  for (int p = e; p < pairs; p += 512)
    if (const int taken = chosen[p]; taken >= 0) atomicAdd(&next[taken], 1);
  __syncthreads();
  // Sums over the experts before this thread's.
  const int count = e < EXPERTS ? next[e] : 0, own_entries = (count + columns - 1) / columns;
  int first = count, entry = own_entries;
  UNROLL for (int below = 1; below < 32; below *= 2) {
    const int other = __shfl_up_sync(FULL_MASK, first, below), other_entry = __shfl_up_sync(FULL_MASK, entry, below);
    if (lane >= below) {
      first += other;
      entry += other_entry;
    }
  }
  if (lane == 31) {
    warp_pairs[warp] = first;
    warp_entries[warp] = entry;
  }
  __syncthreads();
  first -= count;
  entry -= own_entries;
  for (int w = 0; w < warp; w++) {
    first += warp_pairs[w];
    entry += warp_entries[w];
  }
  if (e < EXPERTS) next[e] = first;
  for (int i = 0; i < own_entries; i++)
    entries[1 + entry + i] = make_int4(e, first + i * columns, min(columns, count - i * columns), 0);
  if (e == 511) {
    entries[0] = make_int4(entry + own_entries, 0, 0, 0);
    for (int p = first + count; p < pairs; p++) sorted[p] = -1;
  }
  __syncthreads();
#pragma unroll 4
  for (int p = e; p < pairs; p += 512)
    if (const int taken = chosen[p]; taken >= 0) sorted[atomicAdd(&next[taken], 1)] = p;
}

extern "C" __global__ void __launch_bounds__(128)
    gather(const bf16* x, const int* sorted, bf16* to, bf16* h, int K, int N) {
  wait_then_allow_next();
  const int pair = sorted[blockIdx.x];
  uint4 *row = (uint4*)(to + (size_t)blockIdx.x * K), *h_row = (uint4*)(h + (size_t)blockIdx.x * N);
  const uint4 *from = (const uint4*)(x + (size_t)(max(pair, 0) / TOP_K) * K), zeros = make_uint4(0, 0, 0, 0);
  for (int i = threadIdx.x; i < K / 8; i += 128) row[i] = pair < 0 ? zeros : from[i];
  for (int i = threadIdx.x; i < N / 8 && pair < 0; i += 128) h_row[i] = zeros;
}

extern "C" __global__ void __launch_bounds__(256)
    combine(const float* parts, const int* lengths, const bf16* x, bf16* y, int N) {
  const int token = blockIdx.x, n = (blockIdx.y * 256 + threadIdx.x) * 8;
  wait_then_allow_next();
  if (n >= N || (lengths && lengths[token] < 0)) return;
  const uint4 old = ALONE ? make_uint4(0, 0, 0, 0) : *(const uint4*)(x + (size_t)token * N + n);
  float sums[2][4] = {{low(old.x), high(old.x), low(old.y), high(old.y)},
                      {low(old.z), high(old.z), low(old.w), high(old.w)}};
  UNROLL for (int s = 0; s < TOP_K; s++)
    UNROLL for (int half = 0; half < 2; half++)
      accumulate(sums[half], *(const float4*)(parts + ((size_t)token * TOP_K + s) * N + n + 4 * half));
  *(uint4*)(y + (size_t)token * N + n) =
      make_uint4(pack_bf16x2(sums[0][0], sums[0][1]), pack_bf16x2(sums[0][2], sums[0][3]),
                 pack_bf16x2(sums[1][0], sums[1][1]), pack_bf16x2(sums[1][2], sums[1][3]));
}
