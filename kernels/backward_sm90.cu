// Attention backward by wgmma and TMA, for sm_90a, float16 and bfloat16: dK and dV, and what each key block adds to dQ; IN_ORDER: so that the sum has the
// same bits on every run; MAKES_DQ: and dQ itself; BIAS_GRADIENT: and dBias (bias_gradient_sm90.cuh). After
// FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608) and its sources' order of products.
//
//   P = exp(scores(Q Kᵀ) - lse),  dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ - D) with D = rowsum(dO ∘ O) - dlse,  dK = scale · dSᵀ Q,  dQ = scale · dS K
//   Q, dQ (batch, heads, queries, HEAD_DIM), dO (.., queries, VALUE_DIM), K, dK (.., keys, HEAD_DIM), V, dV (.., keys, VALUE_DIM); options as in backward_sm80.cu
//
// A block owns 128 keys of one key head and walks over the query tiles that see any of them, for each of the heads_per_block query heads that share the key
// head. Warpgroups 0 and 1 own 64 keys each: products are taken transposed, Sᵀ = K Qᵀ and dPᵀ = V dOᵀ, so that Pᵀ and dSᵀ pass from accumulators to
// the A operand of dV and dK in registers. dQ sums over keys: dSᵀ is shared through memory, and each warpgroup makes half of a tile's dQ, one tile later,
// and adds it to dq_sum in device memory, in the order of its registers (backward_finish_sm90 puts it in rows). A thread of warpgroup 2 issues all copies, or two do
// (TWO_LOAD); IN_ORDER two more see to it that dQ is added when it is the block's turn. CUT: some key blocks are cut into pieces (KeyBlock), of which the last to come has
// the sum of their dK and dV (sum_of_pieces). Another thread of warpgroup 2 tells backward_finish_sm90 of what has been added (tell_of_heads), and one of its warps clears
// sums of dQ of a later head (clear_sums_ahead).
//
// MAKES_DQ, for short sequences, where clearing the sums and a pass over them at the end are a good part of the time: the blocks of a grid that fits on the GPU take
// key blocks one after the other (key_blocks_sm90.cuh). The first key block that comes to a query tile stores its part of the sum, which nobody has to clear; the last
// one keeps its part, waits for the sum of the others, which is then in L2, and writes dQ. Two threads of warpgroup 2 find out which ones these are.
//
// The scores of AT_ONCE queries are in registers: of a whole tile, or where options need registers, of one of its parts after the other.
//
// Shared memory (tiles of 64 columns x rows, 128 bytes a row, swizzled):
//   K, MAKES_DQ of two key blocks | V | Q_STAGES x Q | DO_STAGES x dO | DS_STAGES x dSᵀ  128 keys x QUERY_TILE | SLABS: dQ of each warp, float32 | Q_STAGES x lse | DO_STAGES x D | barriers
//   | BIAS_GRADIENT: of each warp, where its head's dBias begins | with which tile the walk begins, and HALVES: whether the second warpgroup begins a tile later | GradientRows, or MAKES_DQ: barriers, two KeyBlockSlots
//
// Order of waits, tile t, with Sᵀ(t) done: dO and D full -> dPᵀ issued -> Pᵀ, dV issued -> dPᵀ done -> place for dSᵀ empty, dSᵀ into memory -> dK issued ->
// dV done, dO empty, dSᵀ full -> dSᵀ(t - 1) full, its dQ issued -> dK done, Q empty -> Q and lse (t + 1) full, Sᵀ(t + 1) issued -> dQ(t - 1) done and added, its dSᵀ empty
// -> Sᵀ(t + 1) done. IN_ORDER, where dQ is added: of 128 queries, slabs empty, dQ into them, and full; of 64, what a warp added before has come about, turn.
// MAKES_DQ: turn -> added; where dQ is made, turn -> sum loaded -> place for dSᵀ empty; and around a key block: slot full -> .. -> V empty -> K empty -> turn, of the
// last tile -> place for dSᵀ empty (dK and dV go through it) -> slot empty -> turn, of the next one's first tile.
// In parts: the first waits for dO and D. After each but the last: dV and dK done, Sᵀ of the next part issued and done. The last hands on what the tile took, dK done.
#include "backward_sm90.cuh"
#include "bias_gradient_sm90.cuh"
#include "key_blocks_sm90.cuh"

template <int HEAD_DIM, int VALUE_DIM, int QUERY_TILE, int AT_ONCE, int Q_STAGES, int DO_STAGES, bool IN_ORDER, bool MAKES_DQ> struct BackwardSm90Tiles {
  static constexpr int PARTS = QUERY_TILE / AT_ONCE;
  static constexpr int WARPGROUPS = 2, KEY_TILE = WARPGROUPS * 64, THREADS = (WARPGROUPS + 1) * 128, LOADING_REGISTERS = 24, COMPUTING_REGISTERS = 240;
  static constexpr int KEY_BOX = KEY_TILE * 128, QUERY_BOX = QUERY_TILE * 128, Q_BOXES = HEAD_DIM / 64, V_BOXES = VALUE_DIM / 64, DS_BOXES = QUERY_TILE / 64;
  static constexpr int Q_BYTES = Q_BOXES * QUERY_BOX, DO_BYTES = V_BOXES * QUERY_BOX, DS_BYTES = DS_BOXES * KEY_BOX, ROW_BYTES = QUERY_TILE * 4;
  static constexpr int DS_STAGES = 3;   // with two the warpgroups would walk in step
  // How dQ is added: wgmma of 64 columns leave too little of the shared memory's time for threads that add from registers, which MAKES_DQ are the faster ones all the
  // same; and in order, of 128 queries, it is not done by warps that compute, as each tile has to wait for the key block before.
  static constexpr bool SLABS = !MAKES_DQ && (IN_ORDER || QUERY_TILE == 64);
  // Queries and output gradients have a loader each, but of tiles of 64, where warps send their slabs too and one is faster, and in order, as the other warps are taken.
  static constexpr bool TWO_LOAD = !SLABS && !MAKES_DQ;
  static constexpr bool HALVES = QUERY_TILE == 64 && !MAKES_DQ;   // the keys of the second warpgroup may be seen by a tile less
  static constexpr int K_STAGES = MAKES_DQ ? 2 : 1, K_BYTES = Q_BOXES * KEY_BOX;   // the keys of the next block come while dK and dV of this one are written
  static constexpr int K = 0, V = K_STAGES * K_BYTES, Q = V + V_BOXES * KEY_BOX, DO = Q + Q_STAGES * Q_BYTES, DS = DO + DO_STAGES * DO_BYTES, SLAB = DS + DS_STAGES * DS_BYTES;
  static constexpr int SLAB_BYTES = 16 * 64 * 4, LSE = SLAB + SLABS * WARPGROUPS * 4 * SLAB_BYTES, D = LSE + Q_STAGES * ROW_BYTES, K_FULL = D + DO_STAGES * ROW_BYTES, V_FULL = K_FULL + 8 * K_STAGES;
  static constexpr int Q_FULL = V_FULL + 8, Q_EMPTY = Q_FULL + 8 * Q_STAGES, DO_FULL = Q_EMPTY + 8 * Q_STAGES, DO_EMPTY = DO_FULL + 8 * DO_STAGES;
  static constexpr int DS_FULL = DO_EMPTY + 8 * DO_STAGES, DS_EMPTY = DS_FULL + 8 * DS_STAGES;
  static constexpr int SLAB_FULL = DS_EMPTY + 8 * DS_STAGES, SLAB_EMPTY = SLAB_FULL + 8 * WARPGROUPS, BIAS = SLAB_EMPTY + 8 * WARPGROUPS, BEGIN = BIAS + 8 * 4 * WARPGROUPS, SKIPS = BEGIN + 4;
  static constexpr int ROWS_FOUND = BEGIN + 8, ROWS = ROWS_FOUND + 8, ALL_ADDED = SLAB_FULL;   // without order: a warpgroup has added all it had to dQ
  // MAKES_DQ: more barriers, and what is known of two key blocks.
  static constexpr int K_EMPTY = ROWS, V_EMPTY = K_EMPTY + 8 * K_STAGES, TURN = MAKES_DQ ? V_EMPTY + 8 : ROWS + sizeof(GradientRows), ADDED = TURN + 16 * WARPGROUPS;
  static constexpr int SLOT_FULL = ADDED + 16 * WARPGROUPS, SLOT_EMPTY = SLOT_FULL + 16, WANTED = SLOT_EMPTY + 16, ROLES = WANTED + 8, SLOTS = ROLES + 8 * WARPGROUPS;
  // Where warps send their slabs in order, more barriers.
  static constexpr bool WARPS_IN_ORDER = IN_ORDER && !MAKES_DQ && QUERY_TILE == 64;
  static constexpr int TOLD = ADDED + 16, SHARED_BYTES = MAKES_DQ ? SLOTS + 2 * SLOT_BYTES : WARPS_IN_ORDER ? TOLD + 16 : ROWS + sizeof(GradientRows);
  // dQ of a tile: its queries are halved among the warpgroups, or if there are only 64, its columns.
  static constexpr int DQ_COLUMNS = QUERY_TILE == 128 ? HEAD_DIM : HEAD_DIM / 2;
  static_assert(QUERY_TILE % AT_ONCE == 0 && AT_ONCE % 32 == 0 && (QUERY_TILE == 128 || QUERY_TILE == 64) && HEAD_DIM % 64 == 0 && VALUE_DIM % 64 == 0 && DQ_COLUMNS == 64, "operands are whole boxes, and dQ is a slab for each warpgroup");
};

template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int OPTIONS, int QUERY_TILE, int AT_ONCE, int Q_STAGES, int DO_STAGES, bool IN_ORDER, bool MAKES_DQ, bool CUT = false>
__global__ void __launch_bounds__(384, 1) backward_sm90(const __grid_constant__ Problem problem, const __grid_constant__ BackwardTensorMaps maps) {
  using Tiles = BackwardSm90Tiles<HEAD_DIM, VALUE_DIM, QUERY_TILE, AT_ONCE, Q_STAGES, DO_STAGES, IN_ORDER, MAKES_DQ>;
  static_assert(!CUT || (!IN_ORDER && !(OPTIONS & (WINDOW | PACKED | BIAS_GRADIENT))), "");
  using Block = KeyBlock<OPTIONS, Tiles::KEY_TILE, QUERY_TILE, IN_ORDER && !MAKES_DQ, CUT>;
  using Slot = KeyBlockSlot<Block>;
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = shared_address(shared);
  const int warpgroup = uniform(threadIdx.x / 128);

  make_barriers([&] {
    init_barriers_of_loads<Tiles, Q_STAGES, DO_STAGES>(base);
    init_ring(base, Tiles::DS_FULL, 8, Tiles::DS_EMPTY, 8, Tiles::DS_STAGES);
    init_ring(base, Tiles::SLAB_FULL, 4, Tiles::SLAB_EMPTY, 1, Tiles::WARPGROUPS);
    begin_walk<Tiles>(problem, base);
    if constexpr (Tiles::WARPS_IN_ORDER) init_barriers_of_turns<Tiles>(base, 8);
    if constexpr (MAKES_DQ) {
      barrier_init(base + Tiles::K_FULL + 8, 1);
      barrier_init(base + Tiles::K_EMPTY, 8), barrier_init(base + Tiles::K_EMPTY + 8, 8);
      barrier_init(base + Tiles::V_EMPTY, 8);
      init_ring(base, Tiles::TURN, 1, Tiles::ADDED, 4, 2 * Tiles::WARPGROUPS);
      init_ring(base, Tiles::SLOT_FULL, 1, Tiles::SLOT_EMPTY, 3 + 8, 2);
      barrier_init(base + Tiles::WANTED, 1);
    }
  });

  if (warpgroup == Tiles::WARPGROUPS) {
    give_registers<Tiles::LOADING_REGISTERS>();
    const int warp = uniform(threadIdx.x / 32 % 4);
    if constexpr (!MAKES_DQ) {
      if (warp == 3 && threadIdx.x % 32 == 0) find_gradient_rows<PRECISION, Tiles, Block>(problem, shared, base);
      if (warp == 3 && problem.clearing_blocks) clear_sums_ahead<HEAD_DIM, Block>(problem);
    }
    if (threadIdx.x % 32) return;
    if constexpr (MAKES_DQ) {
      static_assert(Q_STAGES == 2 && DO_STAGES == 2, "");
      if (warp == 3) {
        take_key_blocks<PRECISION, Tiles, Block>(problem, shared, base);
      } else if (warp == 0) {
        KeyBlockLoader<Tiles, Block, QUERY_TILE> loader;
        follow_key_blocks<Block, Tiles>(shared, base, [&](Slot& slot) {
          loader.load(problem, maps, slot, base);
          barrier_arrive(base + Tiles::WANTED);
        });
      } else {
        TurnTaker<Tiles, Block, QUERY_TILE> turns;
        follow_key_blocks<Block, Tiles>(shared, base, [&](const Slot& slot) { turns.take(problem, slot, warp - 1, base); });
      }
    } else {
      let_next_kernel_begin();   // which waits for what it needs
      if (!IN_ORDER && warp == 2) tell_of_heads<Block>(problem, [&] { barrier_wait(base + Tiles::ALL_ADDED, 0), barrier_wait(base + Tiles::ALL_ADDED + 8, 0); });
      if (warp == 0) load_for_key_block<Tiles, Block, QUERY_TILE, Q_STAGES, DO_STAGES, IN_ORDER, true, !Tiles::TWO_LOAD>(problem, maps, base);
      if (Tiles::TWO_LOAD && warp == 1) load_for_key_block<Tiles, Block, QUERY_TILE, Q_STAGES, DO_STAGES, IN_ORDER, false, true>(problem, maps, base);
      if constexpr (Tiles::WARPS_IN_ORDER) {
        if (warp == 1) give_turns<Tiles, QUERY_TILE, Block, true>(problem, base);
        if (warp == 2) tell_of_turns<Tiles, QUERY_TILE, Block, true>(problem, base);
      } else if (IN_ORDER && (warp == 1 || warp == 2)) {   // adds what a warpgroup leaves of dQ in its slabs
        constexpr int BYTES = 4 * Tiles::SLAB_BYTES;
        const int part = warp - 1;
        Ring<1> slab_ring;
        take_turns<QUERY_TILE, Block>(problem, part, [&](u32 row, auto wait, auto done) {
          slab_ring.wait_full(base + Tiles::SLAB_FULL + 8 * part);
          wait();
          reduce_add_bytes(dq_sum_row(problem, row, HEAD_DIM) + part * (BYTES / 4), base + Tiles::SLAB + part * BYTES, BYTES);
          wait_until_read();
          barrier_arrive(base + Tiles::SLAB_EMPTY + 8 * part);
          slab_ring.advance();
          wait_until_added();
          done();
        });
        tell_of_heads<Block>(problem, [] {});
      }
    }
    return;
  }

  take_registers<Tiles::COMPUTING_REGISTERS>();
  const Block only(problem, blockIdx.x);   // not MAKES_DQ; here, as further down registers are fewer
  if (!MAKES_DQ && !only.exists()) return;
  const int lane = threadIdx.x % 32, key_row = warpgroup * 64 + threadIdx.x % 128 / 32 * 16;
  constexpr bool CLEARS = (OPTIONS & (PACKED | LENGTHS)) != 0;
  auto arrive = [&](int barrier) { if (lane == 0) barrier_arrive(base + barrier); };
  // Rows of a tile from `first` on hold other sequences, or what takes no part: a factor of 0 would not keep their NaN out. Each warpgroup clears them for itself.
  auto cleared = [&] {
    fence_for_async_proxy();
    named_barrier_sync(2 + warpgroup, 128);
  };

  Ring<Q_STAGES> q_ring;
  Ring<DO_STAGES> do_ring;
  Ring<Tiles::DS_STAGES> ds_ring, dq_ring;
  Ring<1> slab_ring;
  Ring<2> turn_ring;

  // All of one key block; `slot`: where it is from, or null.
  auto make_gradients = [&](const Block& block, const Slot* slot) {
    const int first_tile = MAKES_DQ ? uniform(block.first_tile) : block.first_tile, last_tile = MAKES_DQ ? uniform(block.last_tile) : block.last_tile;
    const u32 count = MAKES_DQ ? uniform(slot->count) : 0, k_stage = count % 2;   // of key blocks before this one
    u32 keys = base + Tiles::K + k_stage * Tiles::K_BYTES;
    if constexpr (MAKES_DQ) keep_here(keys);   // what else is added to base is not kept from one key block to the next
    const Exponential<PRECISION> exponential(problem);
    float dk[HEAD_DIM / 8][4] = {}, dv[VALUE_DIM / 8][4] = {}, p[1][AT_ONCE / 8][4];

    auto multiply_k_q = [&](int part, bool exists = true) {   // Sᵀ = K Qᵀ, or of keys alone
      multiply_rows<PRECISION, AT_ONCE, HEAD_DIM, Tiles::KEY_BOX, Tiles::QUERY_BOX>(p[0], keys + warpgroup * 64 * 128, uniform(exists ? base + Tiles::Q + q_ring.stage * Tiles::Q_BYTES : keys) + part * AT_ONCE * 128);
    };
    using BiasGradient = ::BiasGradient<PRECISION, OPTIONS>;
    BiasGradient bias_gradient{base + Tiles::BIAS + threadIdx.x / 32 * 8};
    // Where registers allow, at head dim 128: accumulators begin with D and -V dOᵀ is added, so that D has no registers of its own while dSᵀ is made. In these are
    // the places where a thread stores its dSᵀ, worked out once.
    constexpr bool FROM_D = AT_ONCE == 64 && QUERY_TILE == 64 && !MAKES_DQ && !(OPTIONS & (SOFTCAP | BIAS | DROPOUT));
    u32 ds_places[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      ds_places[n] = (key_row + lane / 4) * 128 + ((n ^ lane / 4) << 4) + lane % 4 * 4;
      if constexpr (FROM_D) keep_here(ds_places[n]);
    }
    // From Sᵀ of a part of a tile to dV and dK, which of a whole tile is still under way at the end. After the last part all threads have written theirs of dSᵀ, but
    // not waited for those of the others.
    auto gradients_of_keys = [&](const Place& place, const Score<PRECISION, OPTIONS>& score, int tile, int part) {
      const int before = part * AT_ONCE, rows_before = before * 128;   // queries of the tile, and bytes of a box, before those of the part
      const int first_query = tile * QUERY_TILE + before, queries = block.sequence.seeing() - tile * QUERY_TILE;
      int lane = threadIdx.x % 32;
      if constexpr ((OPTIONS & (DROPOUT | BIAS | BIAS_GRADIENT)) != 0) keep_here(lane);   // registers are short
      const u32 q_at = uniform(base + Tiles::Q + q_ring.stage * Tiles::Q_BYTES), do_at = uniform(base + Tiles::DO + do_ring.stage * Tiles::DO_BYTES);
      const u32 lse_at = base + Tiles::LSE + q_ring.stage * Tiles::ROW_BYTES + lane % 4 * 8, d_at = base + Tiles::D + do_ring.stage * Tiles::ROW_BYTES + lane % 4 * 8;
      const int lane_key = block.first_key + key_row + lane / 4, lane_query = first_query + lane % 4 * 2;

      if (part == 0) do_ring.wait_full(base + Tiles::DO_FULL);
      if (CLEARS && part == 0 && queries < QUERY_TILE) {   // Sᵀ of these rows is hidden below, whatever it is
        clear_rows(q_at, Tiles::Q_BOXES, Tiles::QUERY_BOX, max(queries, 0));
        clear_rows(do_at, Tiles::V_BOXES, Tiles::QUERY_BOX, max(queries, 0));
        cleared();
      }
      u32 derivative[AT_ONCE / 8][2];   // of the softcap, halves: in float32 they would not fit
      if constexpr ((OPTIONS & SOFTCAP) != 0) {   // nor beside dPᵀ
        float of_scores[1][AT_ONCE / 8][4];
        score.template apply<true, 1, AT_ONCE>(problem, p, lane_key, lane_query, of_scores);
#pragma unroll
        for (int n = 0; n < AT_ONCE / 8; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            u32& pair = derivative[n][half] = pack<FLOAT16>(of_scores[0][n][2 * half], of_scores[0][n][2 * half + 1]);
            if constexpr (CLEARS) asm("max.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(0));   // the scores of what takes no part may be NaN, which times 0 would come back
          }
      }
      float dp[AT_ONCE / 8][4];   // dPᵀ = V dOᵀ, or FROM_D, D - dPᵀ
      if constexpr (FROM_D) {
#pragma unroll
        for (int n = 0; n < AT_ONCE / 8; ++n) {
          load_shared(dp[n][0], dp[n][1], d_at + n * 32);
          dp[n][2] = dp[n][0], dp[n][3] = dp[n][1];
        }
        pin(dp);
        subtract_rows<PRECISION, AT_ONCE, VALUE_DIM, Tiles::KEY_BOX, Tiles::QUERY_BOX>(dp, base + Tiles::V + warpgroup * 64 * 128, do_at);
      } else {
        multiply_rows<PRECISION, AT_ONCE, VALUE_DIM, Tiles::KEY_BOX, Tiles::QUERY_BOX>(dp, base + Tiles::V + warpgroup * 64 * 128, do_at + rows_before);
      }
      pin(p[0]);

      if constexpr (Score<PRECISION, OPTIONS>::CHANGES && !(OPTIONS & SOFTCAP)) score.template apply<true, 1, AT_ONCE>(problem, p, lane_key, lane_query, nullptr);
      u32 lse[AT_ONCE / 8][2];   // all of them are asked for before the first is used
#pragma unroll
      for (int n = 0; n < AT_ONCE / 8; ++n) load_shared(lse[n][0], lse[n][1], lse_at + before * 4 + n * 32);
#pragma unroll
      for (int n = 0; n < AT_ONCE / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) p[0][n][i] = exponential(p[0][n][i], __uint_as_float(lse[n][i % 2]));
      if (first_query < block.visible.query_begin(block.first_key + Tiles::KEY_TILE - 1) || first_query + AT_ONCE > block.visible.query_end(block.first_key))
        block.visible.template hide<true, 1, AT_ONCE>(p, lane_key, lane_query, 0.0f);
      if constexpr ((OPTIONS & DROPOUT) != 0)   // a probability that is dropped carries a minus sign from here on
        Dropout{(u32)place.flat(problem), (u32)block.sequence.index}.template drop<true, 1, AT_ONCE>(
            problem, lane_key, lane_query, [&](int m, int n, int half, int i) { p[m][n][2 * half + i] = -p[m][n][2 * half + i]; });

      // dV += Pᵀ dO, up to 64 queries at once: the first of them beside the arithmetic on dS, and if there are more, those after it, for want of registers.
      constexpr int SHARE = AT_ONCE < 64 ? AT_ONCE : 64;
      u32 words[AT_ONCE / SHARE][SHARE / 16][4];
      auto multiply_p_do = [&](int share) {
#pragma unroll
        for (int n = 0; n < SHARE / 8; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float weight[2] = {p[0][share * 8 + n][2 * half], p[0][share * 8 + n][2 * half + 1]};
            if constexpr ((OPTIONS & DROPOUT) != 0) weight[0] = fmaxf(weight[0], 0.0f), weight[1] = fmaxf(weight[1], 0.0f);
            words[share][n / 2][n % 2 * 2 + half] = pack<PRECISION>(weight[0], weight[1]);
          }
        multiply_words<PRECISION, VALUE_DIM, Tiles::QUERY_BOX>(dv, words[share], do_at + rows_before + share * 64 * 128);
      };
      multiply_p_do(0);

      wgmma_wait<1>();
      pin(dp);
      u32 ds[AT_ONCE / 16][4], d[AT_ONCE / 8][2];
      const u32 ds_at = base + Tiles::DS + ds_ring.stage * Tiles::DS_BYTES + before / 64 * Tiles::KEY_BOX;
      int swizzle = (lane / 4 ^ before % 64 / 8) << 4;
      if constexpr ((OPTIONS & BIAS_GRADIENT) != 0) keep_here(swizzle);
      ds_ring.wait_empty(base + Tiles::DS_EMPTY);
      if constexpr (!FROM_D) {
#pragma unroll
        for (int n = 0; n < AT_ONCE / 8; ++n) load_shared(d[n][0], d[n][1], d_at + before * 4 + n * 32);
      }
      constexpr bool ADDS_TO_BIAS = (OPTIONS & BIAS_GRADIENT) != 0 && !(OPTIONS & BIAS_UNSHARED);
      typename BiasGradient::Tile bias_tile;
      if constexpr (ADDS_TO_BIAS) bias_tile = {problem, bias_gradient, block.sequence, lane_key, lane_query};
#pragma unroll
      for (int n = 0; n < AT_ONCE / 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float x[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) x[i] = FROM_D ? gradient_of_score_from_d(p[0][n][2 * half + i], dp[n][2 * half + i]) : gradient_of_score<OPTIONS>(problem, p[0][n][2 * half + i], dp[n][2 * half + i], __uint_as_float(d[n][i]));
          if constexpr (ADDS_TO_BIAS) bias_gradient.take(problem, bias_tile, n, half, x);
          if constexpr ((OPTIONS & SOFTCAP) != 0) {
#pragma unroll
            for (int i = 0; i < 2; ++i) x[i] *= to_float(half_t{(u16)(derivative[n][half] >> 16 * i)});
          }
          const u32 word = ds[n / 2][n % 2 * 2 + half] = pack<PRECISION>(x[0], x[1]);
          const int row = key_row + half * 8 + lane / 4;
          // The same place made in three ways: each takes registers that the other instances have not got.
          if constexpr (FROM_D) store_shared(uniform(ds_at) + ds_places[n] + half * 1024, word);
          else store_shared(ds_at + n / 8 * Tiles::KEY_BOX + row * 128 + (OPTIONS & BIAS_GRADIENT ? n % 8 << 4 ^ swizzle : (n % 8 ^ before % 64 / 8 ^ row & 7) << 4) + lane % 4 * 4, word);
        }
      if constexpr (AT_ONCE > 64) multiply_p_do(1);
      multiply_words<PRECISION, HEAD_DIM, Tiles::QUERY_BOX>(dk, ds, q_at + rows_before);   // dK += dSᵀ Q
      if constexpr ((OPTIONS & BIAS_UNSHARED) != 0) {
        keep_here(lane);
        BiasGradient::write(problem, {problem, bias_gradient, block.sequence, block.first_key + key_row + lane / 4, first_query + lane % 4 * 2}, ds);
      }
      wgmma_wait<Tiles::PARTS == 1>();   // dV is done; before the branch that parts need, dK too
      pin(dv);
      if constexpr (Tiles::PARTS > 1) pin(dk);
      if (part + 1 < Tiles::PARTS) return;
      arrive(Tiles::DO_EMPTY + 8 * do_ring.stage);
      do_ring.advance();
      fence_for_async_proxy();
      __syncwarp();
      arrive(Tiles::DS_FULL + 8 * ds_ring.stage);
      ds_ring.advance();
    };

    // dQ of the tile before: while this warpgroup was busy with another tile, the other one has had the time to write its part of dSᵀ.
    using QueryGradient = float[Tiles::DQ_COLUMNS / 8][4];
    auto multiply_ds_k = [&](QueryGradient& dq, bool exists) {
      if (exists) dq_ring.wait_full(base + Tiles::DS_FULL);
      const u32 ds_at = base + Tiles::DS + dq_ring.stage * Tiles::DS_BYTES, rows_at = QUERY_TILE == 128 ? ds_at + warpgroup * Tiles::KEY_BOX : ds_at;
      const u32 columns_at = keys + (QUERY_TILE == 128 ? 0 : warpgroup * (Tiles::DQ_COLUMNS / 64) * Tiles::KEY_BOX);
      multiply_columns<PRECISION, Tiles::DQ_COLUMNS, Tiles::KEY_TILE, Tiles::KEY_BOX, Tiles::KEY_BOX>(dq, uniform(rows_at), uniform(columns_at));
    };
    auto dq_is_made = [&](QueryGradient& dq) {
      pin(dq);
      arrive(Tiles::DS_EMPTY + 8 * dq_ring.stage);
      dq_ring.advance();
    };
    // MAKES_DQ: whether the block is the first one at the sum of the tile before, or the last one (AtSum).
    auto wait_for_turn = [&] {
      turn_ring.wait_full(base + Tiles::TURN + 16 * warpgroup);
      return uniform(load_shared(base + Tiles::ROLES + 8 * warpgroup + 4 * turn_ring.stage));
    };
    auto end_turn = [&] {
      __syncwarp();
      arrive(Tiles::ADDED + 16 * warpgroup + 8 * turn_ring.stage);
      turn_ring.advance();
    };
    // Of the last one: what the others have added, and dQ.
    auto load_sum = [&](QueryGradient& sum, const float* target, u32 role) {
#pragma unroll
      for (int n = 0; n < Tiles::DQ_COLUMNS / 8; ++n)
        *(float4*)sum[n] = role & FIRST_AT_SUM ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : __ldcg((const float4*)(target + threadIdx.x / 32 * (Tiles::SLAB_BYTES / 4)) + n * 32 + lane);
      end_turn();
    };
    auto make_dq = [&](QueryGradient& dq, const QueryGradient& sum, int head, int tile) {
#pragma unroll
      for (int n = 0; n < Tiles::DQ_COLUMNS / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) dq[n][i] = (dq[n][i] + sum[n][i]) * problem.scale;
      using Element = typename ElementOf<PRECISION>::type;
      const int piece = threadIdx.x / 32, row = tile * QUERY_TILE + piece * 16 % QUERY_TILE, column = piece * 16 / QUERY_TILE * 64;
      ds_ring.wait_empty(base + Tiles::DS_EMPTY);   // the warp's own rows of the next dSᵀ are scratch
      store_output_in_lines<PRECISION, Tiles::DQ_COLUMNS>(dq, (Element*)slot->dq + head * problem.dq.head_stride + row * problem.dq.row_stride + column, problem.dq.row_stride, (Block::IS_PACKED ? block.sequence.queries : problem.queries) - row, problem.dq.columns - column, lane,
                                                          base + Tiles::DS + ds_ring.stage * Tiles::DS_BYTES + piece * 2048);
    };
    // What was added last has come about.
    auto tell_of_added = [&] {
      wait_until_added();
      barrier_arrive(base + Tiles::ADDED + 8 * turn_ring.stage);
    };
    // In pieces, a warp's registers in their order, by way of its slab or at once. Where warps do not take turns themselves, another thread adds what is in the slabs.
    auto add_dq = [&](QueryGradient& dq, float* target, u32 role = 0) {
      target += threadIdx.x / 32 * (Tiles::SLAB_BYTES / 4);
      if constexpr (Tiles::SLABS) {
        constexpr bool SENDS = !IN_ORDER || Tiles::WARPS_IN_ORDER;
        const u32 slab = base + Tiles::SLAB + threadIdx.x / 32 * Tiles::SLAB_BYTES;
        if (!SENDS) slab_ring.wait_empty(base + Tiles::SLAB_EMPTY + 8 * warpgroup);
        else if (lane == 0 && IN_ORDER) tell_of_added();
        else if (lane == 0) wait_until_read();   // what was in it before
        __syncwarp();
#pragma unroll
        for (int n = 0; n < Tiles::DQ_COLUMNS / 8; ++n)
          store_shared_16_bytes(slab + (n * 32 + lane) * 16, make_uint4(__float_as_uint(dq[n][0]), __float_as_uint(dq[n][1]), __float_as_uint(dq[n][2]), __float_as_uint(dq[n][3])));
        fence_for_async_proxy();
        __syncwarp();
        if (!SENDS) {
          arrive(Tiles::SLAB_FULL + 8 * warpgroup);
          slab_ring.advance();
        } else if (lane == 0) {
          if (IN_ORDER) turn_ring.wait_full(base + Tiles::TURN);
          reduce_add_bytes(target, slab, Tiles::SLAB_BYTES);
        }
        if (Tiles::WARPS_IN_ORDER) turn_ring.advance();
      } else if (role & FIRST_AT_SUM) {   // nobody has cleared the place
#pragma unroll
        for (int n = 0; n < Tiles::DQ_COLUMNS / 8; ++n) *(float4*)(target + (n * 32 + lane) * 4) = *(const float4*)dq[n];
      } else {
#pragma unroll
        for (int n = 0; n < Tiles::DQ_COLUMNS / 8; ++n) reduce_add(target + (n * 32 + lane) * 4, dq[n]);
      }
      if constexpr (MAKES_DQ) end_turn();
    };

    float* dq_target = nullptr;   // of the tile before
    // Under causal masks the first 64 queries see none of the second 64 keys, whose warpgroup leaves zeros as its dSᵀ of the first tile and begins with the next.
    constexpr bool HALVES = Tiles::HALVES && !(OPTIONS & BIAS_GRADIENT);
    static_assert(!HALVES || (Q_STAGES > 1 && DO_STAGES > 1), "it begins with the second stage of each ring");
    int skips = 0;
    int dq_head = 0, dq_tile = 0, next_tile = MAKES_DQ || IN_ORDER ? 0 : uniform(tile_of_walk<Tiles, IN_ORDER>(problem, block, first_tile, base));
    if (first_tile < last_tile) {
      barrier_wait(base + Tiles::K_FULL + 8 * k_stage, count / 2 % 2);
      if constexpr (HALVES) {
        skips = warpgroup & uniform(load_shared(base + Tiles::SKIPS));
        if (skips) {
#pragma unroll
          for (int i = 0; i < 4; ++i) store_shared_16_bytes(base + Tiles::DS + 64 * 128 + (threadIdx.x % 128 + i * 128) * 16, make_uint4(0, 0, 0, 0));
          fence_for_async_proxy();
          __syncwarp();
          arrive(Tiles::DS_FULL);
          arrive(Tiles::DO_EMPTY);
          arrive(Tiles::Q_EMPTY);
          dq_target = dq_sum_row(problem, block.sequence.padded_row(problem, block.place) + first_tile * QUERY_TILE, HEAD_DIM);
        }
        ds_ring.stage = do_ring.stage = q_ring.stage = skips;
        next_tile = uniform(next_tile + skips);
      }
      if constexpr (CLEARS) {
        const int seen = block.sequence.seen() - block.first_key;
        if (seen < Tiles::KEY_TILE) {
          barrier_wait(base + Tiles::V_FULL, count % 2);
          clear_rows(keys, Tiles::Q_BOXES, Tiles::KEY_BOX, max(seen, 0));
          clear_rows(base + Tiles::V, Tiles::V_BOXES, Tiles::KEY_BOX, max(seen, 0));
          cleared();
        }
      }
      q_ring.wait_full(base + Tiles::Q_FULL);
      multiply_k_q(0);
      barrier_wait(base + Tiles::V_FULL, count % 2);
      wgmma_wait<0>();
      pin(p[0]);
    } else if (MAKES_DQ) {   // no warp is a key block ahead of the others at these barriers
      barrier_wait(base + Tiles::K_FULL + 8 * k_stage, count / 2 % 2);
      barrier_wait(base + Tiles::V_FULL, count % 2);
      arrive(Tiles::V_EMPTY);
    }

#pragma unroll 1
    for (int head = 0; head < problem.heads_per_block; ++head) {
      Place place = block.place;
      place.head += head;
      const Score<PRECISION, OPTIONS> score(problem, place, block.sequence);
      const i64 first_row = block.sequence.padded_row(problem, place);
      if constexpr ((OPTIONS & BIAS_GRADIENT) != 0) bias_gradient.begin_head(problem, place, block.sequence);

#pragma unroll 1
      for (int step = (first_tile + (head > 0 ? 0 : skips)) * Tiles::PARTS; step < last_tile * Tiles::PARTS; ++step) {
        const int tile = MAKES_DQ ? first_tile + last_tile - 1 - step / Tiles::PARTS : IN_ORDER ? block.tile_in_order(problem, step / Tiles::PARTS) : next_tile, part = step % Tiles::PARTS;
        // Branches around products would make the compiler wait for those under way. So the first tile takes a dQ from whatever lies there, and the last one
        // takes Sᵀ of the tile after it from whatever lies there; neither is used.
        const bool follows = Tiles::PARTS > 1 ? dq_target != nullptr : step > first_tile || head > 0;   // the former takes fewer registers
        const bool more = step + 1 < last_tile * Tiles::PARTS || head + 1 < problem.heads_per_block;
        gradients_of_keys(place, score, tile, part);
        if (part + 1 < Tiles::PARTS) {
          multiply_k_q(part + 1);
          wgmma_wait<0>();
          pin(p[0]);
          continue;
        }
        QueryGradient dq;
        multiply_ds_k(dq, follows);
        wgmma_wait<1>();
        pin(dk);
        arrive(Tiles::Q_EMPTY + 8 * q_ring.stage);
        q_ring.advance();
        if (more) q_ring.wait_full(base + Tiles::Q_FULL);
        if (MAKES_DQ && !more) arrive(Tiles::V_EMPTY);
        multiply_k_q(0, !MAKES_DQ || more);   // it runs while dQ is added
        wgmma_wait<1>();
        if (follows) {
          dq_is_made(dq);
          const u32 role = MAKES_DQ ? wait_for_turn() : 0;
          if (role & LAST_AT_SUM) {
            QueryGradient sum;
            load_sum(sum, dq_target, role);
            make_dq(dq, sum, dq_head, dq_tile);
          } else {
            add_dq(dq, dq_target, role);
          }
        }
        dq_target = MAKES_DQ ? problem.dq_sum + (i64)(slot->sum_row + head * problem.padded_queries + tile * QUERY_TILE) * HEAD_DIM : dq_sum_row(problem, first_row + tile * QUERY_TILE, HEAD_DIM);
        dq_head = head, dq_tile = tile;
        if (!MAKES_DQ && !IN_ORDER) next_tile = tile + 1 < last_tile ? tile + 1 : first_tile;
        wgmma_wait<0>();
        pin(p[0]);
      }
      if constexpr ((OPTIONS & BIAS_GRADIENT) != 0) bias_gradient.end_head(block.sequence, block.first_key + key_row + lane / 4);
    }
    auto store_key_gradient_of = [&](auto& gradient, const Array& array, void* GradientRows::*to, float factor) {
      int thread = threadIdx.x;
      if constexpr (MAKES_DQ) keep_here(thread);   // what follows from it is not kept from one key block to the next, nor for the other gradient
      const int lane = thread % 32, warp_row = thread / 32 * 16;   // not by the warpgroup, which would be kept till here
      const GradientRows& rows = MAKES_DQ ? slot->rows : *(const GradientRows*)(shared + Tiles::ROWS);
      // Where the warp's values were: all threads are done with them since dSᵀ of the last tile was full. MAKES_DQ: in the next dSᵀ, as other values are on their way.
      constexpr bool FEW_REGISTERS = (OPTIONS & BIAS) && !(OPTIONS & BIAS_GRADIENT) && (OPTIONS & (WINDOW | PACKED | LENGTHS));
      const u32 scratch = FEW_REGISTERS ? 0 : base + (MAKES_DQ ? Tiles::DS + ds_ring.stage * Tiles::DS_BYTES : Tiles::V) + warp_row * 128;
      store_key_gradient<PRECISION, OPTIONS, MAKES_DQ>(problem, rows, array, rows.*to, gradient, factor, warp_row + lane / 4, lane, scratch);
    };
    auto store_dk = [&] {
      if constexpr (MAKES_DQ) ds_ring.wait_empty(base + Tiles::DS_EMPTY);
      store_key_gradient_of(dk, problem.dk, &GradientRows::dk, problem.scale);
    };
    auto store_dv = [&] { store_key_gradient_of(dv, problem.dv, &GradientRows::dv, OPTIONS & DROPOUT ? problem.keep_inverse : 1.0f); };
    if (first_tile < last_tile) {
      QueryGradient dq;
      multiply_ds_k(dq, true);
      wgmma_wait<0>();
      dq_is_made(dq);
      if constexpr (MAKES_DQ) {
        arrive(Tiles::K_EMPTY + 8 * k_stage);
        const u32 role = wait_for_turn();
        const bool last = role & LAST_AT_SUM;
        if (!last) add_dq(dq, dq_target, role);
        store_dk();
        QueryGradient sum = {};
        if (last) load_sum(sum, dq_target, role);   // it comes while dV is written
        store_dv();
        if (last) make_dq(dq, sum, dq_head, dq_tile);
        return;
      }
      add_dq(dq, dq_target);
      if (Tiles::WARPS_IN_ORDER && lane == 0) tell_of_added();
    } else if constexpr (MAKES_DQ) {
      arrive(Tiles::K_EMPTY + 8 * k_stage);
    }
    if constexpr (!MAKES_DQ) barrier_wait(base + Tiles::ROWS_FOUND, 0);
    const bool is_piece = Block::is_piece(problem, block_index_again());
    const int warp = threadIdx.x / 32;
    if (!is_piece || sum_of_pieces<Tiles::KEY_TILE, HEAD_DIM, VALUE_DIM>(problem, false, warp, lane, dk)) store_dk();
    if constexpr (!IN_ORDER) {
      if (Tiles::SLABS && lane == 0 && problem.added_to_head) wait_until_added();
      __syncwarp();
      arrive(Tiles::ALL_ADDED + 8 * warpgroup);
    }
    if (!is_piece || sum_of_pieces<Tiles::KEY_TILE, HEAD_DIM, VALUE_DIM>(problem, true, warp, lane, dv)) store_dv();
  };

  if constexpr (MAKES_DQ) {
    Ring<2> ring;
#pragma unroll 1
    for (;; ring.advance()) {
      ring.wait_full(base + Tiles::SLOT_FULL);
      const Slot& slot = *(const Slot*)(shared + Tiles::SLOTS + ring.stage * SLOT_BYTES);
      if (uniform(slot.last)) return;
      make_gradients(slot.block, &slot);
      __syncwarp();   // all lanes have read what they need of the slot
      arrive(Tiles::SLOT_EMPTY + 8 * ring.stage);
    }
  } else {
    make_gradients(only, nullptr);
    if (Tiles::SLABS && !IN_ORDER && lane == 0) wait_until_read();   // before the memory is another block's
  }
}
