// quantized/repack.cu: codes of a matrix, a byte each, in the order in which the products read them.
//
// plain uint8 [N][K], K a multiple of 8; codes: minioscar/quantized, 0 where there is no row or column. As NumPy has
// it in `Quantized.from_plain`.
//
// A warp has 16 rows and 64 k at a time. A lane reads 8 neighbouring codes of two rows in either half and writes 16
// bytes, or twice 16. Moves 1 B a weight in, 0.5 or 1 B out.
// grid (blocks of 8 runs of 64 k, tiles of 16 rows), 256 threads.
//
// Set by -D: KIND.
#include "codes.cuh"

// The word of registers 2p and 2p + 1 of both rows; x: 4 codes of step s of each. Of 4 bits: of all four registers.
DEVICE uint32_t packed(const uint32_t (&x)[2], int p) {
  uint32_t found = 0;
  UNROLL for (int e = 0; e < 2; e++)
    UNROLL for (int q = 0; q < (KIND == INT4 ? 2 : 1); q++) {
      const int at = 8 * (2 * (KIND == INT4 ? q : p) + e);  // of the code in x
      const uint32_t first = x[0] >> at & 255, second = x[1] >> at & 255;
      if (KIND == INT4)
        found |= (first | second << 4) << (16 * e + 8 * q);
      else if (KIND == INT8)
        found |= (first | second << 8) << 16 * e;
      else
        found |= ((first & 0x80) << 8 | (first & 0x7f) << 4 | (second & 0x80) << 4 | (second & 0x70) << 8 | second & 15)
                 << 16 * e;
    }
  return found;
}

extern "C" __global__ void __launch_bounds__(256) repack(const unsigned char* plain, uint4* codes, int N, int K) {
  wait_then_allow_next();
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, tile = blockIdx.y;
  const int runs = (K + 63) / 64, run = blockIdx.x * 8 + threadIdx.x / 32;
  if (run >= runs) return;
  uint32_t x[2][2][2];  // half, step, row
  UNROLL for (int h = 0; h < 2; h++)
    UNROLL for (int i = 0; i < 2; i++) {
      const int n = tile * 16 + 2 * r + i, k = run * 64 + 32 * h + 8 * c;
      const bool exists = n < N && k < K;
      const uint2 eight = exists ? *(const uint2*)(plain + (size_t)n * K + k) : make_uint2(0, 0);
      x[h][0][i] = eight.x;
      x[h][1][i] = eight.y;
    }
  uint4* to = codes + ((size_t)tile * runs + run) * TILE_VECTORS + lane;
  if (KIND == INT4)
    *to = make_uint4(packed(x[0][0], 0), packed(x[0][1], 0), packed(x[1][0], 0), packed(x[1][1], 0));
  else
    UNROLL for (int h = 0; h < 2; h++)
      to[32 * h] = make_uint4(packed(x[h][0], 0), packed(x[h][0], 1), packed(x[h][1], 0), packed(x[h][1], 1));
}
