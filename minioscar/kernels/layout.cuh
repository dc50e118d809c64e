// layout.cuh: offsets of everything in a page of 64 packed tokens of one kv head. The drawing is in LAYOUT.md.
//
// Set by -D: HEAD_DIM (a multiple of 32), KEY_BITS and VALUE_BITS (2, 3 or 4), KEY_GROUP (32, 64 or 128 tokens),
// VALUE_GROUP (32 or 64 channels), SYMMETRIC (values have no minimum), SCALED (keys are divided by their token's norm),
// FLUSH and KEEP (multiples of 64: when the number of tokens is a multiple of FLUSH, the window's oldest FLUSH tokens
// are packed if it has KEEP others).
#ifndef MINIOSCAR_LAYOUT_CUH
#define MINIOSCAR_LAYOUT_CUH
#include "common.cuh"

constexpr int PAGE_TOKENS = 64, RING = FLUSH + KEEP;  // slots of the window: token t is in slot t % RING
constexpr int DIM = HEAD_DIM;
constexpr int CHUNKS = DIM / 32;       // chunks of 32 channels: a lane owns 8 neighbouring ones in each
// Tiles of 16 x 16 codes in the four words of a lane: 2 bits: 8; 3 and 4 bits: 4.
DEVICE constexpr int tiles_of_load(int bits) { return bits == 2 ? 8 : 4; }
constexpr int KEY_TILES = tiles_of_load(KEY_BITS), VALUE_TILES = tiles_of_load(VALUE_BITS);
constexpr bool PAIRED = KEY_GROUP > PAGE_TOKENS;  // a group of keys is two pages, which share its steps and minima
constexpr int KEY_GROUPS = PAIRED ? 1 : PAGE_TOKENS / KEY_GROUP, VALUE_GROUPS = DIM / VALUE_GROUP;  // of a page
constexpr int KEY_CODE_BYTES = PAGE_TOKENS * DIM * KEY_BITS / 8, VALUE_CODE_BYTES = PAGE_TOKENS * DIM * VALUE_BITS / 8;
constexpr int KEY_PARAM_BYTES = KEY_GROUPS * DIM * 2, SHARED_BYTES = PAIRED ? 2 * KEY_PARAM_BYTES : 0;
constexpr int VALUE_PARAM_BYTES = PAGE_TOKENS * VALUE_GROUPS * 2;
// From the page's first code on, as are all offsets.
constexpr int VALUE_CODES = KEY_CODE_BYTES + (PAIRED ? 0 : 2 * KEY_PARAM_BYTES);
constexpr int VALUE_STEP = VALUE_CODES + VALUE_CODE_BYTES, VALUE_MIN = VALUE_STEP + VALUE_PARAM_BYTES;
constexpr int OWN_BYTES = VALUE_STEP + VALUE_PARAM_BYTES * (SYMMETRIC ? 1 : 2);  // what is shared is not in it
constexpr int PAGE_BYTES = OWN_BYTES + SHARED_BYTES / 2;
// Of page `page`. Those that two pages share lie after the first one's values and before the second one's codes.
DEVICE constexpr int key_step(int page) {
  return !PAIRED ? KEY_CODE_BYTES : page % 2 ? -SHARED_BYTES : OWN_BYTES;
}
DEVICE constexpr int key_min(int page) { return key_step(page) + KEY_PARAM_BYTES; }

// A page and what it shares is one copy of COPIED_BYTES, in which the page's codes are at copied_offset(page).
constexpr int COPIED_BYTES = OWN_BYTES + SHARED_BYTES;
DEVICE constexpr int copied_offset(int page) { return PAIRED && page % 2 ? SHARED_BYTES : 0; }

// Packed tokens lie in blocks: two pages of every kv head, and the norms of 128 tokens. Which blocks a row has, the
// table says: int32 [rows][stride]. All kernels address pages and norms here.
constexpr int BLOCK_PAGES = 2;
struct Table {
  const int* blocks;
  int stride;
  DEVICE int block_of(int row, int page) const { return __ldg(blocks + (size_t)row * stride + page / BLOCK_PAGES); }
};
// Pages of a layer, and tokens of its norms, are fewer than 2^31.
DEVICE size_t page_offset(int block, int kv_heads, int head, int page) {
  const unsigned number = (block * kv_heads + head) * BLOCK_PAGES + page % BLOCK_PAGES;
  return (size_t)number * PAGE_BYTES + copied_offset(page) / 2;
}
DEVICE unsigned norm_offset(int block, int page) { return (block * BLOCK_PAGES + page % BLOCK_PAGES) * PAGE_TOKENS; }

// How many of a row's first `length` tokens are packed; the others are in the window.
DEVICE constexpr int packed_tokens(int length) {
  const int flushed = length / FLUSH * FLUSH;
  return KEEP == 0 ? flushed : flushed > KEEP ? flushed - KEEP : 0;
}

// The token of a page in row r (half 0) or r + 8 (half 1) of token tile j: a lane's norms are then neighbours.
DEVICE constexpr int token_of(int j, int half, int r) { return j / 2 * 32 + 4 * r + j % 2 * 2 + half; }

// Parameters of values are ordered even groups, then odd groups: what a lane needs of either is one load.
constexpr int EVEN_GROUPS = (VALUE_GROUPS + 1) / 2;
DEVICE constexpr int value_group_slot(int group) { return group % 2 * EVEN_GROUPS + group / 2; }

// Key tile (token tile 0..3, k step = 16 channels) and value tile (token step 0..3, channel tile) -> its number.
// number / KEY_TILES (VALUE_TILES) is the four words that have it, the remainder its bit slot there.
DEVICE constexpr int key_tile(int token_tile, int k_step) { return k_step * 4 + token_tile; }
DEVICE constexpr int value_tile(int token_step, int channel_tile) { return token_step * (DIM / 16) + channel_tile; }

// The lowest bit of slot `slot` in the halves of a word.
DEVICE constexpr int slot_bit(int bits, int slot) { return bits == 3 ? slot / 2 * 8 + 2 + slot % 2 * 3 : slot * bits; }

// The words of a lane that have tiles 8 * octet ... 8 * octet + 7. Of 3 bits, two of the eight are the lowest two bits
// of every byte of three others each, which have codes in the upper six (LAYOUT.md).
template <int BITS> struct OctetWords { uint32_t w[8 / tiles_of_load(BITS)][4]; };

DEVICE uint32_t low_pairs(uint32_t a, uint32_t b, uint32_t c) {
  return ((a << 2) & 0x0c0c0c0cu) | ((b << 4) & 0x30303030u) | ((c << 6) & 0xc0c0c0c0u);
}
template <int BITS> DEVICE OctetWords<BITS> load_codes(const unsigned char* codes, int octet) {
  constexpr int LOADS = 8 / tiles_of_load(BITS);
  const int lane = threadIdx.x % 32;
  OctetWords<BITS> words;
  UNROLL for (int i = 0; i < LOADS; i++) {
    uint4 raw;
    if (BITS == 3 && i == 1) {
      const uint32_t(&w)[4] = words.w[0];
      const uint2 rest = ((const uint2*)codes)[octet * 96 + 64 + lane];
      raw = make_uint4(rest.x, rest.y, low_pairs(w[0], w[1], w[2]), low_pairs(w[3], rest.x, rest.y));
    } else {
      raw = ((const uint4*)codes)[BITS == 3 ? octet * 48 + lane : (octet * LOADS + i) * 32 + lane];
    }
    const uint32_t four[4] = {raw.x, raw.y, raw.z, raw.w};
    UNROLL for (int k = 0; k < 4; k++) words.w[i][k] = four[k];
  }
  return words;
}
// The inverse, word by word: to be called when words.w[i] is there, for i = 0, 1 ...
template <int BITS> DEVICE void store_codes(unsigned char* codes, int octet, int i, const OctetWords<BITS>& words) {
  constexpr int LOADS = 8 / tiles_of_load(BITS);
  const int lane = threadIdx.x % 32;
  const uint32_t(&w)[4] = words.w[i];
  if (BITS != 3) ((uint4*)codes)[(octet * LOADS + i) * 32 + lane] = make_uint4(w[0], w[1], w[2], w[3]);
  if (BITS == 3 && i == 1) {
    const uint32_t(&v)[4] = words.w[0];
    uint32_t pairs[6];  // lowest bits of the bytes of six words
    UNROLL for (int k = 0; k < 6; k++) pairs[k] = w[2 + k / 3] >> (2 + k % 3 * 2) & 0x03030303u;
    ((uint4*)codes)[octet * 48 + lane] = make_uint4(v[0] | pairs[0], v[1] | pairs[1], v[2] | pairs[2], v[3] | pairs[3]);
    ((uint2*)codes)[octet * 96 + 64 + lane] = make_uint2(w[0] | pairs[4], w[1] | pairs[5]);
  }
}

static_assert(DIM % 64 == 0 && DIM % VALUE_GROUP == 0, "shape of values");
static_assert(KEY_GROUP % 32 == 0 && 2 * PAGE_TOKENS % KEY_GROUP == 0, "shape of keys");
static_assert(PAGE_BYTES % 16 == 0 && SHARED_BYTES % 32 == 0, "alignment");
static_assert(FLUSH % PAGE_TOKENS == 0 && KEEP % FLUSH == 0, "whole pages are packed, none goes round the ring's end");
static_assert(FLUSH % KEY_GROUP == 0, "whole groups are packed");
#endif
