// What a forward kernel does with its rows after the last key tile: O is normalised, lse made. Accumulators as in softmax.cuh.
#pragma once
#include "product_sm80.cuh"
#include "score.cuh"
#include "softmax.cuh"

// `row`: the lane's first, of its sequence, of which `seeing` take part.
template <int OPTIONS, int PRECISION, typename Softmax, int COUNT>
__device__ __forceinline__ void finish_rows(const Problem& problem, const Place& place, const Softmax& softmax, const Exponential<PRECISION>& exponential, int row, int seeing,
                                            Real<PRECISION> (&output)[COUNT][4], Real<PRECISION> (&lse)[2]) {
  using Real = ::Real<PRECISION>;
  Real inverse[2];
  softmax.finish(exponential, inverse, lse);
  if constexpr ((OPTIONS & SINKS) != 0) {
    const Real sink = *place.rows<Real>(problem.sinks);
#pragma unroll
    for (int half = 0; half < 2; ++half)   // not rounded by a change of units and back
      if (softmax.shift[half] == exponential.shift_of_lse(sink) && sink != -infinity()) lse[half] = sink - log(inverse[half]);
  }
  if constexpr ((OPTIONS & (LENGTHS | DROPOUT)) != 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (OPTIONS & DROPOUT) inverse[half] *= factors<Real>(problem).keep_inverse;
      if (row + half * 8 < seeing) continue;
      // A query that takes no part sees nothing, not even a NaN of the others.
      lse[half] = OPTIONS & SINKS ? *place.rows<Real>(problem.sinks) : Real(-infinity());
#pragma unroll
      for (int n = 0; n < COUNT; ++n) output[n][2 * half] = output[n][2 * half + 1] = 0.0f;
      inverse[half] = 0.0f;
    }
  }
#pragma unroll
  for (int n = 0; n < COUNT; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) output[n][i] *= inverse[i / 2];
}

// Accumulators as float32 rows, of all columns. `row`: the lane's first, counted from `target`.
template <int COUNT> __device__ __forceinline__ void store_floats(const float (&d)[COUNT][4], float* target, i64 row_stride, int row, int rows, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + half * 8 >= rows) continue;
#pragma unroll
    for (int n = 0; n < COUNT; ++n) *(float2*)(target + (row + half * 8) * row_stride + n * 8 + lane % 4 * 2) = make_float2(d[n][2 * half], d[n][2 * half + 1]);
  }
}

// Accumulators to device memory without shared memory: the four lanes of a row transpose 4 x 4 words among them, and each then holds 16 bytes of the row.
// `row`: the lane's first, counted from `target`.
template <int PRECISION, int COLUMNS>
__device__ __forceinline__ void store_output(const float (&output)[COLUMNS / 8][4], typename ElementOf<PRECISION>::type* target, i64 row_stride, int row, int rows, int columns, int lane) {
  using Element = typename ElementOf<PRECISION>::type;
  auto store = [&](auto write) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Element* to = target + (row + half * 8) * row_stride;
#pragma unroll
      for (int n = 0; n < COLUMNS / 8; n += 4) {
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = pack<PRECISION>(output[n + i][2 * half], output[n + i][2 * half + 1]);
#pragma unroll
        for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (i & bit) continue;
            const bool upper = lane & bit;
            const u32 received = __shfl_xor_sync(0xffffffff, upper ? words[i] : words[i | bit], bit);
            if (upper) words[i] = received;
            else words[i | bit] = received;
          }
        const int column = (n + lane % 4) * 8;
        write(to + column, words, row + half * 8 < rows ? columns - column : 0);
      }
    }
  };
  if (uniform(whole_chunks(target, row_stride, columns))) {
    store([](Element* to, const u32 (&words)[4], int valid) {
      if (valid > 0) *(uint4*)to = make_uint4(words[0], words[1], words[2], words[3]);
    });
  } else {
    store([](Element* to, const u32 (&words)[4], int valid) {
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (j < valid) to[j].bits = (u16)(words[j / 2] >> (j % 2 * 16));
    });
  }
}

#if __CUDA_ARCH__ >= 900
// The same by way of 2 KiB of shared memory that the warp has to itself, 64 columns at a time, which are whole lines in device memory. `first`: where the rows'
// whole chunks begin; `rows`, of 16, exist.
template <int PRECISION, int COLUMNS>
__device__ __forceinline__ void store_output_in_lines(const float (&output)[COLUMNS / 8][4], typename ElementOf<PRECISION>::type* first, i64 row_stride, int rows, int columns, int lane, u32 scratch) {
  // Rows of 128 bytes, swizzled: lanes 8 i to 8 i + 7 name the rows of matrix i of a store, and have a row each when it is read.
  const u32 store_at = scratch + lane % 16 * 128, load_at = scratch + lane / 8 * 128;
#pragma unroll
  for (int box = 0; box < COLUMNS / 64; ++box) {
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      const auto& d = *(const float(*)[2][4])output[box * 8 + n];
      const u32 words[4] = {pack<PRECISION>(d[0][0], d[0][1]), pack<PRECISION>(d[0][2], d[0][3]), pack<PRECISION>(d[1][0], d[1][1]), pack<PRECISION>(d[1][2], d[1][3])};
      stmatrix(store_at + ((n + lane / 16 ^ lane % 8) << 4), words);
    }
    __syncwarp();
    uint4 x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = load_shared_16_bytes(load_at + i * 512 + ((lane % 8 ^ (i * 4 + lane / 8) % 8) << 4));
    __syncwarp();
    const int column = box * 64 + lane % 8 * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) store_16_bytes_if(i * 4 + lane / 8 < rows && column < columns, first + (i * 4 + lane / 8) * row_stride + column, x[i]);
  }
}
#endif

// The same in float32, two neighbours at a time.
template <int COUNT> __device__ __forceinline__ void store_float_output(const float (&output)[COUNT][4], float* target, i64 row_stride, int row, int rows, int columns, int lane) {
  const bool pairs = uniform((((unsigned long long)target | row_stride * 4) & 7) == 0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* to = target + (row + half * 8) * row_stride + lane % 4 * 2;
    const int left = row + half * 8 < rows ? columns - lane % 4 * 2 : 0;
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      const float first = output[n][2 * half], second = output[n][2 * half + 1];
      if (pairs && n * 8 + 1 < left) {
        *(float2*)(to + n * 8) = make_float2(first, second);
      } else {
        if (n * 8 < left) to[n * 8] = first;
        if (n * 8 + 1 < left) to[n * 8 + 1] = second;
      }
    }
  }
}
