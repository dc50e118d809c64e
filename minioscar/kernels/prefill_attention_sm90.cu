// prefill_attention_sm90.cu: what prefill_attention.cu computes, from the same arguments, with the warpgroup instructions of compute capability
// 9.0 (compiled for sm_90a): these multiply from shared memory, beside the threads, at nearly twice the rate of mma.sync.
//
// An item is 128 rows of a kv head, (token, q head) pairs, head by head of token after token, and the keys that they see. A block takes several,
// grid (at most a block a multiprocessor). Two warpgroups have 64 rows each; a third one copies tiles of 128 keys and values ahead, each as soon
// as both have read what stood there before, and goes on with the next item while the others end one. A warpgroup asks for the logits of tile j
// and for p . v of tile j - 1 together, and turns the logits into p while the latter, and then the other warpgroup's products, are under way:
// they take turns in asking, so that one computes exponentials while the other multiplies.
// Softmax with a running reference m that moves only when some p would pass 2^8; p is rounded to BF16, at most 2^-8 of it.
//
// Few new tokens after a long past are too few items for a card: then the keys are cut into parts of part_tiles tiles, an item each. Their sums
// meet in workspace, float32 [sequences][kv_heads][blocks of rows][parts][128 rows](D sums), then (m, l), and the block that comes last, counted
// in arrived, int [sequences][kv_heads][blocks of rows], zero before and after, adds them in their order.
//
// Shared memory: q of this item and of the next | STAGES tiles of keys | of values | mbarriers. A row of 64 channels has 128 bytes, whose 16-byte
// pieces are exchanged as wgmma_operand wants it; 128 channels are two such tiles, one behind the other.
// Operations: 4 D for each q head, query and key that it sees; 64 KB from L2 for 8.4 million of them (D = 128).
//
// Set by -D: HEAD_DIM (64, 128), Q_PER_KV (any), STAGES.
#include "device.cuh"

typedef unsigned short bf16;  // only copied here
constexpr int D = HEAD_DIM, PIECES = D / 8, HALVES = D / 64;
constexpr int TILE = 128, GROUPS = 2, GROUP = 128, BLOCK_ROWS = 64 * GROUPS, THREADS = (GROUPS + 1) * GROUP;
constexpr int KEY_TILES = TILE / 8, CHANNEL_TILES = D / 8;
constexpr int PATTERN = 1024, HALF_BYTES = TILE * 128, TILE_BYTES = HALVES * HALF_BYTES, Q_BYTES = BLOCK_ROWS * D * 2;
constexpr int AT_KEYS = 2 * Q_BYTES, AT_VALUES = AT_KEYS + STAGES * TILE_BYTES, AT_BARRIERS = AT_VALUES + STAGES * TILE_BYTES;
constexpr int AT_LAST = AT_BARRIERS + 4 * STAGES * 8;
constexpr int Q_IS_THERE = 1, TURN = 1 + GROUPS, MERGE = 1 + 2 * GROUPS;  // named barriers; of the first two one a warpgroup
constexpr unsigned FULL = 0xffffffffu;
constexpr float NEVER = -1e30f, HIDDEN = -1e38f, ROOM = 8.f;
static_assert(BLOCK_ROWS == TILE, "q has the layout of a tile");

// 128 rows of one kv head of a sequence, and the keys that they see, or a part of these.
struct Item {
  int sequence, head, block, part, parts, rows, start, first, end, from, tiles;  // parts: that there are for these rows
};

struct Items {
  const int *starts, *counts;
  int kv_heads, sequences, blocks, parts, part_tiles, total;

  // The first of this block's items from number i on that has something to do: those with the most keys first, and as many of the longer as
  // of the shorter ones for each block.
  __device__ __forceinline__ bool find(int& i, Item& x) const {
    for (; i * (int)gridDim.x < total; i++) {
      int n = i * gridDim.x + (i % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
      if (n >= total) continue;
      x.part = n % parts, n /= parts;
      x.head = n % kv_heads, n /= kv_heads;
      x.sequence = n % sequences, x.block = blocks - 1 - n / sequences;
      x.rows = counts[x.sequence] * Q_PER_KV, x.start = starts[x.sequence], x.first = x.block * BLOCK_ROWS;
      x.end = x.start + (min(x.first + BLOCK_ROWS, x.rows) - 1) / Q_PER_KV + 1;  // of the keys that any row sees
      const int all = (x.end + TILE - 1) / TILE;
      x.from = x.part * part_tiles, x.tiles = min(all - x.from, part_tiles), x.parts = (all + part_tiles - 1) / part_tiles;
      if (x.first < x.rows && x.tiles > 0) return true;
    }
    return false;
  }
};

// Keys or values of one kv head of a sequence.
struct Tokens {
  const bf16 *past, *fresh;
  int start, stride;
  __device__ __forceinline__ const bf16* at(int t) const { return t < start ? past + (size_t)t * D : fresh + (size_t)(t - start) * stride; }
};

struct Ring {  // of tiles of keys or of values
  unsigned char* tiles;
  uint64_t *full, *empty;
  __device__ __forceinline__ unsigned char* tile(int j) const { return tiles + j % STAGES * TILE_BYTES; }
  __device__ __forceinline__ void wait_full(int j) const { mbarrier_wait(full + j % STAGES, j / STAGES & 1); }
  __device__ __forceinline__ void wait_empty(int j) const {
    if (j >= STAGES) mbarrier_wait(empty + j % STAGES, (j / STAGES - 1) & 1);
  }
  __device__ __forceinline__ void release(int j) const {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + j % STAGES);
  }
};

// Where piece `piece` of row r of a tile stands.
__device__ __forceinline__ int place(int r, int piece) { return piece / 8 * HALF_BYTES + r * 128 + (piece % 8 ^ r % 8) * 16; }

// Copies tokens first ... first + TILE - 1 with the threads of one warpgroup, zeros from `end` on: 0 * p is then 0.
__device__ __forceinline__ void copy_tile(unsigned char* to, const Tokens& tokens, int first, int end) {
  constexpr int ROWS = GROUP / PIECES;  // at a time: a multiple of 8, so that a thread's pieces stand alike
  const int r = threadIdx.x % GROUP / PIECES, piece = threadIdx.x % PIECES;
  unsigned char* const own = to + place(r, piece);
  const int last = first + TILE - 1;
  if (last < end && (last < tokens.start || first >= tokens.start)) {
    const bf16* from = tokens.at(first + r) + piece * 8;
    const int stride = ROWS * (first < tokens.start ? D : tokens.stride);
#pragma unroll
    for (int i = 0; i < TILE / ROWS; i++, from += stride) cp_async_16(own + i * ROWS * 128, from);
  } else {
#pragma unroll 4
    for (int i = 0; i < TILE / ROWS; i++) {
      const int t = first + i * ROWS + r;
      cp_async_16_or_zero(own + i * ROWS * 128, tokens.at(min(t, end - 1)) + piece * 8, t < end);
    }
  }
}

// x: q . k of 64 rows and the keys of a tile. Asked for, not there yet.
__device__ __forceinline__ void multiply_keys(float (&x)[KEY_TILES][4], const unsigned char* q, const unsigned char* keys) {
  const uint64_t a = wgmma_operand(q, PATTERN, 0), b = wgmma_operand(keys, PATTERN, 0);
#pragma unroll
  for (int s = 0; s < D / 16; s++) {
    const int at = (s / 4 * HALF_BYTES + s % 4 * 32) >> 4;  // the address is the descriptor's lowest field
    if (s == 0) wgmma_bf16<true>(x, a, b);
    else wgmma_bf16<false>(x, a + at, b + at);
  }
}

__device__ __forceinline__ void multiply_values(float (&o)[CHANNEL_TILES][4], const uint32_t (&p)[TILE / 16][4], const unsigned char* values) {
  const uint64_t b = wgmma_operand(values, PATTERN, HALF_BYTES);
#pragma unroll
  for (int s = 0; s < TILE / 16; s++) wgmma_bf16(o, p[s], b + (s * 16 * 128 >> 4));
}

// Rows r and r + 8 of a warp's sixteen, for lane 4r + c.
struct Softmax {
  float m[2], l[2], factor[2];  // l: of this lane's keys
  bool moved;                   // of the warp: its sums are to be multiplied by `factor`

  // x becomes p = 2^(x * scale_log2 - m). Row i sees the keys of this tile up to last[i]; `all`: so do all rows of the warp.
  __device__ __forceinline__ void soften(float (&x)[KEY_TILES][4], float scale_log2, bool all, int last0, int last1) {
    const int c = threadIdx.x % 4;
    if (!all)
#pragma unroll
      for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
        for (int k = 0; k < 4; k++)
          if (8 * n + 2 * c + k % 2 > (k < 2 ? last0 : last1)) x[n][k] = HIDDEN;
    float largest[2] = {HIDDEN, HIDDEN};
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) largest[i] = fmaxf(largest[i], fmaxf(x[n][2 * i], x[n][2 * i + 1]));
    largest[0] *= scale_log2, largest[1] *= scale_log2;
    moved = __any_sync(FULL, largest[0] > m[0] + ROOM || largest[1] > m[1] + ROOM);
    if (moved)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float y = fmaxf(m[i], largest[i]);
        y = fmaxf(y, __shfl_xor_sync(FULL, y, 1)), y = fmaxf(y, __shfl_xor_sync(FULL, y, 2));
        factor[i] = ex2(m[i] - y), m[i] = y, l[i] *= factor[i];
      }
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
      for (int k = 0; k < 4; k++) x[n][k] = ex2(fmaf(x[n][k], scale_log2, -m[k / 2])), l[k / 2] += x[n][k];
  }

  __device__ __forceinline__ void rescale(float (&o)[CHANNEL_TILES][4]) const {
    if (moved)
#pragma unroll
      for (int n = 0; n < CHANNEL_TILES; n++)
#pragma unroll
        for (int k = 0; k < 4; k++) o[n][k] *= factor[k / 2];
  }
};

__device__ __forceinline__ void round_p(uint32_t (&p)[TILE / 16][4], const float (&x)[KEY_TILES][4]) {
#pragma unroll
  for (int s = 0; s < TILE / 16; s++)  // an accumulator's places are those of operand a, two column tiles side by side
#pragma unroll
    for (int k = 0; k < 4; k++) p[s][k] = pack_bf16x2(x[2 * s + k / 2][k % 2 * 2], x[2 * s + k / 2][k % 2 * 2 + 1]);
}

// Leaves the sums of a part where the block that comes last finds them, and says whether that is this one; if so, they become those of all parts.
__device__ __forceinline__ bool merge(float (&o)[CHANNEL_TILES][4], Softmax& state, float* sums, int* arrived, int part, int parts, int* last) {
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  float2* const scales = (float2*)(sums + (size_t)parts * BLOCK_ROWS * D);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const size_t n = part * BLOCK_ROWS + row + 8 * i;
    if (c == 0) __stcg(scales + n, make_float2(state.m[i], state.l[i]));
#pragma unroll
    for (int k = 0; k < CHANNEL_TILES; k++) __stcg((float2*)(sums + n * D + 8 * k + 2 * c), make_float2(o[k][2 * i], o[k][2 * i + 1]));
  }
  named_barrier_wait(MERGE, GROUPS * GROUP);
  if (threadIdx.x == 0) {
    *last = atomic_add_acq_rel(arrived, 1) == parts - 1;
    if (*last) *arrived = 0;
  }
  named_barrier_wait(MERGE, GROUPS * GROUP);
  if (!*last) return false;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float m = NEVER, l = 0.f;
    for (int s = 0; s < parts; s++) m = fmaxf(m, __ldcg(scales + s * BLOCK_ROWS + row + 8 * i).x);
#pragma unroll
    for (int k = 0; k < CHANNEL_TILES; k++) o[k][2 * i] = o[k][2 * i + 1] = 0.f;
    for (int s = 0; s < parts; s++) {
      const size_t n = s * BLOCK_ROWS + row + 8 * i;
      const float2 scale = __ldcg(scales + n);
      const float weight = ex2(scale.x - m);
      l += weight * scale.y;
#pragma unroll
      for (int k = 0; k < CHANNEL_TILES; k++) {
        const float2 y = __ldcg((float2*)(sums + n * D + 8 * k + 2 * c));
        o[k][2 * i] += weight * y.x, o[k][2 * i + 1] += weight * y.y;
      }
    }
    state.l[i] = l;
  }
  return true;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) prefill_attention(const bf16* q, const bf16* new_keys, const bf16* new_values,
    const bf16* past_keys, const bf16* past_values, const int* first_rows, const int* past_rows, const int* starts, const int* counts,
    bf16* out, float* workspace, int* arrived, int key_stride, int value_stride, int kv_heads, int capacity, int sequences, int blocks,
    int parts, int part_tiles, float scale_log2) {
  wait_for_previous(), allow_next();
  extern __shared__ __align__(1024) unsigned char smem[];
  uint64_t* barriers = (uint64_t*)(smem + AT_BARRIERS);
  const Ring keys = {smem + AT_KEYS, barriers, barriers + STAGES}, values = {smem + AT_VALUES, barriers + 2 * STAGES, barriers + 3 * STAGES};
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(keys.full + s, GROUP), mbarrier_init(values.full + s, GROUP);
      mbarrier_init(keys.empty + s, GROUPS * 4), mbarrier_init(values.empty + s, GROUPS * 4);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  const Items items = {starts, counts, kv_heads, sequences, blocks, parts, part_tiles, blocks * parts * kv_heads * sequences};
  Item item;
  int number = 0, t = 0;  // of items, of tiles of all items so far
  const int group = __shfl_sync(FULL, threadIdx.x / GROUP, 0);
  if (group == GROUPS) {
    fewer_registers<40>();
    for (; items.find(number, item); number++) {
      const size_t past = ((size_t)(past_rows ? past_rows[item.sequence] : item.sequence) * kv_heads + item.head) * capacity * D;
      const size_t row = first_rows[item.sequence];
      const Tokens k = {past_keys + past, new_keys + row * key_stride + item.head * D, item.start, key_stride};
      const Tokens v = {past_values + past, new_values + row * value_stride + item.head * D, item.start, value_stride};
      for (int j = item.from; j < item.from + item.tiles; j++, t++) {
        keys.wait_empty(t);
        copy_tile(keys.tile(t), k, j * TILE, item.end);
        cp_async_arrive(keys.full + t % STAGES);
        values.wait_empty(t);
        copy_tile(values.tile(t), v, j * TILE, item.end);
        cp_async_arrive(values.full + t % STAGES);
      }
    }
    cp_async_commit(), cp_async_wait<0>();
    return;
  }

  more_registers<232>();
  const int lane = threadIdx.x % 32;
  const size_t token_stride = (size_t)kv_heads * Q_PER_KV * D;
  auto head_at = [&](const Item& x) { return ((size_t)first_rows[x.sequence] * kv_heads + x.head) * Q_PER_KV * D; };
  auto copy_q = [&](const Item& x, unsigned char* to) {
    const bf16* from = q + head_at(x);
    for (int i = threadIdx.x % GROUP; i < 64 * PIECES; i += GROUP) {
      const int r = group * 64 + i / PIECES, n = min(x.first + r, x.rows - 1);  // rows behind the last one repeat it
      cp_async_16(to + place(r, i % PIECES), from + n / Q_PER_KV * token_stride + n % Q_PER_KV * D + i % PIECES * 8);
    }
  };
  auto wait_turn = [&] { named_barrier_wait(TURN + group, 2 * GROUP); };
  auto pass_turn = [&] { named_barrier_arrive(TURN + (group ^ 1), 2 * GROUP); };

  bool more = items.find(number, item);
  if (more) copy_q(item, smem);
  if (group == 1) pass_turn();  // warpgroup 0 begins
  for (int n = 0; more; n++) {
    cp_async_commit(), cp_async_wait<0>();
    fence_async();
    named_barrier_wait(Q_IS_THERE + group, GROUP);  // and all four warps are through with what the next q overwrites
    const int warp_row = item.first + threadIdx.x / 32 * 16, own_row = warp_row + lane / 4;
    const unsigned char* own_q = smem + n % 2 * Q_BYTES + group * 64 * 128;
    float x[KEY_TILES][4], o[CHANNEL_TILES][4];
    uint32_t p[TILE / 16][4];
    Softmax state = {{NEVER, NEVER}, {0.f, 0.f}, {0.f, 0.f}, false};
#pragma unroll
    for (int i = 0; i < CHANNEL_TILES; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
    auto to_p = [&](int j) {  // and waits for what the next products need: a loop, across which ptxas moves no exponential
      const int last = item.start - (item.from + j) * TILE;
      state.soften(x, scale_log2, last + warp_row / Q_PER_KV >= TILE - 1, last + own_row / Q_PER_KV, last + (own_row + 8) / Q_PER_KV);
      hold(x);
      if (j + 1 < item.tiles) keys.wait_full(t + 1);
      values.wait_full(t);
      fence_async();
    };
    keys.wait_full(t), fence_async();
    wait_turn();
    hold(x), wgmma_fence();
    multiply_keys(x, own_q, keys.tile(t)), wgmma_commit();
    pass_turn();
    Item next;
    number++, more = items.find(number, next);
    if (more) copy_q(next, smem + (n + 1) % 2 * Q_BYTES);
    wgmma_wait<0>(), hold(x);
    keys.release(t);
    to_p(0);
    round_p(p, x);
    t++;
    for (int j = 1; j < item.tiles; j++, t++) {
      wait_turn();
      hold(x), hold(o), hold(p), wgmma_fence();
      multiply_keys(x, own_q, keys.tile(t)), wgmma_commit();
      multiply_values(o, p, values.tile(t - 1)), wgmma_commit();
      pass_turn();
      wgmma_wait<1>(), hold(x);
      keys.release(t);
      to_p(j);
      wgmma_wait<0>(), hold(o), hold(p);
      values.release(t - 1);
      state.rescale(o);
      round_p(p, x);
    }
    hold(o), hold(p), wgmma_fence();
    multiply_values(o, p, values.tile(t - 1)), wgmma_commit();
    wgmma_wait<0>(), hold(o);
    values.release(t - 1);

#pragma unroll
    for (int i = 0; i < 2; i++) {
      float& l = state.l[i];
      l += __shfl_xor_sync(FULL, l, 1), l += __shfl_xor_sync(FULL, l, 2);
    }
    bool finish = true;
    if (item.parts > 1) {
      const size_t place = ((size_t)item.sequence * kv_heads + item.head) * blocks + item.block;
      float* sums = workspace + place * parts * BLOCK_ROWS * (D + 2);
      finish = merge(o, state, sums, arrived + place, item.part, item.parts, (int*)(smem + AT_LAST));
    }
    bf16* result = out + head_at(item) + 2 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float inverse = 1.f / state.l[i];
      const int row = own_row + 8 * i;
      if (row >= item.rows || !finish) continue;
      bf16* to = result + row / Q_PER_KV * token_stride + row % Q_PER_KV * D;
#pragma unroll
      for (int k = 0; k < CHANNEL_TILES; k++) *(uint32_t*)(to + 8 * k) = pack_bf16x2(o[k][2 * i] * inverse, o[k][2 * i + 1] * inverse);
    }
    item = next;
  }
  if (group == 0) wait_turn();  // the other's last arrival
}
