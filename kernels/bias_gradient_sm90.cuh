// The gradient of the bias as backward kernels of the sm90 family make it on their way: dBias = dS, summed over whatever the bias is broadcast along. A computing
// warp gives away its 16 keys of a tile of dSᵀ, in float32, as it makes them; rows of its fragments are keys, columns are queries.
//
//   a bias (.., queries, keys)       each number goes to its place at once: it is added, or with BIAS_UNSHARED, where nobody else has one for it, written
//   BIAS_ONE_ROW     (.., 1, keys)   summed over a head's queries in registers, and then added, one number a key
//   BIAS_ONE_COLUMN  (.., queries, 1)  summed over the warp's keys, and then added, one number a query and tile
//   both             (.., 1, 1)      summed over a head's queries and the warp's keys, and then added
//
// dBias lies without gaps, is float32 (BIAS_UNSHARED: of the bias's type), and 0 before: there are pairs that nobody walks over. Of what takes no part nothing is added,
// as it may hold 0 · inf, nor is anything written outside the arrays.
#pragma once
#include "ptx/reduce.cuh"
#include "score.cuh"

template <int PRECISION, int OPTIONS> struct BiasGradient {
  static constexpr bool ONE_ROW = (OPTIONS & BIAS_ONE_ROW) != 0, ONE_COLUMN = (OPTIONS & BIAS_ONE_COLUMN) != 0, UNSHARED = (OPTIONS & BIAS_UNSHARED) != 0;
  static_assert(!UNSHARED || !(ONE_ROW || ONE_COLUMN), "a bias that is broadcast has sums");
  using Element = typename ElementOf<UNSHARED && !(OPTIONS & BIAS_FLOAT32) ? PRECISION : (int)FLOAT32>::type;

  static __device__ __forceinline__ Element* first_of(const Problem& problem, const Place& place, const Sequence<OPTIONS>& sequence) {
    return (Element*)Score<PRECISION, OPTIONS>::template first_of<Element>(problem.dbias, place, sequence);
  }

  // ONE_ROW: over a head's queries of the lane and its neighbour, of one of their two keys.
  float sum = 0.0f;

  // A tile of scores, of which the lane's first key and query are these.
  struct Tile {
    Element* at;           // of the lane's first key and next query; ONE_COLUMN: of the first query that it adds to
    int queries_left[2];   // of each key: how many of the queries from the lane's first one on take part; of a key that does not, none
    int own_queries_left;  // ONE_COLUMN: of those from `at` on
    float part[4][2];      // of 32 queries, ONE_ROW: sums over them, of each key; ONE_COLUMN: sums over the lane's two keys, of each of its queries

    __device__ __forceinline__ Tile(const Problem& problem, const Place& place, const Sequence<OPTIONS>& sequence, int key, int query) {
#pragma unroll
      for (int half = 0; half < 2; ++half) queries_left[half] = key + half * 8 < sequence.seen() ? sequence.seeing() - query : 0;
      if constexpr (ONE_COLUMN && !ONE_ROW) {
        const int group = threadIdx.x % 32 / 4, own = query + group / 2 * 8 + group % 2;
        own_queries_left = sequence.seeing() - own;
        at = first_of(problem, place, sequence) + own;
      } else if constexpr (!ONE_ROW) {
        at = first_of(problem, place, sequence) + query * problem.dbias.row_stride + key;
      }
    }
  };

  // x: dS of the queries n * 8 and n * 8 + 1, from the lane's first one on, and of its key `half`. In the order of n, and half; that the compiler keeps to it saves registers.
  __device__ __forceinline__ void take(const Problem& problem, Tile& tile, int n, int half, const float (&x)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool takes_part = n * 8 + i < tile.queries_left[half];
      if constexpr (ONE_ROW || ONE_COLUMN) {
        const float own = takes_part ? x[i] : 0.0f;
        float& part = ONE_ROW ? tile.part[0][half] : tile.part[n % 4][i];
        part = (ONE_ROW ? n % 4 + i : half) ? part + own : own;
      } else if constexpr (UNSHARED) {
        if (takes_part) from_float(tile.at[i * problem.dbias.row_stride + half * 8], x[i]);
      } else {
        reduce_add_if(takes_part, tile.at + i * problem.dbias.row_stride + half * 8, x[i]);
      }
    }
    const bool whole = n % 4 == 3 && half == 1;   // 32 queries
    if constexpr (ONE_ROW) {
      if (whole) sum += sum_over_pair(tile.part[0]);
    } else if constexpr (ONE_COLUMN) {
      if (whole) reduce_add_if(n / 4 * 32 < tile.own_queries_left, tile.at + n / 4 * 32, sum_over_keys(tile.part));
    } else if (half == 1) {
      tile.at += 8 * problem.dbias.row_stride;
      asm volatile("" : "+l"(tile.at) :: "memory");
    }
  }

  // Of two numbers of each lane, the sum over two neighbouring lanes of one of them: that of the first key in even lanes, of the second in odd ones.
  static __device__ __forceinline__ float sum_over_pair(const float (&x)[2]) {
    const bool odd = threadIdx.x % 2;
    return (odd ? x[1] : x[0]) + __shfl_xor_sync(0xffffffff, odd ? x[0] : x[1], 1);
  }

  // Of 8 numbers of each lane, whose sums over the eight lanes of a query's keys are wanted, the sum of one: number lane / 4. Each step halves what a lane holds.
  static __device__ __forceinline__ float sum_over_keys(const float (&part)[4][2]) {
    const int lane = threadIdx.x % 32;
    float x[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = part[j / 2][j % 2];
#pragma unroll
    for (int count = 4; count > 0; count /= 2)
#pragma unroll
      for (int j = 0; j < count; ++j) {
        const bool upper = lane & count * 4;
        const float given = upper ? x[j] : x[j + count];
        x[j] = (upper ? x[j + count] : x[j]) + __shfl_xor_sync(0xffffffff, given, count * 4);
      }
    return x[0];
  }

  // After a head's last tile.
  __device__ __forceinline__ void end_head(const Problem& problem, const Place& place, const Sequence<OPTIONS>& sequence, int key) {
    if constexpr (ONE_ROW) {
      const int lane = threadIdx.x % 32;
      if (ONE_COLUMN) {
#pragma unroll
        for (int other = 1; other < 32; other *= 2) sum += __shfl_xor_sync(0xffffffff, sum, other);
        reduce_add_if(lane == 0, first_of(problem, place, sequence), sum);
      } else {
        sum += __shfl_xor_sync(0xffffffff, sum, 2);
        key += lane % 2 * 8;
        reduce_add_if(lane % 4 < 2 && key < sequence.seen(), first_of(problem, place, sequence) + key, sum);
      }
      sum = 0.0f;
    }
  }
};
