// activation.cu: the step between the two products of a tower's MLP, in place: x[t, j] = f(x[t, j] + bias[j]).
//
//   gelu:       f(y) = y Phi(y), Phi the normal distribution (arXiv 1606.08415)
//   gelu_tanh:  f(y) = y / 2 (1 + tanh(sqrt(2 / pi) (y + 0.044715 y^3))) = y / (1 + exp(-2 sqrt(2 / pi) (...)))
//   quick_gelu: f(y) = y / (1 + exp(-1.702 y))
//
// x BF16 [tokens, n], bias BF16 [n] (null: none), n = 8 `vectors`; float32 inside, rounded once. Vectors are numbered
// over all tokens, since rows of 538 or 640 do not fill blocks. grid (ceil(count / 1024)), 256 threads, four vectors of
// 16 bytes each. reads and writes 2 B a number: its time is these bytes.
#include "eight.cuh"

constexpr int THREADS = 256, PER_THREAD = 4;

struct Gelu {
  DEVICE static float of(float y) { return .5f * y * (1.f + erff(y * .70710678f)); }
};
struct GeluTanh {
  DEVICE static float of(float y) { return y * rcp_approx(1.f + __expf(-1.5957691f * (y + .044715f * y * y * y))); }
};
struct QuickGelu {
  DEVICE static float of(float y) { return y * rcp_approx(1.f + __expf(-1.702f * y)); }
};

template <class F> DEVICE void apply(uint4* x, const uint4* bias, int vectors, int count) {
  const int first = blockIdx.x * (PER_THREAD * THREADS) + threadIdx.x;
  uint4 y[PER_THREAD], more[PER_THREAD];
  UNROLL for (int i = 0; i < PER_THREAD; i++) {
    const int n = first + i * THREADS;
    more[i] = make_uint4(0, 0, 0, 0);
    if (n < count) {
      y[i] = x[n];
      if (bias) more[i] = bias[n % vectors];
    }
  }
  UNROLL for (int i = 0; i < PER_THREAD; i++)
    if (first + i * THREADS < count) {
      Eight z(y[i]);
      const Eight plus(more[i]);
      UNROLL for (int k = 0; k < 8; k++) z.x[k] = F::of(z.x[k] + plus.x[k]);
      x[first + i * THREADS] = z.packed();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) gelu(uint4* x, const uint4* bias, int vectors, int count) {
  wait_then_allow_next();
  apply<Gelu>(x, bias, vectors, count);
}
extern "C" __global__ void __launch_bounds__(THREADS) gelu_tanh(uint4* x, const uint4* bias, int vectors, int count) {
  wait_then_allow_next();
  apply<GeluTanh>(x, bias, vectors, count);
}
extern "C" __global__ void __launch_bounds__(THREADS) quick_gelu(uint4* x, const uint4* bias, int vectors, int count) {
  wait_then_allow_next();
  apply<QuickGelu>(x, bias, vectors, count);
}
