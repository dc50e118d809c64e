// layer_norm.cu: the sum that ends one half of a tower's layer and the norm that begins the next, in one pass.
//
//   x[m, :] += y[m, :] + y_bias            where y is given
//   out[m, :] = (x[m, :] - mean) / sqrt(variance + eps) * weight + bias      where out is given (arXiv 1607.06450)
//   x, y, out [M][K], y_bias, weight, bias [K], bf16; float32 inside, each result rounded once; K a multiple of 8
//
// grid (M / 8), 256 threads: a warp has a row, PER_LANE vectors of 16 bytes a lane, in registers. The variance is that
// of the numbers less their mean, which does not cancel where the mean is large. out may be y.
// reads 2 B a number, or 4 with y, and writes 2 B for each result: its time is these bytes.
//
// Set by -D: PER_LANE, ceil(K / 256).
#include "eight.cuh"

constexpr int WARPS = 8;

// x + y + bias, rounded.
DEVICE uint4 summed(const uint4& x, const uint4& y, const uint4& bias) {
  Eight sum(x);
  const Eight more(y), last(bias);
  UNROLL for (int k = 0; k < 8; k++) sum.x[k] += more.x[k] + last.x[k];
  return sum.packed();
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    layer_norm(uint4* x, const uint4* y, const uint4* y_bias, const uint4* weight, const uint4* bias, uint4* out,
               int rows, int vectors, float eps) {
  wait_then_allow_next();
  const int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  const size_t first = (size_t)row * vectors;
  uint4 own[PER_LANE];
  UNROLL for (int j = 0, i = lane; j < PER_LANE; j++, i += 32)
    own[j] = i < vectors ? x[first + i] : make_uint4(0, 0, 0, 0);
  if (y)
    UNROLL for (int j = 0, i = lane; j < PER_LANE; j++, i += 32)
      if (i < vectors) {
        own[j] = summed(own[j], y[first + i], y_bias ? y_bias[i] : make_uint4(0, 0, 0, 0));
        x[first + i] = own[j];
      }
  if (!out) return;
  float sum = 0.f, squares = 0.f;
  UNROLL for (int j = 0; j < PER_LANE; j++) {
    const Eight of(own[j]);  // zeros past the end
    UNROLL for (int k = 0; k < 8; k++) sum += of.x[k];
  }
  const float mean = warp_sum(sum) / (8 * vectors);
  UNROLL for (int j = 0, i = lane; j < PER_LANE; j++, i += 32) {
    const Eight of(own[j]);
    UNROLL for (int k = 0; k < 8; k++) squares += i < vectors ? (of.x[k] - mean) * (of.x[k] - mean) : 0.f;
  }
  const float factor = 1.f / sqrtf(warp_sum(squares) / (8 * vectors) + eps);
  UNROLL for (int j = 0, i = lane; j < PER_LANE; j++, i += 32)
    if (i < vectors) {
      Eight of(own[j]);
      const Eight times(weight[i]), plus(bias[i]);
      UNROLL for (int k = 0; k < 8; k++) of.x[k] = (of.x[k] - mean) * factor * times.x[k] + plus.x[k];
      out[first + i] = of.packed();
    }
}
