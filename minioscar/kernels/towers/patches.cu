// patches.cu: the pixels of a picture, or of the frames of a video that share patches, to rows of patches.
//
//   out[p, ((colour * FRAMES + frame) * PATCH + y) * PATCH + x] = (pixel / 255 - mean) / deviation
//
// pixels uint8 [frames, height, width, 3], frames 1 (of a still, which counts for all) or FRAMES; out BF16 [patches,
// 3 * FRAMES * PATCH^2]. Patch p belongs to token p / MERGE^2, row by row: rows and columns of tokens, then rows and
// columns in a token. Float32 inside, rounded once.
// grid (patches), 256 threads; reads 3 B and writes 6 FRAMES B a pixel of a still, once for a picture.
//
// Set by -D: PATCH, FRAMES, MERGE.
#include "../common.cuh"

extern "C" __global__ void __launch_bounds__(256)
    patches(const unsigned char* pixels, bf16* out, int frames, int rows, int columns, float mean0, float mean1,
            float mean2, float deviation0, float deviation1, float deviation2) {
  wait_then_allow_next();
  constexpr int AREA = PATCH * PATCH, SIZE = 3 * FRAMES * AREA;
  const float means[3] = {mean0, mean1, mean2}, deviations[3] = {deviation0, deviation1, deviation2};
  const int token = blockIdx.x / (MERGE * MERGE), inner = blockIdx.x % (MERGE * MERGE);
  const int top = (token / columns * MERGE + inner / MERGE) * PATCH;
  const int left = (token % columns * MERGE + inner % MERGE) * PATCH;
  const int height = rows * MERGE * PATCH, width = columns * MERGE * PATCH;
  for (int i = threadIdx.x; i < SIZE; i += 256) {
    const int colour = i / (FRAMES * AREA), frame = min(i / AREA % FRAMES, frames - 1), at = i % AREA;
    const size_t pixel = ((size_t)frame * height + top + at / PATCH) * width + left + at % PATCH;
    const float x = (float)pixels[pixel * 3 + colour] / 255.f;
    out[(size_t)blockIdx.x * SIZE + i] = to_bf16((x - means[colour]) / deviations[colour]);
  }
}
