// linear_batch_sm90.cu: what linear_batch.cu computes, from the same arguments, with the warpgroup instructions of compute capability 9.0.
//
// These multiply from shared memory, beside the threads: what is left to do for a multiprocessor is to ask for bytes early enough. One warpgroup
// copies, as far ahead as there is room, the other one multiplies, and copies go on while it merges or stores. Rows of a weight are rows of the
// product, so that up to 128 tokens need one pass: m64 . n16 ... n128, ROW_TILES of them one below the other.
//
// A stage holds 64 k of ROWS = 64 ROW_TILES rows, then of the columns, lines of 128 bytes as wgmma_operand wants them. x comes from L2 anew for
// every block of rows: COLUMNS / ROWS of the weights' bytes.
//
// The stream of weights does not end with a launch: the next launch may begin when every block of this one has asked for its last slab, and asks
// for its own first slabs while sums are merged and stored here; for STAGES of them to shared memory, for PREFETCH more to L2. For that two
// launches must have room on a multiprocessor, so a block takes about half of its memory and registers where the sums are few.
//
// How blocks share the tiles: linear_batch.cuh. CLUSTER > 1: so many blocks have one tile, equal parts of k, and run at the same time. Then their
// sums meet in shared memory, in the same order: each block adds and stores some of the columns. grid (blocks, blocks of columns), 256 threads; dynamic shared memory STAGES * (STAGE_BYTES + 16).
//
// Set by -D: COLUMNS (16, 32, 48, 64, 96, 128), ROW_TILES, STAGES, PREFETCH, CLUSTER, and what linear.cuh says.
constexpr int WARPS = 8, ROW_WARPS = 4, HOLDERS = ROW_WARPS * 32;
#include "linear_batch.cuh"

constexpr int GROUP = 128, TILES = COLUMNS / 8, RUN = 64, LINE = RUN * 2, PATTERN = 8 * LINE;
constexpr int X_AT = ROWS * LINE, STAGE_BYTES = X_AT + COLUMNS * LINE, AT_BARRIERS = STAGES * STAGE_BYTES;
constexpr int ROUND = GROUP / 8;  // lines that the copying warpgroup fills at a time, 16 bytes a thread
constexpr int BLOCKS = ROW_TILES * TILES * 4 <= 72 ? 2 : 1;  // whose registers a multiprocessor must have

struct Ring {  // of stages
  unsigned char* stages;
  uint64_t *full, *empty;
  int stage, parity;

  __device__ __forceinline__ unsigned char* place() const { return stages + stage * STAGE_BYTES; }
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// What the copying warpgroup asks for next. A thread has piece thread % 8 of every ROUND-th line.
struct Copies {
  const Product& p;
  const bf16* from[ROW_WARPS * ROW_TILES];
  int slabs, tile, slab;

  __device__ __forceinline__ void begin_tile() {
    const int row = threadIdx.x % GROUP / 8;
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
      for (int w = 0; w < ROW_WARPS; w++) from[t * ROW_WARPS + w] = p.row(tile * OUT_ROWS + w * WARP_OUT, t, row / 8, row % 8) + threadIdx.x % 8 * 8;
  }
  __device__ __forceinline__ unsigned char* own(unsigned char* stage) const {  // of the first line
    const int row = threadIdx.x % GROUP / 8;
    return stage + row * LINE + (threadIdx.x % 8 ^ row % 8) * 16;
  }
  __device__ __forceinline__ bool there() const { return slab * RUN + (int)threadIdx.x % 8 * 8 < p.K; }
  __device__ __forceinline__ void weights(unsigned char* stage) const {
    unsigned char* to = own(stage);
#pragma unroll
    for (int j = 0; j < ROW_WARPS * ROW_TILES; j++) cp_async_16_or_zero(to + j * ROUND * LINE, from[j] + slab * RUN, there());
  }
  __device__ __forceinline__ void x(unsigned char* stage) const {
    unsigned char* to = own(stage + X_AT);
    const int first = blockIdx.y * COLUMNS + threadIdx.x % GROUP / 8;
    const bf16* from = p.x + (size_t)first * p.K + slab * RUN + threadIdx.x % 8 * 8;
#pragma unroll
    for (int j = 0; j < COLUMNS / ROUND; j++) cp_async_16_or_zero(to + j * ROUND * LINE, from + (size_t)j * ROUND * p.K, first + j * ROUND < p.tokens && there());
  }
  __device__ __forceinline__ void advance() {
    if (++slab == slabs) slab = 0, tile++, begin_tile();
  }
};

// Slabs of this tile that have no place in the stages yet, at most `count`: slab number `slab` and on.
__device__ __forceinline__ void prefetch(const Product& p, int tile, int slab, int count) {
  const int k = slab * RUN, end = min(k + count * RUN, p.K);
  if (k >= end) return;
  for (int i = threadIdx.x % GROUP; i < ROWS; i += GROUP) {
    const int n = min(tile * OUT_ROWS + i % OUT_ROWS, p.rows - 1);
    prefetch_l2(p.weight + (size_t)(i / OUT_ROWS * p.rows + n) * p.K + k, (end - k) * 2);
  }
}

// The sums that this block finishes, of all parts; columns from number rank * EACH * 8 on. stages: of this block, whose last is used up.
constexpr int EACH = (TILES + CLUSTER - 1) / CLUSTER;
static_assert(CLUSTER * ROW_TILES * EACH * GROUP * 16 <= AT_BARRIERS, "parts fit into the stages");
__device__ __forceinline__ void meet(const float (&y)[ROW_TILES][TILES][4], float (&z)[ROW_TILES][EACH][4], unsigned char* stages, int rank) {
  float4* place = (float4*)stages + threadIdx.x;
  cluster_arrive_relaxed(), cluster_wait();  // all are through with their stages
#pragma unroll
  for (int n = 0; n < TILES; n++)
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++)
      store_in_cluster(place + ((rank * EACH + n % EACH) * ROW_TILES + t) * GROUP, n / EACH, make_float4(y[t][n][0], y[t][n][1], y[t][n][2], y[t][n][3]));
  cluster_arrive(), cluster_wait();
#pragma unroll
  for (int n = 0; n < EACH; n++)
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) {
      float(&sum)[4] = z[t][n];
      sum[0] = sum[1] = sum[2] = sum[3] = 0.f;
#pragma unroll
      for (int part = 0; part < CLUSTER; part++) {
        const float4 a = place[((part * EACH + n) * ROW_TILES + t) * GROUP];
        sum[0] += a.x, sum[1] += a.y, sum[2] += a.z, sum[3] += a.w;
      }
    }
}

// workspace float32 [blocks of columns][blocks][2][ROWS * COLUMNS]; arrived int [blocks of columns][tiles][ROW_WARPS], zero before and after.
#if CLUSTER > 1
#define CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERS
#endif
extern "C" __global__ void CLUSTERS __launch_bounds__(THREADS, BLOCKS) linear_batch(const bf16* x, const bf16* weight, const bf16* bias,
                                                                                   const bf16* residual, Output* out, float* workspace, int* arrived, int tokens, int K, int N) {
  extern __shared__ __align__(1024) unsigned char smem[];
  uint64_t* const barriers = (uint64_t*)(smem + AT_BARRIERS);
  Ring ring = {smem, barriers, barriers + STAGES, 0, 0};
  const Product p = {x, weight, bias, residual, out, tokens, K, N / HALVES};
  const int tiles = (p.rows + OUT_ROWS - 1) / OUT_ROWS, slabs = (K + RUN - 1) / RUN;
  const Line line = {slabs, slabs * tiles};
  int left = line.begin(blockIdx.x + 1), slab = line.begin(blockIdx.x), tile = slab / slabs;  // left: slabs to multiply
  left -= slab, slab -= tile * slabs;

  const int group = __shfl_sync(FULL, threadIdx.x / GROUP, 0);
  Copies copies = {p, {}, slabs, tile, slab};
  if (group == 1) {
    copies.begin_tile();
    for (int i = 0; i < min(STAGES, left); i++) copies.weights(smem + i * STAGE_BYTES), copies.advance();
  } else if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) mbarrier_init(ring.full + s, GROUP), mbarrier_init(ring.empty + s, ROW_WARPS);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (group == 0) prefetch(p, tile, slab + STAGES, min(left - STAGES, PREFETCH));  // a lane after the other asks: not those that copy
  wait_for_previous();
  if (group == 1) {
    Copies again = {p, {}, slabs, tile, slab};
    for (int i = 0; i < left; i++) {
      if (i >= STAGES) {
        mbarrier_wait(ring.empty + ring.stage, ring.parity ^ 1);
        copies.weights(ring.place()), copies.x(ring.place()), copies.advance();
      } else {
        again.x(ring.place());
        if (++again.slab == slabs) again.slab = 0;
      }
      cp_async_arrive(ring.full + ring.stage);
      ring.advance();
    }
    allow_next();
    cp_async_commit(), cp_async_wait<0>();
    return;
  }

  const int warp = threadIdx.x / 32;
  for (; left > 0; tile++) {
    float y[ROW_TILES][TILES][4];
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++)
#pragma unroll
      for (int n = 0; n < TILES; n++) y[t][n][0] = y[t][n][1] = y[t][n][2] = y[t][n][3] = 0.f;
    const bool begun = slab == 0;  // by this block
    uint64_t* used = nullptr;      // the barrier of the stage before
    do {
      mbarrier_wait(ring.full + ring.stage, ring.parity);
      fence_async();
      const uint64_t a = wgmma_operand(ring.place(), PATTERN, 0), b = wgmma_operand(ring.place() + X_AT, PATTERN, 0);
#pragma unroll
      for (int t = 0; t < ROW_TILES; t++) hold(y[t]);
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < RUN / 16; s++)
#pragma unroll
        for (int t = 0; t < ROW_TILES; t++) wgmma_bf16(y[t], a + ((t * 64 * LINE + s * 32) >> 4), b + (s * 32 >> 4));
      wgmma_commit();
      wgmma_wait<1>();
      if (used && threadIdx.x % 32 == 0) mbarrier_arrive(used);
      used = ring.empty + ring.stage;
      ring.advance();
      left--, slab = slab + 1 == slabs ? 0 : slab + 1;
    } while (slab && left > 0);
    wgmma_wait<0>();
#pragma unroll
    for (int t = 0; t < ROW_TILES; t++) hold(y[t]);
    if (threadIdx.x % 32 == 0) mbarrier_arrive(used);
    if (CLUSTER > 1) {
      const int rank = blockIdx.x % CLUSTER;
      float z[ROW_TILES][EACH][4];
      meet(y, z, smem, rank);
      Product mine = p;  // the last block's columns may be fewer
      mine.tokens = min(tokens, ((int)blockIdx.y + 1) * COLUMNS);
      finish(z, mine, tile * OUT_ROWS + warp * WARP_OUT, blockIdx.y * COLUMNS + rank * EACH * 8);
      continue;
    }
    float* parts = workspace + (size_t)blockIdx.y * gridDim.x * 2 * ROWS * COLUMNS;
    if ((begun && slab == 0) || merge(y, line, tile, parts, arrived + ((int)blockIdx.y * tiles + tile) * ROW_WARPS + warp))
      finish(y, p, tile * OUT_ROWS + warp * WARP_OUT, blockIdx.y * COLUMNS);
  }
}
