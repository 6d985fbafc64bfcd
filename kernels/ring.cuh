// Stages in shared memory between a thread that loads them and warps that use them (sm_90).
#pragma once
#include "problem.cuh"
#include "ptx/tma.cuh"

// Where a thread stands in a ring: the stage, and the parity of the phase of its full barrier (that of its empty barrier is the other one).
template <int STAGES> struct Ring {
  int stage = 0;
  u32 parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ void wait_full(u32 barriers) const { barrier_wait(barriers + 8 * stage, parity); }
  __device__ __forceinline__ void wait_empty(u32 barriers) const { barrier_wait(barriers + 8 * stage, parity ^ 1); }
};

// The same for two stages, in one register.
struct PairRing {
  u32 count = 0;
  __device__ __forceinline__ u32 stage() const { return count % 2; }
  __device__ __forceinline__ u32 parity() const { return count / 2 % 2; }
  __device__ __forceinline__ void advance() { ++count; }
  __device__ __forceinline__ void wait_full(u32 barriers) const { barrier_wait(barriers + 8 * stage(), parity()); }
  __device__ __forceinline__ void wait_empty(u32 barriers) const { barrier_wait(barriers + 8 * stage(), parity() ^ 1); }
};

// The barriers of a ring: how many arrivals make a stage full (besides the bytes of copies), and empty.
__device__ __forceinline__ void init_ring(u32 base, int full, int writers, int empty, int readers, int stages) {
  for (int stage = 0; stage < stages; ++stage) barrier_init(base + full + 8 * stage, writers), barrier_init(base + empty + 8 * stage, readers);
}

// Where the boxes of an array's (batch, head) lie. It is worked out once, not for each copy: who waits for a tile waits for the thread that issues it.
struct BoxPlace {
  int head, batch, outer;
  BoxPlace() = default;
  __device__ __forceinline__ BoxPlace(const Array& array, const Place& place)
      : head(array.head_stride ? array.head_of(place.head) : 0), batch(array.batch_stride[3] ? place.batch[3] : 0), outer(array.batch_stride[2] ? place.batch[2] : 0) {}

  __device__ __forceinline__ void load(const TensorMap& map, u32 target, int column, int row, u32 barrier) const { load_box(target, map, column, row, head, batch, outer, barrier); }
  // All columns of the rows from `row` on, 64 columns a box, after announcing them and `more_bytes` to the barrier.
  template <int BOXES, int BOX_BYTES> __device__ __forceinline__ void load_rows(const TensorMap& map, u32 target, int row, u32 barrier, int more_bytes = 0) const {
    barrier_arrive_expect(barrier, BOXES * BOX_BYTES + more_bytes);
    load_announced<BOXES, BOX_BYTES>(map, target, row, barrier);
  }
  template <int BOXES, int BOX_BYTES> __device__ __forceinline__ void load_announced(const TensorMap& map, u32 target, int row, u32 barrier) const {
#pragma unroll
    for (int box = 0; box < BOXES; ++box) load(map, target + box * BOX_BYTES, box * 64, row, barrier);
  }
};

// Rows of a tile from `first` on become 0, by the threads of a warpgroup.
__device__ __forceinline__ void clear_rows(u32 tile, int boxes, int box_bytes, int first) {
  for (int box = 0; box < boxes; ++box)
    for (int at = first * 128 + (int)(threadIdx.x % 128) * 16; at < box_bytes; at += 128 * 16) store_shared_16_bytes(tile + box * box_bytes + at, make_uint4(0, 0, 0, 0));
}
