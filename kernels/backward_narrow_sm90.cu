// Attention backward by wgmma and TMA, for sm_90a, float16 and bfloat16, for head dims up to 64: what is computed, and of which shapes, is in backward_sm90.cu. Here a
// third warpgroup makes dQ, and there are registers to begin with a tile before the one before it is done with.
//
// A block owns 128 keys of one key head and walks over the query tiles, of 64, that see any of them, for each of the heads_per_block query heads that share the key head.
//   Warpgroups 0 and 1 own 64 keys each: products are taken transposed, so that Pᵀ and dSᵀ pass from accumulators to the A operand of dV and dK in registers. Sᵀ of the
//     next tile is made beside the arithmetic on this one, so that a warpgroup waits for little but its own arithmetic.
//   Warpgroup 2 makes dQ of dSᵀ, which the others hand over through memory, and adds it to dq_sum in device memory by bulk reductions, in the order of its registers
//     (backward_finish_sm90 puts it in rows). One of its threads issues all loads.
//
// Shared memory (tiles of 64 columns x rows, 128 bytes a row, swizzled):
//   K | V | STAGES x Q | STAGES x dO | DS_STAGES x dSᵀ  128 keys x 64 | two slabs of dQ for each warp that makes it, float32 | STAGES x lse | STAGES x D | barriers
//   | BIAS_GRADIENT: of each warp, where its head's dBias begins | what the loads need to know of the block
//
// Order of waits, tile t, with Sᵀ(t) done: dO and D full -> dPᵀ issued -> Pᵀ, dV issued -> Q and lse (t + 1) full, Sᵀ(t + 1) issued -> dPᵀ done -> place for dSᵀ empty,
// dSᵀ into memory -> dK issued, dSᵀ full -> dV, dK and Sᵀ(t + 1) done, Q and dO empty.
// Warpgroup 2: dSᵀ full -> dQ issued and done, dSᵀ empty -> its slab has been read, dQ into it -> IN_ORDER the block's turn -> addition issued -> Q and dO of a tile
// before empty, those of another asked for.
#include "backward_sm90.cuh"
#include "bias_gradient_sm90.cuh"

template <int STAGES> struct BackwardNarrowSm90Tiles {
  static constexpr int WARPGROUPS = 2, KEY_TILE = WARPGROUPS * 64, THREADS = (WARPGROUPS + 1) * 128, COMPUTING_REGISTERS = 216, OTHER_REGISTERS = 72;
  static constexpr int KEY_BOX = KEY_TILE * 128, QUERY_BOX = 64 * 128, Q_BOXES = 1, V_BOXES = 1, Q_BYTES = QUERY_BOX, DO_BYTES = QUERY_BOX, ROW_BYTES = 64 * 4;
  static constexpr int DS_STAGES = 3, DS_BYTES = KEY_BOX, SLAB_BYTES = 16 * 64 * 4;
  static constexpr int K = 0, V = KEY_BOX, Q = V + KEY_BOX, DO = Q + STAGES * Q_BYTES, DS = DO + STAGES * DO_BYTES, SLAB = DS + DS_STAGES * DS_BYTES;
  static constexpr int LSE = SLAB + 2 * 4 * SLAB_BYTES, D = LSE + STAGES * ROW_BYTES, K_FULL = D + STAGES * ROW_BYTES, V_FULL = K_FULL + 8;
  static constexpr int Q_FULL = V_FULL + 8, Q_EMPTY = Q_FULL + 8 * STAGES, DO_FULL = Q_EMPTY + 8 * STAGES, DO_EMPTY = DO_FULL + 8 * STAGES;
  static constexpr int DS_FULL = DO_EMPTY + 8 * STAGES, DS_EMPTY = DS_FULL + 8 * DS_STAGES, BIAS = DS_EMPTY + 8 * DS_STAGES;
  static constexpr int BLOCK = BIAS + 8 * 4 * WARPGROUPS, BLOCK_BYTES = 128, SHARED_BYTES = BLOCK + BLOCK_BYTES;
  static_assert(STAGES > 1, "queries of two tiles are in use at a time");
};

// Loads: keys and values of the block, then queries with their lse and output gradients with their D, tile by tile of the walk.
template <typename Tiles, typename Block, int STAGES, bool IN_ORDER> struct BackwardLoader {
  const Problem& problem;
  const BackwardTensorMaps& maps;
  const Block& block;
  u32 base;
  Ring<STAGES> ring;
  int head = 0, step;

  __device__ __forceinline__ BackwardLoader(const Problem& problem, const BackwardTensorMaps& maps, const Block& block, u32 base) : problem(problem), maps(maps), block(block), base(base), step(block.first_tile) {}

  __device__ __forceinline__ void begin() {
    const int first_key = block.sequence.first_key + block.first_key;
    BoxPlace(problem.k, block.place).template load_rows<Tiles::Q_BOXES, Tiles::KEY_BOX>(maps.k, base + Tiles::K, first_key, base + Tiles::K_FULL);
    load_next([&] { BoxPlace(problem.v, block.place).template load_rows<Tiles::V_BOXES, Tiles::KEY_BOX>(maps.v, base + Tiles::V, first_key, base + Tiles::V_FULL); });   // the first scores do not wait for it
#pragma unroll 1
    for (int stage = 1; stage < STAGES; ++stage) load_next([] {});
  }

  // The next tile, if there is one, once its stage is empty; between() comes after its queries.
  template <typename Between> __device__ __forceinline__ void load_next(Between between) {
    if (head == problem.heads_per_block) return;
    Place place = block.place;
    place.head += head;
    const int tile = block.template tile_at<IN_ORDER>(step), row = block.sequence.first_query + tile * 64;
    const i64 padded_row = block.sequence.padded_row(problem, place) + tile * 64;
    ring.wait_empty(base + Tiles::Q_EMPTY);
    u32 full = base + Tiles::Q_FULL + 8 * ring.stage;
    BoxPlace(problem.q, place).template load_rows<Tiles::Q_BOXES, Tiles::QUERY_BOX>(maps.q, base + Tiles::Q + ring.stage * Tiles::Q_BYTES, row, full, Tiles::ROW_BYTES);
    load_bytes(base + Tiles::LSE + ring.stage * Tiles::ROW_BYTES, problem.row_lse + padded_row, Tiles::ROW_BYTES, full);
    between();
    ring.wait_empty(base + Tiles::DO_EMPTY);
    full = base + Tiles::DO_FULL + 8 * ring.stage;
    BoxPlace(problem.dout, place).template load_rows<Tiles::V_BOXES, Tiles::QUERY_BOX>(maps.dout, base + Tiles::DO + ring.stage * Tiles::DO_BYTES, row, full, Tiles::ROW_BYTES);
    load_bytes(base + Tiles::D + ring.stage * Tiles::ROW_BYTES, problem.row_d + padded_row, Tiles::ROW_BYTES, full);
    ring.advance();
    if (++step == block.last_tile) step = block.first_tile, ++head;
  }
};

template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int OPTIONS, int STAGES, bool IN_ORDER>
__global__ void __launch_bounds__(384, 1) backward_narrow_sm90(const __grid_constant__ Problem problem, const __grid_constant__ BackwardTensorMaps maps) {
  using Tiles = BackwardNarrowSm90Tiles<STAGES>;
  static_assert(HEAD_DIM == 64 && VALUE_DIM == 64, "tiles are one box wide");
  using Block = KeyBlock<OPTIONS, Tiles::KEY_TILE, 64>;
  static_assert(sizeof(Block) <= Tiles::BLOCK_BYTES && alignof(Block) <= 8, "");
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = shared_address(shared);
  const int warpgroup = uniform(threadIdx.x / 128);
  constexpr bool CLEARS = (OPTIONS & (PACKED | LENGTHS)) != 0;
  // Rows of a tile from `first` on hold other sequences, or what takes no part: a factor of 0 would not keep their NaN out. Each warpgroup clears them for itself.
  auto cleared = [&] {
    fence_for_async_proxy();
    named_barrier_sync(2 + warpgroup, 128);
  };

  make_barriers(maps, [&] {
    init_barriers_of_loads<Tiles, STAGES, STAGES>(base);
    init_ring(base, Tiles::DS_FULL, 8, Tiles::DS_EMPTY, 4, Tiles::DS_STAGES);
  });

  if (warpgroup == Tiles::WARPGROUPS) {
    give_registers<Tiles::OTHER_REGISTERS>();
    const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    const bool loads = threadIdx.x % 128 == 0;
    // What the loads need of the block is kept in shared memory: the warps that make dQ have few registers.
    const Block& kept_block = *(const Block*)(shared + Tiles::BLOCK);
    BackwardLoader<Tiles, Block, STAGES, IN_ORDER> loader(problem, maps, kept_block, base);
    int first_tile, last_tile;
    float* dq_rows;
    Turns<64, Block, IN_ORDER> turns(4 * warp);
    {
      const Block block(problem, blockIdx.x);
      first_tile = block.first_tile, last_tile = block.last_tile;
      if (!block.exists() || first_tile >= last_tile) return;   // nobody would wait for the keys, and the block might end before they are there
      if (loads) {
        *(Block*)(shared + Tiles::BLOCK) = block;
        keep_memory_here();
        loader.begin();
      }
      dq_rows = problem.dq_sum + block.sequence.padded_row(problem, block.place) * HEAD_DIM + warp * (Tiles::SLAB_BYTES / 4);
      turns.begin(problem, block);
      barrier_wait(base + Tiles::K_FULL, 0);
      if constexpr (CLEARS) {
        const int keys = block.sequence.seen() - block.first_key;
        if (keys < Tiles::KEY_TILE) {
          clear_rows(base + Tiles::K, Tiles::Q_BOXES, Tiles::KEY_BOX, max(keys, 0));
          cleared();
        }
      }
    }
    Ring<Tiles::DS_STAGES> ds_ring;
    const u32 slabs = base + Tiles::SLAB + warp * Tiles::SLAB_BYTES;
    int slab_stage = 0;
#pragma unroll 1
    for (int head = 0; head < problem.heads_per_block; ++head, dq_rows += (i64)problem.padded_queries * HEAD_DIM, turns.next_head(problem)) {
#pragma unroll 1
      for (int step = first_tile; step < last_tile; ++step) {
        const int tile = IN_ORDER ? first_tile + last_tile - 1 - step : step;
        ds_ring.wait_full(base + Tiles::DS_FULL);
        float dq[8][4];
        multiply_columns<PRECISION, 64, Tiles::KEY_TILE, Tiles::KEY_BOX, Tiles::KEY_BOX>(dq, uniform(base + Tiles::DS + ds_ring.stage * Tiles::DS_BYTES), uniform(base + Tiles::K));
        wgmma_wait<0>();
        pin(dq);
        if (lane == 0) {
          barrier_arrive(base + Tiles::DS_EMPTY + 8 * ds_ring.stage);
          wait_until_read<1>();   // what was in the slab before; the other one's may be under way
        }
        __syncwarp();
        const u32 slab = slabs + slab_stage * 4 * Tiles::SLAB_BYTES;
        slab_stage ^= 1;
#pragma unroll
        for (int n = 0; n < 8; ++n)   // a warp's registers in their order
          store_shared_16_bytes(slab + (n * 32 + lane) * 16, make_uint4(__float_as_uint(dq[n][0]), __float_as_uint(dq[n][1]), __float_as_uint(dq[n][2]), __float_as_uint(dq[n][3])));
        fence_for_async_proxy();
        __syncwarp();
        if (lane == 0) {
          turns.wait(tile);
          reduce_add_bytes(dq_rows + (i64)tile * (64 * HEAD_DIM), slab, Tiles::SLAB_BYTES);
        }
        ds_ring.advance();
        if (loads) loader.load_next([] {});
        __syncwarp();
      }
    }
    if (lane == 0) turns.end(), wait_until_read<0>();   // before the memory is another block's
    return;
  }

  take_registers<Tiles::COMPUTING_REGISTERS>();
  const Block block(problem, blockIdx.x);
  if (!block.exists()) return;
  const int lane = threadIdx.x % 32, key_row = warpgroup * 64 + threadIdx.x % 128 / 32 * 16;
  auto arrive = [&](int barrier) { if (lane == 0) barrier_arrive(base + barrier); };

  const Exponential<PRECISION> exponential(problem);
  Ring<STAGES> q_ring, do_ring;   // the former is a tile ahead at the end of one
  Ring<Tiles::DS_STAGES> ds_ring;
  float dk[HEAD_DIM / 8][4] = {}, dv[VALUE_DIM / 8][4] = {};
  using Scores = float[1][8][4];
  Scores even, odd;   // of every other tile

  auto multiply_k_q = [&](Scores& s) {   // Sᵀ = K Qᵀ
    multiply_rows<PRECISION, 64, HEAD_DIM, Tiles::KEY_BOX, Tiles::QUERY_BOX>(s[0], base + Tiles::K + warpgroup * 64 * 128, uniform(base + Tiles::Q + q_ring.stage * Tiles::Q_BYTES));
  };
  if (block.first_tile < block.last_tile) {
    barrier_wait(base + Tiles::K_FULL, 0);
    if constexpr (CLEARS) {
      barrier_wait(base + Tiles::V_FULL, 0);
      const int keys = block.sequence.seen() - block.first_key;
      if (keys < Tiles::KEY_TILE) {
        clear_rows(base + Tiles::K, Tiles::Q_BOXES, Tiles::KEY_BOX, max(keys, 0));
        clear_rows(base + Tiles::V, Tiles::V_BOXES, Tiles::KEY_BOX, max(keys, 0));
        cleared();
      }
    }
    q_ring.wait_full(base + Tiles::Q_FULL);
    multiply_k_q(even);
    barrier_wait(base + Tiles::V_FULL, 0);
    wgmma_wait<0>();
    pin(even[0]);
  }

  using BiasGradient = ::BiasGradient<PRECISION, OPTIONS>;
  BiasGradient bias_gradient{base + Tiles::BIAS + threadIdx.x / 32 * 8};
  Place place = block.place;
  Score<PRECISION, OPTIONS> score(problem, place, block.sequence);
  int step = block.first_tile, heads_left = problem.heads_per_block;
  if constexpr ((OPTIONS & BIAS_GRADIENT) != 0) bias_gradient.begin_head(problem, place, block.sequence);

  // A tile, whose Sᵀ is in `p`. The answer is whether there is another, whose Sᵀ is in `next` then.
  auto go_on = [&](Scores& p, Scores& next) {
    const int tile = block.template tile_at<IN_ORDER>(step), queries = block.sequence.seeing() - tile * 64, first_query = tile * 64;
    const int lane_key = block.first_key + key_row + lane / 4, lane_query = first_query + lane % 4 * 2;
    const u32 q_at = uniform(base + Tiles::Q + q_ring.stage * Tiles::Q_BYTES), do_at = uniform(base + Tiles::DO + do_ring.stage * Tiles::DO_BYTES);
    const u32 lse_at = base + Tiles::LSE + q_ring.stage * Tiles::ROW_BYTES + lane % 4 * 8, d_at = base + Tiles::D + do_ring.stage * Tiles::ROW_BYTES + lane % 4 * 8;

    do_ring.wait_full(base + Tiles::DO_FULL);
    if (CLEARS && queries < 64) {   // Sᵀ of these rows is hidden below, whatever it is
      clear_rows(q_at, Tiles::Q_BOXES, Tiles::QUERY_BOX, max(queries, 0));
      clear_rows(do_at, Tiles::V_BOXES, Tiles::QUERY_BOX, max(queries, 0));
      cleared();
    }
    float dp[8][4];
    multiply_rows<PRECISION, 64, VALUE_DIM, Tiles::KEY_BOX, Tiles::QUERY_BOX>(dp, base + Tiles::V + warpgroup * 64 * 128, do_at);   // dPᵀ = V dOᵀ
    pin(p[0]);

    float derivative[1][8][4];   // of the softcap
    if constexpr ((OPTIONS & SOFTCAP) != 0) {
      score.template apply<true, 1, 64>(problem, p, lane_key, lane_query, derivative);
      if constexpr (CLEARS)
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) derivative[0][n][i] = fmaxf(derivative[0][n][i], 0.0f);   // the scores of what takes no part may be NaN, which times 0 would come back
    } else if constexpr (Score<PRECISION, OPTIONS>::CHANGES) {
      score.template apply<true, 1, 64>(problem, p, lane_key, lane_query, nullptr);
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      u32 lse[2];
      load_shared(lse[0], lse[1], lse_at + n * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) p[0][n][i] = exponential(p[0][n][i], __uint_as_float(lse[i % 2]));
    }
    if constexpr ((OPTIONS & DROPOUT) != 0)   // a probability that is dropped carries a minus sign from here on
      Dropout{(u32)place.flat(problem), (u32)block.sequence.index}.template drop<true, 1, 64>(
          problem, lane_key, lane_query, [&](int m, int n, int half, int i) { p[m][n][2 * half + i] = -p[m][n][2 * half + i]; });
    if (first_query < block.visible.query_begin(block.first_key + Tiles::KEY_TILE - 1) || first_query + 64 > block.visible.query_end(block.first_key))
      block.visible.template hide<true, 1, 64>(p, lane_key, lane_query, 0.0f);

    u32 words[4][4];
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float weight[2] = {p[0][n][2 * half], p[0][n][2 * half + 1]};
        if constexpr ((OPTIONS & DROPOUT) != 0) weight[0] = fmaxf(weight[0], 0.0f), weight[1] = fmaxf(weight[1], 0.0f);
        words[n / 2][n % 2 * 2 + half] = pack<PRECISION>(weight[0], weight[1]);
      }
    multiply_words<PRECISION, VALUE_DIM, Tiles::QUERY_BOX>(dv, words, do_at);   // dV += Pᵀ dO

    // Branches around products would make the compiler wait for those under way. So the last tile takes Sᵀ of the tile after it from whatever lies there; it is not used.
    const bool ends = ++step == block.last_tile, more = !ends || heads_left > 1;
    q_ring.advance();
    if (more) q_ring.wait_full(base + Tiles::Q_FULL);
    multiply_k_q(next);

    wgmma_wait<2>();
    pin(dp);
    u32 ds[4][4];
    const u32 ds_at = base + Tiles::DS + ds_ring.stage * Tiles::DS_BYTES + (key_row + lane / 4) * 128 + lane % 4 * 4;
    ds_ring.wait_empty(base + Tiles::DS_EMPTY);
    constexpr bool ADDS_TO_BIAS = (OPTIONS & BIAS_GRADIENT) != 0 && !(OPTIONS & BIAS_UNSHARED);
    typename BiasGradient::Tile bias_tile;
    if constexpr (ADDS_TO_BIAS) bias_tile = {problem, bias_gradient, block.sequence, lane_key, lane_query};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      u32 d[2];
      load_shared(d[0], d[1], d_at + n * 32);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) x[i] = gradient_of_score<OPTIONS>(problem, p[0][n][2 * half + i], dp[n][2 * half + i], __uint_as_float(d[i]));
        if constexpr (ADDS_TO_BIAS) bias_gradient.take(problem, bias_tile, n, half, x);
        if constexpr ((OPTIONS & SOFTCAP) != 0) x[0] *= derivative[0][n][2 * half], x[1] *= derivative[0][n][2 * half + 1];
        const u32 word = ds[n / 2][n % 2 * 2 + half] = pack<PRECISION>(x[0], x[1]);
        store_shared(ds_at + half * 8 * 128 + ((n ^ lane / 4) << 4), word);
      }
    }
    multiply_words<PRECISION, HEAD_DIM, Tiles::QUERY_BOX>(dk, ds, q_at);   // dK += dSᵀ Q
    if constexpr ((OPTIONS & BIAS_UNSHARED) != 0) BiasGradient::write(problem, {problem, bias_gradient, block.sequence, lane_key, lane_query}, ds);
    fence_for_async_proxy();
    __syncwarp();
    arrive(Tiles::DS_FULL + 8 * ds_ring.stage);
    ds_ring.advance();
    wgmma_wait<0>();
    pin(dv);
    pin(dk);
    pin(next[0]);
    arrive(Tiles::Q_EMPTY + 8 * do_ring.stage);
    arrive(Tiles::DO_EMPTY + 8 * do_ring.stage);
    do_ring.advance();

    if (ends) {
      if constexpr ((OPTIONS & BIAS_GRADIENT) != 0) bias_gradient.end_head(block.sequence, block.first_key + key_row + lane / 4);
      if (--heads_left == 0) return false;
      ++place.head;
      score = Score<PRECISION, OPTIONS>(problem, place, block.sequence);
      step = block.first_tile;
      if constexpr ((OPTIONS & BIAS_GRADIENT) != 0) bias_gradient.begin_head(problem, place, block.sequence);
    }
    return true;
  };
  if (block.first_tile < block.last_tile)
    while (go_on(even, odd) && go_on(odd, even)) {}

  named_barrier_sync(2 + warpgroup, 128);   // all are done with the values of the warpgroup, in whose place rows are put together
  const int row = key_row + lane / 4;
  const u32 scratch = base + Tiles::V + key_row * 128;
  store_key_gradient<PRECISION, OPTIONS>(problem, block, problem.dk, dk, problem.scale, row, lane, scratch);
  store_key_gradient<PRECISION, OPTIONS>(problem, block, problem.dv, dv, OPTIONS & DROPOUT ? problem.keep_inverse : 1.0f, row, lane, scratch);
}
