// What the backward kernels share: dS of a tile whose rows are queries, and a gradient's way from accumulators to device memory.
#pragma once
#include "product_sm80.cuh"
#include "score.cuh"

// The tiles of a kernel whose warps own 16 · ROW_TILES queries and all keys of a tile.
template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int WARPS, int ROW_TILES, int KEY_TILE> struct GradientTiles {
  using Element = typename ElementOf<PRECISION>::type;
  static constexpr int THREADS = WARPS * 32, WARP_ROWS = ROW_TILES * 16, QUERY_TILE = WARPS * WARP_ROWS;
  using Q = SharedTile<Element, QUERY_TILE, HEAD_DIM>;
  using DO = SharedTile<Element, QUERY_TILE, VALUE_DIM>;
  using K = SharedTile<Element, KEY_TILE, HEAD_DIM>;
  using V = SharedTile<Element, KEY_TILE, VALUE_DIM>;
  static constexpr int QUERY_BYTES = Q::BYTES + DO::BYTES, KEY_BYTES = K::BYTES + V::BYTES;
};

// lse (as a shift) and D of a lane's rows, the first of them `row` of the padded rows. Rows that take no part hold lse = inf, so that P = 0.
template <int ROW_TILES, typename Real> __device__ __forceinline__ void load_statistics(const Problem& problem, Real (&lse)[ROW_TILES][2], Real (&d)[ROW_TILES][2], i64 row) {
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) lse[m][half] = reals<Real>(problem.row_lse)[row + m * 16 + half * 8], d[m][half] = reals<Real>(problem.row_d)[row + m * 16 + half * 8];
}

// dS = P ∘ (dO Vᵀ - D), P = exp(scores(Q Kᵀ) - lse), of 16 · ROW_TILES queries, the rows of Q and dO from `warp_row` on, and all keys of K and V; ds starts at 0.
// OF_PRODUCT: the gradient of scale · Q Kᵀ, which with a softcap is not that of the score.
template <int PRECISION, int OPTIONS, bool OF_PRODUCT, int ROW_TILES, int GROUPS, typename Q, typename DO, typename K, typename V>
__device__ __forceinline__ void gradient_of_products(const Problem& problem, Real<PRECISION> (&ds)[ROW_TILES][GROUPS][4], const Q& q_tile, const DO& do_tile, const K& k_tile, const V& v_tile,
                                                     const Score<PRECISION, OPTIONS>& score, const Visible<OPTIONS>& visible, bool need_mask, const Dropout& dropout,
                                                     const Real<PRECISION> (&lse)[ROW_TILES][2], const Real<PRECISION> (&d)[ROW_TILES][2], int first_query, int warp_row, int first_key, int lane) {
  using Element = typename Q::Element;
  using Real = ::Real<PRECISION>;
  constexpr int KEY_TILE = GROUPS * 8, HEAD_DIM = Q::COLUMNS, VALUE_DIM = DO::COLUMNS;
  const Exponential<PRECISION> exponential(problem);
  Real p[ROW_TILES][KEY_TILE / 8][4] = {};
  {
    const RowsOfA<Q> q_rows(q_tile, lane);
    const ColumnsOfB<K> k_columns(k_tile, lane);
    accumulate<PRECISION, ROW_TILES, KEY_TILE, HEAD_DIM / K_STEP<Element>, false>(
        p, [&](auto& words, int m, int step) { q_rows.load(words, warp_row + m * 16, step); },
        [&](auto& words, int column, int step) { k_columns.load(words, column, step); });
  }
  const int lane_row = first_query + warp_row + lane / 4, lane_column = first_key + lane % 4 * 2;
  Real derivative[ROW_TILES][KEY_TILE / 8][4];   // SOFTCAP alone
  score.template apply<false, ROW_TILES, KEY_TILE>(problem, p, lane_row, lane_column, derivative);
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int n = 0; n < KEY_TILE / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) p[m][n][i] = exponential.against_lse(p[m][n][i], lse[m][i / 2]) * (OF_PRODUCT && OPTIONS & SOFTCAP ? derivative[m][n][i] : Real(1));
  if (need_mask) visible.template hide<false, ROW_TILES, KEY_TILE>(p, lane_row, lane_column, 0.0f);
  if constexpr ((OPTIONS & DROPOUT) != 0)
    dropout.drop<false, ROW_TILES, KEY_TILE>(
        problem, lane_row, lane_column, [&](int m, int n, int half, int i) { p[m][n][2 * half + i] = -p[m][n][2 * half + i]; });

  {
    const RowsOfA<DO> do_rows(do_tile, lane);
    const ColumnsOfB<V> v_columns(v_tile, lane);
    accumulate<PRECISION, ROW_TILES, KEY_TILE, VALUE_DIM / K_STEP<Element>, false>(
        ds, [&](auto& words, int m, int step) { do_rows.load(words, warp_row + m * 16, step); },
        [&](auto& words, int column, int step) { v_columns.load(words, column, step); });
  }
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int n = 0; n < KEY_TILE / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) ds[m][n][i] = gradient_of_score<OPTIONS>(problem, p[m][n][i], ds[m][n][i], d[m][i / 2]);
}

// d times `scale` goes to rows first_row + row .. of `array`, columns column .. : by way of `tile` (free by now) in 16-byte pieces, or, where the host sums
// parts, as float32 (float64) straight from the registers (then rows of `array` are as wide as the tile). All threads of the block call this; `rows` is the array's length.
template <int PRECISION, int ROW_TILES, int COLUMNS, int THREADS, typename Tile>
__device__ __forceinline__ void store_gradient(const Problem& problem, const Array& array, const Place& place, const Tile& tile, Real<PRECISION> (&d)[ROW_TILES][COLUMNS / 8][4],
                                               Real<PRECISION> scale, int row, int column, int first_row, int rows, int lane) {
  using Element = typename Tile::Element;
  using Real = ::Real<PRECISION>;
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) d[m][n][i] *= scale;
  if (problem.partial) {
    Real* target = place.rows<Real>(array) + first_row * array.row_stride;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = row + m * 16 + half * 8 + lane / 4;
        if (first_row + at >= rows) continue;
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n) store_pair(target + at * array.row_stride + column + n * 8 + lane % 4 * 2, d[m][n][2 * half], d[m][n][2 * half + 1]);
      }
  } else {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) store_accumulators<PRECISION, COLUMNS>(tile, row + m * 16, column, lane, d[m]);
    __syncthreads();
    store_rows<THREADS, Tile::ROWS>(tile, 0, threadIdx.x, place.rows<Element>(array) + first_row * array.row_stride, array.row_stride, rows - first_row, array.columns);
  }
}
