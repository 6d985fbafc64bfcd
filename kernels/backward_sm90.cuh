// What the backward kernels of the sm90 family share: their loader, who clears the sums of dQ, the turns of blocks that keep an order, who is told that dQ has been added,
// and how dK and dV are summed over pieces and written.
#pragma once
#include "forward_rows.cuh"
#include "key_block.cuh"
#include "ptx/dependent_launch.cuh"
#include "ptx/reduce.cuh"
#include "ptx/wgmma.cuh"
#include "ring.cuh"

struct BackwardTensorMaps { TensorMap q, k, v, dout; };

// One lane of each of the eight computing warps tells that it has read.
template <typename Tiles, int Q_STAGES, int DO_STAGES> __device__ __forceinline__ void init_barriers_of_loads(u32 base) {
  barrier_init(base + Tiles::K_FULL, 1);
  barrier_init(base + Tiles::V_FULL, 1);
  init_ring(base, Tiles::Q_FULL, 1, Tiles::Q_EMPTY, 8, Q_STAGES);
  init_ring(base, Tiles::DO_FULL, 1, Tiles::DO_EMPTY, 8, DO_STAGES);
  barrier_init(base + Tiles::ROWS_FOUND, 1);
}

// Of those who take turns at dQ (give_turns, tell_of_turns): `adding` warps do.
template <typename Tiles> __device__ __forceinline__ void init_barriers_of_turns(u32 base, int adding) {
  init_ring(base, Tiles::TURN, 1, Tiles::ADDED, adding, 2);
  barrier_init(base + Tiles::TOLD, 1), barrier_init(base + Tiles::TOLD + 8, 1);
}

// make() makes the barriers, in the thread that loads, which goes on at once; the others wait for it. A block of 384 threads, of which the last 128 load.
template <typename Make> __device__ __forceinline__ void make_barriers(Make make) {
  constexpr int ID = 15, LOADER = 8;
  if (threadIdx.x / 32 == LOADER) {
    if (threadIdx.x % 32 == 0) {
      make();
      barrier_init_fence();
    }
    __syncwarp();
    named_barrier_arrive(ID, 384);
  } else {
    named_barrier_sync(ID, 384);
  }
}

// Blocks drift apart on a long walk, and each would then fetch its query tiles and sums of dQ from device memory for itself. So where these do not fit in L2,
// a block begins where another one is, and goes around. The thread that makes the barriers:
template <typename Tiles> __device__ __forceinline__ void begin_walk(const Problem& problem, u32 base) { store_shared(base + Tiles::BEGIN, problem.walked_to ? load_relaxed(problem.walked_to) : 0); }

template <typename Tiles, bool IN_ORDER, typename Block> __device__ __forceinline__ int tile_of_walk(const Problem& problem, const Block& block, int step, u32 base) {
  if constexpr (IN_ORDER) return block.tile_in_order(problem, step);
  else if constexpr (Block::WRAPS) return block.tile_from(load_shared(base + Tiles::BEGIN), step);
  else return step;
}

// backward_prepare clears the sums of dQ of the first heads alone: those of a later head are cleared by the first blocks of one clears_ahead places of the grid before, beside
// their products, by a warp that has nothing else to do.
template <int HEAD_DIM, typename Block> __device__ __forceinline__ void clear_sums_ahead(const Problem& problem) {
  const u32 index = block_index_again();
  const Schedule schedule(problem, Block::whole(problem, index), Block::slots(problem, problem.keys));
  const u32 place = schedule.place + problem.clears_ahead, row = place * problem.heads_per_block * problem.padded_queries;
  if (schedule.tile >= problem.clearing_blocks || place >= problem.grid_places || Block::is_later_piece(problem, index)) return;
  const u32 pieces = problem.heads_per_block * problem.padded_queries / 64 * (HEAD_DIM / 2);   // of 512 bytes
  uint4* sums = (uint4*)(problem.dq_sum + (i64)row * HEAD_DIM) + threadIdx.x % 32;
#pragma unroll 1
  for (u32 piece = schedule.tile; piece < pieces; piece += problem.clearing_blocks) sums[piece * 32] = make_uint4(0, 0, 0, 0);
  __syncwarp();
  if (threadIdx.x % 32 == 0) add_release(problem.row_turn + row + HEAD_CLEARED, 1);
}

// The blocks that do that began earlier.
__device__ __forceinline__ void wait_for_cleared_sums(const Problem& problem, u32 place) {
  if (problem.clearing_blocks && place >= problem.clears_ahead)
    wait_for_at_least(problem.row_turn + place * problem.heads_per_block * problem.padded_queries + HEAD_CLEARED, problem.clearing_blocks);
}

// Keys and values of the block, then queries with their lse and output gradients with their D, tile by tile, as far ahead as the rings allow: by one thread, or QUERIES
// (and keys) by one and OUTPUTS (and values) by another.
template <typename Tiles, typename Block, int QUERY_TILE, int Q_STAGES, int DO_STAGES, bool IN_ORDER, bool QUERIES = true, bool OUTPUTS = true>
__device__ __forceinline__ void load_for_key_block(const Problem& problem, const BackwardTensorMaps& maps, u32 base) {
  const Block block(problem, blockIdx.x);
  if (!block.exists() || block.first_tile >= block.last_tile) return;   // nobody would wait for the keys, and the block might end before they are there
  if constexpr (Tiles::HALVES) {   // found here: what warps read and hand to uniform() the compiler keeps in uniform registers, but not what they would work out
    const bool up = tile_of_walk<Tiles, IN_ORDER>(problem, block, block.first_tile, base) == block.first_tile;
    store_shared(base + Tiles::SKIPS, up && block.first_tile + 1 < block.last_tile && block.first_tile_of(block.first_key + 64) > block.first_tile);
  }
  Place place = block.place;
  const int first_key = block.sequence.first_key + block.first_key;
  if (QUERIES) BoxPlace(problem.k, place).load_rows<Tiles::Q_BOXES, Tiles::KEY_BOX>(maps.k, base + Tiles::K, first_key, base + Tiles::K_FULL);
  Ring<Q_STAGES> q_ring;
  Ring<DO_STAGES> do_ring;
  bool first = true;
  for (int head = 0; head < problem.heads_per_block; ++head, ++place.head) {
    const i64 first_row = block.sequence.padded_row(problem, place);
    const BoxPlace q_place(problem.q, place), do_place(problem.dout, place);
#pragma unroll 1
    for (int step = block.first_tile; step < block.last_tile; ++step) {
      const int tile = tile_of_walk<Tiles, IN_ORDER>(problem, block, step, base);
      if (QUERIES && problem.walked_to) store_relaxed(problem.walked_to, tile);
      const int row = block.sequence.first_query + tile * QUERY_TILE;
      if (QUERIES && head == 0 && step == min(block.first_tile + 1, block.last_tile - 1)) wait_for_cleared_sums(problem, block.schedule.place);   // nothing is added before this tile is there
      if constexpr (QUERIES) {
        q_ring.wait_empty(base + Tiles::Q_EMPTY);
        const u32 full = base + Tiles::Q_FULL + 8 * q_ring.stage;
        q_place.load_rows<Tiles::Q_BOXES, Tiles::QUERY_BOX>(maps.q, base + Tiles::Q + q_ring.stage * Tiles::Q_BYTES, row, full, Tiles::ROW_BYTES);
        load_bytes(base + Tiles::LSE + q_ring.stage * Tiles::ROW_BYTES, problem.row_lse + first_row + tile * QUERY_TILE, Tiles::ROW_BYTES, full);
        q_ring.advance();
      }
      if (!OUTPUTS) continue;
      if (first) BoxPlace(problem.v, place).load_rows<Tiles::V_BOXES, Tiles::KEY_BOX>(maps.v, base + Tiles::V, first_key, base + Tiles::V_FULL);   // the first scores do not wait for it
      first = false;
      do_ring.wait_empty(base + Tiles::DO_EMPTY);
      const u32 full = base + Tiles::DO_FULL + 8 * do_ring.stage;
      do_place.load_rows<Tiles::V_BOXES, Tiles::QUERY_BOX>(maps.dout, base + Tiles::DO + do_ring.stage * Tiles::DO_BYTES, row, full, Tiles::ROW_BYTES);
      load_bytes(base + Tiles::D + do_ring.stage * Tiles::ROW_BYTES, problem.row_d + first_row + tile * QUERY_TILE, Tiles::ROW_BYTES, full);
      do_ring.advance();
    }
  }
}

// backward_finish_sm90 begins while the last key blocks are under way, at heads that are done: a thread that has nothing else to do counts, in a word of each of the
// block's heads, that they are cleared and the block has added all it had to them, once wait() says so. A piece counts once, a whole block as often as there are pieces in
// one, and what may be no key block (of packed sequences) too.
template <typename Block, typename Wait> __device__ __forceinline__ void tell_of_heads(const Problem& problem, Wait wait) {
  if (!problem.added_to_head) return;
  u32* word;
  u32 count;
  bool exists;
  {
    const u32 index = block_index_again();
    const Block block(problem, index);
    word = problem.row_turn + block.place.flat(problem) * problem.padded_queries + HEAD_ADDED, count = Block::is_piece(problem, index) ? 1 : problem.pieces;
    exists = block.exists();
    wait_for_cleared_sums(problem, block.schedule.place);
  }
  if (exists) wait();
  for (int head = 0; head < problem.heads_per_block; ++head) add_release(word + head * problem.padded_queries, count);   // what the warps have added too
}

// The block's turns at dq_sum, one query tile after the other: add(row, wait, done) is to call wait() before it adds to the tile whose padded rows begin at `row`, and
// done() when that has come about. A key block adds to a tile once that of the next keys has (if it sees the tile), which began earlier, so that who is waited for is
// under way. Under causal masks that one is a tile ahead even if both begin together, as each begins with the first queries that see its keys. But the longest blocks
// are the last to begin then, and while they end most of the GPU has nothing to do. So at the last few heads (ordered_last_first) it is the other way round: blocks
// begin in ascending order of their keys, walk from the last tile down, and add to a tile once that of the keys before has. Where two begin together the second one is
// a tile behind all the way. row_turn: one more than who was last.
// `part`: of those who add to a tile apart from each other.
template <int QUERY_TILE, typename Block, typename Add> __device__ __forceinline__ void take_turns(const Problem& problem, int part, Add add) {
  int tile, step, tiles, free;   // the first query tile, in which direction, how many, and how many of them nobody adds to before this block
  u32 row, turn;
  {
    const Block block(problem, block_index_again());
    if (!block.exists()) return;
    const bool up = block.last_keys_first(problem);
    tiles = block.last_tile - block.first_tile, turn = block.slot.tile + 1;
    tile = up ? block.first_tile : block.last_tile - 1, step = up ? 1 : -1;
    free = up ? block.begin_of_next() - block.first_tile : block.last_tile - block.end_of_previous();
    row = block.sequence.padded_row(problem, block.place);
    if (problem.sequences && problem.row_turn[OFFSETS_DESCEND]) free = tiles;   // the sums are of no use then, and nobody may be there to wait for
  }
  const u32 before = turn + step;
  row += tile * QUERY_TILE;
  for (int head = 0; head < problem.heads_per_block; ++head, row += problem.padded_queries) {
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      const u32 tile_row = row + i * step * QUERY_TILE;
      u32* row_turn = problem.row_turn + tile_row + part;
      add(tile_row, [&] { if (i >= free) wait_for_value(row_turn, before); }, [&] { store_release(row_turn, turn); });
    }
  }
}

// The same for warps that add themselves, by two threads: give_turns tells them when it is their turn, tell_of_turns the next key block when they have added. So the next turn
// is asked for while what was added last is on its way: by one thread, both took longer than a tile. LATE: the warps say that they have added to a tile when they come to the
// next one, and the first time, when there was none. A stage of the rings is not used anew before its last use was told of, so that nobody misses a phase.
template <typename Tiles, int QUERY_TILE, typename Block, bool LATE = false> __device__ __forceinline__ void give_turns(const Problem& problem, u32 base) {
  Ring<2> ring, told;
  int begun = LATE;
  take_turns<QUERY_TILE, Block>(problem, 0, [&](u32, auto wait, auto) {
    wait();
    if (begun < 2) ++begun;
    else told.wait_full(base + Tiles::TOLD), told.advance();
    barrier_arrive(base + Tiles::TURN + 8 * ring.stage);
    ring.advance();
  });
}

template <typename Tiles, int QUERY_TILE, typename Block, bool LATE = false> __device__ __forceinline__ void tell_of_turns(const Problem& problem, u32 base) {
  Ring<2> ring;
  auto wait_for_all = [&] {
    ring.wait_full(base + Tiles::ADDED);
    barrier_arrive(base + Tiles::TOLD + 8 * ring.stage);
    ring.advance();
  };
  bool first = LATE;
  take_turns<QUERY_TILE, Block>(problem, 0, [&](u32, auto, auto done) {
    if (first) wait_for_all();
    first = false;
    wait_for_all();
    done();   // waits for what was added, so that no warp that computes has to
  });
  tell_of_heads<Block>(problem, [] {});
}

// Where the block's rows of dK and dV begin, how many of them exist, and how many take part.
struct GradientRows {
  void *dk, *dv;
  int rows, taking_part;
};

template <int PRECISION, typename Block> __device__ __forceinline__ void set_gradient_rows(const Problem& problem, const Block& block, GradientRows& its) {
  using Element = typename ElementOf<PRECISION>::type;
  Place place = block.place;
  if (problem.partial) place.head /= problem.heads_per_block;   // parts have one head a block; dk and dv themselves are found by a query head
  const i64 first_row = block.sequence.first_key + block.first_key;
  const auto begin = [&](const Array& array) -> void* {
    if (problem.partial) return place.rows<float>(array) + first_row * array.row_stride;
    return place.rows<Element>(array) + first_row * array.row_stride;
  };
  its.rows = block.sequence.keys - block.first_key, its.taking_part = block.sequence.seen() - block.first_key;
  its.dk = begin(problem.dk);
  keep_memory_here();   // few registers
  its.dv = begin(problem.dv);
}

// A warp that has nothing else to do works that out while others compute: they would do it one long product after the other, at the very end.
template <int PRECISION, typename Tiles, typename Block> __device__ __forceinline__ void find_gradient_rows(const Problem& problem, u8* shared, u32 base) {
  const Block block(problem, block_index_again());
  if (!block.exists()) return;
  set_gradient_rows<PRECISION>(problem, block, *(GradientRows*)(shared + Tiles::ROWS));
  barrier_arrive(base + Tiles::ROWS_FOUND);
}

template <typename Tiles> __device__ __forceinline__ const GradientRows& wait_for_gradient_rows(const u8* shared, u32 base) {
  barrier_wait(base + Tiles::ROWS_FOUND, 0);
  return *(const GradientRows*)(shared + Tiles::ROWS);
}

// dK or dV of a key block that is cut: each piece adds what it has to sums that begin as 0, in the order of its registers, but for the one that comes last, which gets
// theirs; true there. By each warp on its own; `warp`: of those that have the gradient, 16 rows each.
template <int KEY_TILE, int HEAD_DIM, int VALUE_DIM, int COUNT> __device__ __forceinline__ bool sum_of_pieces(const Problem& problem, bool of_values, int warp, int lane, float (&d)[COUNT][4]) {
  const u32 cut = (block_index_again() - problem.cut_from) / problem.pieces, others = problem.pieces - 1;
  constexpr int SUMS = KEY_TILE * (HEAD_DIM + VALUE_DIM);   // of a key block, and behind them a word for each warp and gradient
  float* own = problem.partial_out + cut * problem.split_stride;
  float* sums = own + (of_values ? KEY_TILE * HEAD_DIM : 0) + warp * COUNT * 128 + lane * 4;
  u32* word = (u32*)own + SUMS + of_values * 8 + warp;
  u32 before = 0;
  if (lane == 0) before = came(add_acquire(word, ONE_CAME));
  const bool last = uniform(before) == others;
  if (!last) {
#pragma unroll
    for (int n = 0; n < COUNT; ++n) reduce_add(sums + n * 128, d[n]);
    __syncwarp();
    if (lane == 0) add_release(word, ONE_ADDED);
    return false;
  }
  while (added(uniform(load_acquire(word))) < others);   // most have long since
  __syncwarp();
#pragma unroll
  for (int n = 0; n < COUNT; ++n) {
    const float4 x = __ldcg((const float4*)(sums + n * 128));
    d[n][0] += x.x, d[n][1] += x.y, d[n][2] += x.z, d[n][3] += x.w;
    if (n % 8 == 7) __threadfence_block();   // the next ones are not asked for sooner: there are no registers for all of them at once
  }
  return true;
}

// dK or dV from the accumulators; where the host sums parts, as float32 rows as wide as the kernel's. `to`: the block's first row; `row`: the lane's first, of the block.
// `scratch`: 2 KiB of shared memory that nobody else needs any more, or 0. WHOLE: the host knows that there is one, and that rows of 16-bit numbers are whole chunks.
template <int PRECISION, int OPTIONS, bool WHOLE = false, int COUNT>
__device__ __forceinline__ void store_key_gradient(const Problem& problem, const GradientRows& its, const Array& array, void* to, float (&d)[COUNT][4], float factor, int row, int lane, u32 scratch = 0) {
  using Element = typename ElementOf<PRECISION>::type;
  const int rows = its.rows, taking_part = its.taking_part;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool takes_part = !(OPTIONS & LENGTHS) || row + half * 8 < taking_part;   // else 0, whatever NaN of the others came by
#pragma unroll
    for (int n = 0; n < COUNT; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) d[n][2 * half + i] = takes_part ? d[n][2 * half + i] * factor : 0.0f;
  }
  if constexpr (WHOLE) {   // no branch, after which the compiler would take loops for different in each lane
    store_output_in_lines<PRECISION, COUNT * 8>(d, (Element*)to + (row - lane / 4) * array.row_stride, array.row_stride, rows - (row - lane / 4), array.columns, lane, scratch);
    return;
  }
  if (problem.partial) {
    store_floats(d, (float*)to, array.row_stride, row, rows, lane);
    return;
  }
  if constexpr (sizeof(Element) == 2) {
    Element* first = (Element*)to + (row - lane / 4) * array.row_stride;
    if (scratch && uniform(whole_chunks(first, array.row_stride, array.columns))) {
      store_output_in_lines<PRECISION, COUNT * 8>(d, first, array.row_stride, rows - (row - lane / 4), array.columns, lane, scratch);
      return;
    }
  }
  if constexpr (sizeof(Element) == 4) store_float_output(d, (Element*)to, array.row_stride, row, rows, array.columns, lane);
  else store_output<PRECISION, COUNT * 8>(d, (Element*)to, array.row_stride, row, rows, array.columns, lane);
}
