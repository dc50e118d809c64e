// layout.cuh: where everything stands in a page of 64 packed tokens of one kv head. The drawing is in LAYOUT.md.
//
// Set by -D: HEAD_DIM (a multiple of 32), BITS (2 or 4), KEY_GROUP (32 or 64 tokens), VALUE_GROUP (32 or 64 channels),
// SYMMETRIC (values have no minimum).
#ifndef MINIOSCAR_LAYOUT_CUH
#define MINIOSCAR_LAYOUT_CUH

constexpr int PAGE_TOKENS = 64, WINDOW = 128;
constexpr int DIM = HEAD_DIM;
constexpr int CHUNKS = DIM / 32;             // runs of 32 channels: a lane owns 8 neighbouring ones in each
constexpr int TILES = 16 / BITS;             // MMA tiles (16 x 16 codes) in one 16-byte load a lane
constexpr int PLACES = TILES / 2;            // of them reached by masks alone; the others after a shift by 8
constexpr int KEY_GROUPS = PAGE_TOKENS / KEY_GROUP, VALUE_GROUPS = DIM / VALUE_GROUP;
constexpr int CODE_BYTES = PAGE_TOKENS * DIM * BITS / 8;  // of keys, and again of values
constexpr int KEY_PARAM_BYTES = KEY_GROUPS * DIM * 2;
constexpr int VALUE_PARAM_BYTES = PAGE_TOKENS * VALUE_GROUPS * 2;
constexpr int KEY_STEP = CODE_BYTES, KEY_MIN = KEY_STEP + KEY_PARAM_BYTES, VALUE_CODES = KEY_MIN + KEY_PARAM_BYTES;
constexpr int VALUE_STEP = VALUE_CODES + CODE_BYTES, VALUE_MIN = VALUE_STEP + VALUE_PARAM_BYTES;
constexpr int PAGE_BYTES = VALUE_STEP + VALUE_PARAM_BYTES * (SYMMETRIC ? 1 : 2);

// Which token of a page stands in row r or r + 8 (half 1) of token tile j: a lane's norms are then neighbours.
__device__ __forceinline__ constexpr int token_of(int j, int half, int r) { return j / 2 * 32 + 4 * r + j % 2 * 2 + half; }

// Parameters of values stand in the order even groups, odd groups: what a lane of either half wants is one load.
constexpr int VALUE_PAIRS = (VALUE_GROUPS + 1) / 2;
__device__ __forceinline__ constexpr int value_group_place(int group) { return group % 2 * VALUE_PAIRS + group / 2; }
__device__ __forceinline__ constexpr int tile_of_place(int place) {  // first channel tile of the group in a place
  return (place < VALUE_PAIRS ? 2 * place : 2 * (place - VALUE_PAIRS) + 1) * (VALUE_GROUP / 16);
}

// Key tile (token tile 0..3, k step = 16 channels) and value tile (token step 0..3, channel tile) -> its number; number / TILES is
// the 16-byte load it is in, number % TILES the place there.
__device__ __forceinline__ constexpr int key_tile(int token_tile, int k_step) { return k_step * 4 + token_tile; }
__device__ __forceinline__ constexpr int value_tile(int token_step, int channel_tile) { return token_step * (DIM / 16) + channel_tile; }

static_assert(DIM % 32 == 0 && DIM % VALUE_GROUP == 0 && PAGE_TOKENS % KEY_GROUP == 0 && PAGE_BYTES % 16 == 0, "shape");
#endif
