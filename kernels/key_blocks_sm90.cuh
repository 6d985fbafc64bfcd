// Key blocks one after the other by the blocks of a grid that fits on the GPU (MAKES_DQ in backward_sm90.cu): who takes them, and how the others follow. While
// the gradients of one are written, the tiles of the next are on their way.
#pragma once
#include "backward_sm90.cuh"

// What all threads of a block know of the key block that they work on.
constexpr int SLOT_BYTES = 256;
template <typename Block> struct KeyBlockSlot {
  int last;            // there is none any more
  u32 count;           // of those before it
  int end_of_last;     // of the query tiles of which it makes dQ
  GradientRows rows;
  void* dq;            // row 0 of the first of its query heads
  u32 sum_row;         // of dq_sum, where these begin
  u32 first_row;       // of row_lse and row_d; it and q and dout become those of the next head when the loader is done with one
  BoxPlace q, k, v, dout;
  Block block;
};

// Key blocks are taken by counting, each when the loader is done with the one before: so of all that have begun, the first ones are always those under way, and whoever
// waits for a turn waits for one of them, even if not all blocks of the grid are running.
template <int PRECISION, int KEY_TILE, typename Tiles, typename Block> __device__ __forceinline__ void take_key_blocks(const Problem& problem, u8* shared, u32 base) {
  using Element = typename ElementOf<PRECISION>::type;
  using Slot = KeyBlockSlot<Block>;
  static_assert(sizeof(Slot) <= SLOT_BYTES, "");
  PairRing ring;
  for (;; ring.advance()) {
    const u32 index = take_number<KEY_BLOCKS_TAKEN>(problem.row_turn);
    ring.wait_empty(base + Tiles::SLOT_EMPTY);
    Slot& slot = *(Slot*)(shared + Tiles::SLOTS + ring.stage() * SLOT_BYTES);
    int keys = problem.keys;
    keep_here(keys);   // few registers
    const bool last = index >= problem.grid_places * (u32)ceil_div(keys, KEY_TILE);
    slot.last = last, slot.count = ring.count;
    if (!last) {
      slot.block.set(problem, index);
      keep_memory_here();   // few registers
      const Block& block = slot.block;
      slot.end_of_last = block.begin_of_next();
      keep_memory_here();
      set_gradient_rows<PRECISION>(problem, block, slot.rows);
      keep_memory_here();   // few registers
      slot.dq = block.place.template rows<Element>(problem.dq);
      keep_memory_here();
      slot.sum_row = slot.first_row = block.sequence.padded_row(problem, block.place);
      slot.q = BoxPlace(problem.q, block.place), slot.dout = BoxPlace(problem.dout, block.place);
      keep_memory_here();
      slot.k = BoxPlace(problem.k, block.place), slot.v = BoxPlace(problem.v, block.place);
    }
    barrier_arrive(base + Tiles::SLOT_FULL + 8 * ring.stage());
    if (last) return;
    barrier_wait(base + Tiles::WANTED, ring.count % 2);
  }
}

// What load_for_key_block does, for one key block after the other. Few registers: what is known of it is read where it is needed.
template <typename Tiles, typename Block, int QUERY_TILE> struct KeyBlockLoader {
  PairRing ring;   // of queries, and of output gradients

  __device__ __forceinline__ void load(const Problem& problem, const BackwardTensorMaps& maps, KeyBlockSlot<Block>& slot, u32 base) {
    barrier_wait(base + Tiles::KEYS_EMPTY, slot.count % 2 ^ 1);
    if (slot.block.first_tile >= slot.block.last_tile) {   // nobody waits for them
      barrier_arrive(base + Tiles::K_FULL);
      barrier_arrive(base + Tiles::V_FULL);
      return;
    }
    slot.k.template load_rows<Tiles::Q_BOXES, Tiles::KEY_BOX>(maps.k, base + Tiles::K, slot.block.first_key, base + Tiles::K_FULL);
    for (int head = 0; head < problem.heads_per_block; ++head) {
#pragma unroll 1
      for (int tile = slot.block.last_tile - 1; tile >= slot.block.first_tile; --tile) {
        const int row = tile * QUERY_TILE;
        keep_here(base);   // what follows from it is not kept
        ring.wait_empty(base + Tiles::Q_EMPTY);
        u32 full = base + Tiles::Q_FULL + 8 * ring.stage();
        slot.q.template load_rows<Tiles::Q_BOXES, Tiles::QUERY_BOX>(maps.q, base + Tiles::Q + ring.stage() * Tiles::Q_BYTES, row, full, Tiles::ROW_BYTES);
        load_bytes(base + Tiles::LSE + ring.stage() * Tiles::ROW_BYTES, problem.row_lse + slot.first_row + row, Tiles::ROW_BYTES, full);
        if (head == 0 && tile == slot.block.last_tile - 1)   // the first scores do not wait for it
          slot.v.template load_rows<Tiles::V_BOXES, Tiles::KEY_BOX>(maps.v, base + Tiles::V, slot.block.first_key, base + Tiles::V_FULL);
        ring.wait_empty(base + Tiles::DO_EMPTY);
        full = base + Tiles::DO_FULL + 8 * ring.stage();
        slot.dout.template load_rows<Tiles::V_BOXES, Tiles::QUERY_BOX>(maps.dout, base + Tiles::DO + ring.stage() * Tiles::DO_BYTES, row, full, Tiles::ROW_BYTES);
        load_bytes(base + Tiles::D + ring.stage() * Tiles::ROW_BYTES, problem.row_d + slot.first_row + row, Tiles::ROW_BYTES, full);
        ring.advance();
      }
      slot.first_row += problem.padded_queries, slot.q.head += problem.q.head_stride != 0, slot.dout.head += problem.dout.head_stride != 0;
    }
  }
};

// The turns of a warpgroup at the sums of dQ, half of a query tile at a time. The first key block stores its part there, others add to that, in any order or with in_order
// in theirs: by way of the slabs from here, or the warps from their registers when it is their turn. The last key block that sees the tile keeps its part until
// all others have added theirs. Whoever is waited for has a key block before this one.
template <typename Tiles, typename Block, int HEAD_DIM, int QUERY_TILE> struct TurnTaker {
  Ring<1> slab_ring;
  PairRing turn_ring, added_ring;   // a warp may be told of the next tile, and be done with it, while others are still at one

  __device__ __forceinline__ void take(const Problem& problem, const KeyBlockSlot<Block>& slot, int part, u32 base) {
    auto tell = [&] {
      barrier_arrive(base + Tiles::TURN + 16 * part + 8 * turn_ring.stage());
      turn_ring.advance();
    };
    bool told = false;   // of the tile
    for (int head = 0; head < problem.heads_per_block; ++head) {
#pragma unroll 1
      for (int tile = slot.block.last_tile - 1; tile >= slot.block.first_tile; --tile) {
        keep_here(part);   // what follows from it is not kept: registers are short
        const bool last = tile < slot.end_of_last, tells = last || !Tiles::SLABS;
        const u32 before = slot.block.slot.tile, row = slot.sum_row + head * problem.padded_queries + tile * QUERY_TILE;
        u32* added = problem.row_turn + row + part;   // how many have
        if (!told) {
          if (before > 0) wait_for_at_least(added, last || problem.in_order ? before : 1);
          if (tells) tell();
        }
        // dQ of the next tile is made soon after this one has been added.
        told = tile == slot.end_of_last && tile > slot.block.first_tile && load_acquire(added - QUERY_TILE) >= before;
        if (told) tell();
        if (tells) {
          added_ring.wait_full(base + Tiles::ADDED + 16 * part);
          added_ring.advance();
        }
        if (last) continue;
        if constexpr (Tiles::SLABS) {
          constexpr int BYTES = 4 * Tiles::SLAB_BYTES;
          const u32 slabs = base + Tiles::SLAB + part * BYTES;
          float* sums = problem.dq_sum + (i64)row * HEAD_DIM + part * (BYTES / 4);
          slab_ring.wait_full(base + Tiles::SLAB_FULL + 8 * part);
          slab_ring.advance();
          if (before == 0) store_bytes(sums, slabs, BYTES);
          else reduce_add_bytes(sums, slabs, BYTES);
          wait_until_read();
          barrier_arrive(base + Tiles::SLAB_EMPTY + 8 * part);
          wait_until_added();
        }
        add_release(added, 1);   // what the warps have added too: no warp that computes waits for that
      }
    }
  }
};

// own(slot) for each of them. The slot is another one's when all have arrived there: by one lane of a warp.
template <typename Block, typename Tiles, typename Own> __device__ __forceinline__ void follow_key_blocks(u8* shared, u32 base, Own own) {
  using Slot = KeyBlockSlot<Block>;
  PairRing ring;
#pragma unroll 1
  for (;; ring.advance()) {
    ring.wait_full(base + Tiles::SLOT_FULL);
    Slot& slot = *(Slot*)(shared + Tiles::SLOTS + ring.stage() * SLOT_BYTES);
    if (slot.last) return;
    own(slot);
    barrier_arrive(base + Tiles::SLOT_EMPTY + 8 * ring.stage());
  }
}
