// What the kernels of a float32 call in float16 parts (parts.cuh), and the one that stands by, tell each other in device memory.
#pragma once
#include "problem.cuh"

// Words of problem.tile_counter, which the host has zeroed: whether parts will not do for the call; of each (batch, head) whether they did for its output; and
// of each of the values' own (batch, head) the largest value's size, as bits.
constexpr int REFUSED = 1, PLACES = 2;
constexpr float SMALLEST_OUTPUT = 1.0f / 256;   // see float32_parts.cu

__device__ __forceinline__ u32* word_of_output(const Problem& problem, const Place& place) { return problem.tile_counter + PLACES + place.flat(problem); }
__device__ __forceinline__ u32* word_of_values(const Problem& problem, const Array& array, const Place& place) {
  u32 own = 0;
#pragma unroll
  for (int i = 0; i < BATCH_DIMS; ++i) own = own * own_entries(problem, array, i) + (array.batch_stride[i] ? place.batch[i] : 0);
  return problem.tile_counter + PLACES + problem.grid_places + own * own_heads(problem, array) + (array.head_stride ? place.head / array.group : 0);
}
