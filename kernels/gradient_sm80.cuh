// A gradient of a block, from accumulators to device memory.
#pragma once
#include "problem.cuh"
#include "product_sm80.cuh"

// d times `scale` goes to rows first_row + row .. of `array`, columns column .. : by way of `tile` (free by now) in 16-byte pieces, or, where the host sums
// parts, as float32 straight from the registers (then rows of `array` are as wide as the tile). All threads of the block call this; `rows` is the array's length.
template <int PRECISION, int ROW_TILES, int COLUMNS, int THREADS, typename Tile>
__device__ __forceinline__ void store_gradient(const Problem& problem, const Array& array, const Place& place, const Tile& tile, float (&d)[ROW_TILES][COLUMNS / 8][4],
                                               float scale, int row, int column, int first_row, int rows, int lane) {
  using Element = typename Tile::Element;
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) d[m][n][i] *= scale;
  if (problem.partial) {
    float* target = place.rows<float>(array) + first_row * array.row_stride;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = row + m * 16 + half * 8 + lane / 4;
        if (first_row + at >= rows) continue;
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n) *(float2*)(target + at * array.row_stride + column + n * 8 + lane % 4 * 2) = make_float2(d[m][n][2 * half], d[m][n][2 * half + 1]);
      }
  } else {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) store_accumulators<PRECISION, COLUMNS>(tile, row + m * 16, column, lane, d[m]);
    __syncthreads();
    store_rows<THREADS, Tile::ROWS>(tile, 0, threadIdx.x, place.rows<Element>(array) + first_row * array.row_stride, array.row_stride, rows - first_row, array.columns);
  }
}
