// e^x in float64, by the FMA units, with a relative error of at most 1.3e-16 (CUDA's own is as good, and branches for large arguments).
#pragma once
#include "types.cuh"

// x = k ln 2 + r with k an integer and |r| <= ln 2 / 2 (Cody & Waite 1980): ln 2 in two parts, so that r keeps its last bits. e^r by a polynomial of degree 11,
// off by 1.6e-17, times 2^k. Below -708, where results would be subnormal, 0; NaN stays NaN, as the product with 2^k takes it along.
__device__ __forceinline__ double exp_float64(double x) {
  constexpr double LOG2_E = 1.4426950408889634, LN_2_HIGH = 0.6931471805599453, LN_2_LOW = 2.3190468138462996e-17;
  constexpr double INTEGER = 6755399441055744.0;   // 1.5 · 2^52: a sum with it is rounded to an integer, which its low word holds
  constexpr double COEFFICIENTS[] = {2.510038549551032e-08, 2.7620088445409746e-07, 2.7557268459997064e-06, 2.4801521295954376e-05, 0.00019841269863053618, 0.0013888888917213717,
                                     0.008333333333330062,  0.04166666666662413,    0.16666666666666669,    0.5000000000000001,     1.0,                    1.0};
  const double sum = fma(x, LOG2_E, INTEGER), k = sum - INTEGER;
  const double r = fma(k, -LN_2_LOW, fma(k, -LN_2_HIGH, x));
  double power = COEFFICIENTS[0];
#pragma unroll
  for (int i = 1; i < 12; ++i) power = fma(power, r, COEFFICIENTS[i]);
  const double two_to_k = __hiloint2double((min(__double2loint(sum), 1024) + 1023) << 20, 0);
  return x < -708.0 ? 0.0 : power * two_to_k;
}
