// sm90/items.cuh: work items of linear_batch.cu and quantized_batch.cu, those of a block gridDim.x apart.
#ifndef MINIOSCAR_ITEMS_CUH
#define MINIOSCAR_ITEMS_CUH
#include "../device.cuh"

// Tiles and splits of k.
struct Items {
  int slabs, splits, tiles;

  DEVICE int count() const { return tiles * splits; }
  DEVICE int tile(int item) const { return item % tiles; }
  DEVICE int split(int item) const { return item / tiles; }
  DEVICE int begin(int item) const { return slabs * split(item) / splits; }
  DEVICE int end(int item) const { return slabs * (split(item) + 1) / splits; }
};
#endif
