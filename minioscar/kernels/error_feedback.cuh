// error_feedback.cuh: shaped rounding of a page's keys (error_feedback.py, shaped_codes); pack.cu includes it.
//
//   for i = 0 ... DIM - 1:   e = x_i - (what its code reads back as);   x_j -= e * feedback[i][j] for j > i
//
// of 64 tokens, each by itself; steps and minima are those of the unfed keys. feedback [DIM][DIM] float32 of a kv head,
// 0 for j <= i. Blocked as GPTQ is (arXiv 2210.17323): the warp that has a chunk of 32 channels goes through them, two
// tokens a lane, 8 channels in registers, and leaves its errors in shared memory; the warps of later chunks subtract
// what 32 errors do to their channels, in the layout of pack_keys, while the warp of the next chunk goes on.
// DIM^2 / 2 products a token, each rounded before it is subtracted: the order and the roundings of error_feedback.py,
// so that codes equal its own bit for bit. reads the table's upper half a page, from L2, while another warp computes.
#ifndef MINIOSCAR_ERROR_FEEDBACK_CUH
#define MINIOSCAR_ERROR_FEEDBACK_CUH

// 32 channels of 64 tokens in shared memory. The gaps keep the four lanes of a token in banks of their own.
constexpr int TILE_FLOATS = 32 * PAGE_TOKENS + 24;
DEVICE constexpr int tile_offset(int channel, int token) { return channel * PAGE_TOKENS + channel / 8 * 8 + token; }

struct __align__(16) FeedbackShared {  // attention.feedback_bytes
  float errors[2][TILE_FLOATS];        // of a chunk, by its parity
  float fed[TILE_FLOATS];              // of the chunk whose warp goes through its channels
  float2 params[KEY_GROUPS][32];       // its steps and minima
  float table[CHUNKS][32][32];         // of each warp: feedback from 32 channels to its own
};

DEVICE float4 four(const float* x) { return *(const float4*)x; }

// Subtracts from channels `begin` and later of two tokens what their errors in an earlier channel do to them.
DEVICE void subtract(float2 (&x)[8], int begin, float2 errors, const float* feedback) {
  UNROLL for (int j = begin / 4 * 4; j < 8; j += 4) {
    const float4 f = four(feedback + j);
    const float factors[4] = {f.x, f.y, f.z, f.w};
    UNROLL for (int n = 0; n < 4; n++) {
      if (j + n < begin) continue;
      x[j + n].x = __fsub_rn(x[j + n].x, __fmul_rn(errors.x, factors[n]));
      x[j + n].y = __fsub_rn(x[j + n].y, __fmul_rn(errors.y, factors[n]));
    }
  }
}

// Goes through 32 channels. rows: as in feed_back. table: their feedback to each other.
DEVICE void feed_chunk(Row (&rows)[8], const GroupParams (&params)[KEY_GROUPS], const float (&table)[32][32],
                       FeedbackShared& shared, float* errors) {
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  float* own = shared.fed + tile_offset(8 * c, 4 * r);
  UNROLL for (int k = 0; k < 8; k++)
    UNROLL for (int i = 0; i < 8; i += 4)  // four neighbouring tokens (token_of)
      *(float4*)(own + k * PAGE_TOKENS + 8 * i) =
          make_float4(rows[i].x[k], rows[i + 1].x[k], rows[i + 2].x[k], rows[i + 3].x[k]);
  UNROLL for (int g = 0; g < KEY_GROUPS; g++)
    shared.params[g][8 * c + r] = make_float2(params[g].step, params[g].minimum);
  __syncwarp();
  const float2* groups = shared.params[2 * lane / KEY_GROUP];
#pragma unroll 1
  for (int first = 0; first < 32; first += 8) {
    float2* fed = (float2*)(shared.fed + tile_offset(first, 2 * lane));
    float2* left = (float2*)(errors + tile_offset(first, 2 * lane));
    float2 x[8];
    UNROLL for (int i = 0; i < 8; i++) x[i] = fed[i * (PAGE_TOKENS / 2)];
#pragma unroll 4
    for (int i = 0; i < first; i++)
      subtract(x, 0, *(const float2*)(errors + tile_offset(i, 2 * lane)), table[i] + first);
    UNROLL for (int i = 0; i < 8; i++) {
      const Coder<KEY_BITS, false> coder({groups[first + i].x, groups[first + i].y});
      const float2 e = make_float2(coder.error(x[i].x), coder.error(x[i].y));
      fed[i * (PAGE_TOKENS / 2)] = x[i];
      left[i * (PAGE_TOKENS / 2)] = e;
      subtract(x, i + 1, e, table[first + i] + first);
    }
  }
  __syncwarp();
  UNROLL for (int k = 0; k < 8; k++)
    UNROLL for (int i = 0; i < 8; i += 4) {
      const float4 y = four(own + k * PAGE_TOKENS + 8 * i);
      rows[i].x[k] = y.x;
      rows[i + 1].x[k] = y.y;
      rows[i + 2].x[k] = y.z;
      rows[i + 3].x[k] = y.w;
    }
}

// Subtracts what the errors of an earlier chunk do to a lane's channels. table: from that chunk to this warp's.
DEVICE void feed_later(Row (&rows)[8], const float (&table)[32][32], const float* errors) {
  const int r = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll 1
  for (int i = 0; i < 32; i++) {
    const float4 f[2] = {four(table[i] + 8 * c), four(table[i] + 8 * c + 4)};
    const float factors[8] = {f[0].x, f[0].y, f[0].z, f[0].w, f[1].x, f[1].y, f[1].z, f[1].w};
    const float4 e[2] = {four(errors + tile_offset(i, 4 * r)), four(errors + tile_offset(i, 32 + 4 * r))};
    const float of[8] = {e[0].x, e[0].y, e[0].z, e[0].w, e[1].x, e[1].y, e[1].z, e[1].w};
    UNROLL for (int t = 0; t < 8; t++)
      UNROLL for (int k = 0; k < 8; k++) rows[t].x[k] = __fsub_rn(rows[t].x[k], __fmul_rn(of[t], factors[k]));
  }
}

// rows: 8 tokens x 8 channels of a lane; they become what is rounded. params: of channel r of the lane's 8. The warps
// of a block have the chunks of one page. feedback: of its kv head.
DEVICE void feed_back(Row (&rows)[8], const GroupParams (&params)[KEY_GROUPS], int chunk, const float* feedback) {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  FeedbackShared& shared = *(FeedbackShared*)dynamic_shared;
  const int lane = threadIdx.x % 32;
  float (&table)[32][32] = shared.table[chunk];
  feedback += (lane / 8) * DIM + chunk * 32 + lane % 8 * 4;
#pragma unroll 1
  for (int from = 0; from < CHUNKS; from++, feedback += 32 * DIM) {
    float* errors = shared.errors[from % 2];
    if (chunk >= from) {
      __syncwarp();  // all lanes have read the table before
      UNROLL for (int i = 0; i < 32; i += 4) cp_async_16(table[i + lane / 8] + lane % 8 * 4, feedback + i * DIM);
      cp_async_commit();
    }
    if (chunk == from) {
      cp_async_wait<0>();
      __syncwarp();
      feed_chunk(rows, params, table, shared, errors);
    }
    __syncthreads();
    if (chunk > from) {
      cp_async_wait<0>();
      __syncwarp();
      feed_later(rows, table, errors);
    }
  }
}
#endif
