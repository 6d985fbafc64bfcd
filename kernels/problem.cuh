// The one argument of every kernel: arrays, sizes and options of a call. cuflash/cupy_backend/launch.py fills it; a test holds the two layouts together.
#pragma once
#include "types.cuh"

constexpr int OFFSETS_DESCEND = 2;   // the word of row_turn that says so of packed sequences: no key block takes turns by it, as tiles have 64 rows and more
constexpr int KEY_BLOCKS_TAKEN = 3;  // and the word that counts key blocks, where they are taken so
constexpr int HEAD_ADDED = 4;        // of each head's words, the one that counts what has been added to its sums (added_to_head)
constexpr int HEAD_CLEARED = 5;      // and the one that counts the blocks that have cleared some of them (clears_ahead)
constexpr int BATCH_DIMS = 4;   // batch dimensions that a view can have once those that lie regularly in memory are merged

// Division by a number that the host knows, of numbers below 2^31, by a product (Granlund & Montgomery 1994, "Division by invariant integers using multiplication"). A block
// finds its place by several divisions, one after the other, before it can ask for anything. In the sm90 family, that is: in the other, some kernels have no registers for it.
struct Divisor {
  u32 magic, shift;
  template <typename Integer> __device__ __forceinline__ Integer quotient(Integer x, Integer divisor) const {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    return (__umulhi(x, magic) + (u32)x) >> shift;
#else
    return x / divisor;
#endif
  }
};

// A view (batch dimensions, heads, rows, columns); strides in elements, a stride of 0 where the array is broadcast. Columns lie side by side, but those of
// mask and bias.
struct Array {
  void* data;
  i64 batch_stride[BATCH_DIMS];
  i64 head_stride;
  i64 row_stride;
  i64 column_stride;
  int group;     // consecutive query heads that share one head of this array
  Divisor by_group;
  int columns;   // columns that exist; a kernel's tile may be wider and then reads zeros
  int pairs;     // bias: whether two neighbouring columns, the first of them even, can be read as one

  // Which of the array's heads a query head has.
  __device__ __forceinline__ int head_of(int head) const { return by_group.quotient(head, group); }
};

// The factors of a call, where it is FLOAT64; elsewhere those of Problem.
struct Factors {
  double keep_inverse, scale, score_unit, inverse_unit, softcap_scale;
};

// A softcap in 16-bit calls: exponents of 2 of capped scores, by a polynomial. It is good to 1.8e-5 of the cap while they are no larger than `most` in size, and falls
// with the product everywhere. Further down it falls too fast; `least_shift` is where a row's shift has to be for that not to matter (_capped in launch.py).
struct CappedExponents {
  float first, third, fifth, most, least_shift;
};

struct Problem {
  Array q, k, v, out, dout, dq, dk, dv;   // float32_parts: dq, dk, dv and out are the parts of q, k, v and dout; mask_words: out are the words
  Array lse, dlse;                        // one column; the row stride steps from query to query
  Array mask, bias, dbias;                // (.., queries, keys); mask in bits: (.., rows of scores, words of 32 columns), see mask.cuh
  Array alibi_slopes, sinks;              // one number for each head
  Array q_lengths, kv_lengths, offsets;   // one 64-bit integer for each batch entry; `offset` for all where offsets is null
  // What kernels add up and keep is float32, and float64 with FLOAT64, also where a pointer's type does not say so (reals).
  float* row_lse;               // backward: (batch · heads, padded_queries): lse as a shift (score.cuh); inf for rows that see nothing or do not exist
  float* row_d;                 // backward: (batch · heads, padded_queries): D = rowsum(dO · O) - dlse
  float* row_sink;              // backward: (batch · heads, padded_queries): what a row adds to the gradient of its head's sink
  u32* row_turn;                // backward in order: (batch · heads, padded_queries): of a tile's first rows, who has added to its dQ (take_turns), or how many key blocks have come and added (TurnTaker); of a head's first rows, what is added (HEAD_ADDED), and cleared (HEAD_CLEARED); or null
  u32* walked_to;               // backward_sm90: a query tile that some block has lately come to, or anything; or null (begin_walk)
  float* dq_sum;                // backward: (batch · heads, padded_queries, head dim of the kernel), what the key blocks add up; its first rows_in_dq rows lie in dq
  float* partial_out;           // SPLIT_KEYS: (splits, batch · heads · queries, value dim of the kernel), each part as if its keys were all; backward: sums of the pieces of key blocks (sum_of_pieces)
  float* partial_lse;           // (splits, batch · heads · queries)
  u32* tile_counter;            // forward_sm90: tiles taken beyond the first of each block; null where blocks take turns. Of float32 calls parts_words.cuh lies behind it
  const int* cu_q;              // packed sequences: where each starts, and at last where all end
  const int* cu_k;
  unsigned long long seed;      // dropout
  i64 offset;                   // query i stands at key i + offset
  i64 split_stride;             // gradient of the bias: elements from one part to the next; CUT: from the sums of one key block to the next one's
  i64 rows_in_dq;               // backward_sm90: in the memory of dq, until dQ takes their place (dq_sum_row)
  i64 left, right;              // bounded: query i sees the keys from i + offset - left to i + offset + right
  int batch[BATCH_DIMS];
  int heads;
  int grid_heads;               // heads as the grid counts them: heads, or in backward blocks of heads_per_block heads
  int grid_places;              // all batch entries times grid_heads
  int queries, keys;            // each below 2^30
  int padded_queries;           // queries rounded up to whole tiles; packed: what all sequences take
  int padding;                  // the largest tile of the kernels that read padded rows
  int sequences;                // packed ones
  int bounded;                  // causal or window
  int last_first;               // whether tiles of the last queries (and first keys) have most to do and start first
  int aligned_ends;             // the offset of a sequence is its keys minus its queries
  int sweep_heads;              // heads whose tiles are scheduled together (Schedule)
  int heads_per_block;          // backward: query heads that one block sums into its dK and dV
  int partial;                  // backward: dq, dk and dv are parts that the host sums (broadcast or split heads), rows as wide as the kernel's tile
  int first_tile;               // backward_finish_sm90: of all query tiles, that of the first block
  int splits;                   // gradient of the bias, and SPLIT_KEYS: parts
  int batches_together;         // STAGED_BIAS in forward_sm90, BIAS_GRADIENT: how many batch entries share a bias, if their tiles should follow each other
  u32 thresholds;               // dropout, in both halves of the word: how many of 32768 weights are dropped, or kept, whichever are fewer
  int keeps_below;              // dropout: whether those below the threshold are kept
  float keep_inverse;           // 1 / that probability
  float scale;
  float score_unit;             // what scores are multiples of (score.cuh)
  float score_unit_log2;        // the same / ln 2: scores become exponents of 2
  float inverse_unit;           // 1 / score_unit
  float softcap_scale;          // scale / softcap
  CappedExponents capped;
  Divisor by_heads, by_grid_heads, by_batch[BATCH_DIMS];
  Divisor by_sweep, by_last_sweep;   // by sweep_heads; and by how many heads the last sweep has
  Factors float64;
  int in_order;                 // backward_sm90 where key blocks make dQ: whether they add to a tile one after the other
  int cut_from, pieces;         // CUT in the sm90 family's backward: the grid's key blocks from this one on are cut into so many pieces, each with some of the query tiles
  int added_to_head;            // what stands in a head's word when its dq_sum is complete, for which backward_finish_sm90 waits; 0: nobody counts, and it begins later
  int clears_ahead;             // backward of the sm90 family: of how many of the grid's places after its own a block clears sums of dQ (clear_sums_ahead), and
  int clearing_blocks;          // how many of a place's blocks do, the first ones; 0: none does
  int ordered_last_first;       // backward in order: how many of the grid's places begin with their last keys; those after them, whole sweeps, with their first
};

template <typename Real> __device__ __forceinline__ const auto& factors(const Problem& problem) {
  if constexpr (sizeof(Real) == 8) return problem.float64;
  else return problem;
}

template <typename Real> __device__ __forceinline__ Real* reals(float* data) { return (Real*)data; }

// A padded row of what the key blocks add up to dQ.
template <typename Real = float> __device__ __forceinline__ Real* dq_sum_row(const Problem& problem, i64 row, int columns) {
  return reals<Real>(row < problem.rows_in_dq ? (float*)problem.dq.data : problem.dq_sum) + row * columns;
}

// How many heads, and entries of a batch dimension, of an array are its own.
__device__ __forceinline__ u32 own_heads(const Problem& problem, const Array& array) { return array.head_stride ? problem.heads / array.group : 1; }
__device__ __forceinline__ u32 own_entries(const Problem& problem, const Array& array, int i) { return array.batch_stride[i] ? problem.batch[i] : 1; }

// Which tile of which (batch, head) a block works on. Heads go in sweeps; within a sweep all first tiles come first, so that blocks which run at the same
// time share keys and values in L2 and the longest tiles can start first.
struct Schedule {
  u32 place;
  int tile;

  __device__ __forceinline__ Schedule(const Problem& problem, u32 block, u32 tiles) {
    const u32 sweep = problem.sweep_heads, places = problem.grid_places;
    const u32 first = block / (sweep * tiles) * sweep, within = block % (sweep * tiles), width = min(sweep, places - first);
    tile = (width == sweep ? problem.by_sweep : problem.by_last_sweep).quotient(within, width);
    place = first + within - tile * width;
  }
};

// blockIdx.x, read so that the compiler cannot see it is the same: what an epilogue derives from it is worked out again instead of being kept in registers
// through the main loop.
__device__ __forceinline__ u32 block_index_again() {
  u32 block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
}

// One batch entry and head.
struct Place {
  int batch[BATCH_DIMS];
  int head;

  // The first of all.
  __device__ __forceinline__ Place() : batch{}, head(0) {}
  // flat: batch · heads, the head fastest
  __device__ __forceinline__ Place(const Problem& problem, u32 flat, u32 heads, const Divisor& by_heads) {
    u32 rest = by_heads.quotient(flat, heads);
    head = flat - rest * heads;
#pragma unroll
    for (int i = BATCH_DIMS - 1; i > 0; --i) {
      flat = rest, rest = problem.by_batch[i].quotient(flat, (u32)problem.batch[i]);
      batch[i] = flat - rest * problem.batch[i];
    }
    batch[0] = rest;
  }

  __device__ __forceinline__ i64 flat(const Problem& problem) const {
    int entry = batch[0];
#pragma unroll
    for (int i = 1; i < BATCH_DIMS; ++i) entry = entry * problem.batch[i] + batch[i];
    return (i64)entry * problem.heads + head;
  }

  // First element of this place's rows of an array.
  template <typename Element> __device__ __forceinline__ Element* rows(const Array& array) const {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL   // as above
    using Index = u32;   // without a sign that takes a register
#else
    using Index = int;
#endif
    i64 at = (Index)array.head_of(head) * array.head_stride;
#pragma unroll
    for (int i = 0; i < BATCH_DIMS; ++i) at += (Index)batch[i] * array.batch_stride[i];
    return (Element*)array.data + at;
  }
};
