// A mask becomes bits, once for what is broadcast, so that the kernels of a call read an eighth of it, 32 columns at a time (mask.cuh).
//
//   mask (batch, heads, queries, keys), bytes of which any but 0 is true, any strides
//   -> problem.out (its own batch entries, heads and rows, problem.out.columns): words of 32 columns, the first in the lowest bit. Bits beyond the columns are 0;
//   where one column stands for all, so does each bit of a row.
//
// Rows and columns are queries and keys, or, for kernels that take their scores transposed, keys and queries: launch.py tells their number as problem.queries
// and problem.keys, and turns the mask's strides round.
//
// A block makes ROWS rows of WORDS words. Lanes read neighbouring bytes: along the columns, and a vote makes 32 of them a word; or, where rows lie closer to each
// other, along the rows, and each makes words of its own.
//
// Shared memory: the words, which are written row by row. Order of waits: the words are made, __syncthreads.
#include "problem.cuh"

constexpr int WARPS = 8, ROWS = 32, WORDS = WARPS;   // along the rows a lane has a row, and a warp a word of each

__global__ void __launch_bounds__(WARPS * 32) mask_words(const __grid_constant__ Problem problem) {
  __shared__ u32 words[ROWS][WORDS + 1];
  const Array &mask = problem.mask, &target = problem.out;
  const int rows = problem.queries, columns = mask.column_stride ? problem.keys : target.columns * 32, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 across = ceil_div(target.columns, WORDS), down = ceil_div(rows, ROWS);
  u32 index = blockIdx.x;
  const int first_word = index % across * WORDS, first_row = index / across % down * ROWS;
  index /= across * down;
  Place place;
  if (index) {   // one division and more for each dimension
    place.head = index % own_heads(problem, target) * target.group;
    index /= own_heads(problem, target);
    for (int i = BATCH_DIMS - 1; i >= 0; --i) {
      place.batch[i] = index % own_entries(problem, target, i);
      index /= own_entries(problem, target, i);
    }
  }

  const u8* first = place.rows<u8>(mask);
  const bool along_rows = mask.row_stride && llabs(mask.row_stride) < llabs(mask.column_stride);
  const i64 step = along_rows ? mask.column_stride : 32 * mask.column_stride;
  auto at = [&](int row, int column) { return first + row * mask.row_stride + column * mask.column_stride; };
  if (along_rows) {
    const int row = first_row + lane, column = (first_word + warp) * 32, left = row < rows ? columns - column : 0;
    const u8* byte = at(row, column);
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 32; ++i, byte += step)
      if (i < left && *byte) word |= 1u << i;
    words[lane][warp] = word;
  } else {
#pragma unroll
    for (int i = 0; i < ROWS / WARPS; ++i) {
      const int row = first_row + warp * (ROWS / WARPS) + i, column = first_word * 32 + lane, left = row < rows ? columns - column : 0;
      const u8* byte = at(row, column);
#pragma unroll
      for (int j = 0; j < WORDS; ++j, byte += step) {
        const u32 word = __ballot_sync(0xffffffff, j * 32 < left && *byte);
        if (lane == j) words[row - first_row][j] = word;
      }
    }
  }
  __syncthreads();
  const int row = first_row + threadIdx.x / WORDS, column = first_word + threadIdx.x % WORDS;
  if (row < rows && column < target.columns) place.rows<u32>(target)[row * target.row_stride + column] = words[threadIdx.x / WORDS][threadIdx.x % WORDS];
}
