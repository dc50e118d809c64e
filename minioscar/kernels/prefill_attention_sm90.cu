// prefill_attention_sm90.cu: what prefill_attention.cu computes, with the warpgroup instructions of compute capability 9.0 (compiled for sm_90a):
// these multiply beside the threads, from shared memory, at nearly twice the rate of mma.sync.
//
// An item is 128 rows of a kv head, (token, q head) pairs, head by head of token after token, and the keys that they see. A block takes several,
// grid (at most a block a multiprocessor); as many heads at a time as L2 holds the keys and values of. Two warpgroups have 64 rows each, q in registers; a warp beside them copies tiles of 128 keys and
// values ahead, each as soon as both have read what stood there before, and goes on with the next item while the others end one. A warpgroup asks
// for the logits of tile j and for p . v of tile j - 1 together, and turns the logits into p while the latter, and then the other warpgroup's
// products, are under way: they take turns in asking, so that one computes exponentials while the other multiplies.
// Softmax with a reference m, the first tile's largest logit. BF16 has float32's exponents, so p may be as large as it likes: p = 2^(x - m) is
// taken without looking for the largest x, and where the sums have passed 2^60, which hardly ever happens, the logits are computed again and m
// moves. p is rounded to BF16, at most 2^-8 of it.
//
// keys, values: tiles as prefill_tiles.cu and unpack.cu leave them, [tiles][kv_heads][TILE_BYTES], in the order in which wgmma wants them in
// shared memory: a tile is one copy. Sequence s has those from first_tiles[s] on. What follows its last token is never seen, but is a number.
//
// Few new tokens after a long past are too few items for a card: then the keys are cut into parts of part_tiles tiles, an item each. Their sums
// meet in workspace, float32 [sequences][kv_heads][blocks of rows][parts][128 rows](D sums), then (m, l), and the block that comes last, counted
// in arrived, int [sequences][kv_heads][blocks of rows], zero before and after, adds them in their order.
//
// Shared memory: STAGES tiles of keys | of values | q of the next item | mbarriers.
// Operations: 4 D for each q head, query and key that it sees; 64 KB from L2 for 8.4 million of them (D = 128). Of shared memory's 128 bytes a
// clock wgmma takes 64, operand b once for each warpgroup; copies take up to 32 more, and q, were it there, half of 32.
//
// Set by -D: HEAD_DIM (64, 128), Q_PER_KV (any), STAGES.
#include "device.cuh"
#include "tile.cuh"

typedef unsigned short bf16;  // only copied here
constexpr int D = HEAD_DIM, GROUPS = 2, GROUP = 128, BLOCK_ROWS = 64 * GROUPS, THREADS = (GROUPS + 1) * GROUP;
constexpr int KEY_TILES = TILE / 8, CHANNEL_TILES = D / 8, Q_BYTES = BLOCK_ROWS * D * 2, PATTERN = 1024;
constexpr int AT_VALUES = STAGES * TILE_BYTES, AT_Q = AT_VALUES + STAGES * TILE_BYTES, AT_BARRIERS = AT_Q + Q_BYTES;
constexpr int AT_LAST = AT_BARRIERS + 4 * STAGES * 8;
constexpr int TURN = 1, MERGE = TURN + GROUPS;  // named barriers; the first for each warpgroup
constexpr unsigned FULL = 0xffffffffu;
constexpr float NEVER = -1e30f, HIDDEN = -1e38f, MOST = 0x1p60f;

// 128 rows of one kv head of a sequence, and the keys that they see, or a part of these.
struct Item {
  int sequence, head, block, part, parts, rows, start, first, end, from, tiles;  // parts: that there are for these rows
};

struct Items {
  const int *starts, *counts;
  int kv_heads, together, sequences, blocks, parts, part_tiles, total;

  // The first of this block's items from number i on that has something to do: `together` heads after as many others; of these those with
  // the most keys first, and as many of the longer as of the shorter ones for each block.
  __device__ __forceinline__ bool find(int& i, Item& x) const {
    for (; i * (int)gridDim.x < total; i++) {
      int n = i * gridDim.x + (i % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
      if (n >= total) continue;
      const int heads = blocks * parts * sequences * together, before = n / heads * together;
      n -= before / together * heads;
      x.part = n % parts, n /= parts;
      x.head = before + n % together, n /= together;
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

struct Place {  // of a tile in a ring, and how often it has come round, modulo 2
  int slot, round;
  __device__ __forceinline__ Place next() const { return slot + 1 == STAGES ? Place{0, round ^ 1} : Place{slot + 1, round}; }
};

struct Ring {  // of tiles of keys or of values
  unsigned char* tiles;
  uint64_t *full, *empty;
  __device__ __forceinline__ unsigned char* tile(Place at) const { return tiles + at.slot * TILE_BYTES; }
  __device__ __forceinline__ void fill(Place at, const unsigned char* from) const {  // by a warp
    mbarrier_wait(empty + at.slot, at.round ^ 1);
    if (elect_one()) {
      mbarrier_arrive_expect_tx(full + at.slot, TILE_BYTES);
      bulk_copy(tile(at), from, TILE_BYTES, full + at.slot);
    }
  }
  __device__ __forceinline__ void wait(Place at) const { mbarrier_wait(full + at.slot, at.round); }
  __device__ __forceinline__ void release(Place at) const { mbarrier_arrive(empty + at.slot); }  // by every thread, for what it has read itself
};

// x: q . k of 64 rows and the keys of a tile. Asked for, not there yet.
__device__ __forceinline__ void multiply_keys(float (&x)[KEY_TILES][4], const uint32_t (&q)[D / 16][4], const unsigned char* keys) {
  const uint64_t b = wgmma_operand(keys, PATTERN, 0);
#pragma unroll
  for (int s = 0; s < D / 16; s++) {
    const int at = (s / 4 * HALF_BYTES + s % 4 * 32) >> 4;  // the address is the descriptor's lowest field
    if (s == 0) wgmma_bf16_k_major<true>(x, q[s], b);
    else wgmma_bf16_k_major<false>(x, q[s], b + at);
  }
}

__device__ __forceinline__ void multiply_values(float (&o)[CHANNEL_TILES][4], const uint32_t (&p)[TILE / 16][4], const unsigned char* values) {
  const uint64_t b = wgmma_operand(values, PATTERN, HALF_BYTES);
#pragma unroll
  for (int s = 0; s < TILE / 16; s++) wgmma_bf16(o, p[s], b + (s * 16 * 128 >> 4));
}

// The same, for a warp's sixteen rows alone and without wgmma: the logits of a tile once more.
__device__ __forceinline__ void multiply_keys_again(float (&x)[KEY_TILES][4], const uint32_t (&q)[D / 16][4], const unsigned char* keys) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < KEY_TILES; n++) x[n][0] = x[n][1] = x[n][2] = x[n][3] = 0.f;
#pragma unroll
  for (int n = 0; n < KEY_TILES; n += 2)
#pragma unroll
    for (int s = 0; s < D / 16; s++) {
      uint32_t k[4];
      ldmatrix_x4(k, keys + place(8 * n + lane / 16 * 8 + lane % 8, 2 * s + lane / 8 % 2));
      mma_m16n8k16_bf16(x[n], q[s][0], q[s][1], q[s][2], q[s][3], k[0], k[1]);
      mma_m16n8k16_bf16(x[n + 1], q[s][0], q[s][1], q[s][2], q[s][3], k[2], k[3]);
    }
}

// Rows r and r + 8 of a warp's sixteen, for lane 4r + c.
struct Softmax {
  float m[2], l[2], factor[2];  // l: of this lane's keys

  // Row i sees the keys of this tile up to last[i].
  static __device__ __forceinline__ void hide(float (&x)[KEY_TILES][4], int last0, int last1) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
      for (int k = 0; k < 4; k++)
        if (8 * n + 2 * c + k % 2 > (k < 2 ? last0 : last1)) x[n][k] = HIDDEN;
  }

  // m becomes the largest of x, or what makes 1 or 2 of l if that is more; what has been summed up is to be multiplied by `factor`.
  __device__ __forceinline__ void move(const float (&x)[KEY_TILES][4], float scale_log2) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float y = HIDDEN;
#pragma unroll
      for (int n = 0; n < KEY_TILES; n++) y = fmaxf(y, fmaxf(x[n][2 * i], x[n][2 * i + 1]));
      y = fmaxf(y * scale_log2, m[i] + (float)max((int)(__float_as_uint(l[i]) >> 23) - 127, 0));
      y = fmaxf(y, __shfl_xor_sync(FULL, y, 1)), y = fmaxf(y, __shfl_xor_sync(FULL, y, 2));
      factor[i] = ex2(m[i] - y), m[i] = y, l[i] *= factor[i];
    }
  }

  // x becomes p = 2^(x * scale_log2 - m). Whether a sum of the warp is too large now.
  __device__ __forceinline__ bool soften(float (&x)[KEY_TILES][4], float scale_log2) {
#pragma unroll
    for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
      for (int k = 0; k < 4; k++) x[n][k] = ex2(fmaf(x[n][k], scale_log2, -m[k / 2])), l[k / 2] += x[n][k];
    return __any_sync(FULL, l[0] > MOST || l[1] > MOST);
  }

  __device__ __forceinline__ void rescale(float (&o)[CHANNEL_TILES][4]) const {
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

extern "C" __global__ void __launch_bounds__(THREADS, 1) prefill_attention(const bf16* q, const unsigned char* key_tiles,
    const unsigned char* value_tiles, const int* first_tiles, const int* first_rows, const int* starts, const int* counts, bf16* out,
    float* workspace, int* arrived, int kv_heads, int together, int sequences, int blocks, int parts, int part_tiles, float scale_log2) {
  wait_for_previous(), allow_next();
  extern __shared__ __align__(1024) unsigned char smem[];
  uint64_t* barriers = (uint64_t*)(smem + AT_BARRIERS);
  const Ring keys = {smem, barriers, barriers + STAGES}, values = {smem + AT_VALUES, barriers + 2 * STAGES, barriers + 3 * STAGES};
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(keys.full + s, 1), mbarrier_init(values.full + s, 1);
      mbarrier_init(keys.empty + s, GROUPS * GROUP), mbarrier_init(values.empty + s, GROUPS * GROUP);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  const Items items = {starts, counts, kv_heads, together, sequences, blocks, parts, part_tiles, blocks * parts * kv_heads * sequences};
  Item item;
  int number = 0;  // of items
  Place at = {0, 0};
  const int group = __shfl_sync(FULL, threadIdx.x / GROUP, 0);
  if (group == GROUPS) {
    fewer_registers<24>();
    if (threadIdx.x >= GROUPS * GROUP + 32) return;
    for (; items.find(number, item); number++) {
      int tile = (first_tiles[item.sequence] + item.from) * kv_heads + item.head;
      for (int j = 0; j < item.tiles; j++, at = at.next(), tile += kv_heads) {
        const size_t from = (size_t)tile * TILE_BYTES;
        keys.fill(at, key_tiles + from);
        values.fill(at, value_tiles + from);
      }
    }
    return;
  }

  more_registers<240>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const size_t token_stride = (size_t)kv_heads * Q_PER_KV * D;
  auto head_at = [&](const Item& x) { return ((size_t)first_rows[x.sequence] * kv_heads + x.head) * Q_PER_KV * D; };
  unsigned char* const own_q = smem + AT_Q + warp * 16 * D * 2;  // the warp's sixteen rows
  auto q_place = [&](int r, int piece) { return own_q + r * D * 2 + (piece ^ r % 8) * 16; };
  auto copy_q = [&](const Item& x) {
    const bf16* from = q + head_at(x);
    for (int i = lane; i < 16 * PIECES; i += 32) {
      const int r = i / PIECES, n = min(x.first + warp * 16 + r, x.rows - 1);  // rows behind the last one repeat it
      cp_async_16(q_place(r, i % PIECES), from + n / Q_PER_KV * token_stride + n % Q_PER_KV * D + i % PIECES * 8);
    }
  };
  auto wait_turn = [&] { named_barrier_wait(TURN + group, 2 * GROUP); };
  auto pass_turn = [&] { named_barrier_arrive(TURN + (group ^ 1), 2 * GROUP); };

  bool more = items.find(number, item);
  if (more) copy_q(item);
  if (group == 1) pass_turn();  // warpgroup 0 begins
  while (more) {
    const int warp_row = item.first + warp * 16, own_row = warp_row + lane / 4;
    float x[KEY_TILES][4], o[CHANNEL_TILES][4];
    uint32_t p[TILE / 16][4], rows[D / 16][4];
    Softmax state = {{NEVER, NEVER}, {0.f, 0.f}, {0.f, 0.f}};
    cp_async_commit(), cp_async_wait<0>();
    __syncwarp();
#pragma unroll
    for (int s = 0; s < D / 16; s++) ldmatrix_x4(rows[s], q_place(lane % 16, 2 * s + lane / 16));
    __syncwarp();
#pragma unroll
    for (int i = 0; i < CHANNEL_TILES; i++) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
    // Logits of tile j of the item to p, and waits for what the next products need. Whether the sums are to be multiplied by state.factor.
    auto to_p = [&](int j) {
      const int last = item.start - (item.from + j) * TILE;
      const bool all = last + warp_row / Q_PER_KV >= TILE - 1;  // rows of the warp see all of its keys
      const float before[2] = {state.l[0], state.l[1]};
      bool moved = j == 0;
      if (!all) state.hide(x, last + own_row / Q_PER_KV, last + (own_row + 8) / Q_PER_KV);
      if (moved) state.move(x, scale_log2);
      while (state.soften(x, scale_log2)) {
        multiply_keys_again(x, rows, keys.tile(at));
        if (!all) state.hide(x, last + own_row / Q_PER_KV, last + (own_row + 8) / Q_PER_KV);
        state.l[0] = before[0], state.l[1] = before[1], moved = true;
        state.move(x, scale_log2);
      }
      hold(x);
      keys.release(at);
      if (j + 1 < item.tiles) keys.wait(at.next());
      values.wait(at);
      return moved;
    };
    keys.wait(at);
    wait_turn();
    hold(x), hold(rows), wgmma_fence();
    multiply_keys(x, rows, keys.tile(at)), wgmma_commit();
    pass_turn();
    Item next;
    number++, more = items.find(number, next);
    if (more) copy_q(next);
    wgmma_wait<0>(), hold(x), hold(rows);
    to_p(0);
    round_p(p, x);
    Place before = at;
    at = at.next();
    for (int j = 1; j < item.tiles; j++, before = at, at = at.next()) {
      wait_turn();
      hold(x), hold(o), hold(p), hold(rows), wgmma_fence();
      multiply_keys(x, rows, keys.tile(at)), wgmma_commit();
      multiply_values(o, p, values.tile(before)), wgmma_commit();
      pass_turn();
      wgmma_wait<1>(), hold(x), hold(rows);
      const bool moved = to_p(j);
      wgmma_wait<0>(), hold(o), hold(p);
      values.release(before);
      if (moved) state.rescale(o);
      round_p(p, x);
    }
    hold(o), hold(p), wgmma_fence();
    multiply_values(o, p, values.tile(before)), wgmma_commit();
    wgmma_wait<0>(), hold(o);
    values.release(before);

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
