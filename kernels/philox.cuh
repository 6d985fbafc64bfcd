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

// What a lane takes of a call: of its sixteen bytes eight, in two words, and the thresholds that they are compared with.
struct DropoutNumbers { u32 words[2], thresholds; };

struct Dropout {
  u32 place, sequence;   // flat index of batch and head; packed sequence

  static __device__ __forceinline__ u32 group(u32 index) { return index / 16 * 4 + index % 8 / 2; }

  // The call for each of two (row group, column group): each lane makes one of them, and gives the half of it that it does not take itself to the lane that does,
  // the one whose row is the neighbour. `odd`: whether the lane's row is.
  template <bool TRANSPOSED> __device__ __forceinline__ void two_calls(const Problem& problem, const u32 (&rows)[2], const u32 (&columns)[2], u32 key_low, u32 key_high, bool odd, DropoutNumbers (&numbers)[2]) const {
    const u32 row = odd ? rows[1] : rows[0], column = odd ? columns[1] : columns[0];
    u32 w[4] = {TRANSPOSED ? column : row, TRANSPOSED ? row : column, place, sequence}, spare;
    philox(w, spare, key_low, key_high);
    const auto share = [&](u32 even_lanes, u32 odd_lanes, u32& first, u32& second) {   // what they take of this lane's call, and this lane of both calls
      const u32 received = __shfl_xor_sync(0xffffffff, odd ? even_lanes : odd_lanes, 4);
      first = odd ? received : even_lanes, second = odd ? odd_lanes : received;
    };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (TRANSPOSED) share(__byte_perm(w[2 * i], w[2 * i + 1], 0x5410), __byte_perm(w[2 * i], w[2 * i + 1], 0x7632), numbers[0].words[i], numbers[1].words[i]);
      else share(w[i], w[2 + i], numbers[0].words[i], numbers[1].words[i]);
    }
    const u32 thresholds = (spare >> 24) * 0x10001 + problem.thresholds & 0x7f007f00;
    share(thresholds, thresholds, numbers[0].thresholds, numbers[1].thresholds);
  }

  // The call for one of them, made by each lane.
  template <bool TRANSPOSED> __device__ __forceinline__ void one_call(const Problem& problem, u32 row, u32 column, u32 key_low, u32 key_high, bool odd, DropoutNumbers& numbers) const {
    u32 w[4] = {TRANSPOSED ? column : row, TRANSPOSED ? row : column, place, sequence}, spare;
    philox(w, spare, key_low, key_high);
#pragma unroll
    for (int i = 0; i < 2; ++i) numbers.words[i] = TRANSPOSED ? __byte_perm(w[2 * i], w[2 * i + 1], odd ? 0x7632 : 0x5410) : odd ? w[2 + i] : w[i];
    numbers.thresholds = (spare >> 24) * 0x10001 + problem.thresholds & 0x7f007f00;
  }

  // Two numbers of a lane's elements, in the high bytes of the halves of a word, of `half` of 16 columns: those of two neighbours of row `own`, or if TRANSPOSED those of column
  // `own` of two neighbours in rows 0 and 8.
  template <bool TRANSPOSED> static __device__ __forceinline__ u32 pair_of(const DropoutNumbers& numbers, int half, int own) {
    const u32 word = numbers.words[own];
    if constexpr (TRANSPOSED) return __byte_perm(word, 0, half ? 0x2233 : 0x0011);
    return half ? word << 8 : word;
  }

  // f(m, n, own, numbers, thresholds) for the elements of a lane's fragments d[m][n][2 · half + i], two at a time: `own` is their half, and they the two i; or if
  // TRANSPOSED, `own` their i, and they the two halves. Rows are queries (or keys if TRANSPOSED), `row` and `column` the lane's first ones; row a multiple of 16
  // plus less than 8, column a multiple of 16 (of 8, if COLUMNS is 8) plus less than 8. All lanes of the warp take part.
  template <bool TRANSPOSED, int ROW_TILES, int COLUMNS, typename Pair>
  __device__ __forceinline__ void for_each_pair(const Problem& problem, int row, int column, Pair f) const {
    keep_here(row), keep_here(column);
    u32 key_low = (u32)problem.seed, key_high = (u32)(problem.seed >> 32);
    keep_here(key_low), keep_here(key_high);   // keys of rounds are made anew for each tile
    constexpr bool NARROW = COLUMNS == 8;   // half of the 16 x 16 elements are those of another fragment
    static_assert(NARROW || COLUMNS % 16 == 0, "columns are whole sixteens, or half of one");
    constexpr int WIDTH = ceil_div(COLUMNS, 16), CALLS = ROW_TILES * WIDTH;
    const u32 row_group = group(row), column_group = group(column);
    const bool upper = NARROW && column / 8 % 2;
#pragma unroll
    for (int call = 0; call < CALLS; call += 2) {
      const int next = call + 1 < CALLS ? call + 1 : call;   // the last of an odd number is made twice
      const u32 rows[2] = {row_group + call / WIDTH * 4, row_group + next / WIDTH * 4}, columns[2] = {column_group + call % WIDTH * 4, column_group + next % WIDTH * 4};
      DropoutNumbers numbers[2];
      if constexpr (CALLS > 1) two_calls<TRANSPOSED>(problem, rows, columns, key_low, key_high, row % 2, numbers);
      else one_call<TRANSPOSED>(problem, row_group, column_group, key_low, key_high, row % 2, numbers[0]);
#pragma unroll
      for (int i = 0; i <= next - call; ++i)
#pragma unroll
        for (int own = 0; own < 2; ++own)
#pragma unroll
          for (int half = 0; half < (NARROW ? 1 : 2); ++half)
            f((call + i) / WIDTH, (call + i) % WIDTH * 2 + half, own, upper ? pair_of<TRANSPOSED>(numbers[i], 1, own) : pair_of<TRANSPOSED>(numbers[i], half, own), numbers[i].thresholds);
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
};

// Which of a tile's elements are kept, for a loop over the chunks of 8 columns of one row tile: it makes them as it goes, beside the loop's own arithmetic.
struct KeptElements {
  Dropout dropout;
  u32 row_group, column_group;
  bool odd;
  DropoutNumbers numbers[2];

  // Of the lane's first row and column, as in Dropout.
  __device__ __forceinline__ void begin(const Dropout& its_dropout, int row, int column) {
    keep_here(row), keep_here(column);
    dropout = its_dropout, row_group = Dropout::group(row), column_group = Dropout::group(column), odd = row % 2;
  }

  // Ones in the half of a word whose element is kept, of two neighbours in chunk n; to be asked for in the order of n, and of `half` in it.
  __device__ __forceinline__ u32 mask(const Problem& problem, int n, int half) {
    if (n % 4 == 0 && half == 0) {   // of what lies behind the last columns nothing is asked
      u32 key_low = (u32)problem.seed, key_high = (u32)(problem.seed >> 32);
      const u32 rows[2] = {row_group, row_group}, columns[2] = {column_group + n * 2, column_group + n * 2 + 4};
      dropout.two_calls<false>(problem, rows, columns, key_low, key_high, odd, numbers);
    }
    u32 below;
    asm("{\n.reg .b32 unsigned;\n"
        "abs.f16x2 unsigned, %1;\n"
        "set.lt.u32.f16x2 %0, unsigned, %2;\n}"
        : "=r"(below) : "r"(Dropout::pair_of<false>(numbers[n / 2 % 2], n % 2, half)), "r"(numbers[n / 2 % 2].thresholds));
    return below ^ (u32)(problem.keeps_below - 1);
  }
};
