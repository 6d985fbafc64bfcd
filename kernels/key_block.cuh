// The keys that a block of a backward kernel owns.
#pragma once
#include "score.cuh"

// Which keys a block owns, and which query tiles see them: it is worked out anew where it is needed, rather than kept in registers.
// IN_ORDER: blocks begin in descending order of their keys, at some heads in ascending order (last_keys_first).
// CUT: where few key blocks, or the last of equal ones, would leave most of the GPU idle, these are cut, and a block of the grid has a piece of one.
template <int OPTIONS, int KEY_TILE, int QUERY_TILE, bool IN_ORDER = false, bool CUT = false> struct KeyBlock {
  Schedule schedule;
  Place place;    // of the first of the block's query heads; any of them finds the key head
  TileOfSequence slot;
  Sequence<OPTIONS> sequence;
  Visible<OPTIONS> visible;
  int first_key;                 // of the sequence
  int first_tile, last_tile;     // query tiles outside [first_tile, last_tile) see none of the keys

  __device__ __forceinline__ KeyBlock(const Problem& problem, u32 block)
      : schedule(problem, whole(problem, block), tile_slots<OPTIONS>(problem, problem.keys, KEY_TILE)), place(problem, flat_place(problem, schedule.place), problem.grid_heads, problem.by_grid_heads), slot(slot_of(problem)), sequence(problem, place, slot.sequence),
        visible(problem, place, sequence), first_key(slot.tile * KEY_TILE) {
    find_tiles(problem);
    if (CUT && is_piece(problem, block)) {
      const int tiles = last_tile - first_tile, piece = (block - problem.cut_from) % problem.pieces;
      last_tile = first_tile + tiles * (piece + 1) / problem.pieces;
      first_tile += tiles * piece / problem.pieces;
    }
  }

  static __device__ __forceinline__ bool is_piece(const Problem& problem, u32 block) { return CUT && block >= (u32)problem.cut_from; }
  static __device__ __forceinline__ bool is_later_piece(const Problem& problem, u32 block) { return is_piece(problem, block) && (block - problem.cut_from) % problem.pieces; }
  static __device__ __forceinline__ u32 whole(const Problem& problem, u32 block) {
    return is_piece(problem, block) ? problem.cut_from + (block - problem.cut_from) / problem.pieces : block;
  }

  // The same in place, member by member: a thread that loads has few registers.
  __device__ __forceinline__ void set(const Problem& problem, u32 block) {
    static_assert(!CUT, "it would be a whole one");
    schedule = Schedule(problem, block, tile_slots<OPTIONS>(problem, problem.keys, KEY_TILE));
    keep_memory_here();
    place = Place(problem, flat_place(problem, schedule.place), problem.grid_heads, problem.by_grid_heads);
    slot = slot_of(problem);
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
    first_tile = first_tile_of(first_key);
    last_tile = end_of_keys(first_key + KEY_TILE);
  }

  __device__ __forceinline__ TileOfSequence slot_of(const Problem& problem) const {
    const int tile = IN_ORDER && last_keys_first(problem) ? tile_slots<OPTIONS>(problem, problem.keys, KEY_TILE) - 1 - schedule.tile : schedule.tile;
    return tile_of_slot<OPTIONS>(problem, problem.cu_k, problem.keys, KEY_TILE, tile);
  }

  // With BIAS_GRADIENT batch entries that share a bias follow each other, so that they find it, and the sums of its gradient, in L2.
  static __device__ __forceinline__ u32 flat_place(const Problem& problem, u32 place) {
    if constexpr ((OPTIONS & BIAS_GRADIENT) != 0) return place % problem.batches_together * problem.grid_heads + place / problem.batches_together;
    return place;
  }

  // Query tiles from here on see none of the keys up to `end`.
  __device__ __forceinline__ int end_of_keys(int end) const { return ceil_div(visible.query_end(min(end, visible.keys) - 1), QUERY_TILE); }
  // Query tiles up to here do not see the key, nor those after it.
  __device__ __forceinline__ int first_tile_of(int key) const {
    const int first_query = visible.query_begin(key);
    const bool unseen = OPTIONS & (WINDOW | LENGTHS) && first_query >= visible.queries;   // without these it is at most one tile in vain
    return (unseen ? first_query + QUERY_TILE - 1 : first_query) / QUERY_TILE;
  }
  // IN_ORDER: blocks begin in descending order of their keys and walk from the first query tile on, or else in ascending order, and walk from the last one down.
  __device__ __forceinline__ bool last_keys_first(const Problem& problem) const { return (int)schedule.place < problem.ordered_last_first; }
  __device__ __forceinline__ int tile_in_order(const Problem& problem, int step) const { return last_keys_first(problem) ? step : first_tile + last_tile - 1 - step; }
  // Of the block's query tiles the block of the next keys has those from here on.
  __device__ __forceinline__ int begin_of_next() const {
    const int next = first_key + KEY_TILE;
    return next < visible.keys ? min(first_tile_of(next), last_tile) : last_tile;
  }
  // And the block of the keys before has those up to here.
  __device__ __forceinline__ int end_of_previous() const { return first_key > 0 ? end_of_keys(first_key) : first_tile; }

  static constexpr bool IS_PACKED = (OPTIONS & PACKED) != 0;
  static __device__ __forceinline__ u32 slots(const Problem& problem, int keys) { return tile_slots<OPTIONS>(problem, keys, KEY_TILE); }

  // Where key blocks make dQ, the first one of a sequence has all of its queries, even if there are no keys: dQ of queries that see nothing is 0. False: an empty slot.
  __device__ __forceinline__ bool take_all_queries_if_first() {
    if (first_key == 0) first_tile = 0;
    return !IS_PACKED || first_key == 0 || exists();
  }
  // So many key blocks have a query tile then.
  __device__ __forceinline__ int blocks_of_tile(int tile) const {
    const int end = (tile + 1) * QUERY_TILE;
    return max(1, ceil_div(end > visible.queries ? visible.keys : visible.key_end(end - 1), KEY_TILE));
  }

  // The tile at a step, from first_tile to last_tile - 1, of a walk that begins with tile `begin`, if that is one of them, and goes on after the last tile with the first.
  static constexpr bool WRAPS = !(OPTIONS & (WINDOW | PACKED));   // others are not asked for such walks
  __device__ __forceinline__ int tile_from(u32 begin, int step) const {
    const u32 tiles = last_tile - first_tile, before = begin - first_tile;
    const int tile = step + (before < tiles ? before : 0);
    return tile < last_tile ? tile : tile - tiles;
  }

  // An empty slot has no keys.
  __device__ __forceinline__ bool exists() const { return !(OPTIONS & PACKED) || (first_key >= 0 && first_key < sequence.keys); }
};
