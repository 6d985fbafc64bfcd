// The online softmax (Dao 2023, FlashAttention-2, section 3.1) on accumulators of 16 rows: lane l holds rows l / 4 and l / 4 + 8, columns shared by 4 lanes.
#pragma once
#include "types.cuh"

// The shift of a row may lag behind its true maximum by this much: probabilities then reach exp(8) at most, far inside every type's range, the sums stay
// exact in float32, and the output is rescaled only in the few tiles that raise the maximum a lot.
constexpr float RESCALE_THRESHOLD = 8.0f;

template <int COLUMNS> struct OnlineSoftmax {
  float shift[2] = {-infinity(), -infinity()};   // what exponents are taken against
  float sum[2] = {0.0f, 0.0f};                   // this lane's columns only, until finish()

  // A sink: an exponent that takes part in the denominator from the start, and has no value.
  __device__ __forceinline__ void start(float sink, int lane) {
#pragma unroll
    for (int row = 0; row < 2; ++row) shift[row] = sink, sum[row] = lane % 4 == 0 && sink != -infinity() ? 1.0f : 0.0f;
  }

  // Scores become probabilities exponential(score, shift); `rescale(row, ratio)` is called for both rows where a shift moved.
  template <typename Exponential, typename Rescale>
  __device__ __forceinline__ void step(float (&scores)[COLUMNS / 8][4], const Exponential& exponential, Rescale rescale) {
    float maximum[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float m = fmaxf(scores[0][2 * row], scores[0][2 * row + 1]);
#pragma unroll
      for (int n = 1; n < COLUMNS / 8; ++n) m = fmaxf(m, fmaxf(scores[n][2 * row], scores[n][2 * row + 1]));
      m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 1));
      maximum[row] = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 2)) * exponential.factor;
    }
    // From nothing seen so far (-inf) every score moves it; -inf and NaN move nothing, and a NaN then shows in the sum.
    const bool moved = maximum[0] - shift[0] > RESCALE_THRESHOLD || maximum[1] - shift[1] > RESCALE_THRESHOLD;
    if (__any_sync(0xffffffff, moved)) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float next = fmaxf(shift[row], maximum[row]);
        const float ratio = next == -infinity() ? 1.0f : Exponential::of(shift[row] - next);
        shift[row] = next;
        sum[row] *= ratio;
        rescale(row, ratio);
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float finite = shift[row] == -infinity() ? 0.0f : shift[row];
      float tile_sum = 0.0f;   // on its own first: added one by one to the sum of a long row, equal terms would all round the same way
#pragma unroll
      for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float p = exponential(scores[n][2 * row + i], finite);
          scores[n][2 * row + i] = p;
          tile_sum += p;
        }
      sum[row] += tile_sum;
    }
  }

  // After the last tile: 1 / sum (0 for a row that saw nothing), and the natural log of the softmax denominator.
  template <typename Exponential> __device__ __forceinline__ void finish(const Exponential&, float (&inverse)[2], float (&lse)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float total = sum[row] + __shfl_xor_sync(0xffffffff, sum[row], 1);
      total += __shfl_xor_sync(0xffffffff, total, 2);
      const bool nothing = shift[row] == -infinity() && total == 0.0f;
      inverse[row] = nothing ? 0.0f : 1.0f / total;
      lse[row] = nothing ? -infinity() : Exponential::lse(shift[row], total);
    }
  }
};
