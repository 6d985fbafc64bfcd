// Attention forward by mma.sync and cp.async: every GPU from sm_80 on. Algorithm: FlashAttention-2 (Dao 2023, arXiv:2307.08691, section 3.1).
//
//   O = softmax(scale · Q Kᵀ) V,   lse = log of the softmax denominator
//   Q (batch, heads, queries, HEAD_DIM), K (.., keys, HEAD_DIM), V (.., keys, VALUE_DIM), O (batch, heads, queries, VALUE_DIM), lse (batch, heads, queries)
//
// A block owns QUERY_TILE = WARPS · 16 · ROW_TILES queries of one head and walks over the key tiles that any of them sees; a warp owns 16 · ROW_TILES of
// the queries and all columns, so the softmax never leaves the warp. O, the row maxima and the row sums stay in registers.
//
// Shared memory:  Q tile  QUERY_TILE x HEAD_DIM | STAGES x (K tile  KEY_TILE x HEAD_DIM | V tile  KEY_TILE x VALUE_DIM); O is staged over all of it at the end.
// Order of waits: a stage's copies have arrived (cp.async.wait_group, then __syncthreads, which also says that every warp is done with the stage before);
// then the copies of the tile STAGES - 1 ahead are issued into that freed stage, and only then does the arithmetic on this stage begin.
#include "product_sm80.cuh"
#include "score.cuh"
#include "softmax.cuh"

template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int WARPS, int ROW_TILES, int KEY_TILE, int STAGES> struct ForwardTiles {
  using Element = typename ElementOf<PRECISION>::type;
  static constexpr int THREADS = WARPS * 32, WARP_ROWS = ROW_TILES * 16, QUERY_TILE = WARPS * WARP_ROWS;
  using Q = SharedTile<Element, QUERY_TILE, HEAD_DIM>;
  using K = SharedTile<Element, KEY_TILE, HEAD_DIM>;
  using V = SharedTile<Element, KEY_TILE, VALUE_DIM>;
  using O = SharedTile<Element, QUERY_TILE, VALUE_DIM>;
  static constexpr int STAGE_BYTES = K::BYTES + V::BYTES;
  static constexpr int SHARED_BYTES = Q::BYTES + STAGES * STAGE_BYTES;
  static_assert(O::BYTES <= SHARED_BYTES, "the output is staged in shared memory");
};

template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int OPTIONS, int WARPS, int ROW_TILES, int KEY_TILE, int STAGES, int BLOCKS_PER_SM>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS_PER_SM) forward_sm80(const __grid_constant__ Problem problem) {
  using Tiles = ForwardTiles<PRECISION, HEAD_DIM, VALUE_DIM, WARPS, ROW_TILES, KEY_TILE, STAGES>;
  using Element = typename Tiles::Element;
  constexpr int K_STEP = 32 / (int)sizeof(Element);
  extern __shared__ __align__(128) u8 shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  const int query_tiles = ceil_div(problem.queries, Tiles::QUERY_TILE);
  const Schedule schedule(problem, blockIdx.x, query_tiles);
  const Place place(problem, schedule.place, problem.grid_heads);
  const Visible visible(problem, place);
  const int query_tile = problem.causal ? query_tiles - 1 - schedule.tile : schedule.tile;   // the last queries see most keys
  const int first_query = query_tile * Tiles::QUERY_TILE, queries = min(Tiles::QUERY_TILE, problem.queries - first_query);

  // Key tiles [0, tiles) are seen by some query of the block; tiles below `whole_tiles` by all of them.
  const int tiles = ceil_div(visible.key_end(first_query + queries - 1), KEY_TILE);
  const int whole_tiles = visible.key_end(first_query) / KEY_TILE;

  u32 base = shared_address(shared);
  const Element* q = place.rows<Element>(problem.q) + first_query * problem.q.row_stride;
  const Element* k = place.rows<Element>(problem.k);
  const Element* v = place.rows<Element>(problem.v);
  auto k_tile = [&](int stage) { return typename Tiles::K{base + Tiles::Q::BYTES + stage * Tiles::STAGE_BYTES}; };
  auto v_tile = [&](int stage) { return typename Tiles::V{base + Tiles::Q::BYTES + stage * Tiles::STAGE_BYTES + Tiles::K::BYTES}; };
  auto load_stage = [&](int tile) {
    if (tile < tiles) {
      const int first_key = tile * KEY_TILE, keys = problem.keys - first_key;
      load_tile<Tiles::THREADS>(k_tile(tile % STAGES), k + first_key * problem.k.row_stride, problem.k.row_stride, keys, problem.k.columns);
      load_tile<Tiles::THREADS>(v_tile(tile % STAGES), v + first_key * problem.v.row_stride, problem.v.row_stride, keys, problem.v.columns);
    }
    cp_async_commit();   // one group a tile, empty past the end, so that the count of pending groups stays right
  };

  load_tile<Tiles::THREADS>(typename Tiles::Q{base}, q, problem.q.row_stride, queries, problem.q.columns);
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) load_stage(stage);   // Q travels with the first group

  using Exp = Exponential<PRECISION, OPTIONS>;
  const Exp exponential(problem);
  float output[ROW_TILES][VALUE_DIM / 8][4] = {};
  OnlineSoftmax<KEY_TILE> softmax[ROW_TILES];

  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    load_stage(tile + STAGES - 1);
    keep_here(base);
    const RowsOfA<typename Tiles::Q> q_rows(typename Tiles::Q{base}, lane);

    // S = Q Kᵀ
    float scores[ROW_TILES][KEY_TILE / 8][4] = {};
    const ColumnsOfB<typename Tiles::K> k_columns(k_tile(tile % STAGES), lane);
    accumulate<PRECISION, ROW_TILES, KEY_TILE, HEAD_DIM / K_STEP, false>(
        scores,
        [&](u32(&words)[4], int m, int step) { q_rows.load(words, warp * Tiles::WARP_ROWS + m * 16, step); },
        [&](u32(&words)[4], int column, int step) { k_columns.load(words, column, step); });

    if constexpr (OPTIONS & SCALE_FIRST) {
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int n = 0; n < KEY_TILE / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[m][n][i] = Exp::transform(problem, scores[m][n][i]);
    }
    if (tile >= whole_tiles) {
      int first_row = first_query;
      keep_here(first_row);
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = first_row + warp * Tiles::WARP_ROWS + m * 16 + half * 8 + lane / 4;
          const int end = visible.key_end(row) - tile * KEY_TILE - lane % 4 * 2;   // this lane's columns are n · 8 and n · 8 + 1 from here
#pragma unroll
          for (int n = 0; n < KEY_TILE / 8; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
              if (n * 8 + i >= end) scores[m][n][2 * half + i] = -infinity();
        }
    }

#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
      softmax[m].step(scores[m], exponential, [&](int row, float ratio) {
#pragma unroll
        for (int n = 0; n < VALUE_DIM / 8; ++n) output[m][n][2 * row] *= ratio, output[m][n][2 * row + 1] *= ratio;
      });

    // O += P V, with P straight from the accumulators of S
    const RowsOfB<typename Tiles::V> v_rows(v_tile(tile % STAGES), lane);
    accumulate<PRECISION, ROW_TILES, VALUE_DIM, KEY_TILE / K_STEP, true, (OPTIONS & LONG_SUMS) != 0>(
        output, [&](u32(&words)[4], int m, int step) { words_of_accumulators<PRECISION, KEY_TILE>(words, scores[m], step); },
        [&](u32(&words)[4], int column, int step) { v_rows.load(words, step, column); });
  }

  // O / row sum goes through shared memory, so that rows leave in 16-byte pieces.
  cp_async_wait<0>();
  __syncthreads();
  const Schedule again(problem, block_index_again(), query_tiles);
  const Place target(problem, again.place, problem.grid_heads);
  const int first_row = (problem.causal ? query_tiles - 1 - again.tile : again.tile) * Tiles::QUERY_TILE, rows = min(Tiles::QUERY_TILE, problem.queries - first_row);
  const typename Tiles::O o_tile{base};
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
    float inverse[2], lse[2];
    softmax[m].finish(exponential, inverse, lse);
#pragma unroll
    for (int n = 0; n < VALUE_DIM / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) output[m][n][i] *= inverse[i / 2];
    const int row = warp * Tiles::WARP_ROWS + m * 16;
    store_accumulators<PRECISION, VALUE_DIM>(o_tile, row, 0, lane, output[m]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + half * 8 + lane / 4;
      if (lane % 4 == 0 && at < rows) target.rows<float>(problem.lse)[(first_row + at) * problem.lse.row_stride] = lse[half];
    }
  }
  __syncwarp();
  Element* out = target.rows<Element>(problem.out) + first_row * problem.out.row_stride;
  store_rows<32, Tiles::WARP_ROWS>(o_tile, warp * Tiles::WARP_ROWS, lane, out, problem.out.row_stride, rows, problem.out.columns);
}
