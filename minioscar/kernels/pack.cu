// pack.cu: quantizes whole blocks of a row and packs their codes (oscar.py, step 3), the plain version.
//
//   codes, step, min of keys[h, t, :] / norms[t] and of values[h, t, :], in groups of `group` tokens or `value_group` channels
//
// keys, values [kv_heads, n, d] bf16, contiguous; the outputs are one row of the cache's arrays (cache.py, `layout`), written
// at tokens first ... first + n - 1 of `capacity`. A byte holds the codes of 8 / bits neighbouring channels, the first lowest.
// grid (n / group, kv_heads); a block takes `group` tokens of one head: keys, then values. dynamic shared: group * d bytes.
// reads 2 B an element; writes bits / 8 B an element and 2 or 4 B a group. The arithmetic is float32 in oscar.py's order,
// so that codes, step and min are equal to it bit for bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

struct Group {  // what dequantization needs: x = step * (code - middle) + minimum, one of the two terms absent
  __half step, minimum;
};

// Range of n numbers x(0) ... x(n-1) as oscar.quantize (symmetric: oscar.quantize_symmetric) has it.
template <class X>
__device__ Group range(X x, int n, int top, float shrink, float symmetric_factor, bool symmetric) {
  float low = x(0), high = low, largest = fabsf(low);
  for (int i = 1; i < n; i++) {
    const float v = x(i);
    low = fminf(low, v), high = fmaxf(high, v), largest = fmaxf(largest, fabsf(v));
  }
  if (symmetric) return {__float2half_rn(largest * symmetric_factor), __float2half_rn(0.f)};
  const float span = (high - low) * shrink;
  return {__float2half_rn(span / (float)top), __float2half_rn(low + (high - low - span) * 0.5f)};
}

__device__ unsigned char code(float x, Group g, int top, bool symmetric) {
  const float step = __half2float(g.step);
  if (step == 0.f) return 0;
  const float y = symmetric ? x / step + (float)top * 0.5f : (x - __half2float(g.minimum)) / step;
  return (unsigned char)fminf(fmaxf(rintf(y), 0.f), (float)top);
}

extern "C" __global__ void pack(const __nv_bfloat16* __restrict__ keys, const __nv_bfloat16* __restrict__ values, const float* __restrict__ norms,
                                unsigned char* __restrict__ key_codes, __half* __restrict__ key_step, __half* __restrict__ key_min,
                                unsigned char* __restrict__ value_codes, __half* __restrict__ value_step, __half* __restrict__ value_min,
                                int n, int d, int first, int capacity, int bits, int group, int value_group, int keys_by_token,
                                float shrink, float symmetric_factor) {
  extern __shared__ unsigned char codes[];  // [group][d]
  const int head = blockIdx.y, t0 = blockIdx.x * group, top = (1 << bits) - 1, per = 8 / bits, groups = d / value_group;
  const size_t row = (size_t)head * capacity + first + t0;  // this block's first token among the packed ones
  for (int which = 0; which < 2; which++) {                 // keys, values
    const __nv_bfloat16* in = (which ? values : keys) + ((size_t)head * n + t0) * d;
    __half* step = which ? value_step : key_step;
    __half* minimum = which ? value_min : key_min;
    const bool symmetric = minimum == nullptr, scaled = !which && norms != nullptr;
    auto element = [&](int t, int c) {
      const float x = __bfloat162float(in[(size_t)t * d + c]);
      return scaled ? x / norms[first + t0 + t] : x;
    };
    const bool by_token = !which && keys_by_token;
    for (int i = threadIdx.x; i < (by_token ? d : group * groups); i += blockDim.x) {
      const int t = by_token ? 0 : i / groups, c = by_token ? i : i % groups * value_group, many = by_token ? group : value_group;
      auto x = [&](int j) { return by_token ? element(j, c) : element(t, c + j); };
      const Group g = range(x, many, top, shrink, symmetric_factor, symmetric);
      const size_t at = by_token ? (row / group) * d + c : row * groups + i;
      step[at] = g.step;
      if (!symmetric) minimum[at] = g.minimum;
      for (int j = 0; j < many; j++) codes[by_token ? j * d + c : t * d + c + j] = code(x(j), g, top, symmetric);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < group * d / per; i += blockDim.x) {
      unsigned byte = 0;
      for (int j = 0; j < per; j++) byte |= codes[i * per + j] << (bits * j);
      (which ? value_codes : key_codes)[row * (d / per) + i] = (unsigned char)byte;
    }
    __syncthreads();
  }
}
