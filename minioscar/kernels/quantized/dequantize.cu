// quantized/dequantize.cu: a quantized matrix as BF16, for the products of many tokens (cuBLAS).
//
//   out[n, k] = bf16((value(code[n, k]) - zero[n, g]) * scale[n, g] * row_scale[n])        g: the group of k
//
// codes, scales, row_scale: minioscar/quantized. out [N][K], K a multiple of 8. Rounded as NumPy rounds
// `Quantized.dequantize`: float32, then once to BF16.
//
// A warp has 16 rows and 64 k at a time: 512 B or 1 KB of codes, which a lane writes as four times 16 bytes, two rows
// of 8c ... 8c + 7 of either half. Moves 0.53 or 1.03 B a weight in, 2 B out.
// grid (blocks of 8 runs of 64 k, tiles of 16 rows), 256 threads.
//
// Set by -D: KIND.
#include "codes.cuh"

// The number of register a of step s whose position in it is e; value times 1.
DEVICE float value(const uint4 (&w)[LOADS], int s, int a, int e) {
  const uint32_t half = (KIND == INT4 ? word(w[0], s) : word(w[s / 2 * (LOADS - 1)], s % 2 * 2 + a / 2)) >> 16 * e;
  if (KIND == INT4) return (float)(half >> 4 * a & 15);
  if (KIND == INT8) return (float)(half >> 8 * (a % 2) & 255);
  const uint32_t low_bits = a % 2 ? half >> 4 & 0x0700 | half << 4 & 0x80f0 : half & 0x87f0;  // as BF16 has them
  return low_f16(low_bits & 0x8000 | (low_bits & 0x07f0) << 3) * 256.f;
}

extern "C" __global__ void __launch_bounds__(256)
    dequantize(const uint4* codes, const uint32_t* scales, const float* row_scale, bf16* out, int N, int K, int shift) {
  wait_then_allow_next();
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4, tile = blockIdx.y;
  const int runs = (K + 63) / 64, groups = ((K - 1) >> shift) + 1, run = blockIdx.x * 8 + threadIdx.x / 32;
  if (run >= runs) return;
  uint4 w[LOADS];
  UNROLL for (int i = 0; i < LOADS; i++) {
    w[i] = make_uint4(0, 0, 0, 0);
    load_once(w[i], codes + ((size_t)tile * runs + run) * TILE_VECTORS + 32 * i + lane, true);
  }
  UNROLL for (int i = 0; i < 2; i++) {
    const int n = tile * 16 + 2 * r + i;
    if (n >= N) return;
    UNROLL for (int h = 0; h < 2; h++) {
      const int k = run * 64 + 32 * h + 8 * c;
      if (k >= K) break;
      const size_t group = (size_t)tile * groups + (k >> shift);
      const uint32_t scale = scales[HAS_ZERO ? group * 16 + 2 * r + i : group];
      uint32_t pairs[4];
      UNROLL for (int pair = 0; pair < 4; pair++) {
        float x[2];
        UNROLL for (int e = 0; e < 2; e++) {
          const float code = value(w, 2 * h + pair / 2, pair % 2 * 2 + i, e);
          const float scaled = HAS_ZERO ? (code - high_f16(scale)) * low_f16(scale) : code * __uint_as_float(scale);
          x[e] = scaled * row_scale[n];
        }
        pairs[pair] = pack_bf16x2(x[0], x[1]);
      }
      *(uint4*)(out + (size_t)n * K + k) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
}
