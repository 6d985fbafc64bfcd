// The one argument of every kernel: arrays, sizes and options of a call. cuflash/cupy_backend/launch.py fills it; a test holds the two layouts together.
#pragma once
#include "types.cuh"

constexpr int BATCH_DIMS = 4;   // batch dimensions that a view can have once those that lie regularly in memory are merged

// A view (batch dimensions, heads, rows, columns); strides in elements, neighbouring columns adjacent, a stride of 0 where the array is broadcast.
struct Array {
  void* data;
  i64 batch_stride[BATCH_DIMS];
  i64 head_stride;
  i64 row_stride;
  int group;     // consecutive query heads that share one head of this array
  int columns;   // columns that exist; a kernel's tile may be wider and then reads zeros
};

struct Problem {
  Array q, k, v, out, dout, dq, dk, dv;
  Array lse, dlse;              // one column; the row stride steps from query to query
  float* row_lse;               // backward: (batch · heads, padded_queries): lse as a shift (score.cuh); inf for rows that see nothing or do not exist
  float* row_d;                 // backward: (batch · heads, padded_queries): D = rowsum(dO · O) - dlse
  float* dq_sum;                // backward: (batch · heads, padded_queries, head dim of the kernel) float32, what the key blocks add up
  const i64* offsets;           // one offset for each batch entry, or null: `offset` for all
  i64 offset_stride[BATCH_DIMS];
  i64 offset;                   // query i stands at key i + offset
  int batch[BATCH_DIMS];
  int heads;
  int grid_heads;               // heads as the grid counts them: heads, or in backward blocks of heads_per_block heads
  int grid_places;              // all batch entries times grid_heads
  int queries, keys;            // each below 2^30
  int padded_queries;           // queries rounded up to whole tiles
  int causal;
  int sweep_heads;              // heads whose tiles are scheduled together (Schedule)
  int heads_per_block;          // backward: query heads that one block sums into its dK and dV
  int partial;                  // backward: dq, dk and dv are float32 parts that the host sums (broadcast or split heads), rows as wide as the kernel's tile
  float scale;
  float scale_log2;             // scale / ln 2: scores become exponents of 2
};

// Which tile of which (batch, head) a block works on. Heads go in sweeps; within a sweep all first tiles come first, so that blocks which run at the same
// time share keys and values in L2 and the longest tiles can start first.
struct Schedule {
  u32 place;
  int tile;

  __device__ __forceinline__ Schedule(const Problem& problem, u32 block, u32 tiles) {
    const u32 sweep = problem.sweep_heads, places = problem.grid_places;
    const u32 first = block / (sweep * tiles) * sweep, within = block % (sweep * tiles), width = min(sweep, places - first);
    place = first + within % width;
    tile = within / width;
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

  // flat: batch · heads, the head fastest
  __device__ __forceinline__ Place(const Problem& problem, u32 flat, u32 heads) {
    head = flat % heads;
    flat /= heads;
#pragma unroll
    for (int i = BATCH_DIMS - 1; i > 0; --i) {
      batch[i] = flat % (u32)problem.batch[i];
      flat /= (u32)problem.batch[i];
    }
    batch[0] = flat;
  }

  __device__ __forceinline__ i64 flat(const Problem& problem) const {
    int entry = batch[0];
#pragma unroll
    for (int i = 1; i < BATCH_DIMS; ++i) entry = entry * problem.batch[i] + batch[i];
    return (i64)entry * problem.heads + head;
  }

  // First element of this place's rows of an array.
  template <typename Element> __device__ __forceinline__ Element* rows(const Array& array) const {
    i64 at = (i64)(head / array.group) * array.head_stride;
#pragma unroll
    for (int i = 0; i < BATCH_DIMS; ++i) at += batch[i] * array.batch_stride[i];
    return (Element*)array.data + at;
  }

  __device__ __forceinline__ i64 offset(const Problem& problem) const {
    if (!problem.offsets) return problem.offset;
    i64 at = 0;
#pragma unroll
    for (int i = 0; i < BATCH_DIMS; ++i) at += batch[i] * problem.offset_stride[i];
    return problem.offsets[at];
  }
};
