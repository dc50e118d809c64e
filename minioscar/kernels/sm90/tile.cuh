// sm90/tile.cuh: keys or values of TILE tokens of one kv head in the order that wgmma reads (prefill_attention.cu). A
// row of 128 bytes has 64 channels of a token, its 16-byte vectors swizzled as wgmma_operand says; 128 channels are
// two halves of TILE rows, one after the other. In memory [tiles][kv_heads][TILE_BYTES], those of a sequence one
// after the other. Of a head's HEAD_DIM channels CHANNELS are its own, FILLED vectors, the rest zeros.
// Set by -D: HEAD_DIM, and CHANNELS where it is less.
#ifndef CHANNELS
#define CHANNELS HEAD_DIM
#endif
constexpr int TILE = 128, VECTORS = HEAD_DIM / 8, FILLED = CHANNELS / 8;
constexpr int HALF_BYTES = TILE * 128, TILE_BYTES = TILE * HEAD_DIM * 2;

// Offset of 16-byte vector `vector` (8 channels) of row r, in bytes.
DEVICE int swizzled_offset(int r, int vector) { return vector / 8 * HALF_BYTES + r * 128 + (vector % 8 ^ r % 8) * 16; }
