// What happens to one score between the product q·k and the softmax: which pairs see each other, and what scale, softcap, bias, ALiBi and mask make of
// it. Every kernel takes its scores through here. An option that a call does not use is compiled out (OPTIONS is a template parameter).
#pragma once
#include "exponential_float64.cuh"
#include "mask.cuh"
#include "philox.cuh"

enum Option {
  SCALE_FIRST = 1,      // scores are scaled at once, not with the exponent: needed where the scale is not positive, or far from 1 beside a bias
  LONG_SUMS = 2,        // forward: each tile's part of O is summed from zero and added in round-to-nearest (accumulate in product_sm80.cuh)
  WINDOW = 4,           // a bound to the left
  PACKED = 8,           // several sequences lie along queries and keys (cu_seqlens)
  LENGTHS = 16,         // only the first queries and keys take part (q_lengths, kv_lengths)
  SOFTCAP = 32,
  BIAS = 64,
  BIAS_FLOAT32 = 128,   // a float32 bias of 16-bit scores
  MASK = 256,
  ALIBI = 512,
  DROPOUT = 1024,
  SINKS = 2048,
  STAGED_BIAS = 4096,   // forward: the bias comes by way of shared memory: its rows are whole 16-byte pieces
  SPLIT_KEYS = 8192,    // forward_sm90: a query tile's keys are shared out over blocks, and forward_combine puts their parts together
  BIAS_GRADIENT = 16384,     // backward of the sm90 family: it makes the gradient of the bias too (bias_gradient_sm90.cuh)
  BIAS_ONE_ROW = 32768,      // beside BIAS_GRADIENT: of a bias that all queries share
  BIAS_ONE_COLUMN = 65536,   // beside BIAS_GRADIENT: of a bias that all keys share
  BIAS_UNSHARED = 131072,    // beside BIAS_GRADIENT: of a bias that has a number for each score
};

// Which queries and keys of a (batch, head) belong together: all, or with PACKED one of its sequences. Rows and columns count from its first ones.
// Values that come from device memory are clamped, so that none of them can lead outside the arrays.
template <int OPTIONS> struct Sequence {
  static constexpr i64 MOST = 1ll << 62;   // an offset further out is no other, and could not be added to
  int index = 0;
  int first_query = 0, first_key = 0;
  int queries, keys;
  int taking_part[2];   // LENGTHS: how many of the queries and keys

  __device__ __forceinline__ Sequence(const Problem& problem, const Place& place, int index = 0) : index(index), queries(problem.queries), keys(problem.keys) {
    if constexpr ((OPTIONS & PACKED) != 0) {
      bounds(problem.cu_q, problem.queries, first_query, queries);
      bounds(problem.cu_k, problem.keys, first_key, keys);
    }
    if constexpr ((OPTIONS & LENGTHS) != 0) {
      taking_part[0] = problem.q_lengths.data ? (int)min(max(max(*place.rows<i64>(problem.q_lengths), 0ll) - first_query, 0ll), (i64)queries) : queries;
      taking_part[1] = problem.kv_lengths.data ? (int)min(max(max(*place.rows<i64>(problem.kv_lengths), 0ll) - first_key, 0ll), (i64)keys) : keys;
    }
  }

  __device__ __forceinline__ void bounds(const int* offsets, int total, int& first, int& count) const {
    first = min(max(offsets[index], 0), total);
    count = min(max(offsets[index + 1], first), total) - first;
  }

  // How many queries and keys take part; the rest sees nothing and is not seen.
  __device__ __forceinline__ int seeing() const { return OPTIONS & LENGTHS ? taking_part[0] : queries; }
  __device__ __forceinline__ int seen() const { return OPTIONS & LENGTHS ? taking_part[1] : keys; }

  // Query i stands at key i + offset.
  __device__ __forceinline__ i64 offset(const Problem& problem, const Place& place) const {
    if ((OPTIONS & (PACKED | LENGTHS)) && problem.aligned_ends) return OPTIONS & PACKED ? keys - queries : seen() - seeing();
    return problem.offsets.data ? min(max(*place.rows<i64>(problem.offsets), -MOST), MOST) : problem.offset;
  }

  // Where the sequence's rows begin in row_lse, row_d and dq_sum, whose sequences start at whole tiles of `problem.padding` rows (see TileOfSequence).
  __device__ __forceinline__ i64 padded_row(const Problem& problem, const Place& place) const {
    return place.flat(problem) * problem.padded_queries + (OPTIONS & PACKED ? (first_query / problem.padding + index) * problem.padding : 0);
  }
};

// Tiles of packed sequences. No tile crosses from one sequence into the next, and how many each has is known on the device alone. Sequence s, which
// starts at row c, takes the slots from c / TILE + s on: that is enough for its tiles, needs no table, and a sequence's last slot may be left empty.
struct TileOfSequence {
  int sequence, tile;

  __device__ __forceinline__ explicit TileOfSequence(int tile) : sequence(0), tile(tile) {}
  __device__ __forceinline__ TileOfSequence(const int* offsets, int sequences, int total, int tile_rows, int slot) {
    int low = 0, high = sequences;   // the last sequence whose first slot is not after `slot`
    while (high - low > 1) {   // in eighths: offsets that are asked for together come in the time of one, and most blocks begin by waiting for them
      const int step = (high - low + 7) / 8, begin = low, end = high;
#pragma unroll
      for (int i = 1; i < 8; ++i) {
        const int middle = begin + i * step;
        const bool after = first_slot(offsets, min(middle, end - 1), total, tile_rows) > slot || middle >= end;
        if (!after) low = middle;
      }
      high = min(low + step, end);
    }
    sequence = low, tile = slot - first_slot(offsets, low, total, tile_rows);
  }
  static __device__ __forceinline__ int first_slot(const int* offsets, int s, int total, int tile_rows) { return min(max(offsets[s], 0), total) / tile_rows + s; }
};

// How many slots the tiles of `total` queries or keys take, and which tile a slot holds; without PACKED a slot is a tile.
template <int OPTIONS> __device__ __forceinline__ int tile_slots(const Problem& problem, int total, int tile_rows) {
  return OPTIONS & PACKED ? total / tile_rows + problem.sequences : ceil_div(total, tile_rows);
}
template <int OPTIONS> __device__ __forceinline__ TileOfSequence tile_of_slot(const Problem& problem, const int* offsets, int total, int tile_rows, int slot) {
  if constexpr ((OPTIONS & PACKED) != 0) return TileOfSequence(offsets, problem.sequences, total, tile_rows, slot);
  return TileOfSequence(slot);
}

// The keys that a query sees are an interval whose two ends never move back from one query to the next; so are the queries that see a key.
// Whole tiles outside are skipped, tiles inside need no mask, and only the tiles between pay for one.
template <int OPTIONS> struct Visible {
  int first, last;      // query `row` sees the keys [row + first, row + last); clamped where every bound further out means the same
  int queries, keys;    // that take part

  __device__ __forceinline__ Visible(const Problem& problem, const Place& place, const Sequence<OPTIONS>& sequence)
      : first(-sequence.queries), last(sequence.keys), queries(sequence.seeing()), keys(sequence.seen()) {
    if (problem.bounded) {
      const i64 offset = sequence.offset(problem, place), low = -(i64)sequence.queries, high = sequence.keys;
      last = (int)min(max(offset + problem.right + 1, low), high);
      if constexpr ((OPTIONS & WINDOW) != 0) first = (int)min(max(offset - problem.left, low), high);
    }
  }

  // Query `row` sees the keys [key_begin(row), key_end(row)), if there are any.
  __device__ __forceinline__ int key_begin(int row) const { return OPTIONS & WINDOW ? min(max(row + first, 0), keys) : 0; }
  __device__ __forceinline__ int key_end(int row) const { return OPTIONS & LENGTHS && row >= queries ? 0 : min(max(row + last, 0), keys); }

  // Key `column` is seen by the queries [query_begin(column), query_end(column)), if there are any; a key that does not exist by none.
  __device__ __forceinline__ int query_begin(int column) const { return column >= keys ? queries : min(max(column - last + 1, 0), queries); }
  __device__ __forceinline__ int query_end(int column) const { return OPTIONS & WINDOW ? min(max(column - first + 1, 0), queries) : queries; }

  // Elements of a lane's fragments of scores that a query does not see become `hidden`; row and column are the lane's first ones. Rows are queries, or keys
  // if TRANSPOSED.
  template <bool TRANSPOSED, int ROW_TILES, int COLUMNS, typename Real>
  __device__ __forceinline__ void hide(Real (&d)[ROW_TILES][COLUMNS / 8][4], int row, int column, float hidden) const {
    constexpr bool BEGINS = TRANSPOSED || (OPTIONS & WINDOW) != 0;   // else what a row sees starts at 0
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = row + m * 16 + half * 8, end = (TRANSPOSED ? query_end(at) : key_end(at)) - column, begin = min((TRANSPOSED ? query_begin(at) : key_begin(at)) - column, end);
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (BEGINS ? (u32)(n * 8 + i - begin) >= (u32)(end - begin) : n * 8 + i >= end) d[m][n][2 * half + i] = hidden;
      }
  }
};

// The key tiles [begin, end) that some query of a block sees; all of its queries see all keys of the tiles [whole_begin, whole_end).
template <int OPTIONS, int KEY_TILE> struct KeyTiles {
  int begin, end, whole_begin, whole_end;

  __device__ __forceinline__ KeyTiles(const Visible<OPTIONS>& visible, int first_query, int rows) {
    const int last_query = min(first_query + rows, visible.queries) - 1;
    begin = visible.key_begin(first_query) / KEY_TILE;
    end = OPTIONS & LENGTHS && last_query < first_query ? 0 : ceil_div(visible.key_end(last_query), KEY_TILE);
    if (OPTIONS & WINDOW && visible.key_begin(first_query) >= visible.key_end(last_query)) end = 0;
    whole_begin = ceil_div(visible.key_begin(last_query), KEY_TILE);
    whole_end = OPTIONS & LENGTHS && first_query + rows > visible.queries ? 0 : visible.key_end(first_query) / KEY_TILE;
  }
  __device__ __forceinline__ bool need_mask(int tile) const { return tile >= whole_end || (OPTIONS & WINDOW && tile < whole_begin); }
};

// Which queries a block owns. It is worked out anew where it is needed, rather than kept in registers.
template <int OPTIONS, int TILE> struct QueryBlock {
  Schedule schedule;
  Place place;
  TileOfSequence slot;
  Sequence<OPTIONS> sequence;
  int first_query;   // of the sequence

  static __device__ __forceinline__ int slots(const Problem& problem) { return tile_slots<OPTIONS>(problem, problem.queries, TILE); }

  __device__ __forceinline__ QueryBlock(const Problem& problem, u32 block)
      : schedule(problem, block, slots(problem)), place(problem, schedule.place, problem.grid_heads, problem.by_grid_heads), slot(slot_of(problem, schedule.tile)), sequence(problem, place, slot.sequence),
        first_query(slot.tile * TILE) {}

  static __device__ __forceinline__ TileOfSequence slot_of(const Problem& problem, int tile) {
    if (problem.last_first) tile = slots(problem) - 1 - tile;   // the last queries see most keys
    return tile_of_slot<OPTIONS>(problem, problem.cu_q, problem.queries, TILE, tile);
  }

  // An empty slot has no queries.
  __device__ __forceinline__ bool exists() const { return !(OPTIONS & PACKED) || (first_query >= 0 && first_query < sequence.queries); }
  __device__ __forceinline__ int rows() const { return min(TILE, sequence.queries - first_query); }
};

// P = exp(factor · x - shift), where a row's shift is its maximum, or its lse. x is what Score makes of a product; bias and ALiBi are added to it in its
// own unit, which saves a multiplication. The 16-bit and tf32 kernels work in exponents of 2, one more multiplication less, with shifts in units of ln 2.
// FLOAT32 and FLOAT64 keep natural units: then a shift is never rounded by a factor, and P errs by an exponent near 0, not by a shift that may be large.
template <int PRECISION> struct Exponential {
  static constexpr bool NATURAL = PRECISION == FLOAT32;
  static constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.69314718055994531f, UNIT = NATURAL ? 1.0f : LOG2_E;
  float factor;   // positive: from scores to exponents

  __device__ __forceinline__ Exponential(const Problem& problem) : factor(NATURAL ? problem.score_unit : problem.score_unit_log2) {}

  static __device__ __forceinline__ float of(float exponent) { return exp2_approximate(NATURAL ? exponent * LOG2_E : exponent); }
  __device__ __forceinline__ float operator()(float score, float shift) const { return of(fmaf(score, factor, -shift)); }
  // Against an lse, the shift of backward. A row's largest score was rounded before it became part of its lse. Where scores are LARGE they have to be rounded here as
  // they were there: a P of 1 is 1 then, as in a dense computation, if the forward pass was of the same family.
  static constexpr float LARGE = 64.0f;
  __device__ __forceinline__ float against_lse(float score, float lse) const {
    return of(NATURAL && fabsf(lse) > LARGE ? __fmul_rn(score, factor) - lse : fmaf(score, factor, -lse));
  }

  static __device__ __forceinline__ float shift_of_lse(float lse) { return lse * UNIT; }
  static __device__ __forceinline__ float lse(float shift, float sum) { return NATURAL ? shift + logf(sum) : (shift + log2_approximate(sum)) * LN_2; }
  static __device__ __forceinline__ float inverse(float sum) { return NATURAL ? 1.0f / sum : reciprocal_approximate(sum); }
};
template <> struct Exponential<FLOAT64> {
  double factor;

  __device__ __forceinline__ Exponential(const Problem& problem) : factor(problem.float64.score_unit) {}

  static __device__ __forceinline__ double of(double exponent) { return exp_float64(exponent); }
  __device__ __forceinline__ double operator()(double score, double shift) const { return of(fma(score, factor, -shift)); }
  __device__ __forceinline__ double against_lse(double score, double lse) const {
    const double rounded = __dmul_rn(score, factor);
    return of(fabs(lse) > Exponential<FLOAT32>::LARGE ? rounded - lse : fma(score, factor, -lse));
  }

  static __device__ __forceinline__ double shift_of_lse(double lse) { return lse; }
  static __device__ __forceinline__ double lse(double shift, double sum) { return shift + log(sum); }
  static __device__ __forceinline__ double inverse(double sum) { return 1.0 / sum; }
};

// The exponent of a product that is yet to be capped, against a shift, in place of Score and Exponential; `zero` is that of OnlineSoftmax::weights. What a row's
// probabilities may add up to if none of its scores is to be beyond what the polynomial is good for; 0 where that does not help.
__device__ __forceinline__ float capped_exponent(const CappedExponents& capped, float product, float shift, float zero) {
  const float square = fmaf(product, product, zero);
  return fmaf(product, fmaf(fmaf(square, capped.fifth, capped.third), square, capped.first), -shift);
}
__device__ __forceinline__ float largest_sum_of_capped(const CappedExponents& capped, float shift) {
  return shift >= capped.least_shift ? exp2_approximate(capped.most - shift) : 0.0f;
}

// dS = P ∘ (dP - D) of one pair. A probability that was dropped carries a minus sign: its dP is 0.
template <int OPTIONS, typename Real> __device__ __forceinline__ Real gradient_of_score(const Problem& problem, Real p, Real dp, Real d) {
  if constexpr ((OPTIONS & DROPOUT) != 0) return p * (p < 0 ? d : fma(dp, factors<Real>(problem).keep_inverse, -d));
  return p * (dp - d);
}
// The same from D - dP, without dropout.
template <typename Real> __device__ __forceinline__ Real gradient_of_score_from_d(Real p, Real d_minus_dp) { return p * -d_minus_dp; }

// What bias, mask and slope a block's scores get. Rows are queries and columns keys of its sequence; in fragments of transposed scores it is the other way.
template <int PRECISION, int OPTIONS> struct Score {
  using Real = ::Real<PRECISION>;
  using BiasElement = typename ElementOf<(OPTIONS & BIAS_FLOAT32) != 0 ? (int)FLOAT32 : PRECISION>::type;
  static constexpr bool CHANGES = (OPTIONS & (SCALE_FIRST | SOFTCAP | BIAS | MASK | ALIBI)) != 0;
  template <int ROW_TILES, int COLUMNS> using Bits = MaskBits<ROW_TILES, COLUMNS, (OPTIONS & PACKED) != 0>;   // of the mask
  const BiasElement* bias;
  const u32* words_of_mask;
  Real slope;
  i64 offset;
  int queries, keys;            // those that take part
  int first_query, first_key;   // MASK: of the sequence

  __device__ __forceinline__ Score(const Problem& problem, const Place& place, const Sequence<OPTIONS>& sequence) : queries(sequence.seeing()), keys(sequence.seen()) {
    if constexpr ((OPTIONS & BIAS) != 0) bias = first_of<BiasElement>(problem.bias, place, sequence);
    if constexpr ((OPTIONS & MASK) != 0) words_of_mask = place.rows<u32>(problem.mask), first_query = sequence.first_query, first_key = sequence.first_key;
    if constexpr ((OPTIONS & ALIBI) != 0) slope = *place.rows<Real>(problem.alibi_slopes) * factors<Real>(problem).inverse_unit, offset = sequence.offset(problem, place);
  }
  template <typename Element> static __device__ __forceinline__ const Element* first_of(const Array& array, const Place& place, const Sequence<OPTIONS>& sequence) {
    return place.rows<Element>(array) + (u32)sequence.first_query * array.row_stride + (u32)sequence.first_key * array.column_stride;
  }

  // Products become scores, in place, in units of problem.score_unit: `scale`, or the softcap, or 1 (SCALE_FIRST). `row` and `column` are the lane's first
  // ones. `derivative`, if not null, becomes 1 - tanh²: the derivative by the scaled product (1 without SOFTCAP: not written). `sloped`: ALiBi is seen to.
  // `mask`, if not null: its bits, read earlier.
  template <bool TRANSPOSED, int ROW_TILES, int COLUMNS>
  __device__ __forceinline__ void apply(const Problem& problem, Real (&d)[ROW_TILES][COLUMNS / 8][4], int row, int column, Real (*derivative)[COLUMNS / 8][4] = nullptr, bool sloped = false,
                                        const Bits<ROW_TILES, COLUMNS>* mask = nullptr) const {
    const auto add_bias = [&](int row, int column) {
      with_each<TRANSPOSED, ROW_TILES, COLUMNS>(problem.bias, bias, row, column, [&](int m, int n, int i, BiasElement x) { d[m][n][i] = fma(to_real(x), factors<Real>(problem).inverse_unit, d[m][n][i]); });
    };
    apply<TRANSPOSED, ROW_TILES, COLUMNS>(problem, d, row, column, add_bias, derivative, sloped, mask);
  }

  // The same with another way to add the bias.
  template <bool TRANSPOSED, int ROW_TILES, int COLUMNS, typename AddBias>
  __device__ __forceinline__ void apply(const Problem& problem, Real (&d)[ROW_TILES][COLUMNS / 8][4], int row, int column, AddBias add_bias, Real (*derivative)[COLUMNS / 8][4], bool sloped = false,
                                        const Bits<ROW_TILES, COLUMNS>* mask = nullptr) const {
    if constexpr (CHANGES) keep_here(row), keep_here(column);
    if constexpr ((OPTIONS & SOFTCAP) != 0) {
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
        // What takes no part may be anything, and must not decide how the rest is worked out.
        const int last_row = row + m * 16 + 8, last_column = column + COLUMNS - 7;
        const bool whole = !(OPTIONS & (PACKED | LENGTHS)) || (TRANSPOSED ? last_row < keys && last_column < queries : last_row < queries && last_column < keys);
        hyperbolic_tangents<PRECISION>(d[m], factors<Real>(problem).softcap_scale, whole);
        if (derivative) {
#pragma unroll
          for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) derivative[m][n][i] = fma(-d[m][n][i], d[m][n][i], Real(1));
        }
      }
    } else if constexpr ((OPTIONS & SCALE_FIRST) != 0) {
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) d[m][n][i] *= factors<Real>(problem).scale;
    }
    if constexpr ((OPTIONS & BIAS) != 0) add_bias(row, column);
    if ((OPTIONS & ALIBI) && !sloped) {
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Real distance = (Real)((TRANSPOSED ? (i64)row - column : (i64)column - row) - offset), step = (Real)(m * 16 + half * 8);
          const Real from = TRANSPOSED ? distance + step : distance - step;
#pragma unroll
          for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) d[m][n][2 * half + i] = fma(-slope, fabs(TRANSPOSED ? from - (n * 8 + i) : from + (n * 8 + i)), d[m][n][2 * half + i]);
        }
    }
    if constexpr ((OPTIONS & MASK) != 0) (mask ? *mask : mask_bits<TRANSPOSED, ROW_TILES, COLUMNS>(problem, row, column)).hide(d, Real(-infinity()));
  }

  // MASK: whether it lets the lane's elements be seen.
  template <bool TRANSPOSED, int ROW_TILES, int COLUMNS> __device__ __forceinline__ Bits<ROW_TILES, COLUMNS> mask_bits(const Problem& problem, int row, int column) const {
    const u32* first = words_of_mask;
    if constexpr ((OPTIONS & PACKED) != 0) first += (TRANSPOSED ? first_key : first_query) * problem.mask.row_stride, column += TRANSPOSED ? first_query : first_key;
    return {problem.mask, first, row, column, TRANSPOSED ? keys : queries};
  }

  // f(m, n, i, x) with the element x of an array (.., queries, keys) for each element of the fragments; where a query or key takes no part, that of the last one that does.
  template <bool TRANSPOSED, int ROW_TILES, int COLUMNS, typename Element, typename F>
  __device__ __forceinline__ void with_each(const Array& array, const Element* first, int row, int column, F f) const {
    if constexpr (TRANSPOSED) {
#pragma unroll
      for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Element* at = first + (OPTIONS & BIAS_ONE_ROW ? 0 : (u32)min(column + n * 8 + i, queries - 1) * array.row_stride);
#pragma unroll
          for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) f(m, n, 2 * half + i, at[OPTIONS & BIAS_ONE_COLUMN ? 0 : (u32)min(row + m * 16 + half * 8, keys - 1) * array.column_stride]);
        }
    } else {
      const bool pairs = array.pairs && column - column % 8 + COLUMNS <= keys;
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Element* at = first + (u32)min(row + m * 16 + half * 8, queries - 1) * array.row_stride;
          if (pairs) {
            struct alignas(2 * sizeof(Element)) Pair { Element x[2]; };
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; ++n) {
              const Pair pair = *(const Pair*)(at + column + n * 8);
              f(m, n, 2 * half, pair.x[0]);
              f(m, n, 2 * half + 1, pair.x[1]);
            }
          } else {
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
              for (int i = 0; i < 2; ++i) f(m, n, 2 * half + i, at[(u32)min(column + n * 8 + i, keys - 1) * array.column_stride]);
          }
        }
    }
  }
};
