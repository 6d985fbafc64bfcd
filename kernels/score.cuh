// What happens to one score between the product q·k and the softmax: which keys a query sees, and the factor that turns a score into an exponent of 2.
// Every kernel takes its scores through here. An option that a call does not use is compiled out (OPTIONS is a template parameter).
#pragma once
#include "problem.cuh"

enum Option {
  SCALE_FIRST = 1,   // scores are scaled before the row maximum is taken: needed where the scale is not positive
};

// The keys that a query sees are an interval whose two ends never move back from one query to the next; so are the queries that see a key.
// Whole tiles outside are skipped, tiles inside need no mask, and only the tiles between pay for one.
struct Visible {
  int offset;   // query i stands at key i + offset; within [-queries, keys], where every offset further out means the same
  int queries, keys;

  __device__ __forceinline__ Visible(const Problem& problem, const Place& place)
      : offset(problem.keys), queries(problem.queries), keys(problem.keys) {
    if (problem.causal) offset = (int)min(max(place.offset(problem), -(i64)queries), (i64)keys);
  }

  // Query `row` sees the keys [0, key_end(row)).
  __device__ __forceinline__ int key_end(int row) const { return min(max(row + offset + 1, 0), keys); }

  // Key `column` is seen by the queries [query_begin(column), queries); a key that does not exist by none.
  __device__ __forceinline__ int query_begin(int column) const { return column >= keys ? queries : min(max(column - offset, 0), queries); }
};

// Factor of the score inside exp2.
template <int OPTIONS> __device__ __forceinline__ float exponent_factor(const Problem& problem) {
  return OPTIONS & SCALE_FIRST ? 1.0f : problem.scale_log2;
}

// One score of the product, on its way to the softmax.
template <int OPTIONS> __device__ __forceinline__ float transform(const Problem& problem, float score) {
  return OPTIONS & SCALE_FIRST ? score * problem.scale_log2 : score;
}
