// The gradient of the bias as backward kernels of the sm90 family make it on their way: dBias = dS, summed over whatever the bias is broadcast along. A computing
// warp gives away its 16 keys of a tile of dSᵀ, in float32, as it makes them; rows of its fragments are keys, columns are queries.
//
//   a bias           (.., queries, keys) each number is added to its place at once; with BIAS_UNSHARED, where nobody else has one for it, it is written, as it was rounded
//                                        for products: so the bias has to be of the arrays' type, and scores without a softcap, which comes before the bias
//   BIAS_ONE_ROW     (.., 1, keys)       summed over a head's queries in registers, and then added, one number a key
//   BIAS_ONE_COLUMN  (.., queries, 1)    summed over the warp's keys, and then added, one number a query and tile
//   both             (.., 1, 1)          summed over a head's queries and the warp's keys, and then added
//
// dBias is 0 before, as there are pairs that nobody walks over. BIAS_UNSHARED it has the bias's shape and type; else it is float32, and has room for whole tiles of
// queries and keys wherever they start, so that additions need no branches, which take registers. What takes no part adds 0, though it may hold 0 · inf, or adds
// where nobody looks.
#pragma once
#include "ptx/reduce.cuh"
#include "score.cuh"

template <int PRECISION, int OPTIONS> struct BiasGradient {
  static constexpr bool ONE_ROW = (OPTIONS & BIAS_ONE_ROW) != 0, ONE_COLUMN = (OPTIONS & BIAS_ONE_COLUMN) != 0, UNSHARED = (OPTIONS & BIAS_UNSHARED) != 0;
  static constexpr bool SELECTS = (OPTIONS & (PACKED | LENGTHS)) != 0;   // else what takes no part has its place in dBias to itself, or is 0
  static_assert(!UNSHARED || !(ONE_ROW || ONE_COLUMN || OPTIONS & (BIAS_FLOAT32 | SOFTCAP)), "numbers are written as they are");
  using Element = typename ElementOf<UNSHARED ? PRECISION : (int)FLOAT32>::type;

  u32 first_at;        // in shared memory: the warp's place for where the head's dBias begins, or that of its sequence
  float sum = 0.0f;    // ONE_ROW: over the queries of the lane and its neighbour, of one of their two keys

  // Before a head's first tile.
  __device__ __forceinline__ void begin_head(const Problem& problem, const Place& place, const Sequence<OPTIONS>& sequence) {
    const unsigned long long first = (unsigned long long)Score<PRECISION, OPTIONS>::template first_of<Element>(problem.dbias, place, sequence);
    __syncwarp();   // that of the head before is of no more use
    if (threadIdx.x % 32 == 0) store_shared(first_at, (u32)first, (u32)(first >> 32));
    __syncwarp();
  }
  __device__ __forceinline__ Element* first() const {
    u32 low, high;
    load_shared(low, high, first_at);
    return (Element*)__cvta_global_to_generic((unsigned long long)high << 32 | low);
  }

  // A tile of scores; key and query are the lane's first ones.
  struct Tile {
    Element* at;           // of these; ONE_COLUMN: of the first query that the lane adds to
    int queries_left[2];   // of each of the lane's keys: how many of the queries from its first one on take part; of a key that does not, none
    float part[4][2];      // of 32 queries. ONE_ROW: sums over them, of each key; ONE_COLUMN: sums over the keys, of each query of the lane

    Tile() = default;
    __device__ __forceinline__ Tile(const Problem& problem, const BiasGradient& gradient, const Sequence<OPTIONS>& sequence, int key, int query) {
#pragma unroll
      for (int half = 0; half < 2; ++half) queries_left[half] = key + half * 8 < sequence.seen() ? sequence.seeing() - query : 0;
      if constexpr (ONE_ROW) return;
      const int own = threadIdx.x % 32 / 4;   // which of the sums over keys
      at = gradient.first() + (ONE_COLUMN ? query + own / 2 * 8 + own % 2 : (u32)query * problem.dbias.row_stride + (u32)key);   // neither is negative
    }
  };

  // x: dS of the queries n * 8 and n * 8 + 1 and of key `half`, of the lane's; to be called in the order of n, and for each of `half`.
  __device__ __forceinline__ void take(const Problem& problem, Tile& tile, int n, int half, const float (&x)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float own = !SELECTS || n * 8 + i < tile.queries_left[half] ? x[i] : 0.0f;
      if constexpr (ONE_ROW) tile.part[0][half] = n % 4 + i ? tile.part[0][half] + own : own;
      else if constexpr (ONE_COLUMN) tile.part[n % 4][i] = half ? tile.part[n % 4][i] + own : own;
      else reduce_add(tile.at + i * problem.dbias.row_stride + half * 8, own);
    }
    if constexpr (ONE_ROW || ONE_COLUMN) {
      if (n % 4 < 3 || half == 0) return;
      if constexpr (ONE_ROW) sum += sum_over_pair(tile.part[0]);
      else reduce_add(tile.at + n / 4 * 32, sum_over_keys(tile.part));
    } else if (half == 1) {
      tile.at += 8 * problem.dbias.row_stride;
      asm volatile("" : "+l"(tile.at) :: "memory");   // else all addresses are made at once
    }
  }

  // BIAS_UNSHARED: all of a tile, in words of two queries, as a product takes them.
  template <int STEPS> static __device__ __forceinline__ void write(const Problem& problem, const Tile& tile, const u32 (&ds)[STEPS][4]) {
#pragma unroll
    for (int n = 0; n < STEPS * 2; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (n * 8 + i < tile.queries_left[half]) tile.at[(n * 8 + i) * problem.dbias.row_stride + half * 8] = Element{(u16)(ds[n / 2][n % 2 * 2 + half] >> 16 * i)};
  }

  // Of two numbers of each lane, the sum over two neighbouring lanes of one of them: of the first in even lanes.
  static __device__ __forceinline__ float sum_over_pair(const float (&x)[2]) {
    const bool odd = threadIdx.x % 2;
    return (odd ? x[1] : x[0]) + __shfl_xor_sync(0xffffffff, odd ? x[0] : x[1], 1);
  }

  // Of eight numbers of each lane, the sum over the eight lanes of a column of one of them: number lane / 4. Each step halves how many a lane holds.
  static __device__ __forceinline__ float sum_over_keys(const float (&part)[4][2]) {
    float x[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = part[j / 2][j % 2];
#pragma unroll
    for (int count = 4; count > 0; count /= 2)
#pragma unroll
      for (int j = 0; j < count; ++j) {
        const bool upper = threadIdx.x & count * 4;
        const float given = upper ? x[j] : x[j + count];
        x[j] = (upper ? x[j + count] : x[j]) + __shfl_xor_sync(0xffffffff, given, count * 4);
      }
    return x[0];
  }

  // After a head's last tile; `key` is the lane's first one.
  __device__ __forceinline__ void end_head(const Sequence<OPTIONS>& sequence, int key) {
    if constexpr (ONE_ROW && ONE_COLUMN) {
#pragma unroll
      for (int other = 1; other < 32; other *= 2) sum += __shfl_xor_sync(0xffffffff, sum, other);
      if (threadIdx.x % 32 == 0) reduce_add(first(), sum);
    } else if constexpr (ONE_ROW) {
      sum += __shfl_xor_sync(0xffffffff, sum, 2);
      key += threadIdx.x % 2 * 8;
      if (threadIdx.x % 4 < 2 && key < sequence.seen()) reduce_add(first() + key, sum);
    }
    sum = 0.0f;
  }
};
