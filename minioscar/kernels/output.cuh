// output.cuh: the type of a kernel's results: BF16 or, with -DOUT_BF16=0, float32.
#ifndef MINIOSCAR_OUTPUT_CUH
#define MINIOSCAR_OUTPUT_CUH
#include "common.cuh"

#if OUT_BF16
typedef bf16 Output;
DEVICE bf16 to_output(float x) { return to_bf16(x); }
DEVICE void store_pair(bf16* to, float x, float y) { *(uint32_t*)to = pack_bf16x2(x, y); }
DEVICE void store_output(bf16* to, float x, float y, float z, float w) {
  *(uint2*)to = make_uint2(pack_bf16x2(x, y), pack_bf16x2(z, w));
}
#else
typedef float Output;
DEVICE float to_output(float x) { return x; }
DEVICE void store_pair(float* to, float x, float y) { *(float2*)to = make_float2(x, y); }
DEVICE void store_output(float* to, float x, float y, float z, float w) { *(float4*)to = make_float4(x, y, z, w); }
#endif
#endif
