// What happens to one score between the product q·k and the softmax: which keys a query sees, and the factor that turns a score into an exponent of 2.
// Every kernel takes its scores through here. An option that a call does not use is compiled out (OPTIONS is a template parameter).
#pragma once
#include "problem.cuh"

enum Option {
  SCALE_FIRST = 1,   // scores are scaled before the row maximum is taken: needed where the scale is not positive
  LONG_SUMS = 2,     // forward: each tile's part of O is summed from zero and added in round-to-nearest (accumulate in product_sm80.cuh)
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

// P = exp(scale · score - shift), where a row's shift is its maximum, or its lse. The 16-bit and tf32 kernels work in exponents of 2, one multiplication
// less, with shifts in units of ln 2. FLOAT32 keeps natural units: then a shift is never rounded by a factor, and P errs by an exponent near 0, not by a
// shift that may be large.
template <int PRECISION, int OPTIONS> struct Exponential {
  static constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.69314718055994531f;
  float factor;   // positive: from scores to exponents

  __device__ __forceinline__ Exponential(const Problem& problem) : factor(OPTIONS & SCALE_FIRST ? 1.0f : scale(problem)) {}
  static __device__ __forceinline__ float scale(const Problem& problem) { return PRECISION == FLOAT32 ? problem.scale : problem.scale_log2; }

  // What the options make of a score, before anything else sees it.
  static __device__ __forceinline__ float transform(const Problem& problem, float score) { return OPTIONS & SCALE_FIRST ? score * scale(problem) : score; }

  static __device__ __forceinline__ float of(float exponent) { return exp2_approximate(PRECISION == FLOAT32 ? exponent * LOG2_E : exponent); }
  __device__ __forceinline__ float operator()(float score, float shift) const { return of(fmaf(score, factor, -shift)); }

  static __device__ __forceinline__ float shift_of_lse(float lse) { return PRECISION == FLOAT32 ? lse : lse * LOG2_E; }
  static __device__ __forceinline__ float lse(float shift, float sum) { return (PRECISION == FLOAT32 ? shift : shift * LN_2) + logf(sum); }
};
