// The keys that a block of a backward kernel owns.
#pragma once
#include "score.cuh"

// Which keys a block owns, and which query tiles see them: it is worked out anew where it is needed, rather than kept in registers.
template <int OPTIONS, int KEY_TILE, int QUERY_TILE> struct KeyBlock {
  Schedule schedule;
  Place place;    // of the first of the block's query heads; any of them finds the key head
  TileOfSequence slot;
  Sequence<OPTIONS> sequence;
  Visible<OPTIONS> visible;
  int first_key;                 // of the sequence
  int first_tile, last_tile;     // query tiles outside [first_tile, last_tile) see none of the keys

  __device__ __forceinline__ KeyBlock(const Problem& problem, u32 block)
      : schedule(problem, block, tile_slots<OPTIONS>(problem, problem.keys, KEY_TILE)), place(problem, flat_place(problem, schedule.place), problem.grid_heads, problem.by_grid_heads), slot(tile_of_slot<OPTIONS>(problem, problem.cu_k, problem.keys, KEY_TILE, schedule.tile)), sequence(problem, place, slot.sequence),
        visible(problem, place, sequence), first_key(slot.tile * KEY_TILE) {
    find_tiles(problem);
  }

  // The same in place, member by member: a thread that loads has few registers.
  __device__ __forceinline__ void set(const Problem& problem, u32 block) {
    schedule = Schedule(problem, block, tile_slots<OPTIONS>(problem, problem.keys, KEY_TILE));
    keep_memory_here();
    place = Place(problem, flat_place(problem, schedule.place), problem.grid_heads, problem.by_grid_heads);
    slot = tile_of_slot<OPTIONS>(problem, problem.cu_k, problem.keys, KEY_TILE, schedule.tile);
    keep_memory_here();
    sequence = Sequence<OPTIONS>(problem, place, slot.sequence);
    keep_memory_here();
    visible = Visible<OPTIONS>(problem, place, sequence);
    keep_memory_here();
    first_key = slot.tile * KEY_TILE;
    find_tiles(problem);
  }

  __device__ __forceinline__ void find_tiles(const Problem& problem) {
    place.head *= problem.heads_per_block;
    const int first_query = visible.query_begin(first_key);
    const bool unseen = OPTIONS & (WINDOW | LENGTHS) && first_query >= visible.queries;   // without these it is at most one tile in vain
    first_tile = (unseen ? first_query + QUERY_TILE - 1 : first_query) / QUERY_TILE;
    last_tile = end_of_keys(first_key + KEY_TILE);
  }

  // With BIAS_GRADIENT batch entries that share a bias follow each other, so that they find it, and the sums of its gradient, in L2.
  static __device__ __forceinline__ u32 flat_place(const Problem& problem, u32 place) {
    if constexpr ((OPTIONS & BIAS_GRADIENT) != 0) return place % problem.batches_together * problem.grid_heads + place / problem.batches_together;
    return place;
  }

  // Query tiles from here on see none of the keys up to `end`.
  __device__ __forceinline__ int end_of_keys(int end) const { return ceil_div(visible.query_end(min(end, visible.keys) - 1), QUERY_TILE); }
  // Of the block's query tiles the block before it has those up to here too: all of them, but for windows.
  __device__ __forceinline__ int end_of_previous() const { return first_key == 0 ? 0 : OPTIONS & WINDOW ? end_of_keys(first_key) : last_tile; }
  // And up to here the block after it has none of them.
  __device__ __forceinline__ int end_of_last() const {
    const int next = first_key + KEY_TILE;
    return next < visible.keys ? min(visible.query_begin(next) / QUERY_TILE, last_tile) : last_tile;
  }
  // The tiles in the order of a walk, `step` from first_tile to last_tile - 1.
  template <bool DESCENDING> __device__ __forceinline__ int tile_at(int step) const { return DESCENDING ? first_tile + last_tile - 1 - step : step; }

  // The same for a walk that begins with tile `begin`, if that is one of them, and goes on after the last tile with the first.
  static constexpr bool WRAPS = !(OPTIONS & (WINDOW | PACKED));   // others are not asked for such walks
  __device__ __forceinline__ int tile_from(u32 begin, int step) const {
    const u32 tiles = last_tile - first_tile, before = begin - first_tile;
    const int tile = step + (before < tiles ? before : 0);
    return tile < last_tile ? tile : tile - tiles;
  }

  // An empty slot has no keys.
  __device__ __forceinline__ bool exists() const { return !(OPTIONS & PACKED) || (first_key >= 0 && first_key < sequence.keys); }
};
