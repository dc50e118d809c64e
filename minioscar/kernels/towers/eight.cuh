// eight.cuh: the eight BF16 numbers of a vector of 16 bytes, as float32.
#ifndef MINIOSCAR_EIGHT_CUH
#define MINIOSCAR_EIGHT_CUH
#include "../common.cuh"

struct Eight {
  float x[8];
  DEVICE Eight(const uint4& v)
      : x{low(v.x), high(v.x), low(v.y), high(v.y), low(v.z), high(v.z), low(v.w), high(v.w)} {}
  DEVICE uint4 packed() const {
    return make_uint4(pack_bf16x2(x[0], x[1]), pack_bf16x2(x[2], x[3]), pack_bf16x2(x[4], x[5]),
                      pack_bf16x2(x[6], x[7]));
  }
};
#endif
