// Attention forward by wgmma and TMA, for sm_90a: float16, bfloat16, and float32 in float16 parts. After FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608, section 3).
//
//   O = softmax(scores(Q Kᵀ)) V,   lse = log of the softmax denominator; what scores are, and the options of a call, is in score.cuh
//   Q (batch, heads, queries, HEAD_DIM), K (.., keys, HEAD_DIM), V (.., keys, VALUE_DIM), O (batch, heads, queries, VALUE_DIM), lse (batch, heads, queries)
//
// A block takes query tiles of WARPGROUPS · 64 queries of one head, one after the other, and walks over the key tiles that any of them sees: in ascending order,
// or with ALIBI, but of PARTS, outwards from the diagonal (Walk in forward_sm90.cuh).
//   Warpgroups 0 .. WARPGROUPS - 1, the consumers: each owns 64 queries and all columns, a warp 16 of them, so the softmax never leaves the warp; S, P and O
//     stay in registers. What one computes besides products runs beside the products of the others.
//   The last warpgroup, a thread of each warp: loaders of keys, of values, and of queries; and the scheduler, which works out the next query tile.
//
// Shared memory (tiles of 64 columns x rows, 128 bytes a row, swizzled):
//   WARPGROUPS x Q  64 x HEAD_DIM | STAGES x K  KEY_TILE x HEAD_DIM | STAGES x V  KEY_TILE x VALUE_DIM | STAGED_BIAS: 2 x bias  QUERY_TILE x KEY_TILE
//   | LONG_SUMS: totals of O, float32 | ALIBI: numbers of keys (slope_sm90.cuh) | 2 x QueryTile | barriers
//   | PARTS: factors of the queries of each warpgroup, and of each stage of K and V
//
// PARTS: Q, K and V are float16 numbers that float32_parts.cu made (parts.cuh), rows of high parts and then low ones; P is split in registers. A product of two
// numbers is low · high + high · low + high · high; what P V of a tile adds up to is multiplied by the values' power of two as it is added to O.
//
// Order of waits. Everything shared goes in rings with two barriers a stage: full (written, or all bytes of its copies are there) and empty (every reader
// arrived). A consumer, from key tile n - 1 to n:
//   with two warpgroups its turn (named barriers: they issue products one after the other) -> issue S = Q K(n)ᵀ and O += P V(n - 1) -> the other's turn
//   -> S done, K(n) empty -> K(n + 1) and V(n) full, while O += P V runs -> O done, V(n - 1) empty -> softmax of S gives P.
#include "forward_sm90.cuh"

template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int OPTIONS, int WARPGROUPS, int KEY_TILE, int STAGES>
__global__ void __launch_bounds__((WARPGROUPS + 1) * 128, 1) forward_sm90(const __grid_constant__ Problem problem, const __grid_constant__ typename TensorMapsOf<(OPTIONS & STAGED_BIAS) != 0>::type maps) {
  constexpr int PARTS = parts_of(PRECISION), PRODUCT = PARTS ? FLOAT16 : PRECISION;   // what is multiplied
  using Tiles = ForwardSm90Tiles<HEAD_DIM, VALUE_DIM, OPTIONS, WARPGROUPS, KEY_TILE, STAGES, PARTS>;
  using Tile = QueryTile<PRECISION, OPTIONS, Tiles::QUERY_TILE, KEY_TILE>;
  using Element = typename ElementOf<PRECISION>::type;
  using Slope = ::Slope<PRECISION, OPTIONS, KEY_TILE>;
  constexpr bool OUTWARDS = Slope::OUTWARDS, SLOPED = Slope::IN_PRODUCTS;
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = shared_address(shared);
  const int warpgroup = uniform(threadIdx.x / 128);
  if constexpr (PARTS != 0) {
    if (problem.tile_counter[REFUSED]) return;   // the sm80 family takes the call
  }

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
  if constexpr (SLOPED) KeyNumbers<KEY_TILE>::template write<PRECISION>(base + Tiles::KEY_NUMBERS);
  __syncthreads();

  if (warpgroup == WARPGROUPS) {
    if constexpr (WARPGROUPS > 1) give_registers<Tiles::LOADING_REGISTERS>();
    const int thread = threadIdx.x % 128;
    if (thread == 0) load_along_keys<Tile, Tiles, OPTIONS, KEY_TILE, STAGES, Tiles::Q_BOXES>(problem, maps.k, problem.k, shared, base, Tiles::K, Tiles::K_FULL, Tiles::K_EMPTY, Tiles::K_FACTORS, problem.tile_counter != nullptr);
    if (thread == 32) load_along_keys<Tile, Tiles, OPTIONS, KEY_TILE, STAGES, Tiles::V_BOXES>(problem, maps.v, problem.v, shared, base, Tiles::V, Tiles::V_FULL, Tiles::V_EMPTY, Tiles::V_FACTORS, false);
    if (thread == 64) load_queries<Tile, Tiles, OPTIONS, WARPGROUPS, KEY_TILE>(problem, maps, shared, base);
    if (thread == 96) schedule_query_tiles<Tile, Tiles, OPTIONS>(problem, shared, base);
    return;
  }

  if constexpr (WARPGROUPS > 1) take_registers<Tiles::COMPUTING_REGISTERS>();
  constexpr bool TURNS = WARPGROUPS == 2;
  // Products are turned into scores beside the exponentials of these, whose unit leaves the others time, and in place only where that has not come off.
  constexpr int CHANGE = OPTIONS & (SCALE_FIRST | SOFTCAP | BIAS | STAGED_BIAS | MASK | ALIBI);
  constexpr bool AT_ONCE = !PARTS && !(OPTIONS & DROPOUT) && (CHANGE == (BIAS | STAGED_BIAS) || CHANGE == MASK || CHANGE == SOFTCAP);
  constexpr bool DROPS_AT_ONCE = (OPTIONS & DROPOUT) && !PARTS && CHANGE == 0;   // and so are random numbers made, where there are registers
  constexpr bool SCORES_AFTER_OUTPUT = PARTS && ((OPTIONS & BIAS) != 0 || ((OPTIONS & MASK) != 0 && (OPTIONS & (SOFTCAP | ALIBI | DROPOUT)) != 0));   // what they take needs the registers
  const int lane = threadIdx.x % 32, warp_row = warpgroup * 64 + threadIdx.x % 128 / 32 * 16;
  // With parts registers are short: what follows from the warpgroup's number is worked out where it is needed.
  auto own_warpgroup = [&] {
    int number = warpgroup;
    if constexpr (PARTS != 0) keep_here(number);
    return number;
  };
  auto my_turn = [&] { if constexpr (TURNS) named_barrier_sync(1 + own_warpgroup(), 256); };
  auto next_turn = [&] {
    const int own = own_warpgroup();
    if constexpr (TURNS) named_barrier_arrive(1 + (own + 1 == WARPGROUPS ? 0 : own + 1), 256);
  };
  if (TURNS && warpgroup == 0) named_barrier_arrive(1, 256);
  auto arrive = [&](int barrier) { if (lane == 0) barrier_arrive(base + barrier); };

  using Exp = Exponential<PRECISION>;
  typename ExponentialOf<PARTS, Exp>::type exponential(problem);
  Ring<2> tile_ring, bias_ring;
  Ring<1> q_ring;
  Ring<STAGES> k_ring, v_ring;
  float output[VALUE_DIM / 8][4], scores[1][KEY_TILE / 8][4];
  u32 p[KEY_TILE / 16][4];
  constexpr int PACE = (AT_ONCE && (OPTIONS & SOFTCAP)) || DROPS_AT_ONCE ? 8 : 0;
  using Softmax = OnlineSoftmax<KEY_TILE, float, SLOPED, PARTS == 2, PACE>;
  Softmax softmax;
  // PARTS: what P V of a tile adds up to on its own, for O is in other units and summed in round-to-nearest; the low parts of P, and the powers of two that
  // turn products of parts into those of numbers.
  float tile_output[PARTS ? VALUE_DIM / 8 : 1][4];
  u32 p_low[PARTS == 2 ? KEY_TILE / 16 : 1][4];
  float score_factor;
  typename Score<PRECISION, OPTIONS>::template Bits<1, KEY_TILE> mask;   // of the tile at hand

  u32 k_at, v_at;
  auto wait_k = [&] {
    k_ring.wait_full(base + Tiles::K_FULL);
    k_at = uniform(base + Tiles::K + k_ring.stage * Tiles::K_BYTES);
  };
  auto wait_v = [&](const Tile& tile, int n) {
    v_ring.wait_full(base + Tiles::V_FULL);
    v_at = uniform(base + Tiles::V + v_ring.stage * Tiles::V_BYTES);
    if constexpr (PARTS == 0 && (OPTIONS & (PACKED | LENGTHS)) != 0) {
      // Rows of V that take no part may hold anything, and a probability of 0 does not keep a NaN out. Each warpgroup clears them for itself.
      const int first = tile.block.sequence.seen() - n * KEY_TILE;
      if (first < KEY_TILE) {
        clear_rows(v_at, Tiles::V_BOXES, Tiles::KEY_BOX, first);
        fence_for_async_proxy();
        named_barrier_sync(5 + warpgroup, 128);
      }
    }
  };
  auto multiply_q_k = [&](const Slope& slope, Side side) {
    const u32 q_at = base + own_warpgroup() * Tiles::Q_BYTES;
    if constexpr (PARTS != 0) {
      multiply_rows_of_parts<PARTS, KEY_TILE, HEAD_DIM, Tiles::Q_BOX, Tiles::KEY_BOX>(scores[0], q_at, k_at);
    } else if constexpr (SLOPED) {
      multiply_rows_and_slope<PRECISION, KEY_TILE, HEAD_DIM, Tiles::Q_BOX, Tiles::KEY_BOX>(scores[0], q_at, k_at, slope.word, side, base + Tiles::KEY_NUMBERS);
    } else {
      multiply_rows<PRECISION, KEY_TILE, HEAD_DIM, Tiles::Q_BOX, Tiles::KEY_BOX>(scores[0], q_at, k_at);
    }
  };
  auto multiply_p_v = [&] {
    if constexpr (PARTS != 0) multiply_words_of_parts<PARTS, VALUE_DIM, Tiles::KEY_BOX>(tile_output, p, p_low, v_at);
    else multiply_words<PRECISION, VALUE_DIM, Tiles::KEY_BOX>(output, p, v_at);
  };
  // The powers of two are read before the waits, which hide it.
  auto read_score_factor = [&](int k_stage) {
    if constexpr (PARTS != 0) score_factor = load_factor(base + Tiles::Q_FACTORS + own_warpgroup() * FACTOR_BYTES) * load_factor(base + Tiles::K_FACTORS + k_stage * FACTOR_BYTES);
  };
  auto wait_p_v = [&](int v_stage) {
    float factor;
    if constexpr (PARTS != 0) factor = load_factor(base + Tiles::V_FACTORS + v_stage * FACTOR_BYTES);
    wgmma_wait<0>();
    if constexpr (PARTS != 0) {
      pin(tile_output);
      if constexpr (PARTS == 2) factor *= 1.0f / PARTS_SCALE;
#pragma unroll
      for (int n = 0; n < VALUE_DIM / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) output[n][i] = fmaf(tile_output[n][i], factor, output[n][i]);
    } else {
      pin(output);
    }
  };
  auto read_mask = [&](const Tile& tile, int n) {   // before a wait too
    if constexpr ((OPTIONS & MASK) != 0) mask = tile.score.template mask_bits<false, 1, KEY_TILE>(problem, tile.block.first_query + warp_row + lane / 4, n * KEY_TILE + lane % 4 * 2);
  };
  u32 bias[OPTIONS & STAGED_BIAS ? KEY_TILE / 8 : 2][2];   // of the tile at hand, two neighbours in a word
  auto read_bias = [&] {   // and this one
    if constexpr ((OPTIONS & STAGED_BIAS) != 0) {
      bias_ring.wait_full(base + Tiles::BIAS_FULL);
      // A lane's address is that of a row of 16 bytes: lanes 0 to 15 have the warp's rows of chunk n, the others those of the next one.
      const u32 stage_at = base + Tiles::BIAS_AT + bias_ring.stage * Tiles::BIAS_BYTES, row_at = warp_row / 64 * Tiles::BIAS_BOXES * Tiles::BIAS_BOX + (warp_row % 64 + lane % 16) * 128;
      const u32 bias_at = stage_at + (problem.bias.row_stride == 0 ? lane / 16 << 4 : row_at + ((lane / 16 ^ lane % 8) << 4));
#pragma unroll
      for (int n = 0; n < KEY_TILE / 8; n += 2) ldmatrix(*(u32(*)[4])bias[n], (bias_at ^ n % 8 << 4) + n / 8 * Tiles::BIAS_BOX);
    }
  };
  auto score_tile = [&](const Tile& tile, const KeyTiles<OPTIONS, KEY_TILE>& keys, const Slope& slope, int n, Side side) {
    const int row = tile.block.first_query + warp_row + lane / 4, column = n * KEY_TILE + lane % 4 * 2;
    if constexpr (PARTS != 0) {
      if constexpr (Score<PRECISION, OPTIONS>::CHANGES) {
#pragma unroll
        for (int n = 0; n < KEY_TILE / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[0][n][i] *= score_factor;
      } else {
        exponential.set_unit(problem, score_factor);
      }
    }
    if constexpr (SLOPED) slope.of_rows(softmax.base, n, side);
    if constexpr ((OPTIONS & STAGED_BIAS) != 0) {
      auto add_bias = [&](int, int) {
#pragma unroll
        for (int n = 0; n < KEY_TILE / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[0][n][i] = fmaf(to_float(Element{(u16)(bias[n][i / 2] >> i % 2 * 16)}), problem.inverse_unit, scores[0][n][i]);
      };
      tile.score.template apply<false, 1, KEY_TILE>(problem, scores, row, column, add_bias, nullptr, SLOPED && side != CROSSING, &mask);
    } else if constexpr (Score<PRECISION, OPTIONS>::CHANGES) {
      tile.score.template apply<false, 1, KEY_TILE>(problem, scores, row, column, nullptr, SLOPED && side != CROSSING, &mask);
    }
    if (keys.need_mask(n)) tile.visible.template hide<false, 1, KEY_TILE>(scores, row, column, -infinity());
  };
  auto weight_at_once = [&](int n, int i, float shift, float zero) {   // AT_ONCE: of a product
    const float product = scores[0][n][i];
    if constexpr ((OPTIONS & SOFTCAP) != 0) return Exp::of(capped_exponent(problem.capped, product, shift, zero));
    else if constexpr ((OPTIONS & MASK) != 0) return exponential(mask.seen(0, n, i) ? product : -infinity(), shift);
    else return exponential(product, fmaf(to_float(Element{(u16)(bias[n][i / 2] >> i % 2 * 16)}), -Exp::LOG2_E, shift));
  };
  KeptElements kept;   // DROPOUT: of the tile at hand
  auto keep = [&](int n, int row, const float (&pair)[2]) {
    u32& high = p[n / 2][n % 2 * 2 + row];
    high = pack<PRODUCT>(pair[0], pair[1]);
    if constexpr (PARTS == 2) {
      high = scale_pair(high);
      p_low[n / 2][n % 2 * 2 + row] = pack<FLOAT16>(fmaf(pair[0], PARTS_SCALE, -to_float(half_t{(u16)high})), fmaf(pair[1], PARTS_SCALE, -to_float(half_t{(u16)(high >> 16)})));
    }
    if constexpr (DROPS_AT_ONCE) high &= kept.mask(problem, n, row);
    return high;
  };
  auto begin_dropout = [&](const Tile& tile, int n) {
    if constexpr ((OPTIONS & DROPOUT) != 0)
      kept.begin({tile.block.schedule.place, (u32)tile.block.sequence.index}, tile.block.first_query + warp_row + lane / 4, n * KEY_TILE + lane % 4 * 2);
  };
  auto try_at_once = [&] {
    if constexpr ((OPTIONS & SOFTCAP) != 0) {
      float most[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) most[row] = fminf(softmax.MOST, largest_sum_of_capped(problem.capped, softmax.shift[row]));
      return !__any_sync(0xffffffff, fminf(most[0], most[1]) < 1.0f) && softmax.try_weights(weight_at_once, most, keep);
    } else {
      return softmax.try_weights(weight_at_once, keep);
    }
  };
  auto probabilities = [&](const Tile& tile, int n) {   // after O is done: it may have to be rescaled
    softmax.raise(scores[0], exponential, [&](int row, float ratio) {
#pragma unroll
      for (int n = 0; n < VALUE_DIM / 8; ++n) output[n][2 * row] *= ratio, output[n][2 * row + 1] *= ratio;
    });
    if constexpr (DROPS_AT_ONCE) begin_dropout(tile, n);   // anew: what a first try made of it would take registers
    softmax.take(scores[0], exponential, keep);
  };
  auto drop = [&](const Tile& tile, int n) {
    if constexpr ((OPTIONS & DROPOUT) != 0 && !DROPS_AT_ONCE) {
      begin_dropout(tile, n);
#pragma unroll
      for (int n = 0; n < KEY_TILE / 8; ++n)
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const u32 mask = kept.mask(problem, n, row);
          p[n / 2][n % 2 * 2 + row] &= mask;
          if constexpr (PARTS == 2) p_low[n / 2][n % 2 * 2 + row] &= mask;
        }
    }
  };
  auto bias_read = [&] {   // after the softmax: an arrival can overtake loads from shared memory whose values nobody has needed yet
    if constexpr ((OPTIONS & STAGED_BIAS) != 0) {
      __syncwarp();
      arrive(Tiles::BIAS_EMPTY + 8 * bias_ring.stage);
      bias_ring.advance();
    }
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
    softmax = Softmax();
    if constexpr ((OPTIONS & SINKS) != 0) softmax.start(Exp::shift_of_lse(*tile.block.place.template rows<float>(problem.sinks)), lane);
    total_shift[0] = total_shift[1] = -infinity();
    // Of the block's key tiles [first, last) this warpgroup's queries see [begin, end), from here on steps of the walk. The others it only lets pass, or where
    // they come in between, hides.
    const int first = uniform(tile.keys.begin), last = uniform(tile.keys.end);
    KeyTiles<OPTIONS, KEY_TILE> keys(tile.visible, tile.block.first_query + warpgroup * 64, 64);
    const bool any = warpgroup * 64 < tile.rows && keys.begin < keys.end;
    int begin = uniform(any ? min(max(keys.begin, first), last) : last), end = uniform(any ? max(min(keys.end, last), begin) : last);
    const Walk<OUTWARDS> walk{first, OUTWARDS ? uniform(tile.walk.nearest) : 0};
    walk.to_steps(begin, end);
    const Slope slope(problem, tile.score, exponential.factor, tile.block.first_query + warp_row, lane);
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
      const int at = walk.tile(begin);
      const Side side = slope.side(at);
      wait_k();
      if (begin > first) my_turn();
      multiply_q_k(slope, side);
      if (begin > first) next_turn();
      const int k_read = k_ring.stage;
      k_ring.advance();
      if (begin + 1 < end) wait_k();
      wait_v(tile, at);
      read_score_factor(k_read);
      read_mask(tile, at);
      read_bias();
      wgmma_wait<0>();
      pin(scores[0]);
      arrive(Tiles::K_EMPTY + 8 * k_read);
      if (begin + 1 == end) arrive(Tiles::Q_EMPTY + 8 * warpgroup);
      score_tile(tile, keys, slope, at, side);
      if constexpr (DROPS_AT_ONCE) begin_dropout(tile, at);
      if ((OPTIONS & (ALIBI | SINKS)) || !softmax.try_start(scores[0], exponential, keep)) probabilities(tile, at);
      bias_read();
      drop(tile, at);
#pragma unroll 1
      for (int n = begin + 1; n < end; ++n) {
        const int at = walk.tile(n);
        const Side side = slope.side(at);
        my_turn();
        multiply_q_k(slope, side);
        multiply_p_v();
        next_turn();
        const int k_read = k_ring.stage, v_read = v_ring.stage;
        k_ring.advance();
        v_ring.advance();
        read_score_factor(k_read);
        read_mask(tile, at);
        read_bias();
        wgmma_wait<1>();
        pin(scores[0]);
        arrive(Tiles::K_EMPTY + 8 * k_read);
        if (n + 1 < end) wait_k();   // what the next products need, while O += P V runs
        else arrive(Tiles::Q_EMPTY + 8 * warpgroup);
        wait_v(tile, at);
        if constexpr (!SCORES_AFTER_OUTPUT && !AT_ONCE) score_tile(tile, keys, slope, at, side);
        wait_p_v(v_read);
        if constexpr (SCORES_AFTER_OUTPUT) score_tile(tile, keys, slope, at, side);
        arrive(Tiles::V_EMPTY + 8 * v_read);
        if ((OPTIONS & LONG_SUMS) != 0 && (n - begin) % SEGMENT == 0) {
          add_totals(n - begin > SEGMENT);
          take_totals();
        }
        if constexpr (DROPS_AT_ONCE) begin_dropout(tile, at);
        bool taken = false;
        if constexpr (AT_ONCE) {
          if (!keys.need_mask(at)) taken = try_at_once();
          if (!taken) score_tile(tile, keys, slope, at, side);
        }
        // Towards the diagonal scores grow a lot from tile to tile, away from it they fall.
        if (!taken && (((OPTIONS & ALIBI) && side != walk.outward(n)) || !softmax.try_take(scores[0], exponential, keep))) probabilities(tile, at);
        bias_read();
        drop(tile, at);
      }
      multiply_p_v();
      wait_p_v(v_ring.stage);
      arrive(Tiles::V_EMPTY + 8 * v_ring.stage);
      v_ring.advance();
      if ((OPTIONS & LONG_SUMS) != 0 && end - begin > SEGMENT) add_totals(true);
    }
    pass(end, PARTS ? uniform(tile.keys.end) : last);

    const Place& place = tile.block.place;
    const int row = warp_row + lane / 4, rows = tile.rows;
    float lse[2];
    if constexpr (PARTS != 0) {
      float largest = 0.0f;
#pragma unroll
      for (int n = 0; n < VALUE_DIM / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (row + i / 2 * 8 < rows) largest = fmaxf(largest, fabsf(output[n][i]));
      if (largest >= SMALLEST_OUTPUT * __uint_as_float(*word_of_values(problem, problem.v, place))) *word_of_output(problem, place) = 1;
    }
    finish_rows<OPTIONS>(problem, place, softmax, exponential, tile.block.first_query + row, tile.block.sequence.seeing(), output, lse);
    if constexpr ((OPTIONS & SPLIT_KEYS) != 0) {
      const i64 all_rows = (i64)problem.grid_places * problem.queries, part = tile.split * all_rows + place.flat(problem) * problem.queries + tile.block.sequence.first_query + tile.block.first_query;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (lane % 4 == 0 && row + half * 8 < rows) problem.partial_lse[part + row + half * 8] = lse[half];
      store_floats(output, problem.partial_out + part * VALUE_DIM, VALUE_DIM, row, rows, lane);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (lane % 4 == 0 && row + half * 8 < rows) tile.lse[(row + half * 8) * problem.lse.row_stride] = lse[half];
      Element* out = (Element*)tile.out;
      if constexpr (PARTS != 0) store_float_output(output, out, problem.out.row_stride, row, rows, problem.out.columns, lane);
      else store_output<PRECISION, VALUE_DIM>(output, out, problem.out.row_stride, row, rows, problem.out.columns, lane);
    }
    __syncwarp();
    arrive(Tiles::TILE_EMPTY + 8 * tile_ring.stage);
  }
}
