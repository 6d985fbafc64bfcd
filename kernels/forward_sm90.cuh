// What surrounds the computing warpgroups of forward_sm90.cu: query tiles, the shared memory map, the scheduler and the loaders.
#pragma once
#include "forward_rows.cuh"
#include "parts.cuh"
#include "slope_sm90.cuh"

struct TensorMaps { TensorMap q, k, v; };
struct TensorMapsWithBias : TensorMaps { TensorMap bias; };
template <bool STAGED_BIAS> struct TensorMapsOf { using type = TensorMaps; };
template <> struct TensorMapsOf<true> { using type = TensorMapsWithBias; };

// The order in which a block walks over its key tiles: ascending, or outwards from `nearest`, where the diagonal is: down to the first of all, then
// up from the one after it. So a row's largest scores tend to come first, and later tiles need no search for a new maximum.
template <bool OUTWARDS> struct Walk {
  int first, nearest;

  __device__ __forceinline__ int tile(int step) const { return OUTWARDS && step <= nearest ? first + nearest - step : step; }

  // On which side of the diagonal a step leads away from it.
  __device__ __forceinline__ Side outward(int step) const { return step <= nearest ? LEFT : RIGHT; }

  // From tiles [begin, end), some of the walk, to the steps from the first to the last of them. There are others between where they lie on both sides of `nearest`.
  __device__ __forceinline__ void to_steps(int& begin, int& end) const {
    if (!OUTWARDS) return;
    if (end <= nearest + 1) {
      const int tiles = end - begin;
      begin = first + nearest + 1 - end, end = begin + tiles;
    } else if (begin <= nearest) {
      begin = first;
    }
  }
};

// What consumers and loaders need to know of a query tile. `last`: there is none.
template <int PRECISION, int OPTIONS, int QUERY_TILE, int KEY_TILE> struct QueryTile {
  using Block = QueryBlock<OPTIONS, QUERY_TILE>;
  bool last;
  u32 index, tiles;   // the scheduler's
  int split;   // SPLIT_KEYS: which part of the keys
  int rows;    // queries
  void* out;   // where their rows begin, and those of lse
  float* lse;
  Block block;
  Visible<OPTIONS> visible;
  KeyTiles<OPTIONS, KEY_TILE> keys;
  Score<PRECISION, OPTIONS> score;
  Walk<walks_outwards(PRECISION, OPTIONS)> walk;   // over `keys`

  // In place, member by member: the thread that does it has few registers.
  __device__ __forceinline__ void set(const Problem& problem, const Block& its_block, int its_split) {
    last = false;
    split = its_split;
    block = its_block;
    keep_memory_here();
    visible = Visible<OPTIONS>(problem, block.place, block.sequence);
    keep_memory_here();
    // Tiles share out the warpgroups' 64 queries evenly: a last tile with one warpgroup at work would take nearly as long as one with all.
    const int queries = block.sequence.queries, groups = ceil_div(queries, 64), tiles = ceil_div(queries, QUERY_TILE), least = groups / tiles, more = groups - least * tiles, tile = block.slot.tile;
    block.first_query = (tile * least + min(tile, more)) * 64;
    rows = min((least + (tile < more)) * 64, queries - block.first_query);
    keep_memory_here();
    keys = KeyTiles<OPTIONS, KEY_TILE>(visible, block.first_query, rows);
    if constexpr ((OPTIONS & SPLIT_KEYS) != 0) {
      const int begin = keys.begin, tiles = max(keys.end - begin, 0);
      keys.begin = begin + (int)((i64)tiles * split / problem.splits);
      keys.end = begin + (int)((i64)tiles * (split + 1) / problem.splits);
    }
    keep_memory_here();
    const i64 first_row = block.sequence.first_query + block.first_query;
    out = block.place.template rows<typename ElementOf<PRECISION>::type>(problem.out) + first_row * problem.out.row_stride;
    keep_memory_here();
    lse = block.place.template rows<float>(problem.lse) + first_row * problem.lse.row_stride;
    keep_memory_here();
    score = Score<PRECISION, OPTIONS>(problem, block.place, block.sequence);
    if constexpr (walks_outwards(PRECISION, OPTIONS)) {
      keep_memory_here();
      const i64 diagonal = block.first_query + rows - 1 + score.offset;   // of the last query
      walk.first = keys.begin, walk.nearest = max((int)min(max(diagonal, 0ll), keys.end * (i64)KEY_TILE - 1) / KEY_TILE, keys.begin);
    }
  }
};

// PARTS: of float32 arrays (parts.cuh); 0: 16-bit arrays.
template <int HEAD_DIM, int VALUE_DIM, int OPTIONS, int WARPGROUPS, int KEY_TILE, int STAGES, int PARTS_ = 0> struct ForwardSm90Tiles {
  static constexpr int PARTS = PARTS_, WHOLE = PARTS ? PARTS : 1;   // numbers that stand for one
  static constexpr int QUERY_TILE = WARPGROUPS * 64, THREADS = (WARPGROUPS + 1) * 128;
  // What a thread of a loading and of a computing warpgroup has: all of it together is what the block started with.
  static constexpr int STARTING_REGISTERS = 65536 / THREADS / 8 * 8, LOADING_REGISTERS = WARPGROUPS == 2 ? 40 : 32;
  static constexpr int COMPUTING_REGISTERS = WARPGROUPS == 2 ? 232 : WARPGROUPS == 3 ? 160 : 112;
  static_assert(WARPGROUPS == 1 || LOADING_REGISTERS + WARPGROUPS * COMPUTING_REGISTERS <= (WARPGROUPS + 1) * STARTING_REGISTERS, "a warpgroup would wait for registers that nobody gives");

  static constexpr int Q_BOX = 64 * 128, KEY_BOX = KEY_TILE * 128;   // bytes of 64 columns, of a warpgroup's queries and of a key tile
  static constexpr int Q_BOXES = WHOLE * ceil_div(HEAD_DIM, 64), V_BOXES = WHOLE * ceil_div(VALUE_DIM, 64);
  static constexpr int Q_BYTES = Q_BOXES * Q_BOX, K_BYTES = Q_BOXES * KEY_BOX, V_BYTES = V_BOXES * KEY_BOX;
  static constexpr int K = WARPGROUPS * Q_BYTES, V = K + STAGES * K_BYTES, BIAS_AT = V + STAGES * V_BYTES;
  static constexpr int BIAS_BYTES = OPTIONS & STAGED_BIAS ? QUERY_TILE * KEY_TILE * 2 : 0, BIAS_BOXES = KEY_TILE / 64, BIAS_BOX = 64 * 128;   // of a stage; a box has 64 queries and keys
  static_assert(BIAS_BYTES == 0 || KEY_TILE % 64 == 0, "tiles of the bias are whole boxes");
  static constexpr int TOTALS = BIAS_AT + 2 * BIAS_BYTES, TOTAL_BYTES = OPTIONS & LONG_SUMS ? QUERY_TILE * VALUE_DIM * 4 : 0;
  static constexpr int KEY_NUMBERS = TOTALS + TOTAL_BYTES, KEY_NUMBERS_BYTES = OPTIONS & ALIBI && !PARTS ? KeyNumbers<KEY_TILE>::BYTES : 0;
  static constexpr int QUERY_TILES = KEY_NUMBERS + KEY_NUMBERS_BYTES, QUERY_TILE_BYTES = 256;
  static constexpr int TILE_FULL = QUERY_TILES + 2 * QUERY_TILE_BYTES, TILE_EMPTY = TILE_FULL + 16, Q_FULL = TILE_EMPTY + 16, Q_EMPTY = Q_FULL + 8 * WARPGROUPS;
  static constexpr int K_FULL = Q_EMPTY + 8 * WARPGROUPS, K_EMPTY = K_FULL + 8 * STAGES, V_FULL = K_EMPTY + 8 * STAGES, V_EMPTY = V_FULL + 8 * STAGES;
  static constexpr int BIAS_FULL = V_EMPTY + 8 * STAGES, BIAS_EMPTY = BIAS_FULL + 16, TILE_WANTED = BIAS_EMPTY + 16;
  // PARTS: a factor of each warpgroup's queries and of each stage of keys and values.
  static constexpr int FACTORS = ceil_div(TILE_WANTED + 8, 16) * 16, Q_FACTORS = FACTORS, K_FACTORS = Q_FACTORS + WARPGROUPS * FACTOR_BYTES, V_FACTORS = K_FACTORS + STAGES * FACTOR_BYTES;
  static constexpr int SHARED_BYTES = PARTS ? V_FACTORS + STAGES * FACTOR_BYTES : TILE_WANTED + 8;
};

// The scheduler: query tiles are taken in turns, or where they are uneven by counting, so that a block which is done early takes the next one.
template <typename Tile, typename Tiles, int OPTIONS> __device__ __forceinline__ void schedule_query_tiles(const Problem& problem, u8* shared, u32 base) {
  const u32 splits = OPTIONS & SPLIT_KEYS ? problem.splits : 1, slots = Tile::Block::slots(problem);
  auto tile_at = [&](int stage) -> Tile& { return *(Tile*)(shared + Tiles::QUERY_TILES + stage * Tiles::QUERY_TILE_BYTES); };
  for (int stage = 0; stage < 2; ++stage) tile_at(stage).tiles = problem.grid_places * slots * splits;   // no register for it
  Ring<2> ring;
  Ring<1> wanted;
  u32 index = blockIdx.x;
  do {
    ring.wait_empty(base + Tiles::TILE_EMPTY);
    Tile& tile = tile_at(ring.stage);
    static_assert(sizeof(Tile) <= Tiles::QUERY_TILE_BYTES, "");
    tile.index = index;   // until further down: its register is needed
    const u32 tiles = tile.tiles;
    u32 block_index = min(index, tiles - 1) / splits;
    if (OPTIONS & STAGED_BIAS && problem.batches_together > 1) {   // batch entries that share a bias take a tile of it one after the other, so that they find it in L2
      const u32 entries = problem.batches_together;
      block_index = block_index % entries * (problem.heads * slots) + block_index / entries;
    }
    const typename Tile::Block block(problem, block_index);
    const bool last = index >= tiles;
    if (last || block.exists()) {
      if (last) tile.last = true;
      else tile.set(problem, block, index % splits);
      barrier_arrive(base + Tiles::TILE_FULL + 8 * ring.stage);
      if (last) return;
      ring.advance();
      if (problem.tile_counter) {   // not earlier: who takes a long tile now may be the one who is done last
        wanted.wait_full(base + Tiles::TILE_WANTED);
        wanted.advance();
      }
    }
    index = tile.index;
    index = gridDim.x + (problem.tile_counter ? atomicAdd(problem.tile_counter, 1) : index);
  } while (true);
}

// Queries: each warpgroup's own, as soon as it is done with those before. So it goes on to its next query tile while others are still at the last.
// With STAGED_BIAS, their bias too, a key tile at a time; one row of it if all queries share that.
template <typename Tile, typename Tiles, int OPTIONS, int WARPGROUPS, int KEY_TILE, typename Maps> __device__ __forceinline__ void load_queries(const Problem& problem, const Maps& maps, const u8* shared, u32 base) {
  prefetch_tensor_map(maps.q);
  Ring<2> ring, bias_ring;
  Ring<1> q_ring;
  for (;; ring.advance()) {
    ring.wait_full(base + Tiles::TILE_FULL);
    const Tile& tile = *(const Tile*)(shared + Tiles::QUERY_TILES + ring.stage * Tiles::QUERY_TILE_BYTES);
    if (tile.last) return;
    if (tile.keys.begin < tile.keys.end) {
      auto load = [&](auto load_group) {
#pragma unroll 1
        for (int warpgroup = 0; warpgroup < WARPGROUPS; ++warpgroup) {
          q_ring.wait_empty(base + Tiles::Q_EMPTY + 8 * warpgroup);
          load_group(warpgroup, base + warpgroup * Tiles::Q_BYTES, base + Tiles::Q_FULL + 8 * warpgroup);
        }
      };
      if constexpr (Tiles::PARTS != 0) {
        const GroupPlace<OPTIONS, 64> place(problem, problem.q, tile.block.place, problem.cu_q, problem.queries, tile.block.sequence.index);
        const int first = tile.block.first_query / 64;
        load([&](int n, u32 target, u32 full) { place.template load<Tiles::Q_BOXES, Tiles::Q_BOX>(maps.q, target, base + Tiles::Q_FACTORS + n * FACTOR_BYTES, first + n, full); });
      } else {
        const BoxPlace place(problem.q, tile.block.place);
        const int row = tile.block.sequence.first_query + tile.block.first_query;
        load([&](int n, u32 target, u32 full) { place.load_rows<Tiles::Q_BOXES, Tiles::Q_BOX>(maps.q, target, row + n * 64, full); });
      }
      q_ring.advance();
    }
    if constexpr (Tiles::BIAS_BYTES != 0) {
      const BoxPlace place(problem.bias, tile.block.place);
      const bool one_row = problem.bias.row_stride == 0;
      const int first_query = tile.block.first_query, parts = one_row ? 1 : WARPGROUPS;
#pragma unroll 1
      for (int n = tile.keys.begin; n < tile.keys.end; ++n, bias_ring.advance()) {
        bias_ring.wait_empty(base + Tiles::BIAS_EMPTY);
        const u32 full = base + Tiles::BIAS_FULL + 8 * bias_ring.stage, target = base + Tiles::BIAS_AT + bias_ring.stage * Tiles::BIAS_BYTES;
        barrier_arrive_expect(full, parts * Tiles::BIAS_BOXES * (one_row ? 128 : Tiles::BIAS_BOX));
#pragma unroll 1
        for (int box = 0; box < parts * Tiles::BIAS_BOXES; ++box)
          place.load(maps.bias, target + box * Tiles::BIAS_BOX, tile.walk.tile(n) * KEY_TILE + box % Tiles::BIAS_BOXES * 64, one_row ? 0 : first_query + box / Tiles::BIAS_BOXES * 64, full);
      }
    }
    barrier_arrive(base + Tiles::TILE_EMPTY + 8 * ring.stage);
  }
}

// Keys, or values: tile by tile, as far ahead as the ring allows. `wants`: asks a scheduler that counts for the next query tile in time.
template <typename Tile, typename Tiles, int OPTIONS, int KEY_TILE, int STAGES, int BOXES>
__device__ __forceinline__ void load_along_keys(const Problem& problem, const TensorMap& map, const Array& array, const u8* shared, u32 base, u32 target, u32 full, u32 empty, u32 factors, bool wants) {
  prefetch_tensor_map(map);
  Ring<2> ring;
  Ring<STAGES> key_ring;
  for (;; ring.advance()) {
    ring.wait_full(base + Tiles::TILE_FULL);
    const Tile& tile = *(const Tile*)(shared + Tiles::QUERY_TILES + ring.stage * Tiles::QUERY_TILE_BYTES);
    if (tile.last) return;
    auto load = [&](auto load_tile) {
      const int begin = tile.keys.begin, end = tile.keys.end;
      if (wants && begin >= end) barrier_arrive(base + Tiles::TILE_WANTED);
#pragma unroll 1
      for (int n = begin; n < end; ++n) {
        if (wants && n == max(end - 3, begin)) barrier_arrive(base + Tiles::TILE_WANTED);
        key_ring.wait_empty(base + empty);
        load_tile(tile.walk.tile(n), base + target + key_ring.stage * BOXES * Tiles::KEY_BOX, base + full + 8 * key_ring.stage);
        key_ring.advance();
      }
    };
    if constexpr (Tiles::PARTS != 0) {
      const GroupPlace<OPTIONS, KEY_TILE> place(problem, array, tile.block.place, problem.cu_k, problem.keys, tile.block.sequence.index);
      load([&](int n, u32 target, u32 full) { place.template load<BOXES, Tiles::KEY_BOX>(map, target, base + factors + key_ring.stage * FACTOR_BYTES, n, full); });
    } else {
      const BoxPlace place(array, tile.block.place);
      const int first_key = tile.block.sequence.first_key;
      load([&](int n, u32 target, u32 full) { place.load_rows<BOXES, Tiles::KEY_BOX>(map, target, first_key + n * KEY_TILE, full); });
    }
    barrier_arrive(base + Tiles::TILE_EMPTY + 8 * ring.stage);
  }
}
