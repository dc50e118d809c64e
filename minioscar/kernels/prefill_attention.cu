// prefill_attention.cu: causal attention of many new tokens over their past and over each other, on the tensor cores.
//
//   out[t, h] = sum over s <= t of softmax_s(q[t, h] . k[s] * scale) v[s], for the q heads h of a kv head
//   With FULL, of pictures and sound: the sum is over all s of the sequence.
//
// Sequence s has counts[s] new tokens, rows first_rows[s] ... of q, out [tokens][q_heads][D] and of the new keys and
// values (BF16, rows q_stride, key_stride and value_stride numbers apart, [q_heads or kv_heads][D] in each: slices of
// the qkv projection), and starts[s] older ones: BF16 [rows][kv_heads][capacity][D], row past_rows[s] (null: s).
// unpack.cu brings a packed past into that form, a layer at a time.
//
// grid (blocks of queries, kv_heads, sequences). A block's rows are (token, q head) pairs, head by head of token
// after token, so keys are read once for all q heads; a warp has ROW_TILES * 16 of them. Keys and values are read in
// tiles of TILE tokens, copied one tile ahead. Softmax with a running max m, p = 2^(x - m) (arXiv 2205.14135). m
// rises only when some p would exceed 2^8, since p and its sums have the range, and most tiles then need not rescale
// the sums. p is rounded to BF16: an error of at most 2^-8 of it.
// Operations: 4 D for each q head, query and key that it sees. reads q, k, v once a block of queries, mostly from L2.
//
// With CHANNELS, a multiple of 8 less than D, a head has so many channels in memory, without a past; the rest, of
// shared memory alone, are zeros, which change no sum: heads of 72 channels are computed as 80.
//
// Set by -D: HEAD_DIM and TILE (multiples of 16), Q_PER_KV (any), BLOCK_WARPS, ROW_TILES (1, 2), BLOCKS_PER_SM.
#include "common.cuh"

#ifndef CHANNELS
#define CHANNELS HEAD_DIM
#endif
constexpr int D = HEAD_DIM, VECTORS = CHANNELS / 8, THREADS = BLOCK_WARPS * 32;
constexpr int WARP_ROWS = 16 * ROW_TILES, BLOCK_ROWS = BLOCK_WARPS * WARP_ROWS;
constexpr int STRIDE = D * 2 + 16;  // bytes of a row of shared memory: eight rows of ldmatrix are in different banks
constexpr int KEY_TILES = TILE / 8, CHANNEL_TILES = D / 8;
constexpr int KEYS_OFFSET = BLOCK_ROWS * STRIDE,
              TILE_BYTES = TILE * STRIDE;  // q | keys, values of one stage | of the other
constexpr float RESCALE_THRESHOLD = 8.f;

// Zeros behind the channels of every row of shared memory, once.
DEVICE void clear_padding(unsigned char* smem) {
  constexpr int PADDING = D / 8 - VECTORS;
  for (int i = threadIdx.x; i < (BLOCK_ROWS + 4 * TILE) * PADDING; i += THREADS)
    *(uint4*)(smem + i / max(PADDING, 1) * STRIDE + (VECTORS + i % max(PADDING, 1)) * 16) = make_uint4(0, 0, 0, 0);
}

// Keys or values of one kv head of a sequence.
struct Tokens {
  const bf16 *past, *recent;
  int start, stride;
  DEVICE const bf16* at(int t) const {
    return t < start ? past + (size_t)t * D : recent + (size_t)(t - start) * stride;
  }
};

// Copies tokens first ... first + TILE - 1, zeros from `end` on: 0 * p is then 0.
DEVICE void copy_tile(unsigned char* to, const Tokens& tokens, int first, int end) {
  for (int i = threadIdx.x; i < TILE * VECTORS; i += THREADS) {
    const int t = first + i / VECTORS, vector = i % VECTORS;
    unsigned char* slot = to + i / VECTORS * STRIDE + vector * 16;
    if (t < end) cp_async_16(slot, tokens.at(t) + vector * 8);
    else *(uint4*)slot = make_uint4(0, 0, 0, 0);
  }
}

// A warp's sums of its rows: lane 4r + c has rows r, r + 8 of each row tile, columns 2c, 2c + 1 of each channel tile.
struct State {
  float o[ROW_TILES][CHANNEL_TILES][4], m[ROW_TILES][2], l[ROW_TILES][2];  // l: of this lane's keys
};

// x[i][n]: q . k of row tile i and keys 8n ... 8n + 7 of the tile.
DEVICE void multiply_keys(float (&x)[ROW_TILES][KEY_TILES][4], const unsigned char* q, const unsigned char* keys) {
  const int lane = threadIdx.x % 32;
  clear(x);
  UNROLL for (int s = 0; s < D / 16; s++) {
    uint32_t a[ROW_TILES][4];
    UNROLL for (int i = 0; i < ROW_TILES; i++)
        ldmatrix_x4(a[i], q + (16 * i + lane % 16) * STRIDE + (2 * s + lane / 16) * 16);
    UNROLL for (int n = 0; n < KEY_TILES; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, keys + (8 * n + lane / 16 * 8 + lane % 8) * STRIDE + (2 * s + lane / 8 % 2) * 16);
      UNROLL for (int i = 0; i < ROW_TILES; i++) {
        mma_m16n8k16_bf16(x[i][n], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
        mma_m16n8k16_bf16(x[i][n + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
      }
    }
  }
}

// Masks the logits of keys after number `last` of the tile in row r (j = 0) or r + 8 (j = 1) of a row tile; c: this
// lane's column pair.
DEVICE void apply_causal_mask(float (&x)[KEY_TILES][4], int j, int c, int last) {
  UNROLL for (int n = 0; n < KEY_TILES; n++)
    UNROLL for (int k = 0; k < 2; k++)
      if (8 * n + 2 * c + k > last) x[n][2 * j + k] = MASKED;
}

// The last key that a row sees; start: that of row 0.
DEVICE int last_key(int start, int row) {
#ifdef FULL
  return start;
#else
  return start + row / Q_PER_KV;
#endif
}

// x becomes p = 2^(x * scale_log2 - m). Row n of the sequence sees the keys of this tile up to number last_key(start,
// n); `row` is the warp's first.
DEVICE void exp_scores(float (&x)[ROW_TILES][KEY_TILES][4], State& state, float scale_log2, int start, int row) {
  const int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const bool sees_all = last_key(start, row) >= TILE - 1;
  float largest[ROW_TILES][2];
  bool rescales = false;
  UNROLL for (int i = 0; i < ROW_TILES; i++)
    UNROLL for (int j = 0; j < 2; j++) {
      if (!sees_all) apply_causal_mask(x[i], j, c, last_key(start, row + 16 * i + 8 * j + r));
      float y = MASKED;
      UNROLL for (int n = 0; n < KEY_TILES; n++) y = fmaxf(y, fmaxf(x[i][n][2 * j], x[i][n][2 * j + 1]));
      y *= scale_log2;
      largest[i][j] = y;
      rescales |= y > state.m[i][j] + RESCALE_THRESHOLD;
    }
  if (__any_sync(FULL_MASK, rescales)) {
    UNROLL for (int i = 0; i < ROW_TILES; i++)
      UNROLL for (int j = 0; j < 2; j++) {
        const float y = quad_max(fmaxf(state.m[i][j], largest[i][j])), factor = ex2(state.m[i][j] - y);
        state.m[i][j] = y;
        state.l[i][j] *= factor;
        UNROLL for (int n = 0; n < CHANNEL_TILES; n++) {
          state.o[i][n][2 * j] *= factor;
          state.o[i][n][2 * j + 1] *= factor;
        }
      }
  }
  UNROLL for (int i = 0; i < ROW_TILES; i++)
    UNROLL for (int n = 0; n < KEY_TILES; n++)
      UNROLL for (int k = 0; k < 4; k++) {
        x[i][n][k] = ex2(fmaf(x[i][n][k], scale_log2, -state.m[i][k / 2]));
        state.l[i][k / 2] += x[i][n][k];
      }
}

DEVICE void multiply_values(State& state, const float (&p)[ROW_TILES][KEY_TILES][4], const unsigned char* values) {
  const int lane = threadIdx.x % 32;
  UNROLL for (int s = 0; s < TILE / 16; s++) {
    uint32_t a[ROW_TILES][4];  // two column tiles of an accumulator, side by side, are laid out like operand A
    UNROLL for (int i = 0; i < ROW_TILES; i++)
      UNROLL for (int k = 0; k < 4; k++) {
        const float(&tile)[4] = p[i][2 * s + k / 2];
        a[i][k] = pack_bf16x2(tile[k % 2 * 2], tile[k % 2 * 2 + 1]);
      }
    UNROLL for (int n = 0; n < CHANNEL_TILES; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, values + (16 * s + lane % 16) * STRIDE + (n + lane / 16) * 16);
      UNROLL for (int i = 0; i < ROW_TILES; i++) {
        mma_m16n8k16_bf16(state.o[i][n], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
        mma_m16n8k16_bf16(state.o[i][n + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    prefill_attention(const bf16* q, const bf16* new_keys, const bf16* new_values, const bf16* past_keys,
                      const bf16* past_values, const int* first_rows, const int* past_rows, const int* starts,
                      const int* counts, bf16* out, int q_stride, int key_stride, int value_stride, int kv_heads,
                      int capacity, float scale_log2) {
  wait_then_allow_next();
  extern __shared__ __align__(128) unsigned char smem[];
  const int sequence = blockIdx.z, head = blockIdx.y, count = counts[sequence], start = starts[sequence];
  const int first = (gridDim.x - 1 - blockIdx.x) * BLOCK_ROWS;  // blocks with the most keys start first
  if (first >= count * Q_PER_KV) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const size_t row = first_rows[sequence];
  const size_t past = ((size_t)(past_rows ? past_rows[sequence] : sequence) * kv_heads + head) * capacity * D;
  const Tokens keys = {past_keys + past, new_keys + row * key_stride + head * CHANNELS, start, key_stride};
  const Tokens values = {past_values + past, new_values + row * value_stride + head * CHANNELS, start, value_stride};
  const bf16* queries = q + row * q_stride + head * Q_PER_KV * CHANNELS;

  clear_padding(smem);
  for (int i = threadIdx.x; i < BLOCK_ROWS * VECTORS; i += THREADS) {
    const int n = first + i / VECTORS, vector = i % VECTORS;
    unsigned char* slot = smem + i / VECTORS * STRIDE + vector * 16;
    const bf16* from = queries + (size_t)(n / Q_PER_KV) * q_stride + n % Q_PER_KV * CHANNELS + vector * 8;
    if (n < count * Q_PER_KV) cp_async_16(slot, from);
    else *(uint4*)slot = make_uint4(0, 0, 0, 0);
  }
#ifdef FULL
  const int end = start + count, first_last = end - 1;
#else
  const int end = start + min((first + BLOCK_ROWS - 1) / Q_PER_KV, count - 1) + 1;  // of the keys that any row sees
  const int first_last = start;  // the last key that row 0 sees
#endif
  copy_tile(smem + KEYS_OFFSET, keys, 0, end);
  copy_tile(smem + KEYS_OFFSET + TILE_BYTES, values, 0, end);
  cp_async_commit();

  State state;
  clear(state.o);
  clear(state.l);
  UNROLL for (int i = 0; i < ROW_TILES; i++) state.m[i][0] = state.m[i][1] = INITIAL_MAX;
  const unsigned char* own = smem + warp * WARP_ROWS * STRIDE;
  for (int at = 0, stage = 0; at < end; at += TILE, stage ^= 1) {
    unsigned char *tile = smem + KEYS_OFFSET + stage * 2 * TILE_BYTES,
                  *next = smem + KEYS_OFFSET + (stage ^ 1) * 2 * TILE_BYTES;
    if (at + TILE < end) {
      copy_tile(next, keys, at + TILE, end);
      copy_tile(next + TILE_BYTES, values, at + TILE, end);
    }
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    float x[ROW_TILES][KEY_TILES][4];
    multiply_keys(x, own, tile);
    exp_scores(x, state, scale_log2, first_last - at, first + warp * WARP_ROWS);
    multiply_values(state, x, tile + TILE_BYTES);
    __syncthreads();  // before the next copies overwrite this tile
  }

  // first_rows is loaded again, which saves a register.
  bf16* result = out + ((size_t)first_rows[sequence] * kv_heads + head) * Q_PER_KV * CHANNELS + 2 * c;
  const int rows = counts[sequence] * Q_PER_KV;
  UNROLL for (int i = 0; i < ROW_TILES; i++)
    UNROLL for (int j = 0; j < 2; j++) {
      float l = state.l[i][j];
      l += __shfl_xor_sync(FULL_MASK, l, 1);
      l += __shfl_xor_sync(FULL_MASK, l, 2);
      const float inverse = 1.f / l;
      const int n = first + warp * WARP_ROWS + 16 * i + 8 * j + r;
      if (n >= rows) continue;
      bf16* to = result + ((size_t)(n / Q_PER_KV) * kv_heads * Q_PER_KV + n % Q_PER_KV) * CHANNELS;
      UNROLL for (int k = 0; k < VECTORS; k++)
        *(uint32_t*)(to + 8 * k) = pack_bf16x2(state.o[i][k][2 * j] * inverse, state.o[i][k][2 * j + 1] * inverse);
    }
}
