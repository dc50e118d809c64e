// places.cu: adds the learned places of a picture's patches.
//
//   x[p, :] += table at the place of patch p, between four rows of it (bilinear, corners on corners)
//
// table BF16 [side * side, hidden], x BF16 [patches, hidden], hidden = 8 `vectors`; rows_columns int32 [patches, 2]:
// of 0 ... last_row and 0 ... last_column, which are stretched over 0 ... side - 1. Float32 inside, rounded once;
// places in float64, as the reference has them.
// grid (patches), 128 threads; reads 8 B of `table`, mostly from L2, and reads and writes 2 B a number of x.
#include "eight.cuh"

// Two neighbouring places of the table along one axis, and how far the patch is from the first to the second.
struct Between {
  int low, high;
  double share;
  // index: of 0 ... last, stretched over 0 ... side - 1.
  DEVICE Between(int index, int last, int side) {
    const double exact = index * ((side - 1) / (double)max(last, 1));
    low = (int)exact;
    high = min(low + 1, side - 1);
    share = exact - low;
  }
};

extern "C" __global__ void __launch_bounds__(128) places(const bf16* table, const int2* rows_columns, uint4* x,
                                                         int vectors, int side, int last_row, int last_column) {
  wait_then_allow_next();
  const int2 at = rows_columns[blockIdx.x];
  const Between row(at.x, last_row, side), column(at.y, last_column, side);
  const float shares[4] = {(float)((1 - row.share) * (1 - column.share)), (float)((1 - row.share) * column.share),
                           (float)(row.share * (1 - column.share)), (float)(row.share * column.share)};
  const int indices[4] = {row.low * side + column.low, row.low * side + column.high, row.high * side + column.low,
                          row.high * side + column.high};
  uint4* const own = x + (size_t)blockIdx.x * vectors;
  for (int i = threadIdx.x; i < vectors; i += 128) {
    const Eight before(own[i]);
    Eight sum(make_uint4(0, 0, 0, 0));
    UNROLL for (int k = 0; k < 4; k++) {
      const Eight of(((const uint4*)table)[(size_t)indices[k] * vectors + i]);
      UNROLL for (int j = 0; j < 8; j++) sum.x[j] += of.x[j] * shares[k];
    }
    UNROLL for (int j = 0; j < 8; j++) sum.x[j] += before.x[j];
    own[i] = sum.packed();
  }
}
