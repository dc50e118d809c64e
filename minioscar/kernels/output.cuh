// output.cuh: what a kernel's results are stored as: BF16 or, with -DOUT_BF16=0, float32.
#ifndef MINIOSCAR_OUTPUT_CUH
#define MINIOSCAR_OUTPUT_CUH
#include <cuda_bf16.h>

typedef __nv_bfloat16 bf16;
#if OUT_BF16
typedef bf16 Output;
__device__ __forceinline__ bf16 to_output(float x) { return __float2bfloat16_rn(x); }
#else
typedef float Output;
__device__ __forceinline__ float to_output(float x) { return x; }
#endif
#endif
