// output.cuh: what a kernel's results are stored as: BF16 or, with -DOUT_BF16=0, float32.
#ifndef MINIOSCAR_OUTPUT_CUH
#define MINIOSCAR_OUTPUT_CUH
#include <cuda_bf16.h>
#include "device.cuh"

typedef __nv_bfloat16 bf16;
#if OUT_BF16
typedef bf16 Output;
__device__ __forceinline__ bf16 to_output(float x) { return __float2bfloat16_rn(x); }
__device__ __forceinline__ void store_output(bf16* to, float x, float y, float z, float w) { *(uint2*)to = make_uint2(pack_bf16x2(x, y), pack_bf16x2(z, w)); }
#else
typedef float Output;
__device__ __forceinline__ float to_output(float x) { return x; }
__device__ __forceinline__ void store_output(float* to, float x, float y, float z, float w) { *(float4*)to = make_float4(x, y, z, w); }
#endif
#endif
