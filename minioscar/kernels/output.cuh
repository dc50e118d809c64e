// output.cuh: what a kernel's results are stored as: BF16 or, with -DOUT_BF16=0, float32.
#ifndef MINIOSCAR_OUTPUT_CUH
#define MINIOSCAR_OUTPUT_CUH
#include "device.cuh"

typedef unsigned short bf16;  // its bits: NVRTC finds cuda_bf16.h through CuPy alone, which does not compile for sm_90a
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((uint32_t)x << 16); }
#if OUT_BF16
typedef bf16 Output;
__device__ __forceinline__ bf16 to_output(float x) { return to_bf16(x); }
__device__ __forceinline__ void store_pair(bf16* to, float x, float y) { *(uint32_t*)to = pack_bf16x2(x, y); }
__device__ __forceinline__ void store_output(bf16* to, float x, float y, float z, float w) { *(uint2*)to = make_uint2(pack_bf16x2(x, y), pack_bf16x2(z, w)); }
#else
typedef float Output;
__device__ __forceinline__ float to_output(float x) { return x; }
__device__ __forceinline__ void store_pair(float* to, float x, float y) { *(float2*)to = make_float2(x, y); }
__device__ __forceinline__ void store_output(float* to, float x, float y, float z, float w) { *(float4*)to = make_float4(x, y, z, w); }
#endif
#endif
