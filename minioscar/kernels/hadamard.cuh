// hadamard.cuh: H = Sylvester(d / m) (x) P / sqrt(d), the matrix of oscar.hadamard. P is the symmetric Paley matrix of order m = 12 or 20
// (d = 96, 80); m = 1 for powers of two.
#ifndef MINIOSCAR_HADAMARD_CUH
#define MINIOSCAR_HADAMARD_CUH

__device__ constexpr int hadamard_order(int dim) { return dim % 3 == 0 ? 12 : dim % 5 == 0 ? 20 : 1; }

// Sign of P[i][j] is negative: Paley's first construction for q = ORDER - 1, its core on i + j (oscar.py, _paley).
template <int ORDER>
__device__ __forceinline__ bool paley_negative(int i, int j) {
  constexpr int q = ORDER - 1;
  constexpr unsigned negative = ORDER == 12 ? 0x23bu : 0x30af3u;  // 0 and the squares modulo 11, 19
  if (i == 0 || j == 0) return false;
  const int s = i + j - 2 >= q ? i + j - 2 - q : i + j - 2;
  return negative >> s & 1;
}

#endif
