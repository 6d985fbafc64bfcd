// Attention backward by mma.sync and cp.async: the gradient of the bias, dBias = dS summed over whatever the bias was broadcast along, in a fixed order.
//
//   dS = P ∘ (dO Vᵀ - D), P = exp(scores(Q Kᵀ) - lse); shapes and options as in backward_sm80.cu
//   dBias (splits, batch or 1, heads or 1, queries or 1, keys or 1) float32 (float64) parts that the host sums; without splits possibly the gradient itself
//
// A block owns a tile of dBias: of rows, of columns, or of both, and where the bias has one row (column) the block sums over all. It walks over the batch
// entries and heads that share the bias, and over the tiles of queries and keys that meet in its part, adds up dS in registers as if all tiles were one,
// and at the end sums the tile's rows or columns. So no sum needs atomics or more memory than the gradient. Where that leaves few blocks, each walks over
// one of `splits` shares of the way. A warp owns 16 · ROW_TILES rows and all columns of a tile of scores.
//
// Shared memory:  Q  QUERY_TILE x HEAD_DIM | dO  QUERY_TILE x VALUE_DIM | K  KEY_TILE x HEAD_DIM | V  KEY_TILE x VALUE_DIM; column sums of the warps at the end.
// Order of waits: every warp is done with the tiles before (__syncthreads), the copies of this step are issued and have arrived (cp.async.wait_group,
// __syncthreads); other blocks on the multiprocessor work meanwhile.
#include "gradient_sm80.cuh"

template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int WARPS, int ROW_TILES, int KEY_TILE> struct BackwardBiasTiles : GradientTiles<PRECISION, HEAD_DIM, VALUE_DIM, WARPS, ROW_TILES, KEY_TILE> {
  using Base = GradientTiles<PRECISION, HEAD_DIM, VALUE_DIM, WARPS, ROW_TILES, KEY_TILE>;
  static constexpr int SHARED_BYTES = Base::QUERY_BYTES + Base::KEY_BYTES;
  static_assert(WARPS * KEY_TILE * (int)sizeof(Real<PRECISION>) <= SHARED_BYTES, "column sums of the warps fit");
};

// The batch entries and heads that share one (batch, head) of the bias: where dBias has an axis the block's own index counts, elsewhere the one it walks over.
struct SharingPlaces {
  Place place;

  static __device__ __forceinline__ int count(const Problem& problem) {
    int n = problem.dbias.head_stride ? 1 : problem.heads;
#pragma unroll
    for (int i = 0; i < BATCH_DIMS; ++i) n *= problem.dbias.batch_stride[i] ? 1 : problem.batch[i];
    return n;
  }
  __device__ __forceinline__ void move_to(const Problem& problem, u32 own, u32 shared) {
    place.head = step(own, shared, problem.dbias.head_stride, problem.heads);
#pragma unroll
    for (int i = BATCH_DIMS - 1; i >= 0; --i) place.batch[i] = step(own, shared, problem.dbias.batch_stride[i], problem.batch[i]);
  }
  static __device__ __forceinline__ int step(u32& own, u32& shared, i64 stride, u32 size) {
    const u32 index = stride ? own : shared;
    if (stride) own /= size;
    else shared /= size;
    return index % size;
  }
};

template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int OPTIONS, int WARPS, int ROW_TILES, int KEY_TILE, int BLOCKS_PER_SM>
__global__ void __launch_bounds__(WARPS * 32, BLOCKS_PER_SM) backward_bias_sm80(const __grid_constant__ Problem problem) {
  using Tiles = BackwardBiasTiles<PRECISION, HEAD_DIM, VALUE_DIM, WARPS, ROW_TILES, KEY_TILE>;
  using Element = typename Tiles::Element;
  using Real = ::Real<PRECISION>;
  using BiasElement = typename Score<PRECISION, OPTIONS>::BiasElement;
  constexpr int QUERY_TILE = Tiles::QUERY_TILE;
  extern __shared__ __align__(128) u8 shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp * Tiles::WARP_ROWS;
  const u32 base = shared_address(shared);
  const typename Tiles::Q q_tile{base};
  const typename Tiles::DO do_tile{base + Tiles::Q::BYTES};
  const typename Tiles::K k_tile{base + Tiles::Q::BYTES + Tiles::DO::BYTES};
  const typename Tiles::V v_tile{base + Tiles::Q::BYTES + Tiles::DO::BYTES + Tiles::K::BYTES};

  // The block's part of dBias: slots of rows, or, with one row, of columns; and with both, a tile of columns.
  const bool rows = problem.dbias.row_stride != 0, columns = problem.dbias.column_stride != 0;
  const int query_slots = QueryBlock<OPTIONS, QUERY_TILE>::slots(problem), key_slots = tile_slots<OPTIONS>(problem, problem.keys, KEY_TILE);
  const u32 column_tiles = rows && columns ? ceil_div(problem.keys, KEY_TILE) : 1, slots = rows ? query_slots : columns ? key_slots : 1;
  u32 index = blockIdx.x;
  const int split = index % problem.splits;
  index /= problem.splits;
  int column_tile = index % column_tiles;
  index /= column_tiles;
  const int slot = index % slots;
  index /= slots;   // which (batch, head) of the bias

  SharingPlaces sharing;
  sharing.move_to(problem, index, 0);
  const Place first_place = sharing.place;
  int query_tiles = rows ? 1 : query_slots;   // how many the block walks over
  TileOfSequence at = rows ? tile_of_slot<OPTIONS>(problem, problem.cu_q, problem.queries, QUERY_TILE, slot) : TileOfSequence(0);
  if (!rows && columns) {
    at = tile_of_slot<OPTIONS>(problem, problem.cu_k, problem.keys, KEY_TILE, slot);
    column_tile = at.tile;
    query_tiles = ceil_div(Sequence<OPTIONS>(problem, first_place, at.sequence).queries, QUERY_TILE);
  }
  const Sequence<OPTIONS> own(problem, first_place, at.sequence);
  if (rows && (at.tile < 0 || at.tile * QUERY_TILE >= own.queries)) return;
  if (columns && (column_tile < 0 || column_tile * KEY_TILE >= own.keys)) return;

  Real sum[ROW_TILES][KEY_TILE / 8][4] = {};
  const int steps = SharingPlaces::count(problem) * query_tiles;
  for (int step = split; step < steps; step += problem.splits) {
    sharing.move_to(problem, index, step / query_tiles);
    const Place& place = sharing.place;
    const int walked = step % query_tiles;
    TileOfSequence here(0);
    here.sequence = at.sequence, here.tile = rows ? at.tile : walked;
    if (!rows && !columns) here = tile_of_slot<OPTIONS>(problem, problem.cu_q, problem.queries, QUERY_TILE, walked);
    const Sequence<OPTIONS> sequence(problem, place, here.sequence);
    const int first_query = here.tile * QUERY_TILE, queries = sequence.seeing() - first_query;
    if (here.tile < 0 || queries <= 0) continue;
    const Visible<OPTIONS> visible(problem, place, sequence);
    const KeyTiles<OPTIONS, KEY_TILE> key_tiles(visible, first_query, QUERY_TILE);
    const int begin = columns ? max(column_tile, key_tiles.begin) : key_tiles.begin, end = columns ? min(column_tile + 1, key_tiles.end) : key_tiles.end;
    if (begin >= end) continue;

    const Score<PRECISION, OPTIONS> score(problem, place, sequence);
    Real lse[ROW_TILES][2], d[ROW_TILES][2];
    load_statistics(problem, lse, d, sequence.padded_row(problem, place) + first_query + warp_row + lane / 4);
    const i64 array_row = sequence.first_query + first_query;
    __syncthreads();
    load_tile<Tiles::THREADS>(q_tile, place.rows<Element>(problem.q) + array_row * problem.q.row_stride, problem.q.row_stride, queries, problem.q.columns);
    load_tile<Tiles::THREADS>(do_tile, place.rows<Element>(problem.dout) + array_row * problem.dout.row_stride, problem.dout.row_stride, queries, problem.dout.columns);
    for (int tile = begin; tile < end; ++tile) {
      const int first_key = tile * KEY_TILE, keys = sequence.seen() - first_key;
      const i64 key_row = sequence.first_key + first_key;
      if (tile > begin) __syncthreads();
      load_tile<Tiles::THREADS>(k_tile, place.rows<Element>(problem.k) + key_row * problem.k.row_stride, problem.k.row_stride, keys, problem.k.columns);
      load_tile<Tiles::THREADS>(v_tile, place.rows<Element>(problem.v) + key_row * problem.v.row_stride, problem.v.row_stride, keys, problem.v.columns);
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      Real ds[ROW_TILES][KEY_TILE / 8][4] = {};
      gradient_of_products<PRECISION, OPTIONS, false>(problem, ds, q_tile, do_tile, k_tile, v_tile, score, visible, key_tiles.need_mask(tile),
                                                      Dropout{(u32)place.flat(problem), (u32)sequence.index}, lse, d, first_query, warp_row, first_key, lane);
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int n = 0; n < KEY_TILE / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {   // what takes no part may hold 0 · inf
            const bool key = !(OPTIONS & LENGTHS) || n * 8 + lane % 4 * 2 + i % 2 < keys;
            if (key && warp_row + m * 16 + i / 2 * 8 + lane / 4 < queries) sum[m][n][i] += ds[m][n][i];
          }
    }
  }

  auto store = [&](int row, int column, Real x) {
    const i64 to = (rows ? own.first_query + at.tile * QUERY_TILE + row : 0) * problem.dbias.row_stride + (columns ? own.first_key + column_tile * KEY_TILE + column : 0) * problem.dbias.column_stride;
    if (problem.partial) (first_place.rows<Real>(problem.dbias) + split * problem.split_stride)[to] = x;
    else from_real((first_place.rows<BiasElement>(problem.dbias))[to], x);
  };
  const int row_end = own.queries - at.tile * QUERY_TILE, column_end = own.keys - column_tile * KEY_TILE;   // where there are rows and columns
  if (!columns) {   // each row's sum: over a lane's columns, then over the four lanes of a row
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Real& total = sum[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < KEY_TILE / 8; ++n) total += (n ? sum[m][n][2 * half] : 0) + sum[m][n][2 * half + 1];
        total += __shfl_xor_sync(0xffffffff, total, 1);
        total += __shfl_xor_sync(0xffffffff, total, 2);
      }
  }
  if (rows) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + m * 16 + half * 8 + lane / 4;
        if (row >= row_end) continue;
        if (!columns && lane % 4 == 0) store(row, 0, sum[m][0][2 * half]);
#pragma unroll
        for (int n = 0; n < KEY_TILE / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (columns && n * 8 + lane % 4 * 2 + i < column_end) store(row, n * 8 + lane % 4 * 2 + i, sum[m][n][2 * half + i]);
      }
    return;
  }
  // One row: each column's sum (without columns: of the row sums) over a lane's rows, the eight lanes of a column, and the warps.
  Real* warp_sums = (Real*)shared;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < KEY_TILE / 8; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Real total = 0;
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) total += sum[m][n][i] + sum[m][n][2 + i];
#pragma unroll
      for (int other = 4; other < 32; other *= 2) total += __shfl_xor_sync(0xffffffff, total, other);
      if (lane < 4) warp_sums[warp * KEY_TILE + n * 8 + lane * 2 + i] = total;
    }
  __syncthreads();
  const int column = threadIdx.x;
  if (column >= KEY_TILE || column >= (columns ? column_end : 1)) return;
  Real total = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) total += warp_sums[w * KEY_TILE + column];
  store(0, column, total);
}
