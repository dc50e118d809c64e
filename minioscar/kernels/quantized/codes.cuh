// quantized/codes.cuh: codes of 4 and 8 bits as operand A of mma.m16n8k16, and scales and zeros of their groups.
// Layout: minioscar/quantized.
//
// A code becomes a BF16 number by masks and shifts alone: as the low bits of a half, which is linear through BF16's
// subnormals, a code q is q * 2^-133 (tensor cores multiply subnormals exactly); the exponent and mantissa of e4m3,
// four bits further up, are its value * 2^-120. x is multiplied by 2^100, which is exact, so that products are normal
// numbers. Nibbles of odd rows stay four bits up: 16 q * 2^-133, and 1/16 joins what finishes the row.
//
// Zeros and scales are applied to the sums of a group, in float32:
//   y += scale * (sum_k code * x - zero * sum_k x)       sum_k x by an MMA whose operand A is the code 1 everywhere
//
// Set by -D: KIND (INT4, INT8, E4M3).
#ifndef MINIOSCAR_CODES_CUH
#define MINIOSCAR_CODES_CUH
#include "../common.cuh"

constexpr int INT4 = 4, INT8 = 8, E4M3 = 43;
constexpr bool HAS_ZERO = KIND != E4M3;
constexpr int LOADS = KIND == INT4 ? 1 : 2;  // 16-byte loads of a lane: its codes of 16 rows and 64 k
constexpr int TILE_VECTORS = 32 * LOADS;     // 16-byte vectors of 16 rows and 64 k

// Of operand A and x together; ODD: of rows 2r + 1, else of rows 2r.
template <bool ODD> DEVICE constexpr float unit() {
  return KIND == E4M3 ? 1.f / (1 << 20) : 1.f / (1 << 29) / (KIND == INT4 && ODD ? 1 : 16);
}
DEVICE float to_result(float sum, bool odd) { return sum * (odd ? 1.f / unit<true>() : 1.f / unit<false>()); }

// x * 2^100, eight numbers.
struct ScaledX {
  DEVICE uint4 operator()(uint4 x) const {
    constexpr uint32_t FACTOR = 0x71807180u;
    return make_uint4(mul_bf16x2(x.x, FACTOR), mul_bf16x2(x.y, FACTOR), mul_bf16x2(x.z, FACTOR),
                      mul_bf16x2(x.w, FACTOR));
  }
};

DEVICE uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Registers 2p and 2p + 1 of operand A; w: of 4 bits both words are the same.
DEVICE void decode(uint32_t& even, uint32_t& odd, uint32_t w, int p) {
  if (KIND == INT4) {
    const uint32_t shifted = p ? w >> 8 : w;
    even = shifted & 0x000f000fu;
    odd = shifted & 0x00f000f0u;
  } else if (KIND == INT8) {
    even = w & 0x00ff00ffu;
    odd = w >> 8 & 0x00ff00ffu;
  } else {
    even = w & 0x87f087f0u;
    odd = (w >> 4 & 0x07000700u | w << 4 & 0xf8fff8ffu) & 0x87f087f0u;
  }
}
// Operand A of step s of the four of a run of 64 k. w: a lane's codes of 16 rows. Opaque: decoded ahead of their
// products, operands would hold registers.
DEVICE void operand(uint32_t (&a)[4], const uint4 (&w)[LOADS], int s) {
  const uint32_t first = opaque(word(w[s / 2 * (LOADS - 1)], KIND == INT4 ? s : s % 2 * 2));
  decode(a[0], a[1], first, 0);
  decode(a[2], a[3], KIND == INT4 ? first : opaque(word(w[s / 2 * (LOADS - 1)], s % 2 * 2 + 1)), 1);
}
// sum += a . x of step s, or with `first` sum = a . x. b: a lane's x of a run, columns 8c ... of its first and of its
// second half.
DEVICE void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint4 (&b)[2], int s, bool first) {
  const uint32_t x[2] = {word(b[s / 2], s % 2 * 2), word(b[s / 2], s % 2 * 2 + 1)};
  if (first)
    mma_m16n8k16_bf16_zero(sum, a[0], a[1], a[2], a[3], x[0], x[1]);
  else
    mma_m16n8k16_bf16(sum, a[0], a[1], a[2], a[3], x[0], x[1]);
}
// Adds x of step s to its sums, 128 times those that code 1 would give. Operand A is the least normal number: a tensor
// core aligns a subnormal as if it were that, and would truncate products of code 1 seven bits higher.
DEVICE void add_x(float (&x_sum)[4], const uint4 (&b)[2], int s, bool first) {
  const uint32_t ones[4] = {0x00800080u, 0x00800080u, 0x00800080u, 0x00800080u};
  multiply(x_sum, ones, b, s, first);
}
// Of two columns, as the sums of code 1 would be in even rows.
DEVICE float2 sums_of_x(const float (&x_sum)[4]) { return make_float2(x_sum[0] / 128.f, x_sum[1] / 128.f); }

// Scales and zeros of rows 2r and 2r + 1 of a group.
struct RowScales {
  float scale[2], zero[2];  // zero: of sums of x in the unit of even rows

  // rows: a word of each row; of e4m3 one of both.
  DEVICE void set(uint2 rows) {
    UNROLL for (int i = 0; i < 2; i++) {
      const uint32_t of_row = i ? rows.y : rows.x;
      scale[i] = HAS_ZERO ? low_f16(of_row) : __uint_as_float(rows.x);
      zero[i] = HAS_ZERO ? high_f16(of_row) * (i ? unit<true>() / unit<false>() : 1.f) : 0.f;
    }
  }
  // words: [group][16 rows], of e4m3 [group].
  DEVICE void load(const unsigned char* words, int group, int r) {
    set(HAS_ZERO ? *(const uint2*)(words + group * 64 + r * 8) : make_uint2(*(const uint32_t*)(words + group * 4), 0));
  }
  // y += scale * (sum - zero * x_sum), x_sum: of two columns.
  DEVICE void add(float (&y)[4], const float (&sum)[4], float2 x_sum) const {
    UNROLL for (int i = 0; i < 4; i++) {
      const float centered = HAS_ZERO ? fmaf(-zero[i / 2], i % 2 ? x_sum.y : x_sum.x, sum[i]) : sum[i];
      y[i] = fmaf(scale[i / 2], centered, y[i]);
    }
  }
};
#endif
