// The online softmax (Dao 2023, FlashAttention-2, section 3.1) on accumulators of 16 rows: lane l holds rows l / 4 and l / 4 + 8, columns shared by 4 lanes.
#pragma once
#include "types.cuh"

// The maximum that exponents are taken against may lag behind the true one by this much (in powers of 2): probabilities then reach 2^8, far inside every
// type's range, the sums stay exact in float32, and the output is rescaled only in the few tiles that raise the maximum a lot.
constexpr float RESCALE_THRESHOLD = 8.0f;

struct RowPair { float first, second; };

template <int COLUMNS> struct OnlineSoftmax {
  float maximum[2] = {-infinity(), -infinity()};   // what exponents are taken against, in units of the scores
  float sum[2] = {0.0f, 0.0f};                     // this lane's columns only, until finish()

  // Scores become probabilities exp2(factor · (score - maximum)); `rescale(row, factor)` is called for both rows where the maximum moved.
  template <typename Rescale> __device__ __forceinline__ void step(float (&scores)[COLUMNS / 8][4], float factor, Rescale rescale) {
    float tile_maximum[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float m = fmaxf(scores[0][2 * row], scores[0][2 * row + 1]);
#pragma unroll
      for (int n = 1; n < COLUMNS / 8; ++n) m = fmaxf(m, fmaxf(scores[n][2 * row], scores[n][2 * row + 1]));
      m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 1));
      tile_maximum[row] = fmaxf(m, __shfl_xor_sync(0xffffffff, m, 2));
    }
    // Nothing seen so far (-inf) always moves; so does a row whose maximum is +inf or whose scores are NaN, as in the dense computation.
    bool moved = (tile_maximum[0] - maximum[0]) * factor > RESCALE_THRESHOLD || (tile_maximum[1] - maximum[1]) * factor > RESCALE_THRESHOLD;
    if (__any_sync(0xffffffff, moved)) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float next = fmaxf(maximum[row], tile_maximum[row]);
        float ratio = next == -infinity() ? 1.0f : exp2_approximate((maximum[row] - next) * factor);
        maximum[row] = next;
        sum[row] *= ratio;
        rescale(row, ratio);
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float shift = maximum[row] == -infinity() ? 0.0f : maximum[row] * factor;
#pragma unroll
      for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float p = exp2_approximate(fmaf(scores[n][2 * row + i], factor, -shift));
          scores[n][2 * row + i] = p;
          sum[row] += p;
        }
    }
  }

  // After the last tile: 1 / sum (0 for a row that saw nothing), and the natural log of the softmax denominator.
  __device__ __forceinline__ void finish(float factor, float (&inverse)[2], float (&lse)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float total = sum[row] + __shfl_xor_sync(0xffffffff, sum[row], 1);
      total += __shfl_xor_sync(0xffffffff, total, 2);
      inverse[row] = total == 0.0f ? 0.0f : 1.0f / total;
      lse[row] = total == 0.0f ? -infinity() : maximum[row] * (factor * 0.69314718055994531f) + logf(total);
    }
  }
};
