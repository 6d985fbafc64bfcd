// Attention forward by mma.sync and cp.async: every GPU from sm_80 on. Algorithm: FlashAttention-2 (Dao 2023, arXiv:2307.08691, section 3.1).
//
//   O = softmax(scores(Q Kᵀ)) V,   lse = log of the softmax denominator; what scores are, and the options of a call, is in score.cuh
//   Q (batch, heads, queries, HEAD_DIM), K (.., keys, HEAD_DIM), V (.., keys, VALUE_DIM), O (batch, heads, queries, VALUE_DIM), lse (batch, heads, queries)
//
// A block owns QUERY_TILE = WARPS / VALUE_GROUPS · 16 · ROW_TILES queries of one head and walks over the key tiles that any of them sees; a warp owns 16 · ROW_TILES of
// the queries and all columns, so the softmax never leaves the warp. O, the row maxima and the row sums stay in registers. Where rows of O are too wide for
// that (float64), VALUE_GROUPS warps share their queries: each makes all of the scores, and O in its own part of the columns.
//
// Shared memory:  Q tile  QUERY_TILE x HEAD_DIM | STAGES x (K tile  KEY_TILE x HEAD_DIM | V tile  KEY_TILE x VALUE_DIM | STAGED_BIAS: QUERY_TILE x KEY_TILE);
// O is staged over all of it at the end.
// Order of waits: a stage's copies have arrived (cp.async.wait_group, then __syncthreads, which also says that every warp is done with the stage before);
// then the copies of the tile STAGES - 1 ahead are issued into that freed stage, and only then does the arithmetic on this stage begin.
#include "forward_rows.cuh"
#include "parts_words.cuh"

template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int OPTIONS, int WARPS, int ROW_TILES, int KEY_TILE, int STAGES, int VALUE_GROUPS = 1> struct ForwardTiles {
  using Element = typename ElementOf<PRECISION>::type;
  static constexpr int THREADS = WARPS * 32, WARP_ROWS = ROW_TILES * 16, ROW_GROUPS = WARPS / VALUE_GROUPS, QUERY_TILE = ROW_GROUPS * WARP_ROWS;
  using Q = SharedTile<Element, QUERY_TILE, HEAD_DIM>;
  using K = SharedTile<Element, KEY_TILE, HEAD_DIM>;
  using V = SharedTile<Element, KEY_TILE, VALUE_DIM>;
  using O = SharedTile<Element, QUERY_TILE, VALUE_DIM>;
  using Bias = SharedTile<typename Score<PRECISION, OPTIONS>::BiasElement, QUERY_TILE, KEY_TILE>;
  static constexpr int STAGE_BYTES = K::BYTES + V::BYTES + (OPTIONS & STAGED_BIAS ? Bias::BYTES : 0);
  static constexpr int SHARED_BYTES = Q::BYTES + STAGES * STAGE_BYTES;
  static_assert(O::BYTES <= SHARED_BYTES, "the output is staged in shared memory");
};

template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int OPTIONS, int WARPS, int ROW_TILES, int KEY_TILE, int STAGES, int BLOCKS_PER_SM, int VALUE_GROUPS = 1>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS_PER_SM) forward_sm80(const __grid_constant__ Problem problem) {
  using Tiles = ForwardTiles<PRECISION, HEAD_DIM, VALUE_DIM, OPTIONS, WARPS, ROW_TILES, KEY_TILE, STAGES, VALUE_GROUPS>;
  using Element = typename Tiles::Element;
  using Real = ::Real<PRECISION>;
  constexpr int VALUE_COLUMNS = VALUE_DIM / VALUE_GROUPS;
  extern __shared__ __align__(128) u8 shared[];
  int lane = threadIdx.x % 32;
  const int warp = VALUE_GROUPS > 1 ? threadIdx.x / 32 % Tiles::ROW_GROUPS : threadIdx.x / 32;   // of those with the same columns of O
  const int first_column = VALUE_GROUPS > 1 ? threadIdx.x / 32 / Tiles::ROW_GROUPS * VALUE_COLUMNS : 0;

  using Block = QueryBlock<OPTIONS, Tiles::QUERY_TILE>;
  const Block block(problem, blockIdx.x);
  if (!block.exists()) return;
  const Place& place = block.place;
  if constexpr (PRECISION == FLOAT32 || PRECISION == TFLOAT32) {
    if (problem.tile_counter && !problem.tile_counter[REFUSED] && *word_of_output(problem, place)) return;   // the sm90 family has made it (float32_parts.cu)
  }
  const Sequence<OPTIONS>& sequence = block.sequence;
  const Visible<OPTIONS> visible(problem, place, sequence);
  const KeyTiles<OPTIONS, KEY_TILE> key_tiles(visible, block.first_query, Tiles::QUERY_TILE);

  u32 base = shared_address(shared);
  const Element* k = place.rows<Element>(problem.k) + sequence.first_key * problem.k.row_stride;
  const Element* v = place.rows<Element>(problem.v) + sequence.first_key * problem.v.row_stride;
  auto k_tile = [&](int stage) { return typename Tiles::K{base + Tiles::Q::BYTES + stage * Tiles::STAGE_BYTES}; };
  auto v_tile = [&](int stage) { return typename Tiles::V{base + Tiles::Q::BYTES + stage * Tiles::STAGE_BYTES + Tiles::K::BYTES}; };
  auto bias_tile = [&](int stage) { return typename Tiles::Bias{base + Tiles::Q::BYTES + stage * Tiles::STAGE_BYTES + Tiles::K::BYTES + Tiles::V::BYTES}; };
  const Score<PRECISION, OPTIONS> score(problem, place, sequence);
  auto load_stage = [&](int tile) {
    if (tile < key_tiles.end) {
      const int first_key = tile * KEY_TILE, keys = sequence.seen() - first_key;
      load_tile<Tiles::THREADS>(k_tile(tile % STAGES), k + first_key * problem.k.row_stride, problem.k.row_stride, keys, problem.k.columns);
      load_tile<Tiles::THREADS>(v_tile(tile % STAGES), v + first_key * problem.v.row_stride, problem.v.row_stride, keys, problem.v.columns);
      if constexpr ((OPTIONS & STAGED_BIAS) != 0)
        load_tile<Tiles::THREADS>(bias_tile(tile % STAGES), score.bias + block.first_query * problem.bias.row_stride + first_key, problem.bias.row_stride,
                                  sequence.seeing() - block.first_query, sequence.keys - first_key);
    }
    cp_async_commit();   // one group a tile, empty past the end, so that the count of pending groups stays right
  };

  load_tile<Tiles::THREADS>(typename Tiles::Q{base}, place.rows<Element>(problem.q) + (sequence.first_query + block.first_query) * problem.q.row_stride, problem.q.row_stride,
                            sequence.seeing() - block.first_query, problem.q.columns);
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) load_stage(key_tiles.begin + stage);   // Q travels with the first group

  using Exp = Exponential<PRECISION>;
  const Exp exponential(problem);
  Real output[ROW_TILES][VALUE_COLUMNS / 8][4] = {};
  OnlineSoftmax<KEY_TILE, Real> softmax[ROW_TILES];
  if constexpr ((OPTIONS & SINKS) != 0) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) softmax[m].start(Exp::shift_of_lse(*place.rows<Real>(problem.sinks)), lane);
  }

  for (int tile = key_tiles.begin; tile < key_tiles.end; ++tile) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    load_stage(tile + STAGES - 1);
    keep_here(base);
    if constexpr (PRECISION == FLOAT32 && HEAD_DIM == 128) keep_here(lane);   // the one tile whose registers are so short
    const RowsOfA<typename Tiles::Q> q_rows(typename Tiles::Q{base}, lane);

    // S = Q Kᵀ
    Real scores[ROW_TILES][KEY_TILE / 8][4] = {};
    const ColumnsOfB<typename Tiles::K> k_columns(k_tile(tile % STAGES), lane);
    accumulate<PRECISION, ROW_TILES, KEY_TILE, HEAD_DIM / K_STEP<Element>, false>(
        scores,
        [&](auto& words, int m, int step) { q_rows.load(words, warp * Tiles::WARP_ROWS + m * 16, step); },
        [&](auto& words, int column, int step) { k_columns.load(words, column, step); });

    auto lane_row = [&] {   // the first of the lane's
      int first_row = block.first_query;
      keep_here(first_row);
      return first_row + warp * Tiles::WARP_ROWS + lane / 4;
    };
    const int lane_column = tile * KEY_TILE + lane % 4 * 2;
    if constexpr ((OPTIONS & STAGED_BIAS) != 0) {
      constexpr int PER_CHUNK = 16 / (int)sizeof(typename Tiles::Bias::Element);
      const LaneView<typename Tiles::Bias> view(bias_tile(tile % STAGES), lane / 4, lane % 4 * 2 / PER_CHUNK, lane % 4 * 2 % PER_CHUNK * (int)sizeof(typename Tiles::Bias::Element));
      auto add_bias = [&](int, int) {
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int n = 0; n < KEY_TILE / 8; ++n) {
              Real x[2];
              load_shared_pair<typename Tiles::Bias::Element>(x, view.at(warp * Tiles::WARP_ROWS + m * 16 + half * 8, n * 8 / PER_CHUNK));
#pragma unroll
              for (int i = 0; i < 2; ++i) scores[m][n][2 * half + i] = fma(x[i], factors<Real>(problem).inverse_unit, scores[m][n][2 * half + i]);
            }
      };
      score.template apply<false, ROW_TILES, KEY_TILE>(problem, scores, lane_row(), lane_column, add_bias, nullptr);
    } else if constexpr (score.CHANGES) {
      score.template apply<false, ROW_TILES, KEY_TILE>(problem, scores, lane_row(), lane_column);
    }
    if (key_tiles.need_mask(tile)) visible.template hide<false, ROW_TILES, KEY_TILE>(scores, lane_row(), lane_column, -infinity());

#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
      softmax[m].step(scores[m], exponential, [&](int row, Real ratio) {
#pragma unroll
        for (int n = 0; n < VALUE_COLUMNS / 8; ++n) output[m][n][2 * row] *= ratio, output[m][n][2 * row + 1] *= ratio;
      });

    if constexpr ((OPTIONS & DROPOUT) != 0)
      Dropout{block.schedule.place, (u32)sequence.index}.drop<false, ROW_TILES, KEY_TILE>(problem, lane_row(), lane_column, [&](int m, int n, int half, int i) { scores[m][n][2 * half + i] = 0; });

    // O += P V, with P straight from the accumulators of S
    const RowsOfB<typename Tiles::V> v_rows(v_tile(tile % STAGES), lane);
    accumulate<PRECISION, ROW_TILES, VALUE_COLUMNS, KEY_TILE / K_STEP<Element>, true, (OPTIONS & LONG_SUMS) != 0>(
        output, [&](auto& words, int m, int step) { words_of_accumulators<PRECISION, KEY_TILE>(words, scores[m], step); },
        [&](auto& words, int column, int step) { v_rows.load(words, step, first_column + column); });
  }

  // O / row sum goes through shared memory, so that rows leave in 16-byte pieces.
  cp_async_wait<0>();
  __syncthreads();
  const Block again(problem, block_index_again());
  const Place& target = again.place;
  const int first_row = again.sequence.first_query + again.first_query;
  const int rows = again.rows();
  const typename Tiles::O o_tile{base};
  bool has_lse = false;   // of the sm90 family's scores: it is as good, and its backward, which makes the same scores, needs no other
  if constexpr (PRECISION == FLOAT32 || PRECISION == TFLOAT32) has_lse = problem.tile_counter && !problem.tile_counter[REFUSED];
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
    const int row = warp * Tiles::WARP_ROWS + m * 16;
    Real lse[2];
    finish_rows<OPTIONS>(problem, target, softmax[m], exponential, again.first_query + row + lane / 4, again.sequence.seeing(), output[m], lse);
    store_accumulators<PRECISION, VALUE_COLUMNS>(o_tile, row, first_column, lane, output[m]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + half * 8 + lane / 4;
      if (lane % 4 == 0 && at < rows && !has_lse) target.rows<Real>(problem.lse)[(first_row + at) * problem.lse.row_stride] = lse[half];
    }
  }
  if constexpr (VALUE_GROUPS > 1) __syncthreads();
  else __syncwarp();
  Element* out = target.rows<Element>(problem.out) + first_row * problem.out.row_stride;
  if constexpr (VALUE_GROUPS > 1) store_rows<Tiles::THREADS, Tiles::QUERY_TILE>(o_tile, 0, threadIdx.x, out, problem.out.row_stride, rows, problem.out.columns);
  else store_rows<32, Tiles::WARP_ROWS>(o_tile, warp * Tiles::WARP_ROWS, lane, out, problem.out.row_stride, rows, problem.out.columns);
}
