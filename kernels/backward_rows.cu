// What the backward pass does to whole rows before and after its main kernel; no products of matrices here.
//
//   backward_prepare:  row_lse = lse in the units of the scores' exponents, row_d = D = rowsum(dO ∘ O) - dlse (FlashAttention-2, algorithm 2, line 4), and dq_sum = 0
//                      of heads that no key block clears; with SINKS also row_sink = exp(sink - lse) D, minus which is the row's part of the sink's gradient
//   backward_finish:   dQ = scale · dq_sum, in dQ's type, or in float32 (float64) where the host sums parts; backward_finish_sm90: the same of the sm90 family's sums,
//                      where the host says so of each head's as soon as they are complete
//
// Where half of the sums lie in dq itself, a row of dQ takes half the place of its sums, so that those of query tile t go where the sums of tile t / 2 were: launches
// of ever more tiles, each where those before it have read, put them all in their places (FinishInPlace in launch.py).
//
// Eight lanes share a row, or some rows; a block of 256 threads takes 32 rows (backward_prepare: ROWS), and reads 16 bytes a lane where the rows allow it.
#include "forward_rows.cuh"
#include "parts_words.cuh"
#include "ptx/dependent_launch.cuh"
#include "ptx/reduce.cuh"

constexpr int LANES = 8;

// The block's rows [first, first + ROWS) of a sequence, and where they lie among the padded rows.
template <int OPTIONS, int ROWS = 32> struct RowBlock {
  Place place;
  int padded;   // of the place
  TileOfSequence slot;
  Sequence<OPTIONS> sequence;
  int first;

  __device__ __forceinline__ RowBlock(const Problem& problem)
      : place(problem, (blockIdx.x + problem.first_tile) / (problem.padded_queries / ROWS), problem.heads, problem.by_heads), padded((blockIdx.x + problem.first_tile) % (problem.padded_queries / ROWS) * ROWS), slot(tile_of_slot<OPTIONS>(problem, problem.cu_q, problem.queries, problem.padding, OPTIONS & PACKED ? padded / problem.padding : 0)),
        sequence(problem, place, slot.sequence), first(OPTIONS & PACKED ? slot.tile * problem.padding + padded % problem.padding : padded) {}
};

// Of numbers of 16 bits four blocks to a multiprocessor: 128 rows a block would take a few registers more than that leaves.
template <int PRECISION, int HEAD_DIM, int OPTIONS, bool ZERO_DQ_SUM, int ROWS> __global__ void __launch_bounds__(256, PRECISION == FLOAT16 || PRECISION == BFLOAT16 ? 4 : 1) backward_prepare(const __grid_constant__ Problem problem) {
  using Element = typename ElementOf<PRECISION>::type;
  using Real = ::Real<PRECISION>;
  constexpr int PER_CHUNK = 16 / (int)sizeof(Element), STEP = 256 / LANES, OWN = ROWS / STEP;   // eight lanes share OWN rows, STEP apart
  static_assert(ROWS % STEP == 0 && OWN <= LANES, "");
  const RowBlock<OPTIONS, ROWS> block(problem);
  const Place& place = block.place;
  const int lane = threadIdx.x % LANES, first_row = block.first + threadIdx.x / LANES;

  // Nobody waits for what is written here, and what is read is there when it is needed.
  const i64 first = place.flat(problem) * problem.padded_queries + block.padded;
  if (ZERO_DQ_SUM && (!problem.clearing_blocks || place.flat(problem) < problem.clears_ahead * problem.heads_per_block)) {   // key blocks clear the others (clear_sums_ahead)
    uint4* dq_sum = (uint4*)dq_sum_row<Real>(problem, first, HEAD_DIM);
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * HEAD_DIM * (int)sizeof(Real) / 16; i += 256) dq_sum[i] = make_uint4(0, 0, 0, 0);
  }
  // The first OWN lanes keep a row each.
  const int row = first_row + lane * STEP;
  const bool exists = lane < OWN && row >= 0 && row < block.sequence.queries;
  Real lse = -infinity(), dlse = 0;
  if (exists) {
    lse = place.rows<Real>(problem.lse)[(block.sequence.first_query + row) * problem.lse.row_stride];
    if (problem.dlse.data) dlse = place.rows<Real>(problem.dlse)[(block.sequence.first_query + row) * problem.dlse.row_stride];
  }

  Real sums[OWN] = {};
  const Element* o = place.rows<Element>(problem.out) + (block.sequence.first_query + first_row) * problem.out.row_stride;
  const Element* dout = place.rows<Element>(problem.dout) + (block.sequence.first_query + first_row) * problem.dout.row_stride;
  auto takes_part = [&](int row) { return row >= 0 && row < block.sequence.seeing(); };
  if (whole_chunks(o, problem.out.row_stride, problem.out.columns) && whole_chunks(dout, problem.dout.row_stride, problem.dout.columns)) {
    for (int column = lane * PER_CHUNK; column < problem.out.columns; column += LANES * PER_CHUNK) {
      __align__(16) Element x[OWN][PER_CHUNK], y[OWN][PER_CHUNK];
#pragma unroll
      for (int i = 0; i < OWN; ++i) {   // all of them are asked for before the first is used
        *(uint4*)x[i] = *(uint4*)y[i] = make_uint4(0, 0, 0, 0);
        if (takes_part(first_row + i * STEP)) *(uint4*)x[i] = *(const uint4*)(o + i * STEP * problem.out.row_stride + column), *(uint4*)y[i] = *(const uint4*)(dout + i * STEP * problem.dout.row_stride + column);
      }
#pragma unroll
      for (int i = 0; i < OWN; ++i)
#pragma unroll
        for (int j = 0; j < PER_CHUNK; ++j) sums[i] += to_real(x[i][j]) * to_real(y[i][j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < OWN; ++i)
      if (takes_part(first_row + i * STEP))
        for (int column = lane; column < problem.out.columns; column += LANES) sums[i] += to_real(o[i * STEP * problem.out.row_stride + column]) * to_real(dout[i * STEP * problem.dout.row_stride + column]);
  }
  Real sum = 0;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) sums[i] += __shfl_xor_sync(0xffffffff, sums[i], step);
    if (lane == i) sum = sums[i];
  }

  if (lane < OWN) {
    const i64 at = first + threadIdx.x / LANES + lane * STEP;
    const bool finite = lse != -infinity(), sees = finite && takes_part(row);   // else P = exp2(score - inf) = 0, and whatever stands in dlse does not matter
    if (finite) sum -= dlse;
    reals<Real>(problem.row_lse)[at] = sees ? Exponential<PRECISION>::shift_of_lse(lse) : Real(infinity());
    reals<Real>(problem.row_d)[at] = sees ? sum : 0;
    if (PRECISION != FLOAT64 && problem.row_turn && at != OFFSETS_DESCEND) problem.row_turn[at] = 0;
    if constexpr ((OPTIONS & SINKS) != 0) reals<Real>(problem.row_sink)[at] = finite ? exp(*place.rows<Real>(problem.sinks) - lse) * sum : 0;
  }
  // Key blocks wait for each other as sequences that follow each other do. With offsets that do not, whoever is waited for may not exist.
  if constexpr ((ZERO_DQ_SUM || (OPTIONS & PACKED && ROWS > 32)) && PRECISION != FLOAT64) {   // of float64 none take turns, nor with rows of the sm80 family where nothing has to be cleared
    if (blockIdx.x == 0 && problem.row_turn) {
      bool descend = false;
      if constexpr ((OPTIONS & PACKED) != 0)
        for (int i = threadIdx.x; i < problem.sequences; i += 256)
          descend |= problem.cu_q[i] < 0 || problem.cu_q[i] > problem.cu_q[i + 1] || problem.cu_q[i + 1] > problem.queries || problem.cu_k[i] < 0 ||
                     problem.cu_k[i] > problem.cu_k[i + 1] || problem.cu_k[i + 1] > problem.keys;
      descend = __syncthreads_or(descend);
      if (threadIdx.x == 0) problem.row_turn[OFFSETS_DESCEND] = descend;
    }
  }
}

template <int PRECISION, int HEAD_DIM, int OPTIONS> __global__ void __launch_bounds__(256) backward_finish(const __grid_constant__ Problem problem) {
  using Element = typename ElementOf<PRECISION>::type;
  using Real = ::Real<PRECISION>;
  constexpr int PER_CHUNK = 16 / (int)sizeof(Element), AT_ONCE = 16 / (int)sizeof(Real);
  const RowBlock<OPTIONS> block(problem);
  const Place& place = block.place;
  const int row = block.first + threadIdx.x / LANES, lane = threadIdx.x % LANES;
  if (row < 0 || row >= block.sequence.queries) return;
  const Real* from = reals<Real>(problem.dq_sum) + (place.flat(problem) * problem.padded_queries + block.padded + threadIdx.x / LANES) * HEAD_DIM;
  const i64 array_row = block.sequence.first_query + row;
  const bool takes_part = row < block.sequence.seeing();   // else 0, whatever NaN of the others came by
  if (problem.partial) {
    Real* to = place.rows<Real>(problem.dq) + array_row * problem.dq.row_stride;
    for (int column = lane; column < HEAD_DIM; column += LANES) to[column] = takes_part ? from[column] * factors<Real>(problem).scale : 0;
    return;
  }
  Element* to = place.rows<Element>(problem.dq) + array_row * problem.dq.row_stride;
  const bool whole = whole_chunks(to, problem.dq.row_stride, problem.dq.columns);
  for (int column = lane * PER_CHUNK; column < problem.dq.columns; column += LANES * PER_CHUNK) {
    __align__(16) Element x[PER_CHUNK];
#pragma unroll
    for (int i = 0; i < PER_CHUNK; i += AT_ONCE) {
      __align__(16) Real y[AT_ONCE];
      *(uint4*)y = takes_part ? *(const uint4*)(from + column + i) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) from_real(x[i + j], y[j] * factors<Real>(problem).scale);
    }
    if (whole) {
      *(uint4*)(to + column) = *(const uint4*)x;
    } else {
#pragma unroll
      for (int i = 0; i < PER_CHUNK; ++i)
        if (column + i < problem.dq.columns) to[column + i] = x[i];
    }
  }
}

// A block takes a query tile of the main kernel, which left it in pieces of 16 rows x 64 columns, each in the order of a warp's registers: 64 rows of pieces after
// one another (of 128 queries, both 64), then those of the next 64 columns.
template <int PRECISION, int HEAD_DIM, int OPTIONS, int QUERY_TILE> __global__ void __launch_bounds__(256) backward_finish_sm90(const __grid_constant__ Problem problem) {
  using Element = typename ElementOf<PRECISION>::type;
  const RowBlock<OPTIONS, QUERY_TILE> block(problem);
  const Place& place = block.place;
  const int lane = threadIdx.x % 32, rows = block.sequence.queries - block.first;
#if __CUDA_ARCH__ >= 900   // elsewhere nobody asks for this kernel
  if (problem.added_to_head) {   // the main kernel may be under way
    if (threadIdx.x == 0) wait_for_at_least(problem.row_turn + place.flat(problem) * problem.padded_queries + HEAD_ADDED, problem.added_to_head);
    __syncthreads();
    if (blockIdx.x == gridDim.x - 1) wait_for_kernels_before();   // so that this kernel ends last
  }
#endif
  if (block.first < 0 || rows <= 0) return;
  const i64 first_row = block.sequence.first_query + block.first;
#pragma unroll 1
  for (int piece = threadIdx.x / 32; piece < QUERY_TILE / 16 * (HEAD_DIM / 64); piece += 8) {
    const int row = piece * 16 % QUERY_TILE + lane / 4, first_column = piece * 16 / QUERY_TILE * 64;
    const float4* from = (const float4*)dq_sum_row(problem, place.flat(problem) * problem.padded_queries + block.padded, HEAD_DIM) + piece * 256 + lane;
    float dq[8][4];
    bool in_rows = false;   // of float32 arrays the sm80 family may have made the sums
    if constexpr (sizeof(Element) == 4) in_rows = problem.tile_counter[REFUSED];
    if (in_rows) {
      const float* own = problem.dq_sum + (place.flat(problem) * problem.padded_queries + block.padded + row) * HEAD_DIM + first_column + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < 8; ++n) *(float2*)dq[n] = *(const float2*)(own + n * 8), *(float2*)(dq[n] + 2) = *(const float2*)(own + 8 * HEAD_DIM + n * 8);
    } else {
#pragma unroll
      for (int n = 0; n < 8; ++n) *(float4*)dq[n] = from[n * 32];
    }
    if (problem.rows_in_dq) __syncthreads();   // the first tile's rows go where its sums are, all of which the block has read by now: it has a warp for each piece
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) dq[n][i] = block.first + row + i / 2 * 8 < block.sequence.seeing() ? dq[n][i] * problem.scale : 0.0f;   // else 0, whatever NaN of the others came by
    if (problem.partial) store_floats(dq, place.rows<float>(problem.dq) + first_row * problem.dq.row_stride + first_column, problem.dq.row_stride, row, rows, lane);
    else if constexpr (sizeof(Element) == 4) store_float_output(dq, place.rows<Element>(problem.dq) + first_row * problem.dq.row_stride + first_column, problem.dq.row_stride, row, rows, problem.dq.columns - first_column, lane);
    else store_output<PRECISION, 64>(dq, place.rows<Element>(problem.dq) + first_row * problem.dq.row_stride + first_column, problem.dq.row_stride, row, rows, problem.dq.columns - first_column, lane);
  }
}
