// elementwise.cu: what stands between the products of a prefill, which are a library's: BF16, float32 inside, rounded once.
//
//   silu_mul: out[t, j] = silu(gate_up[t, j]) * gate_up[t, n + j]       add: y[t, j] += x[t, j], or a bias: x[j] for every t
//
// n a multiple of 8, `pieces` = n / 8. grid (tokens, parts of 512 pieces), 256 threads, two pieces of 16 bytes each.
// silu_mul reads 4 B and writes 2 B a number of `out`, add the same (of a bias 2 B and 2 B): nothing else takes time.
#include "device.cuh"

constexpr int THREADS = 256, EACH = 2;

__device__ __forceinline__ float lower(uint32_t two) { return __uint_as_float(two << 16); }
__device__ __forceinline__ float upper(uint32_t two) { return __uint_as_float(two & 0xffff0000u); }

struct SiluMul {
  static __device__ __forceinline__ float of(float gate, float up) { return gate / (1.f + __expf(-gate)) * up; }
};
struct Sum {
  static __device__ __forceinline__ float of(float x, float y) { return x + y; }
};

// out[i] = F(a[i], b[i]) for this block's part of a row.
template <class F>
__device__ __forceinline__ void apply(const uint4* a, const uint4* b, uint4* out, int pieces) {
  const int first = blockIdx.y * (EACH * THREADS) + threadIdx.x;
  uint4 x[EACH], y[EACH];
#pragma unroll
  for (int i = 0; i < EACH; i++)
    if (first + i * THREADS < pieces) x[i] = a[first + i * THREADS], y[i] = b[first + i * THREADS];
  auto two = [](uint32_t x, uint32_t y) { return pack_bf16x2(F::of(lower(x), lower(y)), F::of(upper(x), upper(y))); };
#pragma unroll
  for (int i = 0; i < EACH; i++)
    if (first + i * THREADS < pieces)
      out[first + i * THREADS] = make_uint4(two(x[i].x, y[i].x), two(x[i].y, y[i].y), two(x[i].z, y[i].z), two(x[i].w, y[i].w));
}

extern "C" __global__ void __launch_bounds__(THREADS) silu_mul(const uint4* gate_up, uint4* out, int pieces) {
  wait_for_previous(), allow_next();
  const uint4* gate = gate_up + (size_t)blockIdx.x * 2 * pieces;
  apply<SiluMul>(gate, gate + pieces, out + (size_t)blockIdx.x * pieces, pieces);
}

// stride: pieces from a row of x to the next; 0 of a bias.
extern "C" __global__ void __launch_bounds__(THREADS) add(const uint4* x, uint4* y, int pieces, int stride) {
  wait_for_previous(), allow_next();
  uint4* row = y + (size_t)blockIdx.x * pieces;
  apply<Sum>(row, x + (size_t)blockIdx.x * stride, row, pieces);
}
