// Fragments of matrix products by mma.sync: loading them from shared tiles, making them from accumulators, multiplying.
// One step along k is 16 elements of 16 bits, or 8 of float32 or float64.
//
// Accumulators hold columns (2t, 2t + 1), which for 16-bit types are also one word of an A fragment; a float32 or float64 A fragment wants columns
// (t, t + 4). The order along k is free as long as A and B agree, so float32 and float64 fragments made from accumulators, and those read against their
// tile's rows ("transposed"), take k in the order 2t, 2t + 1.
#pragma once
#include "ptx/mma_sm80.cuh"
#include "shared_tile.cuh"

template <typename Element> constexpr int K_STEP = sizeof(Element) == 2 ? 16 : 8;

// What fragments are loaded as: words of 32 bits, or numbers of float64. B fragments are loaded for two neighbouring groups of 8 columns, or one (float64).
template <typename Element> struct WordOf { using type = u32; };
template <> struct WordOf<double> { using type = double; };
template <typename Element> constexpr int B_GROUPS = sizeof(Element) == 8 ? 1 : 2;

// What mma takes: for FLOAT32 every x is high + low with high = x rounded to tf32, so that x·y = high·high + high·low + low·high but for
// low · low and the last bits of the low parts, which mma drops: a few times 2^-22 |x·y|.
template <int PRECISION, int WORDS> struct Fragment { u32 high[WORDS], low[WORDS]; };
template <int WORDS> struct Fragment<FLOAT64, WORDS> { double high[WORDS]; };

template <int PRECISION, int WORDS> __device__ __forceinline__ Fragment<PRECISION, WORDS> fragment(const typename WordOf<typename ElementOf<PRECISION>::type>::type* words) {
  Fragment<PRECISION, WORDS> f;
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    if constexpr (PRECISION == FLOAT16 || PRECISION == BFLOAT16 || PRECISION == FLOAT64) {
      f.high[i] = words[i];
    } else {
      f.high[i] = round_to_tfloat32(words[i]);
      if constexpr (PRECISION == FLOAT32) f.low[i] = __float_as_uint(__uint_as_float(words[i]) - __uint_as_float(f.high[i]));
    }
  }
  return f;
}

template <int PRECISION> __device__ __forceinline__ void multiply(Real<PRECISION> (&d)[4], const Fragment<PRECISION, 4>& a, const Fragment<PRECISION, 2>& b) {
  if constexpr (PRECISION == FLOAT16) mma_float16(d, a.high, b.high);
  else if constexpr (PRECISION == BFLOAT16) mma_bfloat16(d, a.high, b.high);
  else if constexpr (PRECISION == FLOAT64) mma_float64(d, a.high, b.high);
  else mma_tfloat32(d, a.high, b.high);
}

// d += a · b over a few steps, FLOAT32. The tensor cores add by truncation: chained over all of k, errors would all go one way and grow with its length. So
// a few steps are summed from zero, the small products first, and added to d in round-to-nearest (Ootomo & Yokota 2022, arXiv:2203.03341).
// An infinite input has a low part of NaN; then the small products are NaN, and the maximum drops them, so that high · high decides as a float32 product would.
// low · low is left out, at most 2^-22 of a term: among many terms it drowns, but a sum of FEW takes it in. TURNED: the bits of bᵀ · aᵀ, transposed.
template <int STEPS, bool FEW, bool TURNED>
__device__ __forceinline__ void multiply_split(float (&d)[4], const Fragment<FLOAT32, 4> (&a)[STEPS], const Fragment<FLOAT32, 2> (&b)[STEPS]) {
  float sum[4] = {};
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    if constexpr (FEW) mma_tfloat32(sum, a[step].low, b[step].low);
    if constexpr (!TURNED) mma_tfloat32(sum, a[step].low, b[step].high);
    mma_tfloat32(sum, a[step].high, b[step].low);
    if constexpr (TURNED) mma_tfloat32(sum, a[step].low, b[step].high);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] = fmaxf(sum[i], -3.402823466e38f);
#pragma unroll
  for (int step = 0; step < STEPS; ++step) mma_tfloat32(sum, a[step].high, b[step].high);
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += sum[i];
}

// A fragments of 16 rows from a tile whose rows run along k.
template <typename Tile, int BYTES = sizeof(typename Tile::Element)> struct RowsOfA {
  LaneView<Tile> view;
  __device__ __forceinline__ RowsOfA(const Tile& tile, int lane) : view(tile, lane % 16, lane / 16) {}
  __device__ __forceinline__ void load(u32 (&words)[4], int row, int step) const { ldmatrix(words, view.at(row, 2 * step)); }
};
template <typename Tile> struct RowsOfA<Tile, 8> {
  LaneView<Tile> view;
  __device__ __forceinline__ RowsOfA(const Tile& tile, int lane) : view(tile, lane / 4, lane / 2 % 2, lane % 2 * 8) {}
  __device__ __forceinline__ void load(double (&words)[4], int row, int step) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) load_shared(words[i], view.at(row + i % 2 * 8, 4 * step + i / 2 * 2));
  }
};

// B fragments of neighbouring groups of 8 columns from a tile that holds the columns as rows along k.
template <typename Tile, int BYTES = sizeof(typename Tile::Element)> struct ColumnsOfB {
  LaneView<Tile> view;
  __device__ __forceinline__ ColumnsOfB(const Tile& tile, int lane) : view(tile, lane % 8 + lane / 16 * 8, lane / 8 % 2) {}
  __device__ __forceinline__ void load(u32 (&words)[4], int column, int step) const { ldmatrix(words, view.at(column, 2 * step)); }
};
template <typename Tile> struct ColumnsOfB<Tile, 8> {
  LaneView<Tile> view;
  __device__ __forceinline__ ColumnsOfB(const Tile& tile, int lane) : view(tile, lane / 4, lane / 2 % 2, lane % 2 * 8) {}
  __device__ __forceinline__ void load(double (&words)[2], int column, int step) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) load_shared(words[i], view.at(column, 4 * step + i * 2));
  }
};

// B fragments of neighbouring groups of 8 columns from a tile whose rows are steps of k.
template <typename Tile, int BYTES = sizeof(typename Tile::Element)> struct RowsOfB {
  LaneView<Tile> view;
  __device__ __forceinline__ RowsOfB(const Tile& tile, int lane) : view(tile, lane % 16, lane / 16) {}
  __device__ __forceinline__ void load(u32 (&words)[4], int step, int column) const { ldmatrix_transposed(words, view.at(step * 16, column / 8)); }
};
template <typename Tile> struct RowsOfB<Tile, 4> {
  LaneView<Tile> even, odd;
  __device__ __forceinline__ RowsOfB(const Tile& tile, int lane)
      : even(tile, lane % 4 * 2, lane / 16, lane / 4 % 4 * 4), odd(tile, lane % 4 * 2 + 1, lane / 16, lane / 4 % 4 * 4) {}
  __device__ __forceinline__ void load(u32 (&words)[4], int step, int column) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      words[2 * i] = load_shared(even.at(step * 8, column / 4 + 2 * i));
      words[2 * i + 1] = load_shared(odd.at(step * 8, column / 4 + 2 * i));
    }
  }
};
template <typename Tile> struct RowsOfB<Tile, 8> {
  LaneView<Tile> even, odd;
  __device__ __forceinline__ RowsOfB(const Tile& tile, int lane) : even(tile, lane % 4 * 2, lane / 8, lane / 4 % 2 * 8), odd(tile, lane % 4 * 2 + 1, lane / 8, lane / 4 % 2 * 8) {}
  __device__ __forceinline__ void load(double (&words)[2], int step, int column) const {
    load_shared(words[0], even.at(step * 8, column / 2));
    load_shared(words[1], odd.at(step * 8, column / 2));
  }
};

// A fragments of 16 columns of a tile whose rows are steps of k.
template <typename Tile, int BYTES = sizeof(typename Tile::Element)> struct ColumnsOfA {
  LaneView<Tile> view;
  __device__ __forceinline__ ColumnsOfA(const Tile& tile, int lane) : view(tile, lane % 8 + lane / 16 * 8, lane / 8 % 2) {}
  __device__ __forceinline__ void load(u32 (&words)[4], int step, int row) const { ldmatrix_transposed(words, view.at(step * 16, row / 8)); }
};
template <typename Tile> struct ColumnsOfA<Tile, 4> {
  RowsOfB<Tile> columns;
  __device__ __forceinline__ ColumnsOfA(const Tile& tile, int lane) : columns(tile, lane) {}
  __device__ __forceinline__ void load(u32 (&words)[4], int step, int row) const {
    u32 b[4];
    columns.load(b, step, row);
    words[0] = b[0], words[1] = b[2], words[2] = b[1], words[3] = b[3];
  }
};
template <typename Tile> struct ColumnsOfA<Tile, 8> {
  RowsOfB<Tile> columns;
  __device__ __forceinline__ ColumnsOfA(const Tile& tile, int lane) : columns(tile, lane) {}
  __device__ __forceinline__ void load(double (&words)[4], int step, int row) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      double b[2];
      columns.load(b, step, row + half * 8);
      words[half] = b[0], words[2 + half] = b[1];
    }
  }
};

// A fragments of 16 rows of a tile along k, in the order of k that RowsOfB has.
template <typename Tile, int BYTES = sizeof(typename Tile::Element)> struct RowsOfAForRowsOfB : RowsOfA<Tile> {
  using RowsOfA<Tile>::RowsOfA;
};
template <typename Tile> struct RowsOfAForRowsOfB<Tile, 8> {
  LaneView<Tile> view;
  __device__ __forceinline__ RowsOfAForRowsOfB(const Tile& tile, int lane) : view(tile, lane / 4, lane % 4) {}
  __device__ __forceinline__ void load(double (&words)[4], int row, int step) const {
    load_shared(words[0], words[2], view.at(row, 4 * step));
    load_shared(words[1], words[3], view.at(row + 8, 4 * step));
  }
};
template <typename Tile> struct RowsOfAForRowsOfB<Tile, 4> {
  LaneView<Tile> view;
  __device__ __forceinline__ RowsOfAForRowsOfB(const Tile& tile, int lane) : view(tile, lane / 4, lane / 2 % 2, lane % 2 * 8) {}
  __device__ __forceinline__ void load(u32 (&words)[4], int row, int step) const {
    load_shared(words[0], words[2], view.at(row, 2 * step));
    load_shared(words[1], words[3], view.at(row + 8, 2 * step));
  }
};

// The A fragment of step `step` out of the accumulators of 16 rows.
template <int PRECISION, int COLUMNS, typename Word> __device__ __forceinline__ void words_of_accumulators(Word (&words)[4], const Real<PRECISION> (&d)[COLUMNS / 8][4], int step) {
  if constexpr (PRECISION == FLOAT16 || PRECISION == BFLOAT16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pack<PRECISION>(d[2 * step + i / 2][i % 2 * 2], d[2 * step + i / 2][i % 2 * 2 + 1]);
  } else if constexpr (PRECISION == FLOAT64) {
    words[0] = d[step][0], words[1] = d[step][2], words[2] = d[step][1], words[3] = d[step][3];
  } else {
    words[0] = __float_as_uint(d[step][0]), words[1] = __float_as_uint(d[step][2]), words[2] = __float_as_uint(d[step][1]), words[3] = __float_as_uint(d[step][3]);
  }
}

// Accumulators of 16 rows (first row `row`) into a tile, at column `column` on; converted to the tile's type.
template <int PRECISION, int COLUMNS, typename Tile>
__device__ __forceinline__ void store_accumulators(const Tile& tile, int row, int column, int lane, const Real<PRECISION> (&d)[COLUMNS / 8][4]) {
  constexpr int PER_CHUNK = 16 / (int)sizeof(typename Tile::Element);
#pragma unroll
  for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int at_row = row + half * 8 + lane / 4, at_column = column + n * 8 + lane % 4 * 2;
      u32 address = tile.at(at_row, at_column / PER_CHUNK) + at_column % PER_CHUNK * (int)sizeof(typename Tile::Element);
      if constexpr (PRECISION == FLOAT16 || PRECISION == BFLOAT16) store_shared(address, pack<PRECISION>(d[n][2 * half], d[n][2 * half + 1]));
      else if constexpr (PRECISION == FLOAT64) store_shared(address, d[n][2 * half], d[n][2 * half + 1]);
      else store_shared(address, __float_as_uint(d[n][2 * half]), __float_as_uint(d[n][2 * half + 1]));
    }
}

// d[m][n] += A · B over STEPS steps of k for ROW_TILES x 16 rows and COLUMNS columns. `load_a(words, m, step)` and `load_b(words, column, step)` give
// the fragments (b: B_GROUPS groups of 8 columns). A_IN_REGISTERS: load_a needs `step` at compile time. LONG: d has summed many tiles before; the tensor cores
// truncate what they add to it, which over a million keys takes 0.7 % off a sum of equal terms, so this tile is summed from zero and added in
// round-to-nearest (FLOAT32 always does so, and float64 tensor cores round to nearest themselves). TURNED: to the bit what B and A, transposed, would give.
template <int PRECISION, int ROW_TILES, int COLUMNS, int STEPS, bool A_IN_REGISTERS, bool LONG = false, bool TURNED = false, typename LoadA, typename LoadB>
__device__ __forceinline__ void accumulate(Real<PRECISION> (&d)[ROW_TILES][COLUMNS / 8][4], LoadA load_a, LoadB load_b) {
  using Word = typename WordOf<typename ElementOf<PRECISION>::type>::type;
  constexpr int GROUPS = B_GROUPS<typename ElementOf<PRECISION>::type>;
  if constexpr (LONG && PRECISION != FLOAT32 && PRECISION != FLOAT64) {
#pragma unroll
    for (int column = 0; column < COLUMNS; column += 16) {
      float sum[ROW_TILES][2][4] = {};
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        u32 b[4];
        load_b(b, column, step);
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
          u32 words[4];
          load_a(words, m, step);   // again for each 16 columns: kept for all of them, A would take the registers of a tile
          const Fragment<PRECISION, 4> a = fragment<PRECISION, 4>(words);
#pragma unroll
          for (int half = 0; half < 2; ++half) multiply<PRECISION>(sum[m][half], a, fragment<PRECISION, 2>(b + 2 * half));
        }
      }
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int i = 0; i < 4; ++i) d[m][column / 8 + half][i] += sum[m][half][i];
    }
    return;
  }
  // Splitting makes long code of few registers' worth of work: unrolled, it is scheduled so far ahead that the registers run out.
  constexpr int AT_ONCE = PRECISION == FLOAT32 ? 2 : 1, UNROLL = A_IN_REGISTERS ? STEPS : PRECISION == FLOAT32 ? 1 : PRECISION == FLOAT64 ? (STEPS > 4 ? 4 : STEPS) : STEPS > 16 ? 8 : STEPS;
  static_assert(STEPS % AT_ONCE == 0, "k is whole steps");
#pragma unroll UNROLL
  for (int first = 0; first < STEPS; first += AT_ONCE) {
    Fragment<PRECISION, 4> a[ROW_TILES][AT_ONCE];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int step = 0; step < AT_ONCE; ++step) {
        Word words[4];
        load_a(words, m, first + step);
        a[m][step] = fragment<PRECISION, 4>(words);
      }
#pragma unroll
    for (int column = 0; column < COLUMNS; column += 8 * GROUPS) {
      Word words[AT_ONCE][2 * GROUPS];
#pragma unroll
      for (int step = 0; step < AT_ONCE; ++step) load_b(words[step], column, first + step);
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) {
        Fragment<PRECISION, 2> b[AT_ONCE];
#pragma unroll
        for (int step = 0; step < AT_ONCE; ++step) b[step] = fragment<PRECISION, 2>(words[step] + 2 * group);
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
          if constexpr (PRECISION == FLOAT32) multiply_split<AT_ONCE, !A_IN_REGISTERS && STEPS <= 4, TURNED>(d[m][column / 8 + group], a[m], b);
          else multiply<PRECISION>(d[m][column / 8 + group], a[m][0], b[0]);
        }
      }
    }
  }
}
