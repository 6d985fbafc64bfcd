// Q, K and V of a float32 call, and in backward dO, become float16 parts (parts.cuh), which forward_sm90.cu or backward_parts_sm90.cu then multiplies.
//
//   Q, K, V, dO (batch, heads, rows, columns), any strides -> problem.dq, dk, dv, out: their parts, once for what is broadcast
//
// A block makes one group of rows; a warp has whole rows, in registers, of which a lane has two columns of each 64.
//
// Where parts would be less than float32 numbers the call is left to the sm80 family: a word says so (parts_words.cuh). These are groups with a NaN or an infinity,
// with a row or a column whose largest number is more than 2^16 times smaller than that of the group (a number keeps 23 bits down to there), and groups so
// large or small that factors could leave the range of float32. Few numbers may be small by chance: a column of one row may be so by 2^24, and of eight
// rows of few columns one may be smaller.
//
// Weights are split in forward_sm90.cu, relative to a row's largest: small ones lose bits, which shows only where the largest have values near zero, or are a
// sink's. So a (batch, head) none of whose outputs reaches SMALLEST_OUTPUT of its largest value, weights taken relative to a row's largest, is sm80's too.
#include "parts.cuh"

constexpr int WARPS = 8, FARTHEST = 16, FARTHEST_ALONE = 24, FEW_COLUMNS = 33, MOST_EXPONENT = 60;

__device__ __forceinline__ u32 size_of(float x) { return __float_as_uint(x) & 0x7fffffff; }   // ordered as sizes are, with NaN the largest
__device__ __forceinline__ u32 exponent_of(u32 size) { return size >> 23; }                   // 0: zero, or a subnormal number, which counts as zero

// How many of an array's (batch, head) are its own.
__device__ __forceinline__ u32 own_places(const Problem& problem, const Array& array) {
  u32 places = own_heads(problem, array);
  for (int i = 0; i < BATCH_DIMS; ++i) places *= own_entries(problem, array, i);
  return places;
}

template <int PARTS, int BOXES, int OPTIONS, int ROWS, bool KEYS, bool VALUES = false> __device__ __forceinline__ void make_group(const Problem& problem, const Array& from, const Array& to, u32 index) {
  constexpr int OWN = ROWS / WARPS, COLUMNS = BOXES * 64;
  static_assert(ROWS % WARPS == 0, "a warp has as many rows as any");
  __shared__ u32 largest_of_column[COLUMNS], largest_of_warp[WARPS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, total = KEYS ? problem.keys : problem.queries;
  for (int column = threadIdx.x; column < COLUMNS; column += WARPS * 32) largest_of_column[column] = 0;

  const int* offsets = KEYS ? problem.cu_k : problem.cu_q;
  const u32 slots = tile_slots<OPTIONS>(problem, total, ROWS), slot = index % slots, heads = own_heads(problem, to);
  index /= slots;
  Place place;
  place.head = index % heads * to.group;
  index /= heads;
  bool shared = false;   // by batch entries, which may have other lengths
  for (int i = BATCH_DIMS - 1; i >= 0; --i) {
    const u32 entries = own_entries(problem, to, i);
    shared |= entries < problem.batch[i];
    place.batch[i] = index % entries;
    index /= entries;
  }
  const TileOfSequence tile = tile_of_slot<OPTIONS>(problem, offsets, total, ROWS, slot);
  const Sequence<OPTIONS> sequence(problem, place, tile.sequence);
  const int all = KEYS ? sequence.keys : sequence.queries, rows = tile.tile < 0 ? 0 : (shared ? all : KEYS ? sequence.seen() : sequence.seeing()) - tile.tile * ROWS;
  const float* source = place.rows<float>(from) + ((KEYS ? sequence.first_key : sequence.first_query) + tile.tile * ROWS) * from.row_stride;

  float x[OWN][BOXES][2] = {};
  u32 largest_of_row[OWN], of_columns[BOXES][2] = {}, largest = 0;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int row = warp * OWN + i;
    const float* at = source + row * from.row_stride;
    if (row < rows) {
#pragma unroll
      for (int box = 0; box < BOXES; ++box) {
        const int column = box * 64 + lane * 2;
        if (column + 1 < from.columns) *(float2*)x[i][box] = *(const float2*)(at + column);
        else if (column < from.columns) x[i][box][0] = at[column];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    largest_of_row[i] = 0;
#pragma unroll
    for (int box = 0; box < BOXES; ++box)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const u32 size = size_of(x[i][box][j]);
        largest_of_row[i] = max(largest_of_row[i], size);
        of_columns[box][j] = max(of_columns[box][j], size);
      }
    largest_of_row[i] = __reduce_max_sync(0xffffffff, largest_of_row[i]);
    largest = max(largest, largest_of_row[i]);
  }
#pragma unroll
  for (int box = 0; box < BOXES; ++box)
#pragma unroll
    for (int j = 0; j < 2; ++j) atomicMax(&largest_of_column[box * 64 + lane * 2 + j], of_columns[box][j]);
  if (lane == 0) largest_of_warp[warp] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WARPS; ++i) largest = max(largest, largest_of_warp[i]);

  const u32 exponent = exponent_of(largest);
  auto lost = [&](u32 own, int farthest) { return exponent_of(own) && exponent_of(own) + farthest < exponent; };
  bool refused = exponent && (exponent < 127 - MOST_EXPONENT || exponent > 127 + MOST_EXPONENT);
  int lost_rows = 0;
#pragma unroll
  for (int i = 0; i < OWN; ++i) lost_rows += lost(largest_of_row[i], FARTHEST);
  refused |= lost_rows > (from.columns < FEW_COLUMNS);
  for (int column = threadIdx.x; column < COLUMNS; column += WARPS * 32) refused |= lost(largest_of_column[column], rows > 1 ? FARTHEST : FARTHEST_ALONE);
  if (refused) problem.tile_counter[REFUSED] = 1;
  if (VALUES && threadIdx.x == 0) atomicMax(word_of_values(problem, to, place), largest);

  const float up = exponent ? __uint_as_float((127 + 14 + 127 - exponent) << 23) : 1.0f, down = exponent ? __uint_as_float((exponent - 14) << 23) : 1.0f;
  u16* target = place.rows<u16>(to) + slot * (ROWS + 1) * to.row_stride;
#pragma unroll
  for (int i = 0; i < OWN; ++i)
#pragma unroll
    for (int box = 0; box < BOXES; ++box) {
      u16* at = target + (warp * OWN + i) * to.row_stride + box * 64 + lane * 2;
      const float first = x[i][box][0] * up, second = x[i][box][1] * up;
      const u32 high = pack<FLOAT16>(first, second);
      *(u32*)at = high;
      if constexpr (PARTS == 2) *(u32*)(at + COLUMNS) = pack<FLOAT16>(first - to_float(half_t{(u16)high}), second - to_float(half_t{(u16)(high >> 16)}));
    }
  if (threadIdx.x == 0) *(float4*)(target + ROWS * to.row_stride) = make_float4(down, 0.0f, 0.0f, 0.0f);   // all of what a copy moves
}

template <int PRECISION, int HEAD_DIM, int VALUE_DIM, int OPTIONS, int KEY_TILE> __global__ void __launch_bounds__(WARPS * 32) float32_parts(const __grid_constant__ Problem problem) {
  constexpr int PARTS = parts_of(PRECISION), Q_BOXES = ceil_div(HEAD_DIM, 64), V_BOXES = ceil_div(VALUE_DIM, 64);
  const u32 key_groups = tile_slots<OPTIONS>(problem, problem.keys, KEY_TILE);
  const u32 of_q = own_places(problem, problem.dq) * tile_slots<OPTIONS>(problem, problem.queries, 64), of_k = own_places(problem, problem.dk) * key_groups, of_v = own_places(problem, problem.dv) * key_groups;
  if (blockIdx.x < of_q) make_group<PARTS, Q_BOXES, OPTIONS, 64, false>(problem, problem.q, problem.dq, blockIdx.x);
  else if (blockIdx.x < of_q + of_k) make_group<PARTS, Q_BOXES, OPTIONS, KEY_TILE, true>(problem, problem.k, problem.dk, blockIdx.x - of_q);
  else if (blockIdx.x < of_q + of_k + of_v) make_group<PARTS, V_BOXES, OPTIONS, KEY_TILE, true, true>(problem, problem.v, problem.dv, blockIdx.x - of_q - of_k);
  else make_group<PARTS, V_BOXES, OPTIONS, 64, false>(problem, problem.dout, problem.out, blockIdx.x - of_q - of_k - of_v);
}
