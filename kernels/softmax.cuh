// The online softmax (Dao 2023, FlashAttention-2, section 3.1) on accumulators of 16 rows: lane l holds rows l / 4 and l / 4 + 8, columns shared by 4 lanes.
#pragma once
#include "types.cuh"

// The shift of a row may lag behind its true maximum by this much: probabilities then reach exp(8) at most, far inside every type's range, the sums stay
// exact in float32, and the output is rescaled only in the few tiles that raise the maximum a lot.
constexpr float RESCALE_THRESHOLD = 8.0f;
// What the probabilities of one lane, row and tile may add up to before the shift has to move: a quarter of float16's range, and more than they can
// while the shift lags by RESCALE_THRESHOLD.
constexpr float LARGEST_SUM = 16384.0f;
// The same where probabilities become two float16 parts, times PARTS_SCALE to keep small ones exact: the shift has to follow closely.
constexpr float PARTS_SCALE = 2048.0f, PARTS_RESCALE_THRESHOLD = 0.5f, PARTS_LARGEST_SUM = 31.9f;

// BASED: the scores of a row are those given plus a number of the lane's own, `base`, which is folded into what is taken once a row.
// PACE, if not 0: the weights of chunk n wait for what was kept of chunk n - PACE. Else the compiler may put all arithmetic of one kind behind all of another, where
// one unit would idle while the other works.
template <int COLUMNS, typename Real = float, bool BASED = false, bool IN_PARTS = false, int PACE = 0> struct OnlineSoftmax {
  static constexpr float THRESHOLD = IN_PARTS ? PARTS_RESCALE_THRESHOLD : RESCALE_THRESHOLD, MOST = IN_PARTS ? PARTS_LARGEST_SUM : LARGEST_SUM;
  Real shift[2] = {-infinity(), -infinity()};   // what exponents are taken against
  Real sum[2] = {0.0f, 0.0f};                   // this lane's columns only, until finish()
  Real base[2] = {0.0f, 0.0f};                  // of the tile at hand, as an exponent

  // A sink: an exponent that takes part in the denominator from the start, and has no value.
  __device__ __forceinline__ void start(Real sink, int lane) {
#pragma unroll
    for (int row = 0; row < 2; ++row) shift[row] = sink, sum[row] = lane % 4 == 0 && sink != -infinity() ? 1.0f : 0.0f;
  }

  // Raises the shifts where the scores need it; `rescale(row, ratio)` is called for both rows where a shift moved.
  template <typename Exponential, typename Rescale> __device__ __forceinline__ void raise(const Real (&scores)[COLUMNS / 8][4], const Exponential& exponential, Rescale rescale) {
    Real largest[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      Real chain[2];   // two at a time: one waits for itself
#pragma unroll
      for (int n = 0; n < COLUMNS / 8; ++n) {
        const Real pair = maximum(scores[n][2 * row], scores[n][2 * row + 1]);
        chain[n % 2] = n < 2 ? pair : maximum(chain[n % 2], pair);
      }
      Real m = COLUMNS > 8 ? maximum(chain[0], chain[1]) : chain[0];
      if (BASED) m = fma(m, exponential.factor, base[row]);
      m = maximum(m, __shfl_xor_sync(0xffffffff, m, 1));
      m = maximum(m, __shfl_xor_sync(0xffffffff, m, 2));
      largest[row] = BASED ? m : m * exponential.factor;
    }
    // From nothing seen so far (-inf) every score moves it; -inf and NaN move nothing, and a NaN then shows in the sum.
    const bool moved = largest[0] - shift[0] > THRESHOLD || largest[1] - shift[1] > THRESHOLD;
    if (!__any_sync(0xffffffff, moved)) return;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const Real next = maximum(shift[row], largest[row]);
      const Real ratio = next == -infinity() ? Real(1) : Exponential::of(shift[row] - next);
      shift[row] = next;
      sum[row] *= ratio;
      rescale(row, ratio);
    }
  }

  // Probabilities of two rows, weight(n, 2 * row + i, shift, zero) each: `keep(n, row, p)` is given each pair of neighbours, in the order of n and of row in it, or
  // BY_ROWS, one after the other, which takes fewer registers; tile_sum what they add up to. `zero` is 0, and there once it is the chunk's time (PACE); so is the
  // shift. With PACE `keep` returns a word of what it kept, whose highest bit is 0.
  template <bool BY_ROWS = false, typename Weight, typename Keep> __device__ __forceinline__ void weights(Weight weight, const Real (&against)[2], Real (&tile_sum)[2], Keep keep) const {
    tile_sum[0] = tile_sum[1] = 0.0f;   // on its own first: added one by one to the sum of a long row, equal terms would all round the same way
    constexpr int RECENT = PACE ? PACE : 1;
    u32 kept[RECENT][2];
#pragma unroll
    for (int k = 0; k < COLUMNS / 4; ++k) {
      const int n = BY_ROWS ? k % (COLUMNS / 8) : k / 2, row = BY_ROWS ? k / (COLUMNS / 8) : k % 2;
      const bool waits = PACE > 0 && n >= PACE;
      const Real zero = waits ? __uint_as_float(kept[n % RECENT][row] >> 31) : 0.0f, shift = waits ? against[row] + zero : against[row];
      Real p[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        p[i] = weight(n, 2 * row + i, shift, zero);
        tile_sum[row] += p[i];
      }
      if constexpr (PACE > 0) kept[n % PACE][row] = keep(n, row, p);
      else keep(n, row, p);
    }
  }
  // The same with weights exponential(score, shift).
  template <bool BY_ROWS = false, typename Exponential, typename Keep>
  __device__ __forceinline__ void exponentials(const Real (&scores)[COLUMNS / 8][4], const Exponential& exponential, const Real (&against)[2], Real (&tile_sum)[2], Keep keep) const {
    weights<BY_ROWS>([&](int n, int i, Real shift, Real) { return exponential(scores[n][i], shift); }, against, tile_sum, keep);
  }

  // Probabilities of a tile, against shifts that raise() has seen to.
  template <bool BY_ROWS = false, typename Exponential, typename Keep> __device__ __forceinline__ void take(const Real (&scores)[COLUMNS / 8][4], const Exponential& exponential, Keep keep) {
    Real against[2] = {shift[0] == -infinity() ? 0 : shift[0], shift[1] == -infinity() ? 0 : shift[1]};
    if (BASED) against[0] -= base[0], against[1] -= base[1];
    Real tile_sum[2];
    exponentials<BY_ROWS>(scores, exponential, against, tile_sum, keep);
#pragma unroll
    for (int row = 0; row < 2; ++row) sum[row] += tile_sum[row];
  }

  // A row's first tile without raise(), against shifts of 0: where scores are so small, or so large, that another shift is better, nothing is taken.
  template <typename Exponential, typename Keep> __device__ __forceinline__ bool try_start(const Real (&scores)[COLUMNS / 8][4], const Exponential& exponential, Keep keep) {
    const Real against[2] = {BASED ? -base[0] : 0, BASED ? -base[1] : 0};
    Real tile_sum[2];
    exponentials(scores, exponential, against, tile_sum, keep);
    const float smallest = fminf(tile_sum[0], tile_sum[1]), largest = fmaxf(tile_sum[0], tile_sum[1]);
    if (__any_sync(0xffffffff, !(smallest >= 1.0f && largest <= MOST))) return false;
#pragma unroll
    for (int row = 0; row < 2; ++row) shift[row] = 0.0f, sum[row] = tile_sum[row];
    return true;
  }

  // A further tile without raise() and its maximum: the sum of the exponentials tells whether one was too large. Then nothing is taken, and the answer is false.
  // A row that has seen nothing has a shift so low that any score is too large. A NaN is not: it shows in the sum.
  template <typename Exponential, typename Keep> __device__ __forceinline__ bool try_take(const Real (&scores)[COLUMNS / 8][4], const Exponential& exponential, Keep keep) {
    return try_weights([&](int n, int i, Real shift, Real) { return exponential(scores[n][i], shift); }, keep);
  }
  template <typename Weight, typename Keep> __device__ __forceinline__ bool try_weights(Weight weight, Keep keep) {
    const Real most[2] = {MOST, MOST};
    return try_weights(weight, most, keep);
  }
  // `most`: what each row's probabilities may add up to.
  template <typename Weight, typename Keep> __device__ __forceinline__ bool try_weights(Weight weight, const Real (&most)[2], Keep keep) {
    Real against[2] = {fmaxf(shift[0], -1e38f), fmaxf(shift[1], -1e38f)};
    if (BASED) against[0] -= base[0], against[1] -= base[1];
    Real tile_sum[2];
    weights(weight, against, tile_sum, keep);
    if (__any_sync(0xffffffff, tile_sum[0] > most[0] || tile_sum[1] > most[1])) return false;
#pragma unroll
    for (int row = 0; row < 2; ++row) sum[row] += tile_sum[row];
    return true;
  }

  // Scores become probabilities, in place.
  template <typename Exponential, typename Rescale> __device__ __forceinline__ void step(Real (&scores)[COLUMNS / 8][4], const Exponential& exponential, Rescale rescale) {
    raise(scores, exponential, rescale);
    take<true>(scores, exponential, [&](int n, int row, const Real (&p)[2]) { scores[n][2 * row] = p[0], scores[n][2 * row + 1] = p[1]; });
  }

  // After the last tile: 1 / sum (0 for a row that saw nothing), and the natural log of the softmax denominator.
  template <typename Exponential> __device__ __forceinline__ void finish(const Exponential&, Real (&inverse)[2], Real (&lse)[2]) const {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      Real total = sum[row] + __shfl_xor_sync(0xffffffff, sum[row], 1);
      total += __shfl_xor_sync(0xffffffff, total, 2);
      const bool nothing = shift[row] == -infinity() && total == 0.0f;
      inverse[row] = nothing ? 0 : Exponential::inverse(total);
      lse[row] = nothing ? Real(-infinity()) : Exponential::lse(shift[row], total);
    }
  }
};
