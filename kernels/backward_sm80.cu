// Attention backward by mma.sync and cp.async: dK and dV, and with QUERY_GRADIENT what each key block adds to dQ. FlashAttention-2, algorithm 2.
//
//   P = exp(scores(Q Kᵀ) - lse),  dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ - D) with D = rowsum(dO ∘ O) - dlse,  dK = scale · dSᵀ Q,  dQ = scale · dS K
//   softcap: dS ∘ (1 - tanh²); dropout of the pairs Z: dV = (P ∘ Z)ᵀ dO / keep, dS = P ∘ (Z ∘ dO Vᵀ / keep - D). What scores are is in score.cuh.
//   Q, dQ (batch, heads, queries, HEAD_DIM), dO (.., queries, VALUE_DIM), K, dK (.., keys, HEAD_DIM), V, dV (.., keys, VALUE_DIM)
//
// A block owns KEY_TILE keys of one key head and walks over the query tiles that see any of them, for each of the heads_per_block query heads that share
// the key head. The products are taken transposed, Sᵀ = K Qᵀ and dPᵀ = V dOᵀ, so that a warp's rows are keys: with COLUMN_GROUPS = 1 a warp owns
// 16 · ROW_TILES keys and all columns, and Pᵀ and dSᵀ pass from accumulators to the A operand of dV and dK in registers. With more column groups the
// columns of each product are divided among that many warps, which halves the accumulators of wide heads, and P goes through shared memory as well. Queries
// may be too few for every column group (SCORE_GROUPS); then some of them only make dK, dV and dQ.
// dQ sums over keys, that is over warps: dSᵀ is shared through memory, each warp multiplies its part of dQ and adds it to dq_sum in device memory.
//
// Shared memory:  K | V | dSᵀ  KEY_TILE x QUERY_TILE | Pᵀ (if SCORE_TILES = 2; else in the place of dSᵀ) | STAGES x (Q | dO | lse | D)
// Order of waits: a stage has arrived (cp.async.wait_group, __syncthreads; every warp is done with the stage and the scores before it), then Sᵀ, Pᵀ, dPᵀ
// and dSᵀ, the scores into memory, __syncthreads, then what reads them. Column groups with one tile for both scores wait twice more: before dV reads Pᵀ,
// and before dSᵀ overwrites it.
#include "gradient_sm80.cuh"
#include "key_block.cuh"
#include "parts_words.cuh"
#include "product_sm80.cuh"
#include "ptx/reduce.cuh"
#include "score.cuh"

template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int WARPS, int ROW_TILES, int COLUMN_GROUPS, int QUERY_TILE, int STAGES, int SCORE_TILES> struct BackwardTiles {
  using Element = typename ElementOf<PRECISION>::type;
  using Real = ::Real<PRECISION>;
  static constexpr int THREADS = WARPS * 32, KEY_GROUPS = WARPS / COLUMN_GROUPS, WARP_KEYS = ROW_TILES * 16, KEY_TILE = KEY_GROUPS * WARP_KEYS;
  using Q = SharedTile<Element, QUERY_TILE, HEAD_DIM>;
  using DO = SharedTile<Element, QUERY_TILE, VALUE_DIM>;
  using K = SharedTile<Element, KEY_TILE, HEAD_DIM>;
  using V = SharedTile<Element, KEY_TILE, VALUE_DIM>;
  using S = SharedTile<Element, KEY_TILE, QUERY_TILE>;
  static constexpr int STATISTICS_BYTES = 2 * QUERY_TILE * (int)sizeof(Real), STAGE_BYTES = Q::BYTES + DO::BYTES + STATISTICS_BYTES;
  static constexpr int SCORES = K::BYTES + V::BYTES, FIRST_STAGE = SCORES + SCORE_TILES * S::BYTES;
  static constexpr int COLUMNS_AT_ONCE = 8 * B_GROUPS<Element>, SCORE_GROUPS = COLUMN_GROUPS * COLUMNS_AT_ONCE <= QUERY_TILE ? COLUMN_GROUPS : QUERY_TILE / COLUMNS_AT_ONCE;
  static_assert(QUERY_TILE / SCORE_GROUPS % COLUMNS_AT_ONCE == 0 && HEAD_DIM / COLUMN_GROUPS % COLUMNS_AT_ONCE == 0 && VALUE_DIM / COLUMN_GROUPS % COLUMNS_AT_ONCE == 0, "fragments are whole");
  static_assert(SCORE_TILES == 1 || (SCORE_TILES == 2 && COLUMN_GROUPS > 1), "only column groups keep both Pᵀ and dSᵀ");
  static constexpr int SHARED_BYTES = FIRST_STAGE + STAGES * STAGE_BYTES;
};

template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int OPTIONS, int WARPS, int ROW_TILES, int COLUMN_GROUPS, int QUERY_TILE, int STAGES, int SCORE_TILES, int DQ_ROW_TILES,
          bool QUERY_GRADIENT, int BLOCKS_PER_SM>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS_PER_SM) backward_sm80(const __grid_constant__ Problem problem) {
  using Tiles = BackwardTiles<PRECISION, HEAD_DIM, VALUE_DIM, WARPS, ROW_TILES, COLUMN_GROUPS, QUERY_TILE, STAGES, SCORE_TILES>;
  using Element = typename Tiles::Element;
  using Real = typename Tiles::Real;
  constexpr int KEY_TILE = Tiles::KEY_TILE;
  constexpr int QUERY_COLUMNS = QUERY_TILE / Tiles::SCORE_GROUPS, HEAD_COLUMNS = HEAD_DIM / COLUMN_GROUPS, VALUE_COLUMNS = VALUE_DIM / COLUMN_GROUPS;
  using Block = KeyBlock<OPTIONS, KEY_TILE, QUERY_TILE>;
  extern __shared__ __align__(128) u8 shared[];
  if constexpr (PRECISION == FLOAT32 || PRECISION == TFLOAT32) {
    if (problem.tile_counter && !problem.tile_counter[REFUSED]) return;   // the sm90 family has made it (float32_parts.cu)
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int key_row = warp % Tiles::KEY_GROUPS * Tiles::WARP_KEYS, column_group = warp / Tiles::KEY_GROUPS;
  const int score_group = Tiles::SCORE_GROUPS < COLUMN_GROUPS ? column_group % Tiles::SCORE_GROUPS : column_group;   // of groups with the same scores the first stores them

  u32 base = shared_address(shared);
  auto stage_address = [&](int tile) { return base + Tiles::FIRST_STAGE + tile % STAGES * Tiles::STAGE_BYTES; };
  {
    const Block block(problem, blockIdx.x);
    if (!block.exists()) return;
    const Place& place = block.place;
    const i64 first_row = block.sequence.first_key + block.first_key;
    const int keys = block.sequence.seen() - block.first_key;
    load_tile<Tiles::THREADS>(typename Tiles::K{base}, place.rows<Element>(problem.k) + first_row * problem.k.row_stride, problem.k.row_stride, keys, problem.k.columns);
    load_tile<Tiles::THREADS>(typename Tiles::V{base + Tiles::K::BYTES}, place.rows<Element>(problem.v) + first_row * problem.v.row_stride, problem.v.row_stride, keys, problem.v.columns);
  }

  using Exp = Exponential<PRECISION>;
  const Exp exponential(problem);
  Real dk[ROW_TILES][HEAD_COLUMNS / 8][4] = {}, dv[ROW_TILES][VALUE_COLUMNS / 8][4] = {};

  for (int head = 0; head < problem.heads_per_block; ++head) {
    const Block block(problem, block_index_again());
    const Sequence<OPTIONS>& sequence = block.sequence;
    const int first_tile = block.first_tile, last_tile = block.last_tile;
    Place place = block.place;
    place.head += head;
    const Score<PRECISION, OPTIONS> score(problem, place, sequence);
    const i64 loaded_row = sequence.first_query + (i64)first_tile * QUERY_TILE;
    const Element* q = place.rows<Element>(problem.q) + loaded_row * problem.q.row_stride;
    const Element* dout = place.rows<Element>(problem.dout) + loaded_row * problem.dout.row_stride;
    const i64 first_row = sequence.padded_row(problem, place);   // of row_lse, row_d and dq_sum
    auto load_stage = [&](int tile) {
      if (tile < last_tile) {
        const int queries = sequence.seeing() - tile * QUERY_TILE;
        const u32 stage = stage_address(tile);
        load_tile<Tiles::THREADS>(typename Tiles::Q{stage}, q, problem.q.row_stride, queries, problem.q.columns);
        load_tile<Tiles::THREADS>(typename Tiles::DO{stage + Tiles::Q::BYTES}, dout, problem.dout.row_stride, queries, problem.dout.columns);
        constexpr int PER_CHUNK = 16 / (int)sizeof(Real), CHUNKS = QUERY_TILE / PER_CHUNK;
        if (threadIdx.x < 2 * CHUNKS) {   // 16 bytes each: first the lse, then D
          const Real* row = reals<Real>(threadIdx.x < CHUNKS ? problem.row_lse : problem.row_d);
          cp_async(stage + Tiles::Q::BYTES + Tiles::DO::BYTES + threadIdx.x * 16, row + first_row + tile * QUERY_TILE + threadIdx.x % CHUNKS * PER_CHUNK, 16);
        }
        q += QUERY_TILE * problem.q.row_stride;
        dout += QUERY_TILE * problem.dout.row_stride;
      }
      cp_async_commit();
    };
    if (head > 0) __syncthreads();   // every warp is done with the stages of the head before
#pragma unroll
    for (int stage = 0; stage < (STAGES > 1 ? STAGES - 1 : 1); ++stage) load_stage(first_tile + stage);

    for (int query_tile = first_tile; query_tile < last_tile; ++query_tile) {
      cp_async_wait<(STAGES > 1 ? STAGES - 2 : 0)>();
      __syncthreads();
      if constexpr (STAGES > 1) load_stage(query_tile + STAGES - 1);
      keep_here(base);
      const typename Tiles::K k_tile{base};
      const typename Tiles::V v_tile{base + Tiles::K::BYTES};
      const typename Tiles::S ds_tile{base + Tiles::SCORES}, p_tile{base + Tiles::SCORES + (SCORE_TILES - 1) * Tiles::S::BYTES};
      const int first_query = query_tile * QUERY_TILE;
      const u32 stage = stage_address(query_tile);
      const typename Tiles::Q q_tile{stage};
      const typename Tiles::DO do_tile{stage + Tiles::Q::BYTES};
      const u32 statistics = stage + Tiles::Q::BYTES + Tiles::DO::BYTES + (score_group * QUERY_COLUMNS + lane % 4 * 2) * (int)sizeof(Real);

      // Sᵀ = K Qᵀ, then Pᵀ
      Real p[ROW_TILES][QUERY_COLUMNS / 8][4] = {};
      {
        const RowsOfA<typename Tiles::K> k_rows(k_tile, lane);
        const ColumnsOfB<typename Tiles::Q> q_columns(q_tile, lane);
        accumulate<PRECISION, ROW_TILES, QUERY_COLUMNS, HEAD_DIM / K_STEP<Element>, false, false, true>(
            p, [&](auto& words, int m, int k) { k_rows.load(words, key_row + m * 16, k); },
            [&](auto& words, int column, int k) { q_columns.load(words, score_group * QUERY_COLUMNS + column, k); });
      }
      auto first_key = [&] {
        int key = block.first_key;
        keep_here(key);
        return key;
      };
      auto lane_key = [&] { return first_key() + key_row + lane / 4; };   // the lane's first, and its first query
      auto lane_query = [&] { return first_query + score_group * QUERY_COLUMNS + lane % 4 * 2; };
      Real derivative[ROW_TILES][QUERY_COLUMNS / 8][4];   // SOFTCAP alone
      if constexpr (score.CHANGES) score.template apply<true, ROW_TILES, QUERY_COLUMNS>(problem, p, lane_key(), lane_query(), derivative);
#pragma unroll
      for (int n = 0; n < QUERY_COLUMNS / 8; ++n) {
        Real lse[2];
        load_shared(lse[0], lse[1], statistics + n * 8 * (int)sizeof(Real));
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) p[m][n][i] = exponential.against_lse(p[m][n][i], lse[i % 2]);
      }
      // Some query does not see the first or the last key, or the last key or the last query takes no part.
      if (first_query < block.visible.query_begin(first_key() + KEY_TILE - 1) || first_query + QUERY_TILE > block.visible.query_end(first_key()))
        block.visible.template hide<true, ROW_TILES, QUERY_COLUMNS>(p, lane_key(), lane_query(), 0.0f);
      // A probability that is dropped carries a minus sign from here on: it counts in dS, but not in dV.
      if constexpr ((OPTIONS & DROPOUT) != 0)
        Dropout{(u32)place.flat(problem), (u32)sequence.index}.drop<true, ROW_TILES, QUERY_COLUMNS>(
            problem, lane_key(), lane_query(), [&](int m, int n, int half, int i) { p[m][n][2 * half + i] = -p[m][n][2 * half + i]; });

      Real weights[ROW_TILES][QUERY_COLUMNS / 8][4];   // of dV
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int n = 0; n < QUERY_COLUMNS / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) weights[m][n][i] = OPTIONS & DROPOUT && p[m][n][i] < 0 ? 0 : p[m][n][i];

      // dV += Pᵀ dO, with Pᵀ from registers, or (COLUMN_GROUPS > 1) with the columns of every group from shared memory. Where memory allows a tile of its
      // own for Pᵀ, it is read together with dSᵀ, after one wait for both.
      auto store_scores = [&](const typename Tiles::S& tile, const auto& d) {
        if (Tiles::SCORE_GROUPS < COLUMN_GROUPS && column_group >= Tiles::SCORE_GROUPS) return;
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) store_accumulators<PRECISION, QUERY_COLUMNS>(tile, key_row + m * 16, score_group * QUERY_COLUMNS, lane, d[m]);
      };
      auto load_scores = [&](auto& words, const RowsOfAForRowsOfB<typename Tiles::S>& rows, const auto& d, int m, int k) {
        if constexpr (COLUMN_GROUPS > 1) rows.load(words, key_row + m * 16, k);
        else words_of_accumulators<PRECISION, QUERY_COLUMNS>(words, d[m], k);
      };
      auto add_to_dv = [&] {
        const RowsOfB<typename Tiles::DO> do_rows(do_tile, lane);
        const RowsOfAForRowsOfB<typename Tiles::S> p_rows(p_tile, lane);
        accumulate<PRECISION, ROW_TILES, VALUE_COLUMNS, QUERY_TILE / K_STEP<Element>, COLUMN_GROUPS == 1>(
            dv, [&](auto& words, int m, int k) { load_scores(words, p_rows, weights, m, k); },
            [&](auto& words, int column, int k) { do_rows.load(words, k, column_group * VALUE_COLUMNS + column); });
      };
      if constexpr (COLUMN_GROUPS > 1) store_scores(p_tile, weights);
      if constexpr (SCORE_TILES == 1) {
        if constexpr (COLUMN_GROUPS > 1) __syncthreads();
        add_to_dv();
      }

      if constexpr ((OPTIONS & SOFTCAP) != 0) {
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
          for (int n = 0; n < QUERY_COLUMNS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) p[m][n][i] *= derivative[m][n][i];
      }

      // dPᵀ = V dOᵀ, then dSᵀ
      Real ds[ROW_TILES][QUERY_COLUMNS / 8][4] = {};
      {
        const RowsOfA<typename Tiles::V> v_rows(v_tile, lane);
        const ColumnsOfB<typename Tiles::DO> do_columns(do_tile, lane);
        accumulate<PRECISION, ROW_TILES, QUERY_COLUMNS, VALUE_DIM / K_STEP<Element>, false>(
            ds, [&](auto& words, int m, int k) { v_rows.load(words, key_row + m * 16, k); },
            [&](auto& words, int column, int k) { do_columns.load(words, score_group * QUERY_COLUMNS + column, k); });
      }
#pragma unroll
      for (int n = 0; n < QUERY_COLUMNS / 8; ++n) {
        Real d[2];
        load_shared(d[0], d[1], statistics + (QUERY_TILE + n * 8) * (int)sizeof(Real));
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) ds[m][n][i] = gradient_of_score<OPTIONS>(problem, p[m][n][i], ds[m][n][i], d[i % 2]);
      }
      if constexpr (COLUMN_GROUPS > 1 && SCORE_TILES == 1) __syncthreads();   // every warp has read Pᵀ
      if constexpr (COLUMN_GROUPS > 1 || QUERY_GRADIENT) {
        store_scores(ds_tile, ds);
        __syncthreads();
      }
      if constexpr (SCORE_TILES == 2) add_to_dv();

      // dK += dSᵀ Q, likewise
      {
        const RowsOfB<typename Tiles::Q> q_rows(q_tile, lane);
        const RowsOfAForRowsOfB<typename Tiles::S> ds_rows(ds_tile, lane);
        accumulate<PRECISION, ROW_TILES, HEAD_COLUMNS, QUERY_TILE / K_STEP<Element>, COLUMN_GROUPS == 1>(
            dk, [&](auto& words, int m, int k) { load_scores(words, ds_rows, ds, m, k); },
            [&](auto& words, int column, int k) { q_rows.load(words, k, column_group * HEAD_COLUMNS + column); });
      }

      // dQ += dS K: a warp takes 16 · DQ_ROW_TILES queries and DQ_COLUMNS columns over all keys of the block
      if constexpr (QUERY_GRADIENT) {
        constexpr int ROW_GROUPS = QUERY_TILE / (16 * DQ_ROW_TILES), DQ_COLUMNS = HEAD_DIM * ROW_GROUPS / WARPS;
        constexpr int MOST = sizeof(Element) == 2 && HEAD_DIM <= 128 ? 64 : sizeof(Element) == 8 ? 16 : 32, CHUNK = DQ_COLUMNS % MOST == 0 ? MOST : DQ_COLUMNS;   // as many columns at a time as find registers beside dK and dV
        static_assert(WARPS % ROW_GROUPS == 0 && CHUNK % Tiles::COLUMNS_AT_ONCE == 0, "dQ is divided evenly among the warps");
        int thread = threadIdx.x;
        keep_here(thread);
        const int row = thread / 32 % ROW_GROUPS * 16 * DQ_ROW_TILES, first_column = thread / 32 / ROW_GROUPS * DQ_COLUMNS;
        keep_here(base);
        const ColumnsOfA<typename Tiles::S> ds_columns(typename Tiles::S{base + Tiles::SCORES}, lane);
        const RowsOfB<typename Tiles::K> k_rows(typename Tiles::K{base}, lane);
#pragma unroll
        for (int chunk = 0; chunk < DQ_COLUMNS; chunk += CHUNK) {
          const int column = first_column + chunk;
          Real dq[DQ_ROW_TILES][CHUNK / 8][4] = {};
          accumulate<PRECISION, DQ_ROW_TILES, CHUNK, KEY_TILE / K_STEP<Element>, false>(
              dq, [&](auto& words, int m, int k) { ds_columns.load(words, k, row + m * 16); },
              [&](auto& words, int n, int k) { k_rows.load(words, k, column + n); });
          Real* target = reals<Real>(problem.dq_sum) + (first_row + first_query + row + thread % 32 / 4) * HEAD_DIM + column + thread % 4 * 2;
#pragma unroll
          for (int m = 0; m < DQ_ROW_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
              for (int n = 0; n < CHUNK / 8; ++n) reduce_add(target + (m * 16 + half * 8) * HEAD_DIM + n * 8, dq[m][n][2 * half], dq[m][n][2 * half + 1]);
        }
      }
      if constexpr (STAGES == 1) {
        __syncthreads();
        load_stage(query_tile + 1);
      }
    }
  }

  cp_async_wait<0>();
  __syncthreads();
  const Block block(problem, block_index_again());
  if constexpr ((OPTIONS & LENGTHS) != 0) {   // a key that takes no part gets 0, whatever NaN of the others came by
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (block.first_key + key_row + m * 16 + half * 8 + lane / 4 < block.sequence.seen()) continue;
#pragma unroll
        for (int n = 0; n < HEAD_COLUMNS / 8; ++n) dk[m][n][2 * half] = dk[m][n][2 * half + 1] = 0;
#pragma unroll
        for (int n = 0; n < VALUE_COLUMNS / 8; ++n) dv[m][n][2 * half] = dv[m][n][2 * half + 1] = 0;
      }
  }
  const int first_row = block.sequence.first_key + block.first_key, end_row = block.sequence.first_key + block.sequence.keys;
  Place target = block.place;
  if (problem.partial) target.head /= problem.heads_per_block;   // parts have one head a block; dk and dv themselves are found by a query head
  store_gradient<PRECISION, ROW_TILES, HEAD_COLUMNS, Tiles::THREADS>(problem, problem.dk, target, typename Tiles::K{base}, dk, factors<Real>(problem).scale, key_row,
                                                                     column_group * HEAD_COLUMNS, first_row, end_row, lane);
  store_gradient<PRECISION, ROW_TILES, VALUE_COLUMNS, Tiles::THREADS>(problem, problem.dv, target, typename Tiles::V{base + Tiles::K::BYTES}, dv, OPTIONS & DROPOUT ? factors<Real>(problem).keep_inverse : Real(1), key_row,
                                                                      column_group * VALUE_COLUMNS, first_row, end_row, lane);
}
