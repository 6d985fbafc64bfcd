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

constexpr int ROWS = 32, WORDS = 8;

__global__ void __launch_bounds__(ROWS * WORDS) mask_words(const __grid_constant__ Problem problem) {
  __shared__ u32 words[ROWS][WORDS + 1];
  const Array &mask = problem.mask, &target = problem.out;
  const int rows = problem.queries, columns = mask.column_stride ? problem.keys : target.columns * 32, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 across = ceil_div(target.columns, WORDS), down = ceil_div(rows, ROWS);
  u32 index = blockIdx.x;
  const int first_word = index % across * WORDS, first_row = index / across % down * ROWS;
  index /= across * down;
  Place place(problem, 0, 1);
  place.head = index % own_heads(problem, target) * target.group;
  index /= own_heads(problem, target);
  for (int i = BATCH_DIMS - 1; i >= 0; --i) {
    place.batch[i] = index % own_entries(problem, target, i);
    index /= own_entries(problem, target, i);
  }

  const u8* first = place.rows<u8>(mask);
  auto seen = [&](int row, int column) { return row < rows && column < columns && first[row * mask.row_stride + column * mask.column_stride] != 0; };
  if (mask.row_stride && llabs(mask.row_stride) < llabs(mask.column_stride)) {
    static_assert(ROWS == 32, "a lane has a row");
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < 32; ++i) word |= (u32)seen(first_row + lane, (first_word + warp) * 32 + i) << i;
    words[lane][warp] = word;
  } else {
    u32 word;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const u32 vote = __ballot_sync(0xffffffff, seen(first_row + warp * (32 / WORDS) + i / WORDS, (first_word + i % WORDS) * 32 + lane));
      if (lane == i) word = vote;
    }
    words[threadIdx.x / WORDS][threadIdx.x % WORDS] = word;
  }
  __syncthreads();
  const int row = first_row + threadIdx.x / WORDS, column = first_word + threadIdx.x % WORDS;
  if (row < rows && column < target.columns) place.rows<u32>(target)[row * target.row_stride + column] = words[threadIdx.x / WORDS][threadIdx.x % WORDS];
}
