// Key blocks one after the other by the blocks of a grid that fits on the GPU (MAKES_DQ in backward_sm90.cu): who takes them, and how the others follow. While
// the gradients of one are written, the tiles of the next are on their way.
#pragma once
#include "backward_sm90.cuh"

// What all threads of a block know of the key block that they work on.
constexpr int SLOT_BYTES = 256;
template <typename Block> struct KeyBlockSlot {
  int last;            // there is none any more
  u32 count;           // of those before it
  GradientRows rows;
  void* dq;            // the sequence's first row of the first of its query heads
  u32 sum_row;         // of dq_sum, where these begin
  u32 first_row;       // of row_lse and row_d; it and q and dout become those of the next head when the loader is done with one
  BoxPlace q, k, v, dout;
  Block block;
};

// Key blocks are taken by counting, each when the loader is done with the one before: so of all that have begun, the first ones are always those under way, and whoever
// waits for a turn waits for one of them, even if not all blocks of the grid are running.
template <int PRECISION, typename Tiles, typename Block> __device__ __forceinline__ void take_key_blocks(const Problem& problem, u8* shared, u32 base) {
  using Element = typename ElementOf<PRECISION>::type;
  using Slot = KeyBlockSlot<Block>;
  static_assert(sizeof(Slot) <= SLOT_BYTES, "");
  PairRing ring;
  for (;; ring.advance()) {
    Slot& slot = *(Slot*)(shared + Tiles::SLOTS + ring.stage() * SLOT_BYTES);
    bool last;
    do {
      const u32 index = take_number<KEY_BLOCKS_TAKEN>(problem.row_turn);
      ring.wait_empty(base + Tiles::SLOT_EMPTY);
      int keys = problem.keys;
      keep_here(keys);   // few registers
      last = index >= problem.grid_places * Block::slots(problem, keys);
      if (!last) slot.block.set(problem, index);
      keep_memory_here();   // few registers
    } while (!last && !slot.block.take_all_queries_if_first());
    slot.last = last, slot.count = ring.count;
    if (!last) {
      const Block& block = slot.block;
      set_gradient_rows<PRECISION>(problem, block, slot.rows);
      keep_memory_here();   // few registers
      slot.dq = block.place.template rows<Element>(problem.dq) + (Block::IS_PACKED ? block.sequence.first_query * problem.dq.row_stride : 0);
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

  static __device__ __forceinline__ int first_key(const KeyBlockSlot<Block>& slot) { return slot.block.first_key + (Block::IS_PACKED ? slot.block.sequence.first_key : 0); }

  __device__ __forceinline__ void load(const Problem& problem, const BackwardTensorMaps& maps, KeyBlockSlot<Block>& slot, u32 base) {
    const bool none = slot.block.first_tile >= slot.block.last_tile;   // nobody waits for them
    const u32 stage = slot.count % 2;
    barrier_wait(base + Tiles::K_EMPTY + 8 * stage, slot.count / 2 % 2 ^ 1);
    if (none) barrier_arrive(base + Tiles::K_FULL + 8 * stage);
    else slot.k.template load_rows<Tiles::Q_BOXES, Tiles::KEY_BOX>(maps.k, base + Tiles::K + stage * Tiles::K_BYTES, first_key(slot), base + Tiles::K_FULL + 8 * stage);
    auto load_values = [&] {   // the first queries are there by then
      barrier_wait(base + Tiles::V_EMPTY, slot.count % 2 ^ 1);
      if (none) barrier_arrive(base + Tiles::V_FULL);
      else slot.v.template load_rows<Tiles::V_BOXES, Tiles::KEY_BOX>(maps.v, base + Tiles::V, first_key(slot), base + Tiles::V_FULL);
    };
    if (none) load_values();
    for (int head = 0; head < problem.heads_per_block; ++head) {
#pragma unroll 1
      for (int tile = slot.block.last_tile - 1; tile >= slot.block.first_tile; --tile) {
        const int row = tile * QUERY_TILE, array_row = row + (Block::IS_PACKED ? slot.block.sequence.first_query : 0);
        keep_here(base);   // what follows from it is not kept
        ring.wait_empty(base + Tiles::Q_EMPTY);
        u32 full = base + Tiles::Q_FULL + 8 * ring.stage();
        slot.q.template load_rows<Tiles::Q_BOXES, Tiles::QUERY_BOX>(maps.q, base + Tiles::Q + ring.stage() * Tiles::Q_BYTES, array_row, full, Tiles::ROW_BYTES);
        load_bytes(base + Tiles::LSE + ring.stage() * Tiles::ROW_BYTES, problem.row_lse + slot.first_row + row, Tiles::ROW_BYTES, full);
        ring.wait_empty(base + Tiles::DO_EMPTY);
        full = base + Tiles::DO_FULL + 8 * ring.stage();
        slot.dout.template load_rows<Tiles::V_BOXES, Tiles::QUERY_BOX>(maps.dout, base + Tiles::DO + ring.stage() * Tiles::DO_BYTES, array_row, full, Tiles::ROW_BYTES);
        load_bytes(base + Tiles::D + ring.stage() * Tiles::ROW_BYTES, problem.row_d + slot.first_row + row, Tiles::ROW_BYTES, full);
        ring.advance();
        if (head == 0 && tile == slot.block.last_tile - 1) load_values();
      }
      slot.first_row += problem.padded_queries, slot.q.head += problem.q.head_stride != 0, slot.dout.head += problem.dout.head_stride != 0;
    }
  }
};

// What a key block is at the sum of a query tile. The first one stores its part there, so that nobody has to clear it; the last one keeps its part until all others
// have added theirs, and makes dQ.
enum AtSum : u32 { FIRST_AT_SUM = 1, LAST_AT_SUM = 2, NOT_YET = 4 };

// The turns of a warpgroup at the sums of dQ, half of a query tile at a time. A word counts who has come, which says who is first and last, and who has added. So
// whoever comes last makes dQ, and waits for others only while they add: where the key block of the last keys that a tile sees made it, as with in_order, which fixes
// all roles and turns beforehand, it would wait for the one before. A block comes to a tile when it is done with the one before, as the answer comes from L2.
//
// Whoever is waited for has come already, or with in_order has an earlier key block; and blocks never wait for each other in a ring. If one that has come does not add,
// it is as its other warpgroup waits, at an earlier tile of the same walk, as all walk the same way; so of all who wait, one at the earliest tile can go on. Hence
// nobody comes to a key block's first tile before both warpgroups are done with the key block before, which may be of another head.
template <typename Tiles, typename Block, int QUERY_TILE> struct TurnTaker {
  PairRing ring;   // a warp may be told of the next tile, and be done with it, while others are still at one

  __device__ __forceinline__ u32 come(const Problem& problem, u32* word) const {
    return problem.in_order ? load_acquire(word) : add_acquire(word, ONE_CAME);
  }

  // Tells the warps what the block is at the sum of a tile, once it is its turn; or if it is not and `now`, nothing.
  __device__ __forceinline__ u32 give(const Problem& problem, const KeyBlockSlot<Block>& slot, int tile, u32* word, u32 found, int part, u32 base, bool now) const {
    const u32 before = problem.in_order ? slot.block.slot.tile : came(found);
    const bool last = before + 1 == slot.block.blocks_of_tile(tile);
    const u32 waits_for = last || problem.in_order ? before : min(before, 1);
    if (added(found) < waits_for) {
      if (now) return NOT_YET;
      if (!Block::IS_PACKED || !problem.row_turn[OFFSETS_DESCEND]) wait_for_at_least(word, waits_for * ONE_ADDED);   // else the sums are of no use, and nobody may be there
    }
    const u32 role = (before == 0 ? FIRST_AT_SUM : 0) | (last ? LAST_AT_SUM : 0);
    store_shared(base + Tiles::ROLES + 8 * part + 4 * ring.stage(), role);
    barrier_arrive(base + Tiles::TURN + 16 * part + 8 * ring.stage());
    return role;
  }

  __device__ __forceinline__ void take(const Problem& problem, const KeyBlockSlot<Block>& slot, int part, u32 base) {
    if (slot.count) barrier_wait(base + Tiles::SLOT_EMPTY + 8 * ((slot.count - 1) % 2), (slot.count - 1) / 2 % 2);
    for (int head = 0; head < problem.heads_per_block; ++head) {
      u32 found = 0, role = NOT_YET;
#pragma unroll 1
      for (int tile = slot.block.last_tile - 1; tile >= slot.block.first_tile; --tile) {
        keep_here(part);   // what follows from it is not kept: registers are short
        const u32 row = slot.sum_row + head * problem.padded_queries + tile * QUERY_TILE;
        u32* word = problem.row_turn + row + part;
        if (tile == slot.block.last_tile - 1) found = come(problem, word);
        if (role == NOT_YET) role = give(problem, slot, tile, word, found, part, base, false);
        ring.wait_full(base + Tiles::ADDED + 16 * part);
        ring.advance();
        const bool adds = !(role & LAST_AT_SUM);
        if (tile > slot.block.first_tile) {
          found = come(problem, word - QUERY_TILE);
          role = give(problem, slot, tile - 1, word, found, part, base, true);
        }
        if (adds) add_release(word, ONE_ADDED);   // what the warps have added too: no warp that computes waits for that
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
