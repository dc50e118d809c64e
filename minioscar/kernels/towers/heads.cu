// heads.cu: from the products with q's, k's and v's matrices of a tower to what attention takes, in place.
//
//   z[t, :] += bias, of z = q, k, v; then, of q and k, channels i and i + d/2 of every head turn by an angle:
//   a, b -> a cos - b sin, b cos + a sin         where there are tables (rotary positions, arXiv 2104.09864)
//   Pair i of d/2 turns by the patch's row, angle cos[row][i], in the first half of pairs, by its column in the other.
//
// q, k, v BF16, rows `stride` numbers apart, heads side by side, d channels each, a multiple of 8; biases BF16 (null:
// none); rows_columns int32 [tokens, 2] and cos, sin float32 [places, d/4] (null: none). Float32 inside, rounded once.
// grid (tokens, 3), 128 threads of two times four channels each; reads and writes 2 B a number.
//
// Set by -D: HEAD_DIM, HEADS.
#include "../common.cuh"

constexpr int D = HEAD_DIM, QUARTER = D / 4, ITEMS = HEADS * D / 8;  // of eight channels

struct Four {
  float x[4];
  DEVICE Four(const uint2& v) : x{low(v.x), high(v.x), low(v.y), high(v.y)} {}
  DEVICE uint2 packed() const { return make_uint2(pack_bf16x2(x[0], x[1]), pack_bf16x2(x[2], x[3])); }
};

DEVICE Four loaded(const bf16* row, const bf16* bias, int at) {
  Four z(*(const uint2*)(row + at));
  if (bias) {
    const Four more(*(const uint2*)(bias + at));
    UNROLL for (int k = 0; k < 4; k++) z.x[k] += more.x[k];
  }
  return z;
}

extern "C" __global__ void __launch_bounds__(128)
    heads(bf16* q, bf16* keys, bf16* values, const bf16* q_bias, const bf16* key_bias, const bf16* value_bias,
          const int2* rows_columns, const float* cos, const float* sin, int stride) {
  wait_then_allow_next();
  const int which = blockIdx.y;
  bf16* const row = (which == 0 ? q : which == 1 ? keys : values) + (size_t)blockIdx.x * stride;
  const bf16* const bias = which == 0 ? q_bias : which == 1 ? key_bias : value_bias;
  const bool turns = cos && which < 2;
  const int2 place = turns ? rows_columns[blockIdx.x] : make_int2(0, 0);
  for (int i = threadIdx.x; i < ITEMS; i += 128) {
    const int pair = i % (D / 8) * 4, at = i / (D / 8) * D + pair;  // the first of four pairs
    Four a = loaded(row, bias, at), b = loaded(row, bias, at + D / 2);
    if (turns) UNROLL for (int k = 0; k < 4; k++) {
        const int n = pair + k < QUARTER ? place.x * QUARTER + pair + k : place.y * QUARTER + pair + k - QUARTER;
        const float c = cos[n], s = sin[n], x = a.x[k];
        a.x[k] = x * c - b.x[k] * s;
        b.x[k] = b.x[k] * c + x * s;
      }
    *(uint2*)(row + at) = a.packed();
    *(uint2*)(row + at + D / 2) = b.packed();
  }
}
