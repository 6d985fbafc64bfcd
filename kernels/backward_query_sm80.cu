// Attention backward by mma.sync and cp.async: dQ alone, each query's sum over keys in a fixed order (deterministic=True).
//
//   dQ = scale · dS K with dS = P ∘ (dO Vᵀ - D), P = exp(scores(Q Kᵀ) - lse); shapes and options as in backward_sm80.cu
//
// A block owns QUERY_TILE = WARPS / COLUMN_GROUPS · 16 · ROW_TILES queries of one head and walks over the key tiles that any of them sees, as the forward kernel does;
// a warp owns its rows with all columns, so dS passes from accumulators to the A operand of dS K in registers (where rows of dQ are too wide for that,
// COLUMN_GROUPS warps share their queries: each makes all of dS, and dQ in its own part of the columns). Two products are computed a second time
// (they are computed for dK and dV too): that is the price of a sum without atomics and without a buffer of more than the gradient's size.
//
// Shared memory:  Q  QUERY_TILE x HEAD_DIM | dO  QUERY_TILE x VALUE_DIM | STAGES x (K | V); dQ is staged over Q at the end.
// Order of waits: as in forward_sm80.cu; with one stage, the next tile is loaded once every warp is done with this one.
#include "gradient_sm80.cuh"
#include "parts_words.cuh"

template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int WARPS, int ROW_TILES, int KEY_TILE, int STAGES, int COLUMN_GROUPS = 1>
struct BackwardQueryTiles : GradientTiles<PRECISION, HEAD_DIM, VALUE_DIM, WARPS / COLUMN_GROUPS, ROW_TILES, KEY_TILE> {
  using Base = GradientTiles<PRECISION, HEAD_DIM, VALUE_DIM, WARPS / COLUMN_GROUPS, ROW_TILES, KEY_TILE>;
  static constexpr int THREADS = WARPS * 32, ROW_GROUPS = WARPS / COLUMN_GROUPS;
  static constexpr int FIRST_STAGE = Base::QUERY_BYTES, STAGE_BYTES = Base::KEY_BYTES, SHARED_BYTES = FIRST_STAGE + STAGES * STAGE_BYTES;
};

template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int OPTIONS, int WARPS, int ROW_TILES, int KEY_TILE, int STAGES, int BLOCKS_PER_SM, int COLUMN_GROUPS = 1>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS_PER_SM) backward_query_sm80(const __grid_constant__ Problem problem) {
  using Tiles = BackwardQueryTiles<PRECISION, HEAD_DIM, VALUE_DIM, WARPS, ROW_TILES, KEY_TILE, STAGES, COLUMN_GROUPS>;
  using Element = typename Tiles::Element;
  using Real = ::Real<PRECISION>;
  constexpr int HEAD_COLUMNS = HEAD_DIM / COLUMN_GROUPS;
  extern __shared__ __align__(128) u8 shared[];
  if constexpr (PRECISION == FLOAT32 || PRECISION == TFLOAT32) {
    if (problem.tile_counter && !problem.tile_counter[REFUSED]) return;   // the sm90 family has made it (float32_parts.cu)
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = (COLUMN_GROUPS > 1 ? warp % Tiles::ROW_GROUPS : warp) * Tiles::WARP_ROWS;
  const int first_column = COLUMN_GROUPS > 1 ? warp / Tiles::ROW_GROUPS * HEAD_COLUMNS : 0;

  const QueryBlock<OPTIONS, Tiles::QUERY_TILE> block(problem, blockIdx.x);
  if (!block.exists()) return;
  const Place& place = block.place;
  const Sequence<OPTIONS>& sequence = block.sequence;
  const int first_query = block.first_query, queries = sequence.seeing() - first_query;
  const Visible<OPTIONS> visible(problem, place, sequence);
  const KeyTiles<OPTIONS, KEY_TILE> key_tiles(visible, first_query, Tiles::QUERY_TILE);

  u32 base = shared_address(shared);
  const Element* k = place.rows<Element>(problem.k) + sequence.first_key * problem.k.row_stride;
  const Element* v = place.rows<Element>(problem.v) + sequence.first_key * problem.v.row_stride;
  auto load_stage = [&](int tile) {
    if (tile < key_tiles.end) {
      const int first_key = tile * KEY_TILE, keys = sequence.seen() - first_key;
      const u32 stage = base + Tiles::FIRST_STAGE + tile % STAGES * Tiles::STAGE_BYTES;
      load_tile<Tiles::THREADS>(typename Tiles::K{stage}, k + first_key * problem.k.row_stride, problem.k.row_stride, keys, problem.k.columns);
      load_tile<Tiles::THREADS>(typename Tiles::V{stage + Tiles::K::BYTES}, v + first_key * problem.v.row_stride, problem.v.row_stride, keys, problem.v.columns);
    }
    cp_async_commit();
  };
  const i64 array_row = sequence.first_query + first_query;
  load_tile<Tiles::THREADS>(typename Tiles::Q{base}, place.rows<Element>(problem.q) + array_row * problem.q.row_stride, problem.q.row_stride, queries, problem.q.columns);
  load_tile<Tiles::THREADS>(typename Tiles::DO{base + Tiles::Q::BYTES}, place.rows<Element>(problem.dout) + array_row * problem.dout.row_stride, problem.dout.row_stride,
                            queries, problem.dout.columns);
#pragma unroll
  for (int stage = 0; stage < (STAGES > 1 ? STAGES - 1 : 1); ++stage) load_stage(key_tiles.begin + stage);

  const Score<PRECISION, OPTIONS> score(problem, place, sequence);
  Real lse[ROW_TILES][2], d[ROW_TILES][2];
  load_statistics(problem, lse, d, sequence.padded_row(problem, place) + first_query + warp_row + lane / 4);

  Real dq[ROW_TILES][HEAD_COLUMNS / 8][4] = {};
  for (int tile = key_tiles.begin; tile < key_tiles.end; ++tile) {
    cp_async_wait<(STAGES > 1 ? STAGES - 2 : 0)>();
    __syncthreads();
    if constexpr (STAGES > 1) load_stage(tile + STAGES - 1);
    keep_here(base);
    const u32 stage = base + Tiles::FIRST_STAGE + tile % STAGES * Tiles::STAGE_BYTES;
    const typename Tiles::K k_tile{stage};
    const typename Tiles::V v_tile{stage + Tiles::K::BYTES};

    Real ds[ROW_TILES][KEY_TILE / 8][4] = {};
    gradient_of_products<PRECISION, OPTIONS, true>(problem, ds, typename Tiles::Q{base}, typename Tiles::DO{base + Tiles::Q::BYTES}, k_tile, v_tile, score, visible, key_tiles.need_mask(tile),
                                                   Dropout{block.schedule.place, (u32)sequence.index}, lse, d, first_query, warp_row, tile * KEY_TILE, lane);

    const RowsOfB<typename Tiles::K> k_rows(k_tile, lane);
    accumulate<PRECISION, ROW_TILES, HEAD_COLUMNS, KEY_TILE / K_STEP<Element>, true>(
        dq, [&](auto& words, int m, int step) { words_of_accumulators<PRECISION, KEY_TILE>(words, ds[m], step); },
        [&](auto& words, int column, int step) { k_rows.load(words, step, first_column + column); });
    if constexpr (STAGES == 1) {
      __syncthreads();
      load_stage(tile + 1);
    }
  }

  cp_async_wait<0>();
  __syncthreads();
  if constexpr ((OPTIONS & LENGTHS) != 0) {   // a query that takes no part sees nothing, not even a NaN of the others
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int n = 0; n < HEAD_COLUMNS / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (warp_row + m * 16 + i / 2 * 8 + lane / 4 >= queries) dq[m][n][i] = 0;
  }
  store_gradient<PRECISION, ROW_TILES, HEAD_COLUMNS, Tiles::THREADS>(problem, problem.dq, place, typename Tiles::Q{base}, dq, factors<Real>(problem).scale, warp_row, first_column, (int)array_row, sequence.first_query + sequence.queries, lane);
}
