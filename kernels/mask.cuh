// The mask as kernels read it: the bits that mask_words.cu made of it, 32 columns a word, the first in the lowest bit. Rows and columns are those of the
// fragments: queries and keys, or of transposed scores keys and queries, which have bits of their own.
#pragma once
#include "problem.cuh"

// The bits of a lane's elements of a fragment whose first column is a multiple of COLUMNS, or with ANYWHERE any.
template <int ROW_TILES, int COLUMNS, bool ANYWHERE> struct MaskBits {
  static constexpr int WORDS = ceil_div(COLUMNS, 32), STEP = ANYWHERE ? 1 : COLUMNS & -COLUMNS;   // a fragment starts at a multiple of STEP
  static constexpr int LAST_BIT = (STEP < 32 ? 32 - STEP : 0) + (ANYWHERE ? 0 : 6) + COLUMNS - 7, READ = LAST_BIT / 32 + 1;   // words, as far as any lane needs them
  static constexpr int CHUNK = STEP >= 128 ? 4 : STEP >= 64 ? 2 : 1;   // words that can be read at once
  static constexpr u32 FIRST_HALF = 0x03030303, BOTH_HALVES = 0x0f0f0f0f;
  static_assert(READ % CHUNK == 0 && COLUMNS <= 128, "words are read in whole chunks, and rows are long enough (MASK_READ_AHEAD in launch.py)");
  struct alignas(4 * CHUNK) Chunk { u32 words[CHUNK]; };
  u32 bits[ROW_TILES][WORDS];   // whether d[m][n][2 * half + i] is seen: bit n % 4 * 8 + 2 * half + i of bits[m][n / 4]

  MaskBits() = default;
  // `first`: the words of a (batch, head). `row` and `column` are the lane's first ones; of rows that do not exist the last one is read.
  __device__ __forceinline__ MaskBits(const Array& mask, const u32* first, int row, int column, int rows) {
    first += (i64)(column / 32) * mask.column_stride;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Chunk* at = (const Chunk*)(first + min(row + m * 16 + half * 8, rows - 1) * mask.row_stride);
        u32 words[READ];
#pragma unroll
        for (int i = 0; i < READ / CHUNK; ++i) {
          const Chunk chunk = at[i];
#pragma unroll
          for (int j = 0; j < CHUNK; ++j) words[i * CHUNK + j] = chunk.words[j];
        }
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
          const u32 own = i + 1 < READ ? __funnelshift_r(words[i], words[i + 1], column) : words[i] >> column % 32;
          bits[m][i] = half ? (bits[m][i] & FIRST_HALF) | (own << 2 & ~FIRST_HALF) : own;
        }
      }
  }

  // What is not seen becomes `hidden`; where a warp sees all there is nothing to do.
  template <typename Real> __device__ __forceinline__ void hide(Real (&d)[ROW_TILES][COLUMNS / 8][4], Real hidden) const {
    u32 all = ~0u;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int i = 0; i < WORDS; ++i) all &= bits[m][i] | (i * 32 + 32 > COLUMNS ? ~0u << COLUMNS % 32 : 0);
    if (__all_sync(0xffffffff, (~all & BOTH_HALVES) == 0)) return;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (!seen(m, n, i)) d[m][n][i] = hidden;
  }

  // Whether d[m][n][i] is.
  __device__ __forceinline__ bool seen(int m, int n, int i) const { return both(bits[m][n / 4], 1 << n % 4 * 8 + i); }

  // a & b, written so that the compiler makes predicates of four neighbouring bits at once; of bit 0 it would make something else.
  static __device__ __forceinline__ u32 both(u32 a, u32 b) {
    u32 bits;
    asm("and.b32 %0, %1, %2;" : "=r"(bits) : "r"(a), "r"(b));
    return bits;
  }
};
