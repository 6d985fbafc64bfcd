// Attention backward by mma.sync and cp.async: dQ alone, each query's sum over keys in a fixed order (deterministic=True).
//
//   dQ = scale · dS K with dS = P ∘ (dO Vᵀ - D), P = exp(scale · Q Kᵀ - lse); shapes as in backward_sm80.cu
//
// A block owns QUERY_TILE = WARPS · 16 · ROW_TILES queries of one head and walks over the key tiles that any of them sees, as the forward kernel does;
// a warp owns its rows with all columns, so dS passes from accumulators to the A operand of dS K in registers. Two products are computed a second time
// (they are computed for dK and dV too): that is the price of a sum without atomics and without a buffer of more than the gradient's size.
//
// Shared memory:  Q  QUERY_TILE x HEAD_DIM | dO  QUERY_TILE x VALUE_DIM | STAGES x (K | V); dQ is staged over Q at the end.
// Order of waits: as in forward_sm80.cu.
#include "gradient_sm80.cuh"
#include "product_sm80.cuh"
#include "score.cuh"

template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int WARPS, int ROW_TILES, int KEY_TILE, int STAGES> struct BackwardQueryTiles {
  using Element = typename ElementOf<PRECISION>::type;
  static constexpr int THREADS = WARPS * 32, WARP_ROWS = ROW_TILES * 16, QUERY_TILE = WARPS * WARP_ROWS;
  using Q = SharedTile<Element, QUERY_TILE, HEAD_DIM>;
  using DO = SharedTile<Element, QUERY_TILE, VALUE_DIM>;
  using K = SharedTile<Element, KEY_TILE, HEAD_DIM>;
  using V = SharedTile<Element, KEY_TILE, VALUE_DIM>;
  static constexpr int FIRST_STAGE = Q::BYTES + DO::BYTES, STAGE_BYTES = K::BYTES + V::BYTES;
  static constexpr int SHARED_BYTES = FIRST_STAGE + STAGES * STAGE_BYTES;
};

template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int OPTIONS, int WARPS, int ROW_TILES, int KEY_TILE, int STAGES, int BLOCKS_PER_SM>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS_PER_SM) backward_query_sm80(const __grid_constant__ Problem problem) {
  using Tiles = BackwardQueryTiles<PRECISION, HEAD_DIM, VALUE_DIM, WARPS, ROW_TILES, KEY_TILE, STAGES>;
  using Element = typename Tiles::Element;
  constexpr int K_STEP = 32 / (int)sizeof(Element);
  extern __shared__ __align__(128) u8 shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp * Tiles::WARP_ROWS;

  const int query_tiles = ceil_div(problem.queries, Tiles::QUERY_TILE);
  const Schedule schedule(problem, blockIdx.x, query_tiles);
  const Place place(problem, schedule.place, problem.grid_heads);
  const Visible visible(problem, place);
  const int query_tile = problem.causal ? query_tiles - 1 - schedule.tile : schedule.tile;   // the last queries see most keys
  const int first_query = query_tile * Tiles::QUERY_TILE, queries = min(Tiles::QUERY_TILE, problem.queries - first_query);
  const int tiles = ceil_div(visible.key_end(first_query + queries - 1), KEY_TILE);
  const int whole_tiles = visible.key_end(first_query) / KEY_TILE;

  u32 base = shared_address(shared);
  const Element* k = place.rows<Element>(problem.k);
  const Element* v = place.rows<Element>(problem.v);
  auto load_stage = [&](int tile) {
    if (tile < tiles) {
      const int first_key = tile * KEY_TILE, keys = problem.keys - first_key;
      const u32 stage = base + Tiles::FIRST_STAGE + tile % STAGES * Tiles::STAGE_BYTES;
      load_tile<Tiles::THREADS>(typename Tiles::K{stage}, k + first_key * problem.k.row_stride, problem.k.row_stride, keys, problem.k.columns);
      load_tile<Tiles::THREADS>(typename Tiles::V{stage + Tiles::K::BYTES}, v + first_key * problem.v.row_stride, problem.v.row_stride, keys, problem.v.columns);
    }
    cp_async_commit();
  };
  load_tile<Tiles::THREADS>(typename Tiles::Q{base}, place.rows<Element>(problem.q) + first_query * problem.q.row_stride, problem.q.row_stride, queries, problem.q.columns);
  load_tile<Tiles::THREADS>(typename Tiles::DO{base + Tiles::Q::BYTES}, place.rows<Element>(problem.dout) + first_query * problem.dout.row_stride, problem.dout.row_stride,
                            queries, problem.dout.columns);
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) load_stage(stage);

  using Exp = Exponential<PRECISION, OPTIONS>;
  const Exp exponential(problem);
  float lse[ROW_TILES][2], d[ROW_TILES][2];   // rows beyond the last query hold lse = inf, so that P = 0
  const i64 first_row = place.flat(problem) * problem.padded_queries + first_query + warp_row + lane / 4;
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) lse[m][half] = problem.row_lse[first_row + m * 16 + half * 8], d[m][half] = problem.row_d[first_row + m * 16 + half * 8];

  float dq[ROW_TILES][HEAD_DIM / 8][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    load_stage(tile + STAGES - 1);
    keep_here(base);
    const u32 stage = base + Tiles::FIRST_STAGE + tile % STAGES * Tiles::STAGE_BYTES;
    const typename Tiles::K k_tile{stage};
    const typename Tiles::V v_tile{stage + Tiles::K::BYTES};

    float p[ROW_TILES][KEY_TILE / 8][4] = {};
    {
      const RowsOfA<typename Tiles::Q> q_rows(typename Tiles::Q{base}, lane);
      const ColumnsOfB<typename Tiles::K> k_columns(k_tile, lane);
      accumulate<PRECISION, ROW_TILES, KEY_TILE, HEAD_DIM / K_STEP, false>(
          p, [&](u32(&words)[4], int m, int step) { q_rows.load(words, warp_row + m * 16, step); },
          [&](u32(&words)[4], int column, int step) { k_columns.load(words, column, step); });
    }
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int n = 0; n < KEY_TILE / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) p[m][n][i] = exponential(Exp::transform(problem, p[m][n][i]), lse[m][i / 2]);
    if (tile >= whole_tiles) {
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int end = visible.key_end(first_query + warp_row + m * 16 + half * 8 + lane / 4) - tile * KEY_TILE - lane % 4 * 2;
#pragma unroll
          for (int n = 0; n < KEY_TILE / 8; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
              if (n * 8 + i >= end) p[m][n][2 * half + i] = 0.0f;
        }
    }

    float ds[ROW_TILES][KEY_TILE / 8][4] = {};
    {
      const RowsOfA<typename Tiles::DO> do_rows(typename Tiles::DO{base + Tiles::Q::BYTES}, lane);
      const ColumnsOfB<typename Tiles::V> v_columns(v_tile, lane);
      accumulate<PRECISION, ROW_TILES, KEY_TILE, VALUE_DIM / K_STEP, false>(
          ds, [&](u32(&words)[4], int m, int step) { do_rows.load(words, warp_row + m * 16, step); },
          [&](u32(&words)[4], int column, int step) { v_columns.load(words, column, step); });
    }
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int n = 0; n < KEY_TILE / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - d[m][i / 2]);

    const RowsOfB<typename Tiles::K> k_rows(k_tile, lane);
    accumulate<PRECISION, ROW_TILES, HEAD_DIM, KEY_TILE / K_STEP, true>(
        dq, [&](u32(&words)[4], int m, int step) { words_of_accumulators<PRECISION, KEY_TILE>(words, ds[m], step); },
        [&](u32(&words)[4], int column, int step) { k_rows.load(words, step, column); });
  }

  cp_async_wait<0>();
  __syncthreads();
  store_gradient<PRECISION, ROW_TILES, HEAD_DIM, Tiles::THREADS>(problem, problem.dq, place, typename Tiles::Q{base}, dq, problem.scale, warp_row, 0, first_query, problem.queries, lane);
}
