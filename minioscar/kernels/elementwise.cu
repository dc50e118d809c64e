// elementwise.cu: the steps between the products of a prefill, which cuBLAS computes: BF16, float32 inside.
//
//   silu_mul: out[t, j] = silu(gate_up[t, j]) * gate_up[t, n + j]
//   add: y[t, j] += x[t, j], or a bias: x[j] for every t
//
// n a multiple of 8, `vectors` = n / 8. grid (tokens, ceil(vectors / 512)), 256 threads, two vectors of 16 bytes each.
// silu_mul reads 4 B and writes 2 B a number of `out`, add the same (of a bias 2 B and 2 B): their time is these bytes.
#include "common.cuh"

constexpr int THREADS = 256, PER_THREAD = 2;

struct SiluMul {
  DEVICE static float of(float gate, float up) { return gate / (1.f + __expf(-gate)) * up; }
};
struct Sum {
  DEVICE static float of(float x, float y) { return x + y; }
};

// out[i] = F(a[i], b[i]) for this block's vectors of a row.
template <class F> DEVICE void apply(const uint4* a, const uint4* b, uint4* out, int vectors) {
  const int first = blockIdx.y * (PER_THREAD * THREADS) + threadIdx.x;
  uint4 x[PER_THREAD], y[PER_THREAD];
  UNROLL for (int i = 0; i < PER_THREAD; i++)
    if (first + i * THREADS < vectors) {
      x[i] = a[first + i * THREADS];
      y[i] = b[first + i * THREADS];
    }
  auto two = [](uint32_t x, uint32_t y) { return pack_bf16x2(F::of(low(x), low(y)), F::of(high(x), high(y))); };
  UNROLL for (int i = 0; i < PER_THREAD; i++)
    if (first + i * THREADS < vectors)
      out[first + i * THREADS] =
          make_uint4(two(x[i].x, y[i].x), two(x[i].y, y[i].y), two(x[i].z, y[i].z), two(x[i].w, y[i].w));
}

extern "C" __global__ void __launch_bounds__(THREADS) silu_mul(const uint4* gate_up, uint4* out, int vectors) {
  wait_then_allow_next();
  const uint4* gate = gate_up + (size_t)blockIdx.x * 2 * vectors;
  apply<SiluMul>(gate, gate + vectors, out + (size_t)blockIdx.x * vectors, vectors);
}

// stride: vectors from a row of x to the next; 0 of a bias.
extern "C" __global__ void __launch_bounds__(THREADS) add(const uint4* x, uint4* y, int vectors, int stride) {
  wait_then_allow_next();
  uint4* row = y + (size_t)blockIdx.x * vectors;
  apply<Sum>(row, x + (size_t)blockIdx.x * stride, row, vectors);
}
