// The rows of packed arrays that no sequence holds, before the kernels that write the others. There are none if cu_seqlens lead from 0 to the length, as they should; but
// where they lie in GPU memory nobody looks at them before. Where offsets descend, all rows: which of them the others write is not said then.
//
//   out, dq (batch, heads, queries, columns), dk, dv (.., keys, columns): 0;  lse (.., queries): -inf;  arrays whose pointer is null: nothing
//   and the word by which forward_sm90 counts tiles: 0
//
// A warp takes a row of a (batch, head), then the next one that no other takes. No shared memory; a block waits once, for all its threads to have looked at offsets.
#include "problem.cuh"

constexpr int WARPS = 8;

// The same in all threads of a block.
__device__ __forceinline__ bool offsets_descend(const Problem& problem) {
  bool descend = false;
  for (int i = threadIdx.x; i < problem.sequences; i += WARPS * 32) descend |= problem.cu_q[i] > problem.cu_q[i + 1] || problem.cu_k[i] > problem.cu_k[i + 1];
  return __syncthreads_or(descend);
}

// write(place, row) of the rows before the first sequence and after the last one, or of all.
template <typename Write> __device__ __forceinline__ void for_rows_outside(const Problem& problem, const int* offsets, int total, bool all, Write write) {
  const int begin = all ? total : min(max(offsets[0], 0), total), end = min(max(offsets[problem.sequences], begin), total), rows = begin + total - end;
  for (i64 index = blockIdx.x * WARPS + threadIdx.x / 32; index < (i64)rows * problem.grid_places; index += gridDim.x * WARPS) {
    const int row = index % rows;
    write(Place(problem, (u32)(index / rows), problem.heads, problem.by_heads), row < begin ? row : row + end - begin);
  }
}

template <int PRECISION> __global__ void __launch_bounds__(WARPS * 32) outside_sequences(const __grid_constant__ Problem problem) {
  using Element = typename ElementOf<PRECISION>::type;
  const int lane = threadIdx.x % 32;
  const bool all = offsets_descend(problem);
  auto clear = [&](const Array& array, const int* offsets, int total) {
    if (!array.data) return;
    for_rows_outside(problem, offsets, total, all, [&](const Place& place, int row) {
      Element* to = place.rows<Element>(array) + row * array.row_stride;
      for (int column = lane; column < array.columns; column += 32) to[column] = Element{};
    });
  };
  clear(problem.out, problem.cu_q, problem.queries);
  clear(problem.dq, problem.cu_q, problem.queries);
  clear(problem.dk, problem.cu_k, problem.keys);
  clear(problem.dv, problem.cu_k, problem.keys);
  if (problem.lse.data)
    for_rows_outside(problem, problem.cu_q, problem.queries, all, [&](const Place& place, int row) { place.rows<Real<PRECISION>>(problem.lse)[row * problem.lse.row_stride] = -infinity(); });
  if (problem.tile_counter && blockIdx.x == 0 && threadIdx.x == 0) *problem.tile_counter = 0;
}
