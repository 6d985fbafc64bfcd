// Attention backward by wgmma and TMA, for sm_90a, of float32 arrays in float16 parts (parts.cuh): dK and dV, and what each key block adds to dQ. What is computed,
// and of which shapes, is in backward_sm90.cu; float32_parts.cu made the parts of Q, K, V and dO, rows of high parts and then low ones.
//
// A block owns 64 keys of one key head and walks over the query tiles, of 64, that see any of them. Products are taken transposed, as in backward_sm90.cu; each is
// low · high + high · low + high · high, and P and dS are split in registers.
//   Warpgroup 0 makes Sᵀ = K Qᵀ, Pᵀ and dV, and hands Pᵀ to the other in float32.
//   Warpgroup 1 makes dPᵀ = V dOᵀ, dSᵀ and dK, and leaves the parts of dSᵀ where Pᵀ was: a warp's rows of both lie in the same bytes.
//   Each makes some columns of dQ, one tile later, and adds them to dq_sum in device memory, in the order of its registers.
//   A thread of warpgroup 2 issues all copies.
//
// Powers of two. Those of Q, K, V and dO come with their groups of 64 rows. P has the power that brings the largest of a warp's 16 keys and a tile to 2^14 or more,
// below 2^15; dS that of a tile: in dQ all keys of a tile are summed, so warpgroup 1 has to agree on it. What dV and dK of a tile add up to, in their own
// units and truncated as tensor cores do, is multiplied by its power of two as it is added to the totals.
//
// Shared memory (tiles of 64 columns x rows, 128 bytes a row, swizzled; each tile's parts after one another):
//   K | V | Q_STAGES x Q | DO_STAGES x dO | DS_STAGES x (Pᵀ, float32 in the order of registers, then dSᵀ  64 keys x 64 queries) | Q_STAGES x lse | DO_STAGES x D
//   | factors of K, of V, of each stage of Q and of dO | of each dSᵀ: the largest of each warp, and its factor | barriers | GradientRows | KeyBlock
//
// Order of waits, tile t.
//   Warpgroup 0, with Sᵀ(t) done: lse read -> place for Pᵀ empty (its dQ(t - DS_STAGES) done), Pᵀ written, and full; Q empty -> dO full, dV issued -> dSᵀ(t - 1) full, its
//     dQ issued -> dV done, added, dO empty -> Q and lse (t + 1) full, Sᵀ(t + 1) issued -> dQ(t - 1) done and added, its dSᵀ empty -> Sᵀ(t + 1) done.
//   Warpgroup 1, with dPᵀ(t) done: Pᵀ full, read; D read -> the warps' largest dS (a named barrier) -> dSᵀ written over Pᵀ, and full; dO empty -> Q full, dK issued ->
//     dSᵀ(t - 1) full, its dQ issued -> dK done, added, Q empty -> dO and D (t + 1) full, dPᵀ(t + 1) issued -> dQ(t - 1) done and added, its dSᵀ empty -> dPᵀ(t + 1) done.
#include "backward_sm90.cuh"
#include "parts.cuh"

// The power of two that brings numbers, of which this is the largest, as bits without a sign, below 2^15, and the one that brings them back: both normal numbers.
struct Powers {
  float up, down;
  __device__ __forceinline__ explicit Powers(u32 largest) {
    const u32 exponent = min(max(largest >> 23, 15u), 254u);
    up = __uint_as_float((127 + 14 + 127 - exponent) << 23), down = __uint_as_float((exponent - 14) << 23);
  }
};

template <int PARTS, int HEAD_DIM, int VALUE_DIM, int Q_STAGES, int DO_STAGES, int DS_STAGES> struct BackwardPartsSm90Tiles {
  static constexpr int KEY_TILE = 64, QUERY_TILE = 64, THREADS = 384, LOADING_REGISTERS = 40, COMPUTING_REGISTERS = 232;
  static constexpr int BOX = 64 * 128, Q_BOXES = HEAD_DIM / 64, V_BOXES = VALUE_DIM / 64, ROW_BYTES = 64 * 4;   // boxes of one part
  static constexpr int Q_BYTES = PARTS * Q_BOXES * BOX, DO_BYTES = PARTS * V_BOXES * BOX, DS_BYTES = 2 * BOX;
  static constexpr int K = 0, V = Q_BYTES, Q = V + DO_BYTES, DO = Q + Q_STAGES * Q_BYTES, DS = DO + DO_STAGES * DO_BYTES;
  static constexpr int LSE = DS + DS_STAGES * DS_BYTES, D = LSE + Q_STAGES * ROW_BYTES;
  static constexpr int K_FACTOR = D + DO_STAGES * ROW_BYTES, V_FACTOR = K_FACTOR + FACTOR_BYTES, Q_FACTORS = V_FACTOR + FACTOR_BYTES, DO_FACTORS = Q_FACTORS + Q_STAGES * FACTOR_BYTES;
  static constexpr int LARGEST = DO_FACTORS + DO_STAGES * FACTOR_BYTES, DS_FACTORS = LARGEST + DS_STAGES * 16;
  static constexpr int K_FULL = DS_FACTORS + DS_STAGES * 8, V_FULL = K_FULL + 8;
  static constexpr int Q_FULL = V_FULL + 8, Q_EMPTY = Q_FULL + 8 * Q_STAGES, DO_FULL = Q_EMPTY + 8 * Q_STAGES, DO_EMPTY = DO_FULL + 8 * DO_STAGES;
  static constexpr int P_FULL = DO_EMPTY + 8 * DO_STAGES, DS_FULL = P_FULL + 8 * DS_STAGES, DS_EMPTY = DS_FULL + 8 * DS_STAGES;
  static constexpr int TURN = DS_EMPTY + 8 * DS_STAGES, ADDED = TURN + 16, TOLD = ADDED + 16;   // IN_ORDER: it is the block's turn to add to a tile of dQ, and it has
  static constexpr int ROWS_FOUND = TOLD + 16, ROWS = ROWS_FOUND + 8, BLOCK = ROWS + sizeof(GradientRows), BLOCK_BYTES = 128, SHARED_BYTES = BLOCK + BLOCK_BYTES;
  static constexpr int DQ_BOXES[2] = {ceil_div(Q_BOXES, 2), Q_BOXES / 2}, DQ_WARPS = DQ_BOXES[1] ? 8 : 4;   // of each warpgroup, and how many warps make dQ
  static_assert(HEAD_DIM % 64 == 0 && VALUE_DIM % 64 == 0 && DQ_BOXES[0] == 1, "operands are whole boxes, and dQ of a warpgroup is one");
  static_assert(DS_STAGES > 1, "dQ is made one tile later");
  static_assert(Q_STAGES > 1, "the loader goes on to the next queries before the gradients of those at hand are done");
};

// As load_for_key_block has it, of groups of 64 rows and their factors.
template <typename Tiles, typename Block, int OPTIONS, int Q_STAGES, int DO_STAGES>
__device__ __forceinline__ void load_parts_for_key_block(const Problem& problem, const BackwardTensorMaps& maps, u32 base) {
  const Block block(problem, blockIdx.x);
  if (!block.exists() || block.first_tile >= block.last_tile) return;
  constexpr int K_BOXES = Tiles::Q_BYTES / Tiles::BOX, V_BOXES = Tiles::DO_BYTES / Tiles::BOX;
  using Group = GroupPlace<OPTIONS, 64>;
  Place place = block.place;
  const int sequence = block.sequence.index, key_group = block.first_key / 64;
  Group(problem, problem.k, place, problem.cu_k, problem.keys, sequence).template load<K_BOXES, Tiles::BOX>(maps.k, base + Tiles::K, base + Tiles::K_FACTOR, key_group, base + Tiles::K_FULL);
  Ring<Q_STAGES> q_ring;
  Ring<DO_STAGES> do_ring;
  bool first = true;
  for (int head = 0; head < problem.heads_per_block; ++head, ++place.head) {
    const i64 first_row = block.sequence.padded_row(problem, place);
    const Group q_place(problem, problem.q, place, problem.cu_q, problem.queries, sequence), do_place(problem, problem.dout, place, problem.cu_q, problem.queries, sequence);
#pragma unroll 1
    for (int tile = block.first_tile; tile < block.last_tile; ++tile) {
      q_ring.wait_empty(base + Tiles::Q_EMPTY);
      u32 full = base + Tiles::Q_FULL + 8 * q_ring.stage;
      q_place.template load<K_BOXES, Tiles::BOX>(maps.q, base + Tiles::Q + q_ring.stage * Tiles::Q_BYTES, base + Tiles::Q_FACTORS + q_ring.stage * FACTOR_BYTES, tile, full, Tiles::ROW_BYTES);
      load_bytes(base + Tiles::LSE + q_ring.stage * Tiles::ROW_BYTES, problem.row_lse + first_row + tile * 64, Tiles::ROW_BYTES, full);
      q_ring.advance();
      if (first)   // the first scores do not wait for it
        Group(problem, problem.v, place, problem.cu_k, problem.keys, sequence).template load<V_BOXES, Tiles::BOX>(maps.v, base + Tiles::V, base + Tiles::V_FACTOR, key_group, base + Tiles::V_FULL);
      first = false;
      do_ring.wait_empty(base + Tiles::DO_EMPTY);
      full = base + Tiles::DO_FULL + 8 * do_ring.stage;
      do_place.template load<V_BOXES, Tiles::BOX>(maps.dout, base + Tiles::DO + do_ring.stage * Tiles::DO_BYTES, base + Tiles::DO_FACTORS + do_ring.stage * FACTOR_BYTES, tile, full, Tiles::ROW_BYTES);
      load_bytes(base + Tiles::D + do_ring.stage * Tiles::ROW_BYTES, problem.row_d + first_row + tile * 64, Tiles::ROW_BYTES, full);
      do_ring.advance();
    }
  }
}

template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int OPTIONS, int Q_STAGES, int DO_STAGES, int DS_STAGES, bool IN_ORDER>
__global__ void __launch_bounds__(384, 1) backward_parts_sm90(const __grid_constant__ Problem problem, const __grid_constant__ BackwardTensorMaps maps) {
  constexpr int PARTS = parts_of(PRECISION);
  using Tiles = BackwardPartsSm90Tiles<PARTS, HEAD_DIM, VALUE_DIM, Q_STAGES, DO_STAGES, DS_STAGES>;
  using Block = KeyBlock<OPTIONS, 64, 64, IN_ORDER>;
  using Scores = float[1][8][4];
  static_assert(sizeof(Block) <= Tiles::BLOCK_BYTES && alignof(Block) <= 8, "");
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = shared_address(shared);
  const int warpgroup = uniform(threadIdx.x / 128);
  if (problem.tile_counter[REFUSED]) return;   // the sm80 family takes the call

  if (threadIdx.x == 0) {
    init_barriers_of_loads<Tiles, Q_STAGES, DO_STAGES>(base);
    init_ring(base, Tiles::DS_FULL, 4, Tiles::DS_EMPTY, Tiles::DQ_WARPS, DS_STAGES);
    for (int stage = 0; stage < DS_STAGES; ++stage) barrier_init(base + Tiles::P_FULL + 8 * stage, 4);
    init_barriers_of_turns<Tiles>(base, Tiles::DQ_WARPS);
    barrier_init_fence();
  }
  __syncthreads();

  if (warpgroup == 2) {
    give_registers<Tiles::LOADING_REGISTERS>();
    const int warp = uniform(threadIdx.x / 32 % 4);
    if (threadIdx.x % 32) return;
    if (warp == 3) find_gradient_rows<PRECISION, Tiles, Block>(problem, shared, base);
    if (warp == 0) load_parts_for_key_block<Tiles, Block, OPTIONS, Q_STAGES, DO_STAGES>(problem, maps, base);
    if (IN_ORDER && warp == 1) give_turns<Tiles, 64, Block>(problem, base);
    if (IN_ORDER && warp == 2) tell_of_turns<Tiles, 64, Block>(problem, base);
    return;
  }

  take_registers<Tiles::COMPUTING_REGISTERS>();
  const Block block(problem, blockIdx.x);
  if (!block.exists()) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, row = warp * 16 + lane / 4;
  auto arrive = [&](int barrier) { if (lane == 0) barrier_arrive(base + barrier); };

  Ring<Q_STAGES> q_ring;
  Ring<DO_STAGES> do_ring;
  Ring<2> turn_ring;
  Ring<DS_STAGES> ds_ring, dq_ring;
  auto p_at = [&](int thread, int n) { return base + Tiles::DS + ds_ring.stage * Tiles::DS_BYTES + n / 4 * Tiles::BOX + thread / 32 * 2048 + n % 4 * 512 + thread % 32 * 16; };   // of d[n] of Pᵀ
  // Two numbers as words of their parts.
  auto split = [&](float first, float second, u32& high, u32& low) {
    high = pack<FLOAT16>(first, second);
    if constexpr (PARTS == 2) low = pack<FLOAT16>(first - to_float(half_t{(u16)high}), second - to_float(half_t{(u16)(high >> 16)}));
  };
  auto add_to = [&](auto& total, auto& own, float factor) {
    pin(own);
#pragma unroll
    for (int n = 0; n < (int)(sizeof(own) / 16); ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) total[n][i] = fmaf(own[n][i], factor, total[n][i]);
  };

  float k_factor = 0.0f;
  if (block.first_tile < block.last_tile) {
    barrier_wait(base + Tiles::K_FULL, 0);
    k_factor = load_factor(base + Tiles::K_FACTOR);
  }

  // dQ = dS K, of the tile before, a box of columns.
  float dq_factor;
  auto multiply_ds_k = [&](float (&dq)[8][4], int box, bool exists) {
    if (exists) dq_ring.wait_full(base + Tiles::DS_FULL);
    dq_factor = k_factor * load_factor(base + Tiles::DS_FACTORS + dq_ring.stage * 4);
    multiply_columns_of_parts<PARTS, 64, 64, Tiles::BOX, Tiles::BOX>(dq, uniform(base + Tiles::DS + dq_ring.stage * Tiles::DS_BYTES), Tiles::BOX, uniform(base + Tiles::K + box * Tiles::BOX), Tiles::Q_BOXES * Tiles::BOX);
  };
  auto add_dq = [&](float (&dq)[8][4], int box, float* tile_at) {
    pin(dq);
    arrive(Tiles::DS_EMPTY + 8 * dq_ring.stage);
    dq_ring.advance();
    if (IN_ORDER) turn_ring.wait_full(base + Tiles::TURN);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dq[n][i] *= dq_factor;
      reduce_add(tile_at + ((box * 4 + warp) * 8 + n) * 128 + lane * 4, dq[n]);
    }
    if (IN_ORDER) {
      __syncwarp();
      arrive(Tiles::ADDED + 8 * turn_ring.stage);
      turn_ring.advance();
    }
  };

  // The walk of a warpgroup over all tiles. start(exists, scores) issues the first product of a tile, scores or their gradients; own(head, tile, scores, sum) goes on
  // from there and issues dV or dK of the tile, COLUMNS wide; done(sum) is called when these are done. With MAKES_DQ it makes a box of columns of dQ.
  auto walk = [&](auto columns, auto makes_dq, int box, auto start, auto own, auto done) {
    constexpr bool MAKES_DQ = decltype(makes_dq)::value;
    constexpr int COLUMNS = decltype(columns)::value;
    float *dq_rows = problem.dq_sum + block.sequence.padded_row(problem, block.place) * HEAD_DIM, *dq_target = nullptr;
    Scores scores;
    if (block.first_tile < block.last_tile) {
      start(true, scores[0]);
      wgmma_wait<0>();
      pin(scores[0]);
    }
#pragma unroll 1
    for (int head = 0; head < problem.heads_per_block; ++head, dq_rows += (i64)problem.padded_queries * HEAD_DIM) {
#pragma unroll 1
      for (int tile = block.first_tile; tile < block.last_tile; ++tile) {
        // As in backward_sm90.cu, products that are not used spare branches around others under way.
        const bool follows = tile > block.first_tile || head > 0, more = tile + 1 < block.last_tile || head + 1 < problem.heads_per_block;
        float sum[COLUMNS / 8][4];
        own(head, tile, scores, sum);
        Scores next;   // in registers of their own: those of the last ones are free by now
        if constexpr (MAKES_DQ) {
          float dq[8][4];
          multiply_ds_k(dq, box, follows);
          wgmma_wait<1>();
          done(sum);
          start(more, next[0]);
          wgmma_wait<1>();
          if (follows) add_dq(dq, box, dq_target);
          dq_target = dq_rows + (i64)tile * (64 * HEAD_DIM);
        } else {
          start(more, next[0]);
          wgmma_wait<1>();
          done(sum);
        }
        wgmma_wait<0>();
        pin(next[0]);
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[0][n][i] = next[0][n][i];
      }
    }
    if constexpr (MAKES_DQ) {
      if (block.first_tile < block.last_tile) {
        float dq[8][4];
        multiply_ds_k(dq, box, true);
        wgmma_wait<0>();
        add_dq(dq, box, dq_target);
      }
    }
  };

  float unit, factor;   // of the products that become scores or their gradients, and of what a tile adds to dV or dK
  if (warpgroup == 0) {
    ExponentialOfParts<Exponential<PRECISION>> exponential(problem);
    float dv[VALUE_DIM / 8][4] = {};
    if (threadIdx.x == 0) *(Block*)(shared + Tiles::BLOCK) = block;
    const Block& kept = *(const Block*)(shared + Tiles::BLOCK);   // read where it is needed, for want of registers
    named_barrier_sync(2, 128);
    walk(
        Constant<VALUE_DIM>(), Constant<1>(), 0,
        [&](bool exists, float (&s)[8][4]) {   // Sᵀ = K Qᵀ
          if (exists) q_ring.wait_full(base + Tiles::Q_FULL);
          unit = k_factor * load_factor(base + Tiles::Q_FACTORS + q_ring.stage * FACTOR_BYTES);
          // With the bits of the forward pass: lse is large where scores are, and only of the same scores it leaves the right P.
          multiply_rows_of_parts<PARTS, 64, HEAD_DIM, Tiles::BOX, Tiles::BOX, true>(s, base + Tiles::K, uniform(base + Tiles::Q + q_ring.stage * Tiles::Q_BYTES));
        },
        [&](int head, int tile, Scores& p, float (&sum)[VALUE_DIM / 8][4]) {
          int thread = threadIdx.x;
          keep_here(thread);   // what follows from it is worked out anew: registers are short where products are under way
          const int lane = thread % 32, row = thread / 32 * 16 + lane / 4;
          const int first_query = tile * 64, lane_key = kept.first_key + row, lane_query = first_query + lane % 4 * 2;
          Place place = kept.place;
          place.head += head;
          Scores derivative;   // SOFTCAP alone
          if constexpr (Score<PRECISION, OPTIONS>::CHANGES) {
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) p[0][n][i] *= unit;
            Score<PRECISION, OPTIONS>(problem, place, kept.sequence).template apply<true, 1, 64>(problem, p, lane_key, lane_query, derivative);
          } else {
            exponential.set_unit(problem, unit);
          }
          u32 lse[8][2];
#pragma unroll
          for (int n = 0; n < 8; ++n) load_shared(lse[n][0], lse[n][1], base + Tiles::LSE + q_ring.stage * Tiles::ROW_BYTES + lane % 4 * 8 + n * 32);
#pragma unroll
          for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) p[0][n][i] = exponential.against_lse(p[0][n][i], __uint_as_float(lse[n][i % 2]));
          if (first_query < kept.visible.query_begin(kept.first_key + 63) || first_query + 64 > kept.visible.query_end(kept.first_key))
            kept.visible.template hide<true, 1, 64>(p, lane_key, lane_query, 0.0f);
          if constexpr ((OPTIONS & DROPOUT) != 0)   // a probability that is dropped carries a minus sign from here on
            Dropout{(u32)place.flat(problem), (u32)kept.sequence.index}.template drop<true, 1, 64>(
                problem, lane_key, lane_query, [&](int m, int n, int half, int i) { p[m][n][2 * half + i] = -p[m][n][2 * half + i]; });
          ds_ring.wait_empty(base + Tiles::DS_EMPTY);
#pragma unroll
          for (int n = 0; n < 8; ++n) {   // the other makes gradients by the products of it, which the softcap's derivative is part of
            float x[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) x[i] = OPTIONS & SOFTCAP ? p[0][n][i] * derivative[0][n][i] : p[0][n][i];
            store_shared_16_bytes(p_at(thread, n), make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])));
          }
          __syncwarp();
          arrive(Tiles::P_FULL + 8 * ds_ring.stage);
          ds_ring.advance();
          arrive(Tiles::Q_EMPTY + 8 * q_ring.stage);
          q_ring.advance();
          float largest = 0.0f;
#pragma unroll
          for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(p[0][n][i]));
          const Powers powers(__reduce_max_sync(0xffffffff, __float_as_uint(largest)));
          u32 high[4][4], low[PARTS == 2 ? 4 : 1][4];
#pragma unroll
          for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float weight[2] = {p[0][n][2 * half], p[0][n][2 * half + 1]};
              if constexpr ((OPTIONS & DROPOUT) != 0) weight[0] = weight[0] < 0 ? 0 : weight[0], weight[1] = weight[1] < 0 ? 0 : weight[1];
              split(weight[0] * powers.up, weight[1] * powers.up, high[n / 2][n % 2 * 2 + half], low[PARTS == 2 ? n / 2 : 0][n % 2 * 2 + half]);
            }
          do_ring.wait_full(base + Tiles::DO_FULL);
          factor = load_factor(base + Tiles::DO_FACTORS + do_ring.stage * FACTOR_BYTES) * powers.down;
          multiply_words_of_parts<PARTS, VALUE_DIM, Tiles::BOX>(sum, high, low, uniform(base + Tiles::DO + do_ring.stage * Tiles::DO_BYTES));   // Pᵀ dO
        },
        [&](float (&sum)[VALUE_DIM / 8][4]) {
          add_to(dv, sum, factor);
          arrive(Tiles::DO_EMPTY + 8 * do_ring.stage);
          do_ring.advance();
        });
    const GradientRows& rows = wait_for_gradient_rows<Tiles>(shared, base);
    store_key_gradient<PRECISION, OPTIONS>(problem, rows, problem.dv, rows.dv, dv, OPTIONS & DROPOUT ? problem.keep_inverse : 1.0f, row, lane);
  } else {
    float dk[HEAD_DIM / 8][4] = {}, v_factor = 0.0f;
    if (block.first_tile < block.last_tile) {
      barrier_wait(base + Tiles::V_FULL, 0);
      v_factor = load_factor(base + Tiles::V_FACTOR);
    }
    walk(
        Constant<HEAD_DIM>(), Constant<Tiles::DQ_BOXES[1]>(), 1,
        [&](bool exists, float (&dp)[8][4]) {   // dPᵀ = V dOᵀ
          if (exists) do_ring.wait_full(base + Tiles::DO_FULL);
          unit = v_factor * load_factor(base + Tiles::DO_FACTORS + do_ring.stage * FACTOR_BYTES);
          multiply_rows_of_parts<PARTS, 64, VALUE_DIM, Tiles::BOX, Tiles::BOX>(dp, base + Tiles::V, uniform(base + Tiles::DO + do_ring.stage * Tiles::DO_BYTES));
        },
        [&](int, int, Scores& scores, float (&sum)[HEAD_DIM / 8][4]) {
          float (&ds)[8][4] = scores[0];   // dPᵀ, then dSᵀ
          u32 d[8][2];
#pragma unroll
          for (int n = 0; n < 8; ++n) load_shared(d[n][0], d[n][1], base + Tiles::D + do_ring.stage * Tiles::ROW_BYTES + lane % 4 * 8 + n * 32);
          ds_ring.wait_full(base + Tiles::P_FULL);
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            const uint4 words = load_shared_16_bytes(p_at(threadIdx.x % 128, n));
            const u32 p[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) ds[n][i] = gradient_of_score<OPTIONS>(problem, __uint_as_float(p[i]), ds[n][i] * unit, __uint_as_float(d[n][i % 2]));
          }
          // A NaN is no larger than others and stays one in the parts, as an infinity does: it is left out where there is one.
          auto largest_below = [&](u32 limit) {
            u32 largest = 0;
#pragma unroll
            for (int n = 0; n < 8; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const u32 size = __float_as_uint(fmaxf(fabsf(ds[n][i]), 0.0f));
                largest = max(largest, size < limit ? size : 0);
              }
            const u32 at = base + Tiles::LARGEST + ds_ring.stage * 16, of_warp = __reduce_max_sync(0xffffffff, largest);
            if (lane == 0) store_shared(at + warp * 4, of_warp);
            named_barrier_sync(1, 128);
            const uint4 of_warps = load_shared_16_bytes(at);
            return max(max(of_warps.x, of_warps.y), max(of_warps.z, of_warps.w));
          };
          u32 largest = largest_below(~0u);
          if (largest >= 0x7f800000) {
            named_barrier_sync(1, 128);   // all have read it
            largest = largest_below(0x7f800000);
          }
          const Powers powers(largest);
          if (threadIdx.x == 128) store_shared(base + Tiles::DS_FACTORS + ds_ring.stage * 4, __float_as_uint(powers.down));

          int swizzle = row % 8 << 4;
          keep_here(swizzle);
          const u32 ds_at = base + Tiles::DS + ds_ring.stage * Tiles::DS_BYTES + row * 128 + lane % 4 * 4;
          u32 high[4][4], low[PARTS == 2 ? 4 : 1][4];
#pragma unroll
          for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              u32& high_word = high[n / 2][n % 2 * 2 + half];
              u32& low_word = low[PARTS == 2 ? n / 2 : 0][n % 2 * 2 + half];
              split(ds[n][2 * half] * powers.up, ds[n][2 * half + 1] * powers.up, high_word, low_word);
              store_shared(ds_at + half * 8 * 128 + (n << 4 ^ swizzle), high_word);
              if constexpr (PARTS == 2) store_shared(ds_at + Tiles::BOX + half * 8 * 128 + (n << 4 ^ swizzle), low_word);
            }
          fence_for_async_proxy();
          __syncwarp();
          arrive(Tiles::DO_EMPTY + 8 * do_ring.stage);
          do_ring.advance();
          arrive(Tiles::DS_FULL + 8 * ds_ring.stage);
          ds_ring.advance();
          q_ring.wait_full(base + Tiles::Q_FULL);
          factor = powers.down * load_factor(base + Tiles::Q_FACTORS + q_ring.stage * FACTOR_BYTES);
          multiply_words_of_parts<PARTS, HEAD_DIM, Tiles::BOX>(sum, high, low, uniform(base + Tiles::Q + q_ring.stage * Tiles::Q_BYTES));   // dSᵀ Q
        },
        [&](float (&sum)[HEAD_DIM / 8][4]) {
          add_to(dk, sum, factor);
          arrive(Tiles::Q_EMPTY + 8 * q_ring.stage);
          q_ring.advance();
        });
    const GradientRows& rows = wait_for_gradient_rows<Tiles>(shared, base);
    store_key_gradient<PRECISION, OPTIONS>(problem, rows, problem.dk, rows.dk, dk, problem.scale, row, lane);
  }
}
