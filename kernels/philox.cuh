// Dropout by a counter-based random generator, Philox4x32 with 7 rounds (Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3").
// Which pairs of a query and a key are kept depends on (seed, batch and head, sequence, query, key) alone, so forward, backward and the NumPy path
// (cuflash/philox.py) find the same ones, whatever their tiles.
//
// One call gives sixteen bytes, for 4 queries, i, i + 1, i + 8 and i + 9, and 4 such keys: of each 16 x 16 pairs what two lanes hold of a fragment of scores, and
// what two lanes, others, hold of a transposed one. Query i and key j belong to the group (i / 16 * 4 + i % 8 / 2, j / 16 * 4 + j % 8 / 2) and take byte
// j % 2 * 2 + 1 - j / 8 % 2 of word i % 2 * 2 + i / 8 % 2.
//
// Of 32768 numbers below 32768 so many are dropped as the probability says, or where fewer than half are kept, kept: those below a threshold of 15 bits. A byte
// without its highest bit stands for the 7 high bits of a number. Whether it is below the threshold's 7 high bits, or also equal, is settled at random, in the
// proportion of the 8 low ones: by a byte of the generator's state before the last round, one for all sixteen, of which each of these is independent. So
// probabilities are exact; those that share a call are correlated by no more than 1 / 65536 over p (1 - p).
// Two bytes at a time are compared, each the high one of a float16 number without its sign: the order of these is that of their bits, up to infinity and NaN,
// which are not below any threshold. The number's low byte may be anything, as the threshold's is 0.
#pragma once
#include "problem.cuh"

// Of 64-bit factors whose high halves are 0 the compiler would still add what these give.
__device__ __forceinline__ unsigned long long wide_product(u32 x, u32 y) {
  unsigned long long product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(x), "r"(y));
  return product;
}

// `spare` comes of two words before the last round: of one alone, and two of the others after it, chances would not be independent.
__device__ __forceinline__ void philox(u32 (&words)[4], u32& spare, u32 key_low, u32 key_high) {
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    spare = words[1] + words[3];
    const unsigned long long first = wide_product(0xD2511F53, words[0]), second = wide_product(0xCD9E8D57, words[2]);
    words[0] = (u32)(second >> 32) ^ words[1] ^ key_low;
    words[1] = (u32)second;
    words[2] = (u32)(first >> 32) ^ words[3] ^ key_high;
    words[3] = (u32)first;
    key_low += 0x9E3779B9u, key_high += 0xBB67AE85u;
  }
}

struct Dropout {
  u32 place, sequence;   // flat index of batch and head; packed sequence

  static __device__ __forceinline__ u32 group(u32 index) { return index / 16 * 4 + index % 8 / 2; }

  // f(m, n, own, numbers, thresholds) for the elements of a lane's fragments d[m][n][2 · half + i], two at a time: `own` is their half, and they the two i; or if
  // TRANSPOSED, `own` their i, and they the two halves. Rows are queries (or keys if TRANSPOSED), `row` and `column` the lane's first ones; row a multiple of 16
  // plus less than 8, column a multiple of 16 (of 8, if COLUMNS is 8) plus less than 8.
  template <bool TRANSPOSED, int ROW_TILES, int COLUMNS, typename Pair>
  __device__ __forceinline__ void for_each_pair(const Problem& problem, int row, int column, Pair f) const {
    keep_here(row), keep_here(column);
    u32 key_low = (u32)problem.seed, key_high = (u32)(problem.seed >> 32);
    keep_here(key_low), keep_here(key_high);   // keys of rounds are made anew for each tile
    constexpr bool NARROW = COLUMNS == 8;   // half of the 16 x 16 elements are those of another fragment
    static_assert(NARROW || COLUMNS % 16 == 0, "columns are whole sixteens, or half of one");
    const u32 row_group = group(row), column_group = group(column);
    const bool odd = row % 2, upper = NARROW && column / 8 % 2;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int pair = 0; pair < ceil_div(COLUMNS, 16); ++pair) {
        const u32 r = row_group + m * 4, c = column_group + pair * 4;
        u32 w[4] = {TRANSPOSED ? c : r, TRANSPOSED ? r : c, place, sequence}, spare;
        philox(w, spare, key_low, key_high);
        const u32 thresholds = (spare >> 24) * 0x10001 + problem.thresholds & 0x7f007f00;
#pragma unroll
        for (int x = 0; x < (NARROW && TRANSPOSED ? 1 : 2); ++x)   // the query's half of 16
#pragma unroll
          for (int y = 0; y < (NARROW && !TRANSPOSED ? 1 : 2); ++y) {
            if constexpr (TRANSPOSED) {   // y: whether the query is odd
              const u32 word = upper ? w[y * 2 + 1] : w[y * 2 + x];
              f(m, pair * 2 + x, y, __byte_perm(word, 0, odd ? 0x2233 : 0x0011), thresholds);
            } else {   // y: the key's half of 16
              const u32 word = odd ? w[2 + x] : w[x];
              f(m, pair * 2 + y, x, y || upper ? word << 8 : word, thresholds);
            }
          }
      }
  }

  // f(m, n, half, i) for every dropped element.
  template <bool TRANSPOSED, int ROW_TILES, int COLUMNS, typename Drop>
  __device__ __forceinline__ void drop(const Problem& problem, int row, int column, Drop f) const {
    for_each_pair<TRANSPOSED, ROW_TILES, COLUMNS>(problem, row, column, [&](int m, int n, int own, u32 numbers, u32 thresholds) {
      u32 dropped[2];
      asm("{\n.reg .pred low, high, inverted;\n.reg .b32 unsigned;\n"
          "setp.ne.s32 inverted, %4, 0;\n"
          "abs.f16x2 unsigned, %2;\n"
          "setp.lt.xor.f16x2 low|high, unsigned, %3, inverted;\n"
          "selp.u32 %0, 1, 0, low;\n"
          "selp.u32 %1, 1, 0, high;\n}"
          : "=r"(dropped[0]), "=r"(dropped[1]) : "r"(numbers), "r"(thresholds), "r"(problem.keeps_below));
#pragma unroll
      for (int other = 0; other < 2; ++other)
        if (dropped[other]) f(m, n, TRANSPOSED ? other : own, TRANSPOSED ? own : other);
    });
  }

  // f(n, half, mask) for every two neighbours of one row tile; the mask has ones in the half of a word whose element is kept.
  template <int COLUMNS, typename Keep> __device__ __forceinline__ void keep_halves(const Problem& problem, int row, int column, Keep f) const {
    for_each_pair<false, 1, COLUMNS>(problem, row, column, [&](int, int n, int half, u32 numbers, u32 thresholds) {
      u32 below;
      asm("{\n.reg .b32 unsigned;\n"
          "abs.f16x2 unsigned, %1;\n"
          "set.lt.u32.f16x2 %0, unsigned, %2;\n}"
          : "=r"(below) : "r"(numbers), "r"(thresholds));
      f(n, half, below ^ (u32)(problem.keeps_below - 1));
    });
  }
};
