// tile.cuh: keys or values of TILE tokens of one kv head, in the order in which wgmma reads them (prefill_attention_sm90.cu). A row of 128 bytes has
// 64 channels of a token, its 16-byte pieces exchanged as wgmma_operand wants it; 128 channels are two halves of TILE rows, one behind the other.
// In memory [tiles][kv_heads][TILE_BYTES], those of a sequence one after the other. Set by -D: HEAD_DIM.
constexpr int TILE = 128, PIECES = HEAD_DIM / 8, HALF_BYTES = TILE * 128, TILE_BYTES = TILE * HEAD_DIM * 2;

// Where the 8 channels `piece` of row r stand, in bytes.
__device__ __forceinline__ int place(int r, int piece) { return piece / 8 * HALF_BYTES + r * 128 + (piece % 8 ^ r % 8) * 16; }
