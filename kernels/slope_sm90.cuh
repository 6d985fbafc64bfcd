// ALiBi in forward_sm90.cu: the slope enters scores by the tensor cores.
//
// Of a key tile to one side of the diagonal (of what 16 queries, a warp's, see in it) a score gets
//   ± slope · (first column - row - offset), the same for the whole row: the softmax folds it in once (BASED in softmax.cuh), and
//   ± slope · j, j the number of its key in the tile: that is one more step of the product Q Kᵀ, 16 columns wide.
// Its columns of Q are the slope as a sum of three 16-bit numbers, in registers, minus it to the right of the diagonal; those of K, in shared memory, the same
// for all tiles, are j three times. Of a tile that crosses the diagonal its columns of Q are 0, and score.cuh adds the slope score by score.
#pragma once
#include "score.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

// Whether keys are walked outwards from the diagonal (Walk in forward_sm90.cuh). With arrays in parts registers are short for it.
__device__ __forceinline__ constexpr bool walks_outwards(int precision, int options) { return (options & ALIBI) && (precision == FLOAT16 || precision == BFLOAT16); }

enum Side { RIGHT = -1, CROSSING = 0, LEFT = 1 };   // where a key tile lies from the diagonal; the sign of the slope there

// j three times of each key of a tile, as a row of 8 columns; eight rows more, as the last ones' further columns are read where the next rows lie. compute-sanitizer
// takes it that the product reads rows of 16 columns: so many bytes lie here and, 512 of them, behind.
template <int KEY_TILE> struct KeyNumbers {
  static constexpr int ROWS = KEY_TILE + 8, BYTES = KEY_TILE * 32 - 512;
  static_assert(BYTES >= ROWS * 16, "the rows have room");

  template <int PRECISION> static __device__ __forceinline__ void write(u32 address) {   // by all threads of a block, of which there are more than rows
    const float j = threadIdx.x;
    if (threadIdx.x < ROWS) store_shared_16_bytes(address + threadIdx.x * 16, make_uint4(pack<PRECISION>(j, j), pack<PRECISION>(j, 0.0f), 0, 0));
    fence_for_async_proxy();
  }
};

// The slope of a query tile, for one warp's 16 queries of it. One that scores do not fall with, or that three parts do not hold, has no sides: every tile counts
// as one that crosses the diagonal. So it is where keys are not walked outwards.
template <int PRECISION, int OPTIONS, int KEY_TILE> struct Slope {
  static constexpr bool OUTWARDS = walks_outwards(PRECISION, OPTIONS), IN_PRODUCTS = OUTWARDS && !(OPTIONS & (SCALE_FIRST | SOFTCAP));   // else products are no scores yet
  static constexpr int MOST = 1 << 30;       // no key is further out; distances from less fit in an int
  int left_end = 0, right_begin = MOST;      // key tiles before the one, and from the other on, lie to one side
  u32 word = 0;                              // this lane's pair of the columns of Q, to the left of the diagonal
  int diagonal = 0;                          // of this lane's first row
  float step = 0.0f;                         // the slope as an exponent

  __device__ __forceinline__ Slope(const Problem& problem, const Score<PRECISION, OPTIONS>& score, float factor, int first_row, int lane) {
    if constexpr (!OUTWARDS) return;
    const float slope = score.slope;
    const i64 first = first_row + score.offset;
    bool sides = slope >= 0.0f && slope <= 32768.0f && -MOST < first && first < MOST;
    if constexpr (IN_PRODUCTS) {
      float parts[4] = {}, rest = slope;
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        typename ElementOf<PRECISION>::type part;
        from_float(part, rest);
        parts[i] = to_float(part), rest -= parts[i];
      }
      sides = sides && fabsf(rest) * (KEY_TILE * problem.score_unit) <= 1.5e-5f;   // which subnormal parts may leave
      word = lane % 4 == 0 ? pack<PRECISION>(parts[0], parts[1]) : lane % 4 == 1 ? pack<PRECISION>(parts[2], parts[3]) : 0;
    }
    if (!uniform(sides)) return;
    left_end = uniform(max((int)first + 1, 0) / KEY_TILE);
    right_begin = uniform(ceil_div(max((int)first + 15, 0), KEY_TILE));
    diagonal = (int)first + lane / 4, step = slope * factor;
  }

  __device__ __forceinline__ Side side(int tile) const { return !OUTWARDS ? CROSSING : tile < left_end ? LEFT : tile >= right_begin ? RIGHT : CROSSING; }

  // What all scores of the lane's two rows get in a tile, as exponents.
  __device__ __forceinline__ void of_rows(float (&base)[2], int tile, Side side) const {
    const float signed_step = side == CROSSING ? 0.0f : side == LEFT ? step : -step;
    base[0] = signed_step * (float)(tile * KEY_TILE - diagonal);
    base[1] = fmaf(signed_step, -8.0f, base[0]);
  }
};

// S = Q Kᵀ as multiply_rows makes it, plus ± slope · j. The slope comes last: what is added to S is truncated to the last bits of S, and its terms may be large.
template <int PRECISION, int N, int DEPTH, int A_BOX, int B_BOX> __device__ __forceinline__ void multiply_rows_and_slope(float (&d)[N / 8][4], u32 a_at, u32 b_at, u32 word, Side side, u32 numbers_at) {
  const u32 signed_word = side == CROSSING ? 0 : side == LEFT ? word : word ^ 0x80008000u;
  u32 words[4] = {signed_word, signed_word, 0, 0};   // the same for the lane's two rows
#pragma unroll
  for (int i = 0; i < 4; ++i) keep_here(words[i]);   // in their registers before the fence
  wgmma_fence();
  issue_rows<false, PRECISION, N, DEPTH, A_BOX, B_BOX>(d, a_at, b_at);
  Wgmma<PRECISION, N>::template multiply_registers_along_k<true>(d, words, descriptor_of_short_rows(numbers_at));
  wgmma_commit();
}
