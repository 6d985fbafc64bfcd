// Float32 arrays as float16 parts, for the float16 products of forward_sm90.cu and backward_parts_sm90.cu: x · 2^e = high + low, each a float16 number, which keeps 23 bits of x;
// or high alone, 11 bits, as tf32 has. A power of two 2^e brings the largest |x| of a group of rows to 2^14 or more, below 2^15.
//
// An array of parts is (places, groups · (ROWS + 1), PARTS · columns in whole 64): each group's ROWS rows [high | low] and a row that starts with 2^-e.
// Groups of a sequence are its key tiles, or 64 of its queries; those of packed sequences lie in slots as tiles do (TileOfSequence). Rows that do not exist
// or take no part are zero.
#pragma once
#include "parts_words.cuh"
#include "ring.cuh"
#include "score.cuh"
#include "softmax.cuh"
#include "ptx/wgmma.cuh"

// How many parts a number of this precision has; 0: it is one of 16 bits, and taken as it is.
__device__ __forceinline__ constexpr int parts_of(int precision) { return precision == FLOAT32 ? 2 : precision == TFLOAT32 ? 1 : 0; }

constexpr int FACTOR_BYTES = 16;   // of the 2^-e of a group: what a copy moves at least

// Where the groups of a sequence of an array's (batch, head) lie.
template <int OPTIONS, int ROWS> struct GroupPlace {
  BoxPlace boxes;
  const u8* rows;
  i64 row_bytes;
  int first, last;   // groups, counted within (batch, head): of the sequence, and of all

  // `offsets`: where packed sequences start among `total` rows.
  __device__ __forceinline__ GroupPlace(const Problem& problem, const Array& array, const Place& place, const int* offsets, int total, int sequence)
      : boxes(array, place), rows((const u8*)place.rows<u16>(array)), row_bytes(array.row_stride * 2),
        first(OPTIONS & PACKED ? TileOfSequence::first_slot(offsets, sequence, total, ROWS) : 0), last(tile_slots<OPTIONS>(problem, total, ROWS) - 1) {}

  // Group n of the sequence and its factor; where there is none, another one, whose rows then stand for no query.
  template <int BOXES, int BOX_BYTES> __device__ __forceinline__ void load(const TensorMap& map, u32 target, u32 factor, int n, u32 barrier, int more_bytes = 0) const {
    const int row = min(first + n, last) * (ROWS + 1);
    boxes.load_rows<BOXES, BOX_BYTES>(map, target, row, barrier, FACTOR_BYTES + more_bytes);
    load_bytes(factor, rows + (row + ROWS) * row_bytes, FACTOR_BYTES, barrier);
  }
};

// The 2^-e of a group, the same in all lanes.
__device__ __forceinline__ float load_factor(u32 address) { return __uint_as_float(uniform(load_shared(address))); }

// Exponential with another factor from tile to tile: of products of parts that are multiples of `unit`.
template <typename Exponential> struct ExponentialOfParts : Exponential {
  using Exponential::Exponential;
  // A factor of 0 or infinity would make NaN of hidden scores, or of products that are 0.
  __device__ __forceinline__ void set_unit(const Problem& problem, float unit) { Exponential::factor = fminf(fmaxf(Exponential(problem).factor * unit, 1.17549435e-38f), 3.402823466e38f); }
};
template <int PARTS, typename Exponential> struct ExponentialOf { using type = ExponentialOfParts<Exponential>; };
template <typename Exponential> struct ExponentialOf<0, Exponential> { using type = const Exponential; };

// Two float16 numbers times PARTS_SCALE.
__device__ __forceinline__ u32 scale_pair(u32 pair) {
  static_assert(PARTS_SCALE == 2048.0f, "0x6800 is 2048 in float16");
  u32 product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(pair), "r"(0x68006800));
  return product;
}

// D = A Bᵀ, D = Aᵀ B and D = A B as multiply_rows, multiply_columns and multiply_words have them, of numbers in PARTS. What is added to D is truncated to the last bits of D: the small
// products come first. low · low is left out, 2^-24 of a term. TURNED: the bits of B Aᵀ, transposed.
template <int PARTS, int N, int DEPTH, int A_BOX, int B_BOX, bool TURNED = false> __device__ __forceinline__ void multiply_rows_of_parts(float (&d)[N / 8][4], u32 a_at, u32 b_at) {
  constexpr int BOXES = ceil_div(DEPTH, 64), FIRST_A = TURNED ? 0 : BOXES * A_BOX, FIRST_B = TURNED ? BOXES * B_BOX : 0;
  wgmma_fence();
  if constexpr (PARTS == 2) {
    issue_rows<false, FLOAT16, N, DEPTH, A_BOX, B_BOX>(d, a_at + FIRST_A, b_at + FIRST_B);
    issue_rows<true, FLOAT16, N, DEPTH, A_BOX, B_BOX>(d, a_at + BOXES * A_BOX - FIRST_A, b_at + BOXES * B_BOX - FIRST_B);
  }
  issue_rows<PARTS == 2, FLOAT16, N, DEPTH, A_BOX, B_BOX>(d, a_at, b_at);
  wgmma_commit();
}
template <int PARTS, int N, int DEPTH, int A_BOX, int B_BOX>   // `a_low` and `b_low`: how far behind the high parts the low ones lie
__device__ __forceinline__ void multiply_columns_of_parts(float (&d)[N / 8][4], u32 a_at, int a_low, u32 b_at, int b_low) {
  wgmma_fence();
  if constexpr (PARTS == 2) {
    issue_columns<false, FLOAT16, N, DEPTH, A_BOX, B_BOX>(d, a_at + a_low, b_at);
    issue_columns<true, FLOAT16, N, DEPTH, A_BOX, B_BOX>(d, a_at, b_at + b_low);
  }
  issue_columns<PARTS == 2, FLOAT16, N, DEPTH, A_BOX, B_BOX>(d, a_at, b_at);
  wgmma_commit();
}
template <int PARTS, int N, int B_BOX, int STEPS, int LOW_STEPS>
__device__ __forceinline__ void multiply_words_of_parts(float (&d)[N / 8][4], const u32 (&high)[STEPS][4], const u32 (&low)[LOW_STEPS][4], u32 b_at) {
  wgmma_fence();
  if constexpr (PARTS == 2) {
    issue_words<false, FLOAT16, N, B_BOX>(d, low, b_at);
    issue_words<true, FLOAT16, N, B_BOX>(d, high, b_at + ceil_div(N, 64) * B_BOX);
  }
  issue_words<PARTS == 2, FLOAT16, N, B_BOX>(d, high, b_at);
  wgmma_commit();
}
