// sm90/prepared_x.cuh: the order and the unit in which quantized_batch.cu multiplies x, made by prepare_x.cu or by
// itself.
//
// Of 32 columns a lane's codes have 8c + 4s + 2p + {0, 1} in register 2p + i of step s, where wgmma has 16s + 8p + 2c +
// {0, 1}: the four words of four vectors of x are transposed.
#ifndef MINIOSCAR_PREPARED_X_CUH
#define MINIOSCAR_PREPARED_X_CUH
#include "../quantized/codes.cuh"

DEVICE float sum_of(uint4 v) {
  return ((low(v.x) + high(v.x)) + (low(v.y) + high(v.y))) + ((low(v.z) + high(v.z)) + (low(v.w) + high(v.w)));
}
// 32 neighbouring k of a token, times 2^100 and transposed. Returns the sum of what they were.
DEVICE float prepare_block(uint4 (&v)[4]) {
  const float sum = (sum_of(v[0]) + sum_of(v[1])) + (sum_of(v[2]) + sum_of(v[3]));
  uint4 x[4];
  UNROLL for (int c = 0; c < 4; c++) x[c] = ScaledX()(v[c]);
  UNROLL for (int j = 0; j < 4; j++) v[j] = make_uint4(word(x[0], j), word(x[1], j), word(x[2], j), word(x[3], j));
  return sum;
}
#endif
