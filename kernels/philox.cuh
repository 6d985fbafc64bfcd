// Dropout by a counter-based random generator, Philox4x32 with 7 rounds (Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3").
// Which pairs of a query and a key are kept depends on (seed, batch and head, sequence, query, key) alone, so forward, backward and the NumPy path
// (cuflash/philox.py) find the same ones, whatever their tiles.
//
// One call gives eight 16-bit fields, for 2 queries, 8 apart, and 4 keys, 8 apart: what one lane holds of a fragment of scores, and of a transposed one.
// Query i and key j belong to the group (i / 16 * 8 + i % 8, j / 32 * 8 + j % 8) and take its field (i / 8 % 2) * 4 + j / 8 % 4; a field is half a word.
//
// Two fields are compared at once, as float16 numbers without their signs, whose order is that of their other 15 bits up to 31 * 2^10; above are NaN, which are
// not below any number. So thresholds have to be lower, and are at most half of all: of fields to drop, or where fewer than half are kept, to keep.
#pragma once
#include "problem.cuh"

// Of 64-bit factors whose high halves are 0 the compiler would still add what these give.
__device__ __forceinline__ unsigned long long wide_product(u32 x, u32 y) {
  unsigned long long product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(x), "r"(y));
  return product;
}

__device__ __forceinline__ void philox(u32 (&words)[4], u32 key_low, u32 key_high) {
#pragma unroll
  for (int round = 0; round < 7; ++round) {
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

  static __device__ __forceinline__ u32 query_group(u32 query) { return query / 16 * 8 + query % 8; }
  static __device__ __forceinline__ u32 key_group(u32 key) { return key / 32 * 8 + key % 8; }

  // The four words of a group.
  __device__ __forceinline__ void words(u32 key_low, u32 key_high, u32 (&w)[4], u32 query_group, u32 key_group) const {
    w[0] = query_group, w[1] = key_group, w[2] = place, w[3] = sequence;
    philox(w, key_low, key_high);
  }
  // Whether the pairs of a word's two fields are dropped.
  static __device__ __forceinline__ void compare(const Problem& problem, u32 (&dropped)[2], u32 word) {
    asm("{\n.reg .pred low, high, inverted;\n.reg .b32 numbers;\n"
        "setp.ne.s32 inverted, %4, 0;\n"
        "abs.f16x2 numbers, %2;\n"
        "setp.lt.xor.f16x2 low|high, numbers, %3, inverted;\n"
        "selp.u32 %0, 1, 0, low;\n"
        "selp.u32 %1, 1, 0, high;\n}"
        : "=r"(dropped[0]), "=r"(dropped[1]) : "r"(word), "r"(problem.field_threshold), "r"(problem.keeps_below));
  }

  // f(m, n, half, i) for every dropped element of a lane's fragments d[m][n][2 · half + i]. Rows are queries (or keys if TRANSPOSED), `row` and `column`
  // the lane's first ones; row a multiple of 16 · ROW_TILES plus less than 8, column a multiple of 16 (of 8, if COLUMNS is 8) plus less than 8.
  template <bool TRANSPOSED, int ROW_TILES, int COLUMNS, typename Drop>
  __device__ __forceinline__ void drop(const Problem& problem, int row, int column, Drop f) const {
    // 16 x 16 elements at a time take two words of a call; where the 32 keys of a group lie in one fragment, its next 16 take the two others.
    keep_here(row), keep_here(column);
    u32 key_low = (u32)problem.seed, key_high = (u32)(problem.seed >> 32);
    keep_here(key_low), keep_here(key_high);   // keys of rounds are made anew for each tile
    const u32 first_query_group = query_group(TRANSPOSED ? column : row), first_key_group = key_group(TRANSPOSED ? row : column);
    constexpr int ROWS_AT_ONCE = TRANSPOSED && ROW_TILES % 2 == 0 ? 2 : 1, PAIRS_AT_ONCE = !TRANSPOSED && COLUMNS % 32 == 0 ? 2 : 1;
    constexpr bool NARROW = COLUMNS == 8;   // half of the 16 x 16 elements are those of another fragment
    static_assert(NARROW || COLUMNS % 16 == 0, "columns are whole sixteens, or half of one");
#pragma unroll
    for (int m = 0; m < ROW_TILES; m += ROWS_AT_ONCE)
#pragma unroll
      for (int pair = 0; pair < ceil_div(COLUMNS, 16); pair += PAIRS_AT_ONCE)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key_step = (TRANSPOSED ? m : pair) * 16, query_step = (TRANSPOSED ? pair : m) * 16, key = (TRANSPOSED ? row : column) + key_step;
          u32 w[4];   // 16 queries on, the group is 8 on; so it is 32 keys on
          words(key_low, key_high, w, first_query_group + query_step / 2 + (TRANSPOSED ? i : 0), (key_step % 32 == 0 ? first_key_group + key_step / 4 : key_group(key)) + (TRANSPOSED ? 0 : i));
          const bool second = key / 16 % 2;
#pragma unroll
          for (int more = 0; more < ROWS_AT_ONCE * PAIRS_AT_ONCE; ++more)
#pragma unroll
            for (int a = 0; a < 2; ++a) {   // the query's half of 16
              const u32 word = ROWS_AT_ONCE * PAIRS_AT_ONCE == 2 ? w[a * 2 + more] : (second ? w[a * 2 + 1] : w[a * 2]);
              u32 dropped[2];
              compare(problem, dropped, word);
#pragma unroll
              for (int b = 0; b < 2; ++b) {   // the key's
                const bool elsewhere = NARROW && (TRANSPOSED ? a : b) != column / 8 % 2;
                if (dropped[b] && !elsewhere) {
                  if constexpr (TRANSPOSED) f(m + more, NARROW ? 0 : pair * 2 + a, b, i);
                  else f(m, NARROW ? 0 : (pair + more) * 2 + b, a, i);
                }
              }
            }
        }
  }
};
