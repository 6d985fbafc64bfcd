// Attention backward by wgmma and TMA, for sm_90a, float16 and bfloat16, for head dims above 128, where dK and dV of 64 keys fill the registers of a warpgroup
// each. What is computed, and of which shapes, is in backward_sm90.cu.
//
// A block owns 64 keys of one key head and walks over the query tiles, of 64, that see any of them. Products are taken transposed, as there.
//   Warpgroup 0 makes Sᵀ = K Qᵀ, Pᵀ and dV, and hands Pᵀ to the other, rounded as the products take it.
//   Warpgroup 1 makes dPᵀ = V dOᵀ, dSᵀ and dK, and leaves dSᵀ in shared memory.
//   Each makes some columns of dQ, one tile later, and adds them to dq_sum in device memory, in the order of its registers.
//   A thread of warpgroup 2 issues all copies; others give turns, or tell backward_finish_sm90 of what has been added, and a warp clears sums of dQ of a later head. CUT: as
//   in backward_sm90.cu.
//
// Shared memory (tiles of 64 columns x rows, 128 bytes a row, swizzled):
//   K | V | Q_STAGES x Q | DO_STAGES x dO | Pᵀ, in the order of registers | DS_STAGES x dSᵀ  64 keys x 64 queries | Q_STAGES x lse | DO_STAGES x D | barriers
//   | with which tile the walk begins | GradientRows
//
// Order of waits, tile t.
//   Warpgroup 0, with Sᵀ(t) done: lse read -> place for Pᵀ empty, Pᵀ written, and full; Q empty -> dO full, dV issued -> dSᵀ(t - 1) full, its dQ issued -> dV done,
//     dO empty -> Q and lse (t + 1) full, Sᵀ(t + 1) issued -> dQ(t - 1) done and added, its dSᵀ empty -> Sᵀ(t + 1) done.
//   Warpgroup 1, with dPᵀ(t) done: Pᵀ full, read, and empty; D read, dO empty -> place for dSᵀ empty, dSᵀ written, and full -> Q full, dK issued -> dSᵀ(t - 1) full,
//     its dQ issued -> dK done, Q empty -> dO and D (t + 1) full, dPᵀ(t + 1) issued -> dQ(t - 1) done and added, its dSᵀ empty -> dPᵀ(t + 1) done.
#include "backward_sm90.cuh"

template <int HEAD_DIM, int VALUE_DIM, int Q_STAGES, int DO_STAGES> struct BackwardWideSm90Tiles {
  static constexpr int KEY_TILE = 64, QUERY_TILE = 64, THREADS = 384, LOADING_REGISTERS = 24, COMPUTING_REGISTERS = 240, DS_STAGES = 3;
  static constexpr int KEY_BOX = 64 * 128, QUERY_BOX = 64 * 128, Q_BOXES = HEAD_DIM / 64, V_BOXES = VALUE_DIM / 64, ROW_BYTES = QUERY_TILE * 4;
  static constexpr int Q_BYTES = Q_BOXES * QUERY_BOX, DO_BYTES = V_BOXES * QUERY_BOX, P_BYTES = 64 * 64 * 2, DS_BYTES = KEY_BOX;
  static constexpr int K = 0, V = Q_BOXES * KEY_BOX, Q = V + V_BOXES * KEY_BOX, DO = Q + Q_STAGES * Q_BYTES, P = DO + DO_STAGES * DO_BYTES, DS = P + P_BYTES;
  static constexpr int LSE = DS + DS_STAGES * DS_BYTES, D = LSE + Q_STAGES * ROW_BYTES, K_FULL = D + DO_STAGES * ROW_BYTES, V_FULL = K_FULL + 8;
  static constexpr int Q_FULL = V_FULL + 8, Q_EMPTY = Q_FULL + 8 * Q_STAGES, DO_FULL = Q_EMPTY + 8 * Q_STAGES, DO_EMPTY = DO_FULL + 8 * DO_STAGES;
  static constexpr int DS_FULL = DO_EMPTY + 8 * DO_STAGES, DS_EMPTY = DS_FULL + 8 * DS_STAGES, P_FULL = DS_EMPTY + 8 * DS_STAGES, P_EMPTY = P_FULL + 8;
  static constexpr int TURN = P_EMPTY + 8, ADDED = TURN + 16, TOLD = ADDED + 16, BEGIN = TOLD + 16;   // IN_ORDER: it is the block's turn to add to a tile of dQ, and it has; else: it has added all it had
  static constexpr int ROWS_FOUND = BEGIN + 8, ROWS = ROWS_FOUND + 8, SHARED_BYTES = ROWS + sizeof(GradientRows);
  static constexpr bool HALVES = false;
  static constexpr int DQ_BOXES[2] = {ceil_div(Q_BOXES, 2), Q_BOXES / 2};   // of each warpgroup
  static_assert(HEAD_DIM % 64 == 0 && VALUE_DIM % 64 == 0, "operands are whole boxes");
};

template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int OPTIONS, int Q_STAGES, int DO_STAGES, bool IN_ORDER, bool CUT = false>
__global__ void __launch_bounds__(384, 1) backward_wide_sm90(const __grid_constant__ Problem problem, const __grid_constant__ BackwardTensorMaps maps) {
  using Tiles = BackwardWideSm90Tiles<HEAD_DIM, VALUE_DIM, Q_STAGES, DO_STAGES>;
  using Element = typename ElementOf<PRECISION>::type;
  static_assert(!CUT || (!IN_ORDER && !(OPTIONS & (WINDOW | PACKED))), "");
  using Block = KeyBlock<OPTIONS, 64, 64, IN_ORDER, CUT>;
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = shared_address(shared);
  const int warpgroup = uniform(threadIdx.x / 128);

  make_barriers([&] {
    init_barriers_of_loads<Tiles, Q_STAGES, DO_STAGES>(base);
    init_ring(base, Tiles::DS_FULL, 4, Tiles::DS_EMPTY, 8, Tiles::DS_STAGES);
    init_ring(base, Tiles::P_FULL, 4, Tiles::P_EMPTY, 4, 1);
    init_barriers_of_turns<Tiles>(base, 8);
    begin_walk<Tiles>(problem, base);
  });

  if (warpgroup == 2) {
    give_registers<Tiles::LOADING_REGISTERS>();
    const int warp = uniform(threadIdx.x / 32 % 4);
    if (warp == 3 && threadIdx.x % 32 == 0) find_gradient_rows<PRECISION, Tiles, Block>(problem, shared, base);
    if (warp == 3 && problem.clearing_blocks) clear_sums_ahead<HEAD_DIM, Block>(problem);
    if (threadIdx.x % 32) return;
    let_next_kernel_begin();   // which waits for what it needs
    if (warp == 0) load_for_key_block<Tiles, Block, 64, Q_STAGES, DO_STAGES, IN_ORDER>(problem, maps, base);
    if (!IN_ORDER && warp == 2) tell_of_heads<Block>(problem, [&] { barrier_wait(base + Tiles::ADDED, 0); });
    if (IN_ORDER && warp == 1) give_turns<Tiles, 64, Block>(problem, base);
    if (IN_ORDER && warp == 2) tell_of_turns<Tiles, 64, Block>(problem, base);
    return;
  }

  take_registers<Tiles::COMPUTING_REGISTERS>();
  const Block block(problem, blockIdx.x);
  if (!block.exists()) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, row = warp * 16 + lane / 4;
  constexpr bool CLEARS = (OPTIONS & (PACKED | LENGTHS)) != 0;
  auto arrive = [&](int barrier) { if (lane == 0) barrier_arrive(base + barrier); };
  // Rows of a tile from `first` on hold other sequences, or what takes no part: a factor of 0 would not keep their NaN out. Each warpgroup clears what it reads.
  auto clear = [&](int tile_at, int boxes, int first) {
    if constexpr (CLEARS) {
      if (first >= 64) return;
      clear_rows(base + tile_at, boxes, 64 * 128, max(first, 0));
      fence_for_async_proxy();
      named_barrier_sync(1 + warpgroup, 128);
    }
  };

  Ring<Q_STAGES> q_ring;
  Ring<DO_STAGES> do_ring;
  Ring<1> p_ring;
  Ring<2> turn_ring;
  Ring<Tiles::DS_STAGES> ds_ring, dq_ring;
  const u32 p_at = base + Tiles::P + threadIdx.x % 128 * 16;   // the thread's 16 bytes of each quarter of Pᵀ

  // dQ = dS K, of the tile before, columns from `first_box` on.
  auto multiply_ds_k = [&](auto& dq, int first_box, bool exists) {
    constexpr int COLUMNS = sizeof(dq) / 16 * 8;
    if (exists) dq_ring.wait_full(base + Tiles::DS_FULL);
    multiply_columns<PRECISION, COLUMNS, 64, Tiles::KEY_BOX, Tiles::KEY_BOX>(dq, uniform(base + Tiles::DS + dq_ring.stage * Tiles::DS_BYTES), uniform(base + Tiles::K + first_box * Tiles::KEY_BOX));
  };
  auto add_dq = [&](auto& dq, int first_box, float* tile_at) {
    pin(dq);
    arrive(Tiles::DS_EMPTY + 8 * dq_ring.stage);
    dq_ring.advance();
    constexpr int COUNT = sizeof(dq) / 16;
    if (IN_ORDER) turn_ring.wait_full(base + Tiles::TURN);
    float* own = tile_at + (first_box * 4 + warp) * 1024 + lane * 4;
#pragma unroll
    for (int n = 0; n < COUNT; ++n) reduce_add(own + n / 8 * 4096 + n % 8 * 128, dq[n]);
    if (IN_ORDER) {
      __syncwarp();
      arrive(Tiles::ADDED + 8 * turn_ring.stage);
      turn_ring.advance();
    }
  };

  // The walk of a warpgroup over all tiles. start(exists, tile) issues the first product of a tile, scores or their gradients; own(place, tile) goes on from
  // there and issues dV or dK; done() is called when these are done. dQ is of so many boxes of columns.
  auto walk = [&](auto boxes, int first_box, auto start, auto own, auto done) {
    constexpr int BOXES = decltype(boxes)::value;
    constexpr bool ROOM = HEAD_DIM < 256;   // for the next tile's first product beside dQ
    auto tile_at = [&](int step) { return tile_of_walk<Tiles, IN_ORDER>(problem, block, step, base); };
    float* dq_target = nullptr;
    if (block.first_tile < block.last_tile) {
      start(true, tile_at(block.first_tile));
      wgmma_wait<0>();
    }
#pragma unroll 1
    for (int head = 0; head < problem.heads_per_block; ++head) {
      Place place = block.place;
      place.head += head;
#pragma unroll 1
      for (int step = block.first_tile; step < block.last_tile; ++step) {
        // As in backward_sm90.cu, products that are not used spare branches around others under way.
        const bool follows = step > block.first_tile || head > 0, last = step + 1 == block.last_tile, more = !last || head + 1 < problem.heads_per_block;
        const int tile = tile_at(step), next = tile_at(last ? block.first_tile : step + 1);
        own(place, tile);
        float dq[BOXES * 8][4];
        multiply_ds_k(dq, first_box, follows);
        wgmma_wait<1>();
        done();
        if constexpr (ROOM) start(more, next);
        wgmma_wait<ROOM>();
        if (follows) add_dq(dq, first_box, dq_target);
        dq_target = problem.dq_sum + (block.sequence.padded_row(problem, place) + tile * 64) * HEAD_DIM;
        if constexpr (!ROOM) start(more, next);
        wgmma_wait<0>();
      }
    }
    if (block.first_tile < block.last_tile) {
      float dq[BOXES * 8][4];
      multiply_ds_k(dq, first_box, true);
      wgmma_wait<0>();
      add_dq(dq, first_box, dq_target);
    }
    if (!IN_ORDER) {
      __syncwarp();
      arrive(Tiles::ADDED);
    }
  };

  if (block.first_tile < block.last_tile) {
    barrier_wait(base + Tiles::K_FULL, 0);
    clear(Tiles::K, Tiles::Q_BOXES, block.sequence.seen() - block.first_key);
  }

  if (warpgroup == 0) {
    const Exponential<PRECISION> exponential(problem);
    float dv[VALUE_DIM / 8][4] = {}, p[1][8][4];
    walk(
        Constant<Tiles::DQ_BOXES[0]>(), 0,
        [&](bool exists, int) {   // Sᵀ = K Qᵀ
          if (exists) q_ring.wait_full(base + Tiles::Q_FULL);
          multiply_rows<PRECISION, 64, HEAD_DIM, Tiles::KEY_BOX, Tiles::QUERY_BOX>(p[0], base + Tiles::K, uniform(base + Tiles::Q + q_ring.stage * Tiles::Q_BYTES));
        },
        [&](const Place& place, int tile) {
          pin(p[0]);
          const int first_query = tile * 64, lane_key = block.first_key + row, lane_query = first_query + lane % 4 * 2;
          if constexpr (Score<PRECISION, OPTIONS>::CHANGES) Score<PRECISION, OPTIONS>(problem, place, block.sequence).template apply<true, 1, 64>(problem, p, lane_key, lane_query, nullptr);
          u32 lse[8][2];
#pragma unroll
          for (int n = 0; n < 8; ++n) load_shared(lse[n][0], lse[n][1], base + Tiles::LSE + q_ring.stage * Tiles::ROW_BYTES + lane % 4 * 8 + n * 32);
#pragma unroll
          for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) p[0][n][i] = exponential(p[0][n][i], __uint_as_float(lse[n][i % 2]));
          // Rows of Q that take no part may have made any scores; they end here.
          if (first_query < block.visible.query_begin(block.first_key + 63) || first_query + 64 > block.visible.query_end(block.first_key))
            block.visible.template hide<true, 1, 64>(p, lane_key, lane_query, 0.0f);
          if constexpr ((OPTIONS & DROPOUT) != 0)   // a probability that is dropped carries a minus sign from here on
            Dropout{(u32)place.flat(problem), (u32)block.sequence.index}.template drop<true, 1, 64>(
                problem, lane_key, lane_query, [&](int m, int n, int half, int i) { p[m][n][2 * half + i] = -p[m][n][2 * half + i]; });
          u32 words[4][4];
#pragma unroll
          for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) words[n / 2][n % 2 * 2 + half] = pack<PRECISION>(p[0][n][2 * half], p[0][n][2 * half + 1]);
          p_ring.wait_empty(base + Tiles::P_EMPTY);
#pragma unroll
          for (int step = 0; step < 4; ++step) store_shared_16_bytes(p_at + step * 2048, make_uint4(words[step][0], words[step][1], words[step][2], words[step][3]));
          __syncwarp();
          arrive(Tiles::P_FULL);
          p_ring.advance();
          arrive(Tiles::Q_EMPTY + 8 * q_ring.stage);
          q_ring.advance();
          if constexpr ((OPTIONS & DROPOUT) != 0) {
#pragma unroll
            for (int i = 0; i < 16; ++i) words[i / 4][i % 4] &= ~((words[i / 4][i % 4] & 0x80008000u) / 0x8000u * 0xffffu);   // negative halves become 0
          }
          do_ring.wait_full(base + Tiles::DO_FULL);
          clear(Tiles::DO + do_ring.stage * Tiles::DO_BYTES, Tiles::V_BOXES, block.sequence.seeing() - first_query);
          multiply_words<PRECISION, VALUE_DIM, Tiles::QUERY_BOX>(dv, words, uniform(base + Tiles::DO + do_ring.stage * Tiles::DO_BYTES));   // dV += Pᵀ dO
        },
        [&] {
          pin(dv);
          arrive(Tiles::DO_EMPTY + 8 * do_ring.stage);
          do_ring.advance();
        });
    const GradientRows& rows = wait_for_gradient_rows<Tiles>(shared, base);
    if (!Block::is_piece(problem, block_index_again()) || sum_of_pieces<64, HEAD_DIM, VALUE_DIM>(problem, true, warp, lane, dv))
      store_key_gradient<PRECISION, OPTIONS>(problem, rows, problem.dv, rows.dv, dv, OPTIONS & DROPOUT ? problem.keep_inverse : 1.0f, row, lane);
  } else {
    float dk[HEAD_DIM / 8][4] = {}, dp[8][4];
    if (block.first_tile < block.last_tile) {
      barrier_wait(base + Tiles::V_FULL, 0);
      clear(Tiles::V, Tiles::V_BOXES, block.sequence.seen() - block.first_key);
    }
    walk(
        Constant<Tiles::DQ_BOXES[1]>(), Tiles::DQ_BOXES[0],
        [&](bool exists, int tile) {   // dPᵀ = V dOᵀ
          if (exists) {
            do_ring.wait_full(base + Tiles::DO_FULL);
            clear(Tiles::DO + do_ring.stage * Tiles::DO_BYTES, Tiles::V_BOXES, block.sequence.seeing() - tile * 64);
          }
          multiply_rows<PRECISION, 64, VALUE_DIM, Tiles::KEY_BOX, Tiles::QUERY_BOX>(dp, base + Tiles::V, uniform(base + Tiles::DO + do_ring.stage * Tiles::DO_BYTES));
        },
        [&](const Place&, int tile) {
          pin(dp);
          u32 d[8][2], words[4][4];
#pragma unroll
          for (int n = 0; n < 8; ++n) load_shared(d[n][0], d[n][1], base + Tiles::D + do_ring.stage * Tiles::ROW_BYTES + lane % 4 * 8 + n * 32);
          p_ring.wait_full(base + Tiles::P_FULL);
#pragma unroll
          for (int step = 0; step < 4; ++step) *(uint4*)words[step] = load_shared_16_bytes(p_at + step * 2048);
          ds_ring.wait_empty(base + Tiles::DS_EMPTY);
          int swizzle = row % 8 << 4;
          keep_here(swizzle);
          const u32 ds_at = base + Tiles::DS + ds_ring.stage * Tiles::DS_BYTES + row * 128 + lane % 4 * 4;
#pragma unroll
          for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              u32& word = words[n / 2][n % 2 * 2 + half];   // of Pᵀ, then of dSᵀ
              float x[2];
#pragma unroll
              for (int i = 0; i < 2; ++i) x[i] = gradient_of_score<OPTIONS>(problem, to_float(Element{(u16)(word >> 16 * i)}), dp[n][2 * half + i], __uint_as_float(d[n][i]));
              word = pack<PRECISION>(x[0], x[1]);
              store_shared(ds_at + half * 8 * 128 + (n << 4 ^ swizzle), word);
            }
          fence_for_async_proxy();
          __syncwarp();
          arrive(Tiles::P_EMPTY);
          p_ring.advance();
          arrive(Tiles::DO_EMPTY + 8 * do_ring.stage);
          do_ring.advance();
          arrive(Tiles::DS_FULL + 8 * ds_ring.stage);
          ds_ring.advance();
          q_ring.wait_full(base + Tiles::Q_FULL);
          clear(Tiles::Q + q_ring.stage * Tiles::Q_BYTES, Tiles::Q_BOXES, block.sequence.seeing() - tile * 64);
          multiply_words<PRECISION, HEAD_DIM, Tiles::QUERY_BOX>(dk, words, uniform(base + Tiles::Q + q_ring.stage * Tiles::Q_BYTES));   // dK += dSᵀ Q
        },
        [&] {
          pin(dk);
          arrive(Tiles::Q_EMPTY + 8 * q_ring.stage);
          q_ring.advance();
        });
    const GradientRows& rows = wait_for_gradient_rows<Tiles>(shared, base);
    if (!Block::is_piece(problem, block_index_again()) || sum_of_pieces<64, HEAD_DIM, VALUE_DIM>(problem, false, warp, lane, dk))
      store_key_gradient<PRECISION, OPTIONS>(problem, rows, problem.dk, rows.dk, dk, problem.scale, row, lane);
  }
}
