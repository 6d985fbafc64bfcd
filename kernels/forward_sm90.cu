// Attention forward by wgmma and TMA, for sm_90a, float16 and bfloat16. After FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608, section 3).
//
//   O = softmax(scores(Q Kᵀ)) V,   lse = log of the softmax denominator; what scores are, and the options of a call, is in score.cuh
//   Q (batch, heads, queries, HEAD_DIM), K (.., keys, HEAD_DIM), V (.., keys, VALUE_DIM), O (batch, heads, queries, VALUE_DIM), lse (batch, heads, queries)
//
// A block takes query tiles of WARPGROUPS · 64 queries of one head, one after the other, and walks over the key tiles that any of them sees.
//   Warpgroups 0 .. WARPGROUPS - 1, the consumers: each owns 64 queries and all columns, a warp 16 of them, so the softmax never leaves the warp; S, P and O
//     stay in registers. What one computes besides products runs beside the products of the others.
//   The last warpgroup: one thread, the scheduler, works out the next query tile; one, the loader, issues all copies. The rest of it does nothing.
//
// Shared memory (tiles of 64 columns x rows, 128 bytes a row, swizzled):
//   Q  QUERY_TILE x HEAD_DIM | STAGES x K  KEY_TILE x HEAD_DIM | STAGES x V  KEY_TILE x VALUE_DIM | LONG_SUMS: totals of O, float32 | 2 x QueryTile | barriers
//
// Order of waits. Everything shared goes in rings with two barriers a stage: full (written, or all bytes of its copies are there) and empty (every reader
// arrived). A consumer, from key tile n - 1 to n:
//   its turn (named barriers: the warpgroups issue products one after the other) -> issue S = Q K(n)ᵀ and O += P V(n - 1) -> next warpgroup's turn
//   -> S done, K(n) empty -> K(n + 1) and V(n) full, while O += P V runs -> O done, V(n - 1) empty -> softmax of S gives P.
#include "forward_rows.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

struct TensorMaps { TensorMap q, k, v; };

// What consumers and loader need to know of a query tile. `last`: there is none.
template <int PRECISION, int OPTIONS, int QUERY_TILE, int KEY_TILE> struct QueryTile {
  using Block = QueryBlock<OPTIONS, QUERY_TILE>;
  bool last;
  Block block;
  Visible<OPTIONS> visible;
  KeyTiles<OPTIONS, KEY_TILE> keys;
  Score<PRECISION, OPTIONS> score;

  // In place, member by member: the thread that does it has few registers.
  __device__ __forceinline__ void set(const Problem& problem, const Block& its_block) {
    last = false;
    block = its_block;
    keep_memory_here();
    visible = Visible<OPTIONS>(problem, block.place, block.sequence);
    keep_memory_here();
    keys = KeyTiles<OPTIONS, KEY_TILE>(visible, block.first_query, QUERY_TILE);
    keep_memory_here();
    score = Score<PRECISION, OPTIONS>(problem, block.place, block.sequence);
  }
};

template <int HEAD_DIM, int VALUE_DIM, int OPTIONS, int WARPGROUPS, int KEY_TILE, int STAGES> struct ForwardSm90Tiles {
  static constexpr int QUERY_TILE = WARPGROUPS * 64, THREADS = (WARPGROUPS + 1) * 128;
  // What a thread of a loading and of a computing warpgroup has: all of it together is what the block started with.
  static constexpr int STARTING_REGISTERS = 65536 / THREADS / 8 * 8, LOADING_REGISTERS = WARPGROUPS == 2 ? 40 : 32;
  static constexpr int COMPUTING_REGISTERS = WARPGROUPS == 2 ? 232 : WARPGROUPS == 3 ? 160 : 112;
  static_assert(LOADING_REGISTERS + WARPGROUPS * COMPUTING_REGISTERS <= (WARPGROUPS + 1) * STARTING_REGISTERS, "a warpgroup would wait for registers that nobody gives");

  static constexpr int Q_BOX = QUERY_TILE * 128, KEY_BOX = KEY_TILE * 128;   // bytes of 64 columns
  static constexpr int Q_BOXES = ceil_div(HEAD_DIM, 64), V_BOXES = ceil_div(VALUE_DIM, 64);
  static constexpr int Q_BYTES = Q_BOXES * Q_BOX, K_BYTES = Q_BOXES * KEY_BOX, V_BYTES = V_BOXES * KEY_BOX;
  static constexpr int K = Q_BYTES, V = K + STAGES * K_BYTES, TOTALS = V + STAGES * V_BYTES, TOTAL_BYTES = OPTIONS & LONG_SUMS ? QUERY_TILE * VALUE_DIM * 4 : 0;
  static constexpr int QUERY_TILES = TOTALS + TOTAL_BYTES, QUERY_TILE_BYTES = 256;
  static constexpr int TILE_FULL = QUERY_TILES + 2 * QUERY_TILE_BYTES, TILE_EMPTY = TILE_FULL + 16, Q_FULL = TILE_EMPTY + 16, Q_EMPTY = Q_FULL + 8;
  static constexpr int K_FULL = Q_EMPTY + 8, K_EMPTY = K_FULL + 8 * STAGES, V_FULL = K_EMPTY + 8 * STAGES, V_EMPTY = V_FULL + 8 * STAGES;
  static constexpr int TILE_WANTED = V_EMPTY + 8 * STAGES, SHARED_BYTES = TILE_WANTED + 8;
};

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

// The scheduler: query tiles are taken in turns, or where they are uneven by counting, so that a block which is done early takes the next one.
template <typename Tile, typename Tiles> __device__ __forceinline__ void schedule_query_tiles(const Problem& problem, u8* shared, u32 base) {
  const u32 tiles = problem.grid_places * Tile::Block::slots(problem);
  Ring<2> ring;
  Ring<1> wanted;
  u32 index = blockIdx.x;
  do {
    const typename Tile::Block block(problem, min(index, tiles - 1));
    const bool last = index >= tiles;
    if (last || block.exists()) {
      ring.wait_empty(base + Tiles::TILE_EMPTY);
      Tile& tile = *(Tile*)(shared + Tiles::QUERY_TILES + ring.stage * Tiles::QUERY_TILE_BYTES);
      static_assert(sizeof(Tile) <= Tiles::QUERY_TILE_BYTES, "");
      if (last) tile.last = true;
      else tile.set(problem, block);
      barrier_arrive(base + Tiles::TILE_FULL + 8 * ring.stage);
      ring.advance();
      if (last) return;
      if (problem.tile_counter) {   // not earlier: who takes a long tile now may be the one who is done last
        wanted.wait_full(base + Tiles::TILE_WANTED);
        wanted.advance();
      }
    }
    index = gridDim.x + (problem.tile_counter ? atomicAdd(problem.tile_counter, 1) : index);
  } while (true);
}

// The loader: all copies, in the order in which they are waited for.
template <typename Tile, typename Tiles, int KEY_TILE, int STAGES>
__device__ __forceinline__ void load_tiles(const Problem& problem, const TensorMaps& maps, const u8* shared, u32 base) {
  prefetch_tensor_map(maps.q);
  prefetch_tensor_map(maps.k);
  prefetch_tensor_map(maps.v);
  Ring<2> ring;
  Ring<STAGES> k_ring, v_ring;
  Ring<1> q_ring;
  for (;; ring.advance()) {
    ring.wait_full(base + Tiles::TILE_FULL);
    const Tile& tile = *(const Tile*)(shared + Tiles::QUERY_TILES + ring.stage * Tiles::QUERY_TILE_BYTES);
    if (tile.last) return;
    const int begin = tile.keys.begin, end = tile.keys.end;
    auto load = [&](const TensorMap& map, const Array& array, u32 target, int boxes, int box_bytes, int row, u32 barrier) {
      const Place& place = tile.block.place;
      const int head = array.head_stride ? place.head / array.group : 0, batch = array.batch_stride[3] ? place.batch[3] : 0, outer = array.batch_stride[2] ? place.batch[2] : 0;
      barrier_arrive_expect(barrier, boxes * box_bytes);
#pragma unroll 1
      for (int box = 0; box < boxes; ++box) load_box(target + box * box_bytes, map, box * 64, row, head, batch, outer, barrier);
    };
    auto load_k = [&](int n) {
      k_ring.wait_empty(base + Tiles::K_EMPTY);
      load(maps.k, problem.k, base + Tiles::K + k_ring.stage * Tiles::K_BYTES, Tiles::Q_BOXES, Tiles::KEY_BOX, tile.block.sequence.first_key + n * KEY_TILE, base + Tiles::K_FULL + 8 * k_ring.stage);
      k_ring.advance();
    };
    auto load_v = [&](int n) {
      v_ring.wait_empty(base + Tiles::V_EMPTY);
      load(maps.v, problem.v, base + Tiles::V + v_ring.stage * Tiles::V_BYTES, Tiles::V_BOXES, Tiles::KEY_BOX, tile.block.sequence.first_key + n * KEY_TILE, base + Tiles::V_FULL + 8 * v_ring.stage);
      v_ring.advance();
    };
    if (begin < end) {
      load_k(begin);
      q_ring.wait_empty(base + Tiles::Q_EMPTY);
      load(maps.q, problem.q, base, Tiles::Q_BOXES, Tiles::Q_BOX, tile.block.sequence.first_query + tile.block.first_query, base + Tiles::Q_FULL);
      q_ring.advance();
#pragma unroll 1
      for (int n = begin; n < end; ++n) {
        if (n + 1 < end) load_k(n + 1);
        if (n == max(end - 3, begin)) barrier_arrive(base + Tiles::TILE_WANTED);
        load_v(n);
      }
    } else {
      barrier_arrive(base + Tiles::TILE_WANTED);
    }
    barrier_arrive(base + Tiles::TILE_EMPTY + 8 * ring.stage);
  }
}

template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int OPTIONS, int WARPGROUPS, int KEY_TILE, int STAGES>
__global__ void __launch_bounds__((WARPGROUPS + 1) * 128, 1) forward_sm90(const __grid_constant__ Problem problem, const __grid_constant__ TensorMaps maps) {
  using Tiles = ForwardSm90Tiles<HEAD_DIM, VALUE_DIM, OPTIONS, WARPGROUPS, KEY_TILE, STAGES>;
  using Tile = QueryTile<PRECISION, OPTIONS, Tiles::QUERY_TILE, KEY_TILE>;
  using Element = typename ElementOf<PRECISION>::type;
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = shared_address(shared);
  const int warpgroup = uniform(threadIdx.x / 128);

  if (threadIdx.x == 0) {
    constexpr int CONSUMERS = WARPGROUPS * 4;   // warps: one lane of each arrives
    auto init = [&](int full, int empty, int stages, int readers) {
      for (int stage = 0; stage < stages; ++stage) barrier_init(base + full + 8 * stage, 1), barrier_init(base + empty + 8 * stage, readers);
    };
    init(Tiles::TILE_FULL, Tiles::TILE_EMPTY, 2, CONSUMERS + 1);
    barrier_init(base + Tiles::TILE_WANTED, 1);
    init(Tiles::Q_FULL, Tiles::Q_EMPTY, 1, CONSUMERS);
    init(Tiles::K_FULL, Tiles::K_EMPTY, STAGES, CONSUMERS);
    init(Tiles::V_FULL, Tiles::V_EMPTY, STAGES, CONSUMERS);
    barrier_init_fence();
  }
  __syncthreads();

  if (warpgroup == WARPGROUPS) {
    give_registers<Tiles::LOADING_REGISTERS>();
    if (threadIdx.x % 128 == 0) load_tiles<Tile, Tiles, KEY_TILE, STAGES>(problem, maps, shared, base);
    if (threadIdx.x % 128 == 32) schedule_query_tiles<Tile, Tiles>(problem, shared, base);
    return;
  }

  take_registers<Tiles::COMPUTING_REGISTERS>();
  constexpr bool TURNS = WARPGROUPS > 1;
  constexpr bool ALWAYS_RAISE = (OPTIONS & ALIBI) != 0;   // scores that grow a lot from tile to tile are the rule
  const int lane = threadIdx.x % 32, warp_row = warpgroup * 64 + threadIdx.x % 128 / 32 * 16;
  auto my_turn = [&] { if constexpr (TURNS) named_barrier_sync(1 + warpgroup, 256); };
  auto next_turn = [&] { if constexpr (TURNS) named_barrier_arrive(1 + (warpgroup + 1 == WARPGROUPS ? 0 : warpgroup + 1), 256); };
  if (TURNS && warpgroup == 0) named_barrier_arrive(1, 256);
  auto arrive = [&](int barrier) { if (lane == 0) barrier_arrive(base + barrier); };

  using Exp = Exponential<PRECISION>;
  const Exp exponential(problem);
  Ring<2> tile_ring;
  Ring<1> q_ring;
  Ring<STAGES> k_ring, v_ring;
  float output[VALUE_DIM / 8][4], scores[1][KEY_TILE / 8][4];
  u32 p[KEY_TILE / 16][4];
  OnlineSoftmax<KEY_TILE> softmax;

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
        for (int box = 0; box < Tiles::V_BOXES; ++box)
          for (int at = first * 128 + (int)(threadIdx.x % 128) * 16; at < Tiles::KEY_BOX; at += 128 * 16) store_shared_16_bytes(v_at + box * Tiles::KEY_BOX + at, make_uint4(0, 0, 0, 0));
        fence_for_async_proxy();
        named_barrier_sync(5 + warpgroup, 128);
      }
    }
  };
  auto multiply_q_k = [&] {
    const unsigned long long q = descriptor_along_k(base + warpgroup * 64 * 128), k = descriptor_along_k(k_at);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
      const int q_at = step / 4 * Tiles::Q_BOX + step % 4 * 32, k_at = step / 4 * Tiles::KEY_BOX + step % 4 * 32;
      if (step == 0) Wgmma<PRECISION, KEY_TILE>::template multiply_shared<false>(scores[0], q, k);
      else Wgmma<PRECISION, KEY_TILE>::template multiply_shared<true>(scores[0], q + (q_at >> 4), k + (k_at >> 4));
    }
    wgmma_commit();
  };
  auto multiply_p_v = [&] {
    const unsigned long long v = descriptor_across_k(v_at, Tiles::KEY_BOX);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < KEY_TILE / 16; ++step) Wgmma<PRECISION, VALUE_DIM>::template multiply_registers<true>(output, p[step], v + (step * 2048 >> 4));
    wgmma_commit();
  };
  auto score_tile = [&](const Tile& tile, int n) {
    const int row = tile.block.first_query + warp_row + lane / 4, column = n * KEY_TILE + lane % 4 * 2;
    if constexpr (Score<PRECISION, OPTIONS>::CHANGES) tile.score.template apply<false, 1, KEY_TILE>(problem, scores, row, column);
    if (tile.keys.need_mask(n)) tile.visible.template hide<false, 1, KEY_TILE>(scores, row, column, -infinity());
  };
  auto keep = [&](int n, int row, const float (&pair)[2]) { p[n / 2][n % 2 * 2 + row] = pack<PRECISION>(pair[0], pair[1]); };
  auto probabilities = [&] {   // after O is done: it may have to be rescaled
    softmax.raise(scores[0], exponential, [&](int row, float ratio) {
#pragma unroll
      for (int n = 0; n < VALUE_DIM / 8; ++n) output[n][2 * row] *= ratio, output[n][2 * row + 1] *= ratio;
    });
    softmax.take(scores[0], exponential, keep);
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
    softmax = OnlineSoftmax<KEY_TILE>();
    if constexpr ((OPTIONS & SINKS) != 0) softmax.start(Exp::shift_of_lse(*tile.block.place.template rows<float>(problem.sinks)), lane);
    total_shift[0] = total_shift[1] = -infinity();
    const int begin = uniform(tile.keys.begin), end = uniform(tile.keys.end);
    if (begin < end) {
      q_ring.wait_full(base + Tiles::Q_FULL);
      q_ring.advance();
      wait_k();
      multiply_q_k();
      const int k_read = k_ring.stage;
      k_ring.advance();
      if (begin + 1 < end) wait_k();
      wait_v(tile, begin);
      wgmma_wait<0>();
      pin(scores[0]);
      arrive(Tiles::K_EMPTY + 8 * k_read);
      if (begin + 1 == end) arrive(Tiles::Q_EMPTY);
      score_tile(tile, begin);
      probabilities();
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
        else arrive(Tiles::Q_EMPTY);
        wait_v(tile, n);
        score_tile(tile, n);
        wgmma_wait<0>();
        pin(output);
        arrive(Tiles::V_EMPTY + 8 * v_read);
        if ((OPTIONS & LONG_SUMS) != 0 && (n - begin) % SEGMENT == 0) {
          add_totals(n - begin > SEGMENT);
          take_totals();
        }
        if (ALWAYS_RAISE || !softmax.try_take(scores[0], exponential, keep)) probabilities();
        drop(tile, n);
      }
      multiply_p_v();
      wgmma_wait<0>();
      pin(output);
      arrive(Tiles::V_EMPTY + 8 * v_ring.stage);
      v_ring.advance();
      if ((OPTIONS & LONG_SUMS) != 0 && end - begin > SEGMENT) add_totals(true);
    }

    const Place& place = tile.block.place;
    const int row = warp_row + lane / 4, rows = tile.block.rows();
    const i64 first_row = tile.block.sequence.first_query + tile.block.first_query;
    float lse[2];
    finish_rows<OPTIONS>(problem, place, softmax, exponential, tile.block.first_query + row, tile.block.sequence.seeing(), output, lse);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (lane % 4 == 0 && row + half * 8 < rows) place.template rows<float>(problem.lse)[(first_row + row + half * 8) * problem.lse.row_stride] = lse[half];
    Element* out = place.template rows<Element>(problem.out) + first_row * problem.out.row_stride;
    store_output<PRECISION, VALUE_DIM>(output, out, problem.out.row_stride, row, rows, problem.out.columns, lane);
    __syncwarp();
    arrive(Tiles::TILE_EMPTY + 8 * tile_ring.stage);
  }
}
