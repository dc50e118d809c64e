// rotate_scale.cu: from the qkv projection to what attention and the cache take (oscar.py, steps 1 and 2).
//
//   x = QK-norm(x) (if the model has it), RoPE(x) (half-split pairs), x . H (if the scheme rotates)
//   x: heads of q, then k
//   V'[t,h,:] = V[t,h,:] . H for quantized weights, which cannot have it in v_proj
//   norms[t] = || K'[t,:,:] || over all kv heads, 1 where that is 0
//
// qkv [tokens, (q_heads + 2 kv_heads) * d] bf16; q_out [tokens, q_heads, d]; cos, sin [positions, d/2] float32. Keys
// and, where `values` is given, values go to k_out and values [tokens, kv_heads, d] if k_out is given (prefill), else
// into the cache (decode): keys and values [slot, kv_heads, capacity, d] at position % capacity (128 of a window, the
// context of a plain BF16 cache). rotate: 1 for queries and keys, plus 2 for values. norms [blocks][128], of position t
// in block table[slot][t / 128] (LAYOUT.md). H is the normalized Walsh-Hadamard matrix. A lane has 16 numbers of a
// head, 8 neighbours and their partners in RoPE: two reads and writes of 16 bytes; four stages of the transform in
// registers, the others are shuffles among the d / 16 lanes of the head.
// grid (tokens, 1 + ceil(q_heads / 16)), a block has the lanes of 16 heads. The first block of a token has its keys
// and values, so that it sums the keys' norm in a fixed order. All arithmetic is float32; K' is rounded to bf16
// before its norm is taken.
// With SHARED_KEYS qkv has the keys of all key_heads, for their norms; the kv_heads from first_key on are stored.
// With SHIFTED, of models that read pictures, the tables' row of a token is its position + shifts[token].
// reads and writes 2 B an element. A token at position < 0 is skipped.
#include "common.cuh"

constexpr int DIM = HEAD_DIM, PER_LANE = 16, HALF = PER_LANE / 2, LANES = DIM / PER_LANE;  // of a lane; of a head
constexpr int WORDS = PER_LANE / 2, BLOCK_TOKENS = 128;  // of a lane; whose norms a block of the cache has
constexpr int KEYS = 1, VALUES = 2;  // bits of `rotate`
constexpr int HEADS_PER_BLOCK = 16, THREADS = HEADS_PER_BLOCK * LANES, HEADS_PER_WARP = 32 / LANES;
#ifdef SHARED_KEYS
#define KEYS_ARGUMENTS , int key_heads, int first_key
#define QKV_HEADS (q_heads + key_heads + kv_heads)
#define IS_KEPT(head) (!has_keys || (unsigned)(head - first_key) < (unsigned)kv_heads)
#define KEPT(head) min(max(head - first_key, 0), kv_heads - 1)
#else
#define KEYS_ARGUMENTS
#define QKV_HEADS (q_heads + 2 * kv_heads)
#define key_heads kv_heads
#define IS_KEPT(head) true
#define KEPT(head) head
#endif
#ifdef SHIFTED
#define SHIFTS_ARGUMENT , const int* shifts
#define TABLE_SHIFT + shifts[blockIdx.x]
#else
#define SHIFTS_ARGUMENT
#define TABLE_SHIFT
#endif
static_assert(DIM == 64 || DIM == 128 || DIM == 256, "head_dim");

// A lane's numbers of a head: channels 8 * lane ... and DIM / 2 + 8 * lane ..., two in a word.
DEVICE void load(uint32_t (&words)[WORDS], const bf16* head, int lane) {
  UNROLL for (int half = 0; half < 2; half++) {
    const uint4 x = *(const uint4*)(head + lane * HALF + half * (DIM / 2));
    const uint32_t four[4] = {x.x, x.y, x.z, x.w};
    UNROLL for (int i = 0; i < 4; i++) words[4 * half + i] = four[i];
  }
}
DEVICE void store(bf16* head, const uint32_t (&words)[WORDS], int lane) {
  UNROLL for (int half = 0; half < 2; half++)
    *(uint4*)(head + lane * HALF + half * (DIM / 2)) =
        make_uint4(words[4 * half], words[4 * half + 1], words[4 * half + 2], words[4 * half + 3]);
}
DEVICE float number(const uint32_t (&words)[WORDS], int i) { return i % 2 ? high(words[i / 2]) : low(words[i / 2]); }
// row [DIM / 2]: cosines or sines of a position.
DEVICE void load_angles(float (&x)[HALF], const float* row, int lane) {
  UNROLL for (int i = 0; i < HALF; i += 4) {
    const float4 angles = *(const float4*)(row + lane * HALF + i);
    const float four[4] = {angles.x, angles.y, angles.z, angles.w};
    UNROLL for (int j = 0; j < 4; j++) x[i + j] = four[j];
  }
}

// sqrt(DIM) x . H of the head that these lanes hold.
DEVICE void hadamard(float (&x)[PER_LANE], int lane) {
  UNROLL for (int stride = 1; stride < PER_LANE;
              stride *= 2)  // within a lane; the last stage pairs the two halves of the head
      UNROLL for (int i = 0; i < PER_LANE; i++) if (!(i & stride)) {
    const float a = x[i], b = x[i + stride];
    x[i] = a + b;
    x[i + stride] = a - b;
  }
  UNROLL for (int other = 1; other < LANES; other *= 2) {
    const float sign = lane & other ? -1.f : 1.f;
    // The product with +-1 is exact: fmaf rounds the sum alone.
    UNROLL for (int i = 0; i < PER_LANE; i++) x[i] = fmaf(sign, x[i], __shfl_xor_sync(FULL_MASK, x[i], other));
  }
}

// x . H of a head.
DEVICE void rotate_head(uint32_t (&words)[WORDS], int lane) {
  float x[PER_LANE];
  UNROLL for (int i = 0; i < PER_LANE; i++) x[i] = number(words, i);
  hadamard(x, lane);
  const float factor = rsqrtf((float)DIM);
  UNROLL for (int i = 0; i < WORDS; i++) words[i] = pack_bf16x2(x[2 * i] * factor, x[2 * i + 1] * factor);
}

// At most 64 registers, so that a multiprocessor has 32 warps: with many tokens some compute while others read.
extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS)
    rotate_scale(const bf16* __restrict__ qkv, const bf16* q_weight, const bf16* k_weight, const float* cosines,
                 const float* sines, const int* positions, const int* slots, bf16* __restrict__ q_out,
                 bf16* __restrict__ k_out, bf16* __restrict__ keys, bf16* __restrict__ values,
                 float* __restrict__ norms, const int* table, int q_heads, int kv_heads, int capacity,
                 int table_stride, int rotate, float eps KEYS_ARGUMENTS SHIFTS_ARGUMENT) {
  __shared__ float squares[THREADS / 32];
  // The shuffle tells the compiler that `warp` is uniform; else every shuffle in the loop gets a divergent version.
  const int warp = __shfl_sync(FULL_MASK, threadIdx.x / 32, 0), lane = threadIdx.x % LANES,
            position = positions[blockIdx.x];
  const bool has_keys = blockIdx.y == 0;
  allow_next();  // decode attention copies pages meanwhile, older than the projection; in a prefill the next one waits
  // Weights, angles, table, positions and slots are older than the previous launch and loaded while it ends. They are
  // not __restrict__: the compiler would move the loads after the wait.
  const bf16* weight = has_keys ? k_weight : q_weight;
  uint32_t weights[WORDS];
  if (weight) load(weights, weight, lane);
  const size_t row = (size_t)max(position TABLE_SHIFT, 0) * (DIM / 2);
  float cosine[HALF], sine[HALF];
  load_angles(cosine, cosines + row, lane);
  load_angles(sine, sines + row, lane);
  const size_t token = blockIdx.x, slot = slots ? slots[token] : token;
  int norm_at = max(position, 0);
  if (has_keys && norms)
    norm_at = table[slot * table_stride + norm_at / BLOCK_TOKENS] * BLOCK_TOKENS + norm_at % BLOCK_TOKENS;
  wait_for_previous();
  if (position < 0) return;
  const bf16* in = qkv + token * QKV_HEADS * DIM;
  float sum = 0.f;
  const int end = has_keys ? key_heads : q_heads;
  int first = (has_keys ? 0 : (blockIdx.y - 1) * HEADS_PER_BLOCK) + warp * HEADS_PER_WARP;
  for (; first < end; first += has_keys ? HEADS_PER_BLOCK : end) {
    const int lane_head = first + threadIdx.x % 32 / LANES, head = min(lane_head, end - 1);
    const int kept = KEPT(head);
    const bool exists = lane_head < end, own = exists && IS_KEPT(head);  // others repeat the last head, to shuffle
    uint32_t words[WORDS];
    load(words, in + ((has_keys ? q_heads : 0) + head) * DIM, lane);
    bf16* out = has_keys ? k_out + (token * kv_heads + kept) * DIM : q_out + (token * q_heads + head) * DIM;
    if (has_keys && values) {
      const size_t offset = k_out ? (token * kv_heads + kept) * DIM
                                  : ((slot * kv_heads + kept) * capacity + position % capacity) * DIM;
      uint32_t value[WORDS];
      load(value, in + (q_heads + key_heads + kept) * DIM, lane);
      if (rotate & VALUES) rotate_head(value, lane);
      if (own) store(values + offset, value, lane);
      if (!k_out) out = keys + offset;
    }
    float x[PER_LANE], factor = rotate & KEYS ? rsqrtf((float)DIM) : 1.f;  // of a head, applied last: QK-norm's and H's
    UNROLL for (int i = 0; i < PER_LANE; i++) x[i] = number(words, i);
    if (weight) {
      float square = 0.f;
      UNROLL for (int i = 0; i < WORDS; i++) weights[i] = opaque(weights[i]);
      UNROLL for (int i = 0; i < PER_LANE; i++) {
        square += x[i] * x[i];
        x[i] *= number(weights, i);
      }
      factor *= rsqrtf(warp_sum<LANES>(square) / (float)DIM + eps);
    }
    UNROLL for (int i = 0; i < HALF; i++) {
      const float a = x[i], b = x[i + HALF];
      x[i] = a * cosine[i] - b * sine[i];
      x[i + HALF] = b * cosine[i] + a * sine[i];
    }
    if (rotate & KEYS) hadamard(x, lane);
    UNROLL for (int i = 0; i < WORDS; i++) words[i] = pack_bf16x2(x[2 * i] * factor, x[2 * i + 1] * factor);
    if (!exists) continue;
    if (own) store(out, words, lane);
    if (!has_keys) continue;
    UNROLL for (int i = 0; i < PER_LANE; i++) sum += number(words, i) * number(words, i);
  }
  if (!has_keys || !norms) return;
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) squares[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.f;
    for (int w = 0; w < THREADS / 32; w++) total += squares[w];
    norms[norm_at] = total == 0.f ? 1.f : total * rsqrtf(total);
  }
}

// In place: heads [count, d] times H. Behind attention, where values were rotated here; a matrix's heads when it is
// loaded. grid (ceil(count / 16)). reads and writes 2 B a number.
extern "C" __global__ void __launch_bounds__(THREADS) rotate_heads(bf16* x, int count) {
  wait_then_allow_next();
  const int own = blockIdx.x * HEADS_PER_BLOCK + threadIdx.x / LANES, lane = threadIdx.x % LANES;
  uint32_t words[WORDS] = {};  // lanes without a head shuffle zeros
  if (own < count) load(words, x + (size_t)own * DIM, lane);
  rotate_head(words, lane);
  if (own < count) store(x + (size_t)own * DIM, words, lane);
}
