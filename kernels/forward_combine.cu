// Attention over parts of the keys put together: out = sum of exp(lse_s - lse) out_s, lse = log of the sum of exp(lse_s). FlashAttention's split-KV.
//
//   partial_out (splits, rows, VALUE_DIM), partial_lse (splits, rows), float32, rows = batch · heads · queries -> O and lse of the call
//
// A block takes a row, each of its warps every fourth part.
#include "score.cuh"

template <int PRECISION, int VALUE_DIM> __global__ void __launch_bounds__(128) forward_combine(const __grid_constant__ Problem problem) {
  using Element = typename ElementOf<PRECISION>::type;
  __shared__ float sums[4][VALUE_DIM];
  const i64 rows = (i64)problem.grid_places * problem.queries, at = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Place place(problem, (u32)(at / problem.queries), problem.grid_heads, problem.by_grid_heads);
  const i64 row = at % problem.queries;
  const float* lse_of = problem.partial_lse + at;
  const float* out_of = problem.partial_out + at * VALUE_DIM + lane;

  float largest = -infinity(), sum = 0.0f;
  for (int split = lane; split < problem.splits; split += 32) largest = fmaxf(largest, lse_of[split * rows]);
#pragma unroll
  for (int step = 16; step; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, step));
  const float finite = largest == -infinity() ? 0.0f : largest;
  for (int split = lane; split < problem.splits; split += 32) sum += expf(lse_of[split * rows] - finite);
#pragma unroll
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  const float lse = sum == 0.0f ? -infinity() : finite + logf(sum);

  float result[VALUE_DIM / 32] = {};
#pragma unroll 2
  for (int split = warp; split < problem.splits; split += 4) {
    const float weight = lse == -infinity() ? 0.0f : expf(lse_of[split * rows] - lse);
#pragma unroll
    for (int i = 0; i < VALUE_DIM / 32; ++i) result[i] = fmaf(weight, out_of[split * rows * VALUE_DIM + i * 32], result[i]);
  }
#pragma unroll
  for (int i = 0; i < VALUE_DIM / 32; ++i) sums[warp][i * 32 + lane] = result[i];
  __syncthreads();

  if (threadIdx.x == 0) place.rows<float>(problem.lse)[row * problem.lse.row_stride] = lse;
  Element* out = place.rows<Element>(problem.out) + row * problem.out.row_stride;
  for (int column = threadIdx.x; column < problem.out.columns; column += 128) from_float(out[column], sums[0][column] + sums[1][column] + sums[2][column] + sums[3][column]);
}
