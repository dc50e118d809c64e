// The codes of every 16-bit half, as registers of operand A: tests/test_linear_quantized.py.
#include "../../../minioscar/kernels/quantized/codes.cuh"

// out [65536][2][2]: register 2p and 2p + 1 of a word that has the half in both places, for p = 0 and 1.
extern "C" __global__ void decode_all(uint32_t* out) {
  const uint32_t half = blockIdx.x * blockDim.x + threadIdx.x;
  for (int p = 0; p < 2; p++) {
    uint32_t even, odd;
    decode(even, odd, half | half << 16, p);
    out[4 * half + 2 * p] = even;
    out[4 * half + 2 * p + 1] = odd;
  }
}
