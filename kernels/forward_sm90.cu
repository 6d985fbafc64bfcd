// Attention forward by wgmma and TMA, for sm_90a, float16 and bfloat16. After FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608, section 3).
//
//   O = softmax(scores(Q Kᵀ)) V,   lse = log of the softmax denominator; what scores are, and the options of a call, is in score.cuh
//   Q (batch, heads, queries, HEAD_DIM), K (.., keys, HEAD_DIM), V (.., keys, VALUE_DIM), O (batch, heads, queries, VALUE_DIM), lse (batch, heads, queries)
//
// A block takes query tiles of WARPGROUPS · 64 queries of one head, one after the other, and walks over the key tiles that any of them sees.
//   Warpgroups 0 .. WARPGROUPS - 1, the consumers: each owns 64 queries and all columns, a warp 16 of them, so the softmax never leaves the warp; S, P and O
//     stay in registers. What one computes besides products runs beside the products of the others.
//   The last warpgroup, a thread of each warp: loaders of keys, of values, and of queries; and the scheduler, which works out the next query tile.
//
// Shared memory (tiles of 64 columns x rows, 128 bytes a row, swizzled):
//   WARPGROUPS x Q  64 x HEAD_DIM | STAGES x K  KEY_TILE x HEAD_DIM | STAGES x V  KEY_TILE x VALUE_DIM | STAGED_BIAS: 2 x bias  QUERY_TILE x KEY_TILE
//   | LONG_SUMS: totals of O, float32 | 2 x QueryTile | barriers
//
// Order of waits. Everything shared goes in rings with two barriers a stage: full (written, or all bytes of its copies are there) and empty (every reader
// arrived). A consumer, from key tile n - 1 to n:
//   with two warpgroups its turn (named barriers: they issue products one after the other) -> issue S = Q K(n)ᵀ and O += P V(n - 1) -> the other's turn
//   -> S done, K(n) empty -> K(n + 1) and V(n) full, while O += P V runs -> O done, V(n - 1) empty -> softmax of S gives P.
#include "forward_rows.cuh"
#include "ring.cuh"
#include "ptx/wgmma.cuh"

struct TensorMaps { TensorMap q, k, v; };
struct TensorMapsWithBias : TensorMaps { TensorMap bias; };
template <bool STAGED_BIAS> struct TensorMapsOf { using type = TensorMaps; };
template <> struct TensorMapsOf<true> { using type = TensorMapsWithBias; };

// What consumers and loaders need to know of a query tile. `last`: there is none.
template <int PRECISION, int OPTIONS, int QUERY_TILE, int KEY_TILE> struct QueryTile {
  using Block = QueryBlock<OPTIONS, QUERY_TILE>;
  bool last;
  u32 index;   // the scheduler's
  int split;   // SPLIT_KEYS: which part of the keys
  int rows;    // queries
  Block block;
  Visible<OPTIONS> visible;
  KeyTiles<OPTIONS, KEY_TILE> keys;
  Score<PRECISION, OPTIONS> score;

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
    score = Score<PRECISION, OPTIONS>(problem, block.place, block.sequence);
  }
};

template <int HEAD_DIM, int VALUE_DIM, int OPTIONS, int WARPGROUPS, int KEY_TILE, int STAGES> struct ForwardSm90Tiles {
  static constexpr int QUERY_TILE = WARPGROUPS * 64, THREADS = (WARPGROUPS + 1) * 128;
  // What a thread of a loading and of a computing warpgroup has: all of it together is what the block started with.
  static constexpr int STARTING_REGISTERS = 65536 / THREADS / 8 * 8, LOADING_REGISTERS = WARPGROUPS == 2 ? 40 : 32;
  static constexpr int COMPUTING_REGISTERS = WARPGROUPS == 2 ? 232 : WARPGROUPS == 3 ? 160 : 112;
  static_assert(WARPGROUPS == 1 || LOADING_REGISTERS + WARPGROUPS * COMPUTING_REGISTERS <= (WARPGROUPS + 1) * STARTING_REGISTERS, "a warpgroup would wait for registers that nobody gives");

  static constexpr int Q_BOX = 64 * 128, KEY_BOX = KEY_TILE * 128;   // bytes of 64 columns, of a warpgroup's queries and of a key tile
  static constexpr int Q_BOXES = ceil_div(HEAD_DIM, 64), V_BOXES = ceil_div(VALUE_DIM, 64);
  static constexpr int Q_BYTES = Q_BOXES * Q_BOX, K_BYTES = Q_BOXES * KEY_BOX, V_BYTES = V_BOXES * KEY_BOX;
  static constexpr int K = WARPGROUPS * Q_BYTES, V = K + STAGES * K_BYTES, BIAS_AT = V + STAGES * V_BYTES;
  static constexpr int BIAS_BYTES = OPTIONS & STAGED_BIAS ? QUERY_TILE * KEY_TILE * 2 : 0, BIAS_BOXES = KEY_TILE / 64, BIAS_BOX = 64 * 128;   // of a stage; a box has 64 queries and keys
  static_assert(BIAS_BYTES == 0 || KEY_TILE % 64 == 0, "tiles of the bias are whole boxes");
  static constexpr int TOTALS = BIAS_AT + 2 * BIAS_BYTES, TOTAL_BYTES = OPTIONS & LONG_SUMS ? QUERY_TILE * VALUE_DIM * 4 : 0;
  static constexpr int QUERY_TILES = TOTALS + TOTAL_BYTES, QUERY_TILE_BYTES = 256;
  static constexpr int TILE_FULL = QUERY_TILES + 2 * QUERY_TILE_BYTES, TILE_EMPTY = TILE_FULL + 16, Q_FULL = TILE_EMPTY + 16, Q_EMPTY = Q_FULL + 8 * WARPGROUPS;
  static constexpr int K_FULL = Q_EMPTY + 8 * WARPGROUPS, K_EMPTY = K_FULL + 8 * STAGES, V_FULL = K_EMPTY + 8 * STAGES, V_EMPTY = V_FULL + 8 * STAGES;
  static constexpr int BIAS_FULL = V_EMPTY + 8 * STAGES, BIAS_EMPTY = BIAS_FULL + 16, TILE_WANTED = BIAS_EMPTY + 16, SHARED_BYTES = TILE_WANTED + 8;
};

// The scheduler: query tiles are taken in turns, or where they are uneven by counting, so that a block which is done early takes the next one.
template <typename Tile, typename Tiles, int OPTIONS> __device__ __forceinline__ void schedule_query_tiles(const Problem& problem, u8* shared, u32 base) {
  const u32 splits = OPTIONS & SPLIT_KEYS ? problem.splits : 1, slots = Tile::Block::slots(problem), tiles = problem.grid_places * slots * splits;
  Ring<2> ring;
  Ring<1> wanted;
  u32 index = blockIdx.x;
  do {
    ring.wait_empty(base + Tiles::TILE_EMPTY);
    Tile& tile = *(Tile*)(shared + Tiles::QUERY_TILES + ring.stage * Tiles::QUERY_TILE_BYTES);
    static_assert(sizeof(Tile) <= Tiles::QUERY_TILE_BYTES, "");
    tile.index = index;   // until further down: its register is needed
    u32 block_index = min(index, tiles - 1) / splits;
    if (OPTIONS & STAGED_BIAS && problem.batches_together > 1) {   // batch entries that share a bias follow each other, so that they find it in L2
      const u32 place = block_index / slots, entries = problem.batches_together;
      block_index += (place % entries * problem.heads + place / entries - place) * slots;
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
template <typename Tile, typename Tiles, int WARPGROUPS, int KEY_TILE, typename Maps> __device__ __forceinline__ void load_queries(const Problem& problem, const Maps& maps, const u8* shared, u32 base) {
  prefetch_tensor_map(maps.q);
  Ring<2> ring, bias_ring;
  Ring<1> q_ring;
  for (;; ring.advance()) {
    ring.wait_full(base + Tiles::TILE_FULL);
    const Tile& tile = *(const Tile*)(shared + Tiles::QUERY_TILES + ring.stage * Tiles::QUERY_TILE_BYTES);
    if (tile.last) return;
    if (tile.keys.begin < tile.keys.end) {
      const BoxPlace place(problem.q, tile.block.place);
      const int row = tile.block.sequence.first_query + tile.block.first_query;
#pragma unroll 1
      for (int warpgroup = 0; warpgroup < WARPGROUPS; ++warpgroup) {
        q_ring.wait_empty(base + Tiles::Q_EMPTY + 8 * warpgroup);
        place.load_rows<Tiles::Q_BOXES, Tiles::Q_BOX>(maps.q, base + warpgroup * Tiles::Q_BYTES, row + warpgroup * 64, base + Tiles::Q_FULL + 8 * warpgroup);
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
          place.load(maps.bias, target + box * Tiles::BIAS_BOX, n * KEY_TILE + box % Tiles::BIAS_BOXES * 64, one_row ? 0 : first_query + box / Tiles::BIAS_BOXES * 64, full);
      }
    }
    barrier_arrive(base + Tiles::TILE_EMPTY + 8 * ring.stage);
  }
}

// Keys, or values: tile by tile, as far ahead as the ring allows. `wants`: asks a scheduler that counts for the next query tile in time.
template <typename Tile, typename Tiles, int KEY_TILE, int STAGES, int BOXES>
__device__ __forceinline__ void load_along_keys(const TensorMap& map, const Array& array, const u8* shared, u32 base, u32 target, u32 full, u32 empty, bool wants) {
  prefetch_tensor_map(map);
  Ring<2> ring;
  Ring<STAGES> key_ring;
  for (;; ring.advance()) {
    ring.wait_full(base + Tiles::TILE_FULL);
    const Tile& tile = *(const Tile*)(shared + Tiles::QUERY_TILES + ring.stage * Tiles::QUERY_TILE_BYTES);
    if (tile.last) return;
    const BoxPlace place(array, tile.block.place);
    const int begin = tile.keys.begin, end = tile.keys.end, first_key = tile.block.sequence.first_key;
    if (wants && begin >= end) barrier_arrive(base + Tiles::TILE_WANTED);
#pragma unroll 1
    for (int n = begin; n < end; ++n) {
      if (wants && n == max(end - 3, begin)) barrier_arrive(base + Tiles::TILE_WANTED);
      key_ring.wait_empty(base + empty);
      place.load_rows<BOXES, Tiles::KEY_BOX>(map, base + target + key_ring.stage * BOXES * Tiles::KEY_BOX, first_key + n * KEY_TILE, base + full + 8 * key_ring.stage);
      key_ring.advance();
    }
    barrier_arrive(base + Tiles::TILE_EMPTY + 8 * ring.stage);
  }
}

template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int OPTIONS, int WARPGROUPS, int KEY_TILE, int STAGES>
__global__ void __launch_bounds__((WARPGROUPS + 1) * 128, 1) forward_sm90(const __grid_constant__ Problem problem, const __grid_constant__ typename TensorMapsOf<(OPTIONS & STAGED_BIAS) != 0>::type maps) {
  using Tiles = ForwardSm90Tiles<HEAD_DIM, VALUE_DIM, OPTIONS, WARPGROUPS, KEY_TILE, STAGES>;
  using Tile = QueryTile<PRECISION, OPTIONS, Tiles::QUERY_TILE, KEY_TILE>;
  using Element = typename ElementOf<PRECISION>::type;
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = shared_address(shared);
  const int warpgroup = uniform(threadIdx.x / 128);

  if (threadIdx.x == 0) {
    constexpr int CONSUMERS = WARPGROUPS * 4, LOADERS = 3;   // warps: one lane of each arrives
    auto init = [&](int full, int empty, int stages, int readers) { init_ring(base, full, 1, empty, readers, stages); };
    init(Tiles::TILE_FULL, Tiles::TILE_EMPTY, 2, CONSUMERS + LOADERS);
    barrier_init(base + Tiles::TILE_WANTED, 1);
    init(Tiles::Q_FULL, Tiles::Q_EMPTY, WARPGROUPS, 4);
    init(Tiles::K_FULL, Tiles::K_EMPTY, STAGES, CONSUMERS);
    init(Tiles::V_FULL, Tiles::V_EMPTY, STAGES, CONSUMERS);
    if (OPTIONS & STAGED_BIAS) init(Tiles::BIAS_FULL, Tiles::BIAS_EMPTY, 2, CONSUMERS);
    barrier_init_fence();
  }
  __syncthreads();

  if (warpgroup == WARPGROUPS) {
    if constexpr (WARPGROUPS > 1) give_registers<Tiles::LOADING_REGISTERS>();
    const int thread = threadIdx.x % 128;
    if (thread == 0) load_along_keys<Tile, Tiles, KEY_TILE, STAGES, Tiles::Q_BOXES>(maps.k, problem.k, shared, base, Tiles::K, Tiles::K_FULL, Tiles::K_EMPTY, problem.tile_counter != nullptr);
    if (thread == 32) load_along_keys<Tile, Tiles, KEY_TILE, STAGES, Tiles::V_BOXES>(maps.v, problem.v, shared, base, Tiles::V, Tiles::V_FULL, Tiles::V_EMPTY, false);
    if (thread == 64) load_queries<Tile, Tiles, WARPGROUPS, KEY_TILE>(problem, maps, shared, base);
    if (thread == 96) schedule_query_tiles<Tile, Tiles, OPTIONS>(problem, shared, base);
    return;
  }

  if constexpr (WARPGROUPS > 1) take_registers<Tiles::COMPUTING_REGISTERS>();
  constexpr bool TURNS = WARPGROUPS == 2;
  constexpr bool ALWAYS_RAISE = (OPTIONS & ALIBI) != 0;   // scores that grow a lot from tile to tile are the rule
  constexpr bool BASED = (OPTIONS & (ALIBI | MASK)) == ALIBI;
  const int lane = threadIdx.x % 32, warp_row = warpgroup * 64 + threadIdx.x % 128 / 32 * 16;
  auto my_turn = [&] { if constexpr (TURNS) named_barrier_sync(1 + warpgroup, 256); };
  auto next_turn = [&] { if constexpr (TURNS) named_barrier_arrive(1 + (warpgroup + 1 == WARPGROUPS ? 0 : warpgroup + 1), 256); };
  if (TURNS && warpgroup == 0) named_barrier_arrive(1, 256);
  auto arrive = [&](int barrier) { if (lane == 0) barrier_arrive(base + barrier); };

  using Exp = Exponential<PRECISION>;
  const Exp exponential(problem);
  Ring<2> tile_ring, bias_ring;
  Ring<1> q_ring;
  Ring<STAGES> k_ring, v_ring;
  float output[VALUE_DIM / 8][4], scores[1][KEY_TILE / 8][4];
  u32 p[KEY_TILE / 16][4];
  OnlineSoftmax<KEY_TILE, BASED> softmax;

  u32 k_at, v_at;
  auto wait_k = [&] {
    k_ring.wait_full(base + Tiles::K_FULL);
    k_at = uniform(base + Tiles::K + k_ring.stage * Tiles::K_BYTES);
  };
  auto wait_v = [&](const Tile& tile, int n) {
    v_ring.wait_full(base + Tiles::V_FULL);
    v_at = uniform(base + Tiles::V + v_ring.stage * Tiles::V_BYTES);
    if constexpr ((OPTIONS & (PACKED | LENGTHS)) != 0) {
      // Rows of V that take no part may hold anything, and a probability of 0 does not keep a NaN out. Each warpgroup clears them for itself.
      const int first = tile.block.sequence.seen() - n * KEY_TILE;
      if (first < KEY_TILE) {
        clear_rows(v_at, Tiles::V_BOXES, Tiles::KEY_BOX, first);
        fence_for_async_proxy();
        named_barrier_sync(5 + warpgroup, 128);
      }
    }
  };
  auto multiply_q_k = [&] { multiply_rows<PRECISION, KEY_TILE, HEAD_DIM, Tiles::Q_BOX, Tiles::KEY_BOX>(scores[0], base + warpgroup * Tiles::Q_BYTES, k_at); };
  auto multiply_p_v = [&] { multiply_words<PRECISION, VALUE_DIM, Tiles::KEY_BOX>(output, p, v_at); };
  auto score_tile = [&](const Tile& tile, const KeyTiles<OPTIONS, KEY_TILE>& keys, int n) {
    const int row = tile.block.first_query + warp_row + lane / 4, column = n * KEY_TILE + lane % 4 * 2;
    if constexpr ((OPTIONS & STAGED_BIAS) != 0) {
      bias_ring.wait_full(base + Tiles::BIAS_FULL);
      const bool one_row = problem.bias.row_stride == 0;
      const u32 swizzle = one_row ? 0 : lane / 4 << 4, bias_at = base + Tiles::BIAS_AT + bias_ring.stage * Tiles::BIAS_BYTES + (one_row ? 0 : warp_row / 64 * Tiles::BIAS_BOXES * Tiles::BIAS_BOX + (warp_row % 64 + lane / 4) * 128);
      const int eight_rows = one_row ? 0 : 8 * 128;
      auto add_bias = [&](int, int) {
#pragma unroll
        for (int n = 0; n < KEY_TILE / 8; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float x[2];
            load_shared_pair<Element>(x, bias_at + half * eight_rows + n / 8 * Tiles::BIAS_BOX + ((n % 8 << 4) ^ swizzle) + lane % 4 * 4);
#pragma unroll
            for (int i = 0; i < 2; ++i) scores[0][n][2 * half + i] = fmaf(x[i], problem.inverse_unit, scores[0][n][2 * half + i]);
          }
      };
      tile.score.template apply<false, 1, KEY_TILE>(problem, scores, row, column, add_bias, nullptr);
    } else if constexpr (BASED) {
      const auto add_bias = [&](int row, int column) { tile.score.template add_bias<false, 1, KEY_TILE>(problem, scores, row, column); };
      tile.score.template apply<false, 1, KEY_TILE>(problem, scores, row, column, add_bias, nullptr, softmax.base);
      softmax.base[0] *= exponential.factor, softmax.base[1] *= exponential.factor;
    } else if constexpr (Score<PRECISION, OPTIONS>::CHANGES) {
      tile.score.template apply<false, 1, KEY_TILE>(problem, scores, row, column);
    }
    if (keys.need_mask(n)) tile.visible.template hide<false, 1, KEY_TILE>(scores, row, column, -infinity());
  };
  auto keep = [&](int n, int row, const float (&pair)[2]) { p[n / 2][n % 2 * 2 + row] = pack<PRECISION>(pair[0], pair[1]); };
  auto probabilities = [&] {   // after O is done: it may have to be rescaled
    softmax.raise(scores[0], exponential, [&](int row, float ratio) {
#pragma unroll
      for (int n = 0; n < VALUE_DIM / 8; ++n) output[n][2 * row] *= ratio, output[n][2 * row + 1] *= ratio;
    });
    softmax.take(scores[0], exponential, keep);
  };
  auto bias_read = [&] {   // after the softmax: an arrival can overtake loads from shared memory whose values nobody has needed yet
    if constexpr ((OPTIONS & STAGED_BIAS) != 0) {
      __syncwarp();
      arrive(Tiles::BIAS_EMPTY + 8 * bias_ring.stage);
      bias_ring.advance();
    }
  };
  auto drop = [&](const Tile& tile, int n) {
    if constexpr ((OPTIONS & DROPOUT) != 0)
      Dropout{tile.block.schedule.place, (u32)tile.block.sequence.index}.template drop<false, 1, KEY_TILE>(
          problem, tile.block.first_query + warp_row + lane / 4, n * KEY_TILE + lane % 4 * 2, [&](int, int n, int half, int i) { p[n / 2][n % 2 * 2 + half] &= i ? 0x0000ffffu : 0xffff0000u; });
  };

  // LONG_SUMS: the tensor cores truncate what they add to O (accumulate in product_sm80.cuh). So they sum SEGMENT key tiles at most; the totals, each
  // thread's own, are added up in round-to-nearest.
  constexpr int SEGMENT = 4096 / KEY_TILE;
  float total_shift[2];
  auto add_totals = [&](bool any) {   // to O
    float ratio[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) ratio[half] = total_shift[half] == -infinity() ? 0.0f : Exp::of(total_shift[half] - softmax.shift[half]), total_shift[half] = softmax.shift[half];
    if (!any) return;
#pragma unroll
    for (int n = 0; n < VALUE_DIM / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        output[n][i] = fmaf(__uint_as_float(load_shared(base + Tiles::TOTALS + ((n * 4 + i) * WARPGROUPS * 128 + threadIdx.x) * 4)), ratio[i / 2], output[n][i]);
  };
  auto take_totals = [&] {   // from O, which is then zero
#pragma unroll
    for (int n = 0; n < VALUE_DIM / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) store_shared(base + Tiles::TOTALS + ((n * 4 + i) * WARPGROUPS * 128 + threadIdx.x) * 4, __float_as_uint(output[n][i])), output[n][i] = 0.0f;
  };

  for (;; tile_ring.advance()) {
    tile_ring.wait_full(base + Tiles::TILE_FULL);
    const Tile& tile = *(const Tile*)(shared + Tiles::QUERY_TILES + tile_ring.stage * Tiles::QUERY_TILE_BYTES);
    if (uniform(tile.last)) break;
#pragma unroll
    for (int n = 0; n < VALUE_DIM / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) output[n][i] = 0.0f;
    softmax = OnlineSoftmax<KEY_TILE, BASED>();
    if constexpr ((OPTIONS & SINKS) != 0) softmax.start(Exp::shift_of_lse(*tile.block.place.template rows<float>(problem.sinks)), lane);
    total_shift[0] = total_shift[1] = -infinity();
    // Of the block's key tiles [first, last) this warpgroup's queries see [begin, end); the others it only lets pass.
    const int first = uniform(tile.keys.begin), last = uniform(tile.keys.end);
    KeyTiles<OPTIONS, KEY_TILE> keys(tile.visible, tile.block.first_query + warpgroup * 64, 64);
    const bool any = warpgroup * 64 < tile.rows && keys.begin < keys.end;
    const int begin = uniform(any ? min(max(keys.begin, first), last) : last), end = uniform(any ? max(min(keys.end, last), begin) : last);
    auto pass = [&](int from, int to) {
#pragma unroll 1
      for (int n = from; n < to; ++n) {
        k_ring.wait_full(base + Tiles::K_FULL);
        arrive(Tiles::K_EMPTY + 8 * k_ring.stage);
        k_ring.advance();
        if constexpr ((OPTIONS & STAGED_BIAS) != 0) {
          bias_ring.wait_full(base + Tiles::BIAS_FULL);
          arrive(Tiles::BIAS_EMPTY + 8 * bias_ring.stage);
          bias_ring.advance();
        }
        if (n > first) my_turn(), next_turn();
        v_ring.wait_full(base + Tiles::V_FULL);
        arrive(Tiles::V_EMPTY + 8 * v_ring.stage);
        v_ring.advance();
      }
    };
    if (first < last) {
      q_ring.wait_full(base + Tiles::Q_FULL + 8 * warpgroup);
      q_ring.advance();
      if (begin == end) arrive(Tiles::Q_EMPTY + 8 * warpgroup);
      pass(first, begin);
    }
    if (begin < end) {
      wait_k();
      if (begin > first) my_turn();
      multiply_q_k();
      if (begin > first) next_turn();
      const int k_read = k_ring.stage;
      k_ring.advance();
      if (begin + 1 < end) wait_k();
      wait_v(tile, begin);
      wgmma_wait<0>();
      pin(scores[0]);
      arrive(Tiles::K_EMPTY + 8 * k_read);
      if (begin + 1 == end) arrive(Tiles::Q_EMPTY + 8 * warpgroup);
      score_tile(tile, keys, begin);
      if (ALWAYS_RAISE || (OPTIONS & SINKS) || !softmax.try_start(scores[0], exponential, keep)) probabilities();
      bias_read();
      drop(tile, begin);
#pragma unroll 1
      for (int n = begin + 1; n < end; ++n) {
        my_turn();
        multiply_q_k();
        multiply_p_v();
        next_turn();
        const int k_read = k_ring.stage, v_read = v_ring.stage;
        k_ring.advance();
        v_ring.advance();
        wgmma_wait<1>();
        pin(scores[0]);
        arrive(Tiles::K_EMPTY + 8 * k_read);
        if (n + 1 < end) wait_k();   // what the next products need, while O += P V runs
        else arrive(Tiles::Q_EMPTY + 8 * warpgroup);
        wait_v(tile, n);
        score_tile(tile, keys, n);
        wgmma_wait<0>();
        pin(output);
        arrive(Tiles::V_EMPTY + 8 * v_read);
        if ((OPTIONS & LONG_SUMS) != 0 && (n - begin) % SEGMENT == 0) {
          add_totals(n - begin > SEGMENT);
          take_totals();
        }
        if (ALWAYS_RAISE || !softmax.try_take(scores[0], exponential, keep)) probabilities();
        bias_read();
        drop(tile, n);
      }
      multiply_p_v();
      wgmma_wait<0>();
      pin(output);
      arrive(Tiles::V_EMPTY + 8 * v_ring.stage);
      v_ring.advance();
      if ((OPTIONS & LONG_SUMS) != 0 && end - begin > SEGMENT) add_totals(true);
    }
    pass(end, last);

    const Place& place = tile.block.place;
    const int row = warp_row + lane / 4, rows = tile.rows;
    const i64 first_row = tile.block.sequence.first_query + tile.block.first_query;
    float lse[2];
    finish_rows<OPTIONS>(problem, place, softmax, exponential, tile.block.first_query + row, tile.block.sequence.seeing(), output, lse);
    if constexpr ((OPTIONS & SPLIT_KEYS) != 0) {
      const i64 all_rows = (i64)problem.grid_places * problem.queries, part = tile.split * all_rows + place.flat(problem) * problem.queries + first_row;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (lane % 4 == 0 && row + half * 8 < rows) problem.partial_lse[part + row + half * 8] = lse[half];
      store_floats(output, problem.partial_out + part * VALUE_DIM, VALUE_DIM, row, rows, lane);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (lane % 4 == 0 && row + half * 8 < rows) place.template rows<float>(problem.lse)[(first_row + row + half * 8) * problem.lse.row_stride] = lse[half];
      Element* out = place.template rows<Element>(problem.out) + first_row * problem.out.row_stride;
      store_output<PRECISION, VALUE_DIM>(output, out, problem.out.row_stride, row, rows, problem.out.columns, lane);
    }
    __syncwarp();
    arrive(Tiles::TILE_EMPTY + 8 * tile_ring.stage);
  }
}
