// small_float.h: half and bfloat16, rounded to nearest even once from the exact result, subnormals kept.
#pragma once
#include "simt.h"

namespace simt {

// P significant bits, smallest normal 2^EMIN.
template <int P, int EMIN>
struct Small {
  uint16_t bits;
  Small() = default;
  SIMT_INLINE Small(float f) : Small(from(f)) {}
  SIMT_INLINE operator float() const { return value(); }

  static constexpr int MANTISSA = P - 1, EXPONENT = 15 - MANTISSA;  // stored bits of each
  static constexpr uint32_t INF = ((1u << EXPONENT) - 1) << MANTISSA;
  static SIMT_INLINE Small raw(uint32_t bits) { Small s; s.bits = (uint16_t)bits; return s; }

  static __attribute__((noinline)) Small from(double x) {
    const uint32_t sign = signbit(x) ? 0x8000 : 0;
    if (x != x) return raw(0x7FFF);  // CUDA's canonical NaN
    x = fabs(x);
    int e = x > 0 ? ilogb(x) : EMIN;
    if (e < EMIN) e = EMIN;
    if (e > -EMIN + 1) return raw(sign | INF);
    const uint32_t m =
        (uint32_t)nearbyint(ldexp(x, MANTISSA - e));  // below 2^P; 2^P carries into the exponent, and into infinity
    const uint32_t r = m < (1u << MANTISSA) ? m : ((uint32_t)(e - EMIN + 1) << MANTISSA) + (m - (1u << MANTISSA));
    return raw(sign | r);
  }
  SIMT_INLINE float value() const {
    if (MANTISSA == 7) return bits_of<float>((uint32_t)bits << 16);
    float f = bits_of<float>((uint32_t)(bits & 0x7FFF) << 13) * 0x1p112f;
    if ((bits & INF) == INF) f = bits_of<float>((uint32_t)(bits & 0x7FFF) << 13 | 0x7F800000u);
    return bits & 0x8000 ? -f : f;
  }
  // A double has more than 2P + 2 bits, so rounding its result again is right.
  friend SIMT_INLINE Small operator+(Small a, Small b) { return from((double)a.value() + b.value()); }
  friend SIMT_INLINE Small operator-(Small a, Small b) { return from((double)a.value() - b.value()); }
  friend SIMT_INLINE Small operator*(Small a, Small b) { return from((double)a.value() * b.value()); }
  friend SIMT_INLINE Small operator/(Small a, Small b) { return from((double)a.value() / b.value()); }
  friend SIMT_INLINE Small operator-(Small a) { return raw(a.bits ^ 0x8000); }
  SIMT_INLINE Small& operator+=(Small b) { return *this = *this + b; }
  SIMT_INLINE Small& operator*=(Small b) { return *this = *this * b; }
  // Not so of a fused multiply-add: a product may lie in the middle between two numbers, and c be too small to move
  // it. What the double loses goes into its last bit ("round to odd"), after which it may be rounded again.
  static __attribute__((noinline)) Small fma(Small a, Small b, Small c) {
    const double product = (double)a.value() * b.value(), z = c.value(), sum = product + z, part = sum - product;
    const double lost = (product - (sum - part)) + (z - part);  // exactly
    const bool even = !(bits_of<uint64_t>(sum) & 1);
    return from(even && lost > 0 ? nextafter(sum, INFINITY) : even && lost < 0 ? nextafter(sum, -INFINITY) : sum);
  }
};

template <class T>
struct alignas(4) Pair { T x, y; };

#define SIMT_EACH(a, expression_x, expression_y) { return {expression_x, expression_y}; }
#define SIMT_T template <int P, int E> SIMT_INLINE
#define SIMT_S Small<P, E>
#define SIMT_P Pair<Small<P, E>>
#define SIMT_BINARY(name, expression)                                             \
  SIMT_T SIMT_S name(SIMT_S a, SIMT_S b) { return expression; }                   \
  SIMT_T SIMT_P name##2(SIMT_P p, SIMT_P q) { return {name(p.x, q.x), name(p.y, q.y)}; }
#define SIMT_COMPARE(name, op) SIMT_T bool name(SIMT_S a, SIMT_S b) { return a.value() op b.value(); }
#define SIMT_UNARY(name, expression)                                              \
  SIMT_T SIMT_S name(SIMT_S a) { return expression; }                             \
  SIMT_T SIMT_P name##2(SIMT_P p) { return {name(p.x), name(p.y)}; }
SIMT_BINARY(__hadd, a + b)
SIMT_BINARY(__hsub, a - b)
SIMT_BINARY(__hmul, a * b)
SIMT_BINARY(__hadd_rn, a + b)
SIMT_BINARY(__hmul_rn, a * b)
SIMT_BINARY(__hmax, a.value() != a.value() || b.value() > a.value() ? b : a)
SIMT_BINARY(__hmin, a.value() != a.value() || b.value() < a.value() ? b : a)
SIMT_UNARY(__hneg, -a)
SIMT_UNARY(__habs, SIMT_S::raw(a.bits & 0x7FFF))
SIMT_COMPARE(__heq, ==)
SIMT_COMPARE(__hne, !=) SIMT_COMPARE(__hlt, <) SIMT_COMPARE(__hle, <=) SIMT_COMPARE(__hgt, >)
    SIMT_COMPARE(__hge, >=) SIMT_T SIMT_S __hdiv(SIMT_S a, SIMT_S b) {
  return a / b;
}
SIMT_T SIMT_S __hfma(SIMT_S a, SIMT_S b, SIMT_S c) { return SIMT_S::fma(a, b, c); }
SIMT_T SIMT_P __hfma2(SIMT_P a, SIMT_P b, SIMT_P c) { return {SIMT_S::fma(a.x, b.x, c.x), SIMT_S::fma(a.y, b.y, c.y)}; }
SIMT_T bool __hisnan(SIMT_S a) { return a.value() != a.value(); }
SIMT_T SIMT_P operator+(SIMT_P a, SIMT_P b) { return __hadd2(a, b); }
SIMT_T SIMT_P operator-(SIMT_P a, SIMT_P b) { return __hsub2(a, b); }
SIMT_T SIMT_P operator*(SIMT_P a, SIMT_P b) { return __hmul2(a, b); }
SIMT_T SIMT_S __low2half(SIMT_P a) { return a.x; }
SIMT_T SIMT_S __high2half(SIMT_P a) { return a.y; }
SIMT_T float __low2float(SIMT_P a) { return a.x.value(); }
SIMT_T float __high2float(SIMT_P a) { return a.y.value(); }
SIMT_T SIMT_P __lowhigh2highlow(SIMT_P a) { return {a.y, a.x}; }
}  // namespace simt
