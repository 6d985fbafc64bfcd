// A tile of a matrix in shared memory: rows of 16-byte chunks, swizzled so that eight consecutive rows of one chunk column (what ldmatrix reads) and
// the transposed reads of float32 fall in different banks. Copies between device memory and tiles.
//
// Float64 fragments are read without ldmatrix: at a time 2 chunks of each of four neighbouring rows, or of four even or four odd ones (against the rows), or
// 4 chunks of each of two neighbours (in the order of accumulators). The swizzle of float64 puts each of these in different banks.
#pragma once
#include "ptx/shared_memory.cuh"

template <typename Element_, int ROWS_, int COLUMNS_> struct SharedTile {
  using Element = Element_;
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_;
  static constexpr int PITCH = COLUMNS * (int)sizeof(Element);   // bytes of a row
  static constexpr int CHUNKS = PITCH / 16;
  static constexpr int BYTES = ROWS * PITCH;
  static_assert(PITCH % 32 == 0, "rows are whole pairs of chunks");

  u32 address;

  // Rows of 128 bytes and multiples hold 8 chunks of different banks; shorter rows share a 128-byte line, and the swizzle turns with the line.
  static __device__ __forceinline__ constexpr int swizzle(int row) {
    if (sizeof(Element) == 8 && CHUNKS % 8 == 0) return (row & 6) ^ (row & 1) << 2;
    return CHUNKS % 8 == 0 ? row & 7 : CHUNKS % 4 == 0 ? (row >> 1) & 3 : (row >> 2) & 1;
  }

  __device__ __forceinline__ u32 at(int row, int chunk) const { return address + row * PITCH + ((chunk ^ swizzle(row)) << 4); }
};

// A lane's view of a tile: its row and chunk within the fragment are folded into one address once, so that every fragment's address is that one with
// its chunk flipped in (the tile starts at a multiple of 128 bytes, so the three bits of a chunk in its 128-byte line stand alone), plus a constant.
template <typename Tile> struct LaneView {
  static constexpr int LINE = Tile::CHUNKS % 8 == 0 ? 8 : Tile::CHUNKS % 4 == 0 ? 4 : 2;   // chunks that the swizzle permutes among themselves
  u32 start;

  __device__ __forceinline__ LaneView(const Tile& tile, int lane_row, int lane_chunk, int lane_byte = 0)
      : start(tile.address + lane_row * Tile::PITCH + ((Tile::swizzle(lane_row) ^ lane_chunk) << 4) + lane_byte) {}

  // row: a multiple of 8; chunk: even.
  __device__ __forceinline__ u32 at(int row, int chunk) const { return (start ^ (u32)(chunk % LINE << 4)) + row * Tile::PITCH + (chunk / LINE * LINE << 4); }
};

// Two neighbours in a tile, as what is computed with.
template <typename Element, typename Real> __device__ __forceinline__ void load_shared_pair(Real (&x)[2], u32 address) {
  if constexpr (sizeof(Element) >= 4) {
    load_shared(x[0], x[1], address);
  } else {
    const u32 pair = load_shared(address);
    Element first, second;
    first.bits = (u16)pair, second.bits = (u16)(pair >> 16);
    x[0] = to_float(first), x[1] = to_float(second);
  }
}

// Rows [0, rows) of device memory into a tile, asynchronously; what lies outside the rows or the columns becomes zero and is never read.
// A thread keeps its chunk column where the threads divide into whole rows, so that it steps down the rows by one addition.
template <int THREADS, typename Tile>
__device__ __forceinline__ void load_tile(const Tile& tile, const typename Tile::Element* source, i64 row_stride, int rows, int columns) {
  using Element = typename Tile::Element;
  constexpr int COUNT = Tile::ROWS * Tile::CHUNKS, PER_CHUNK = 16 / (int)sizeof(Element);
  if constexpr (THREADS % Tile::CHUNKS == 0) {
    constexpr int STEP = THREADS / Tile::CHUNKS;
    const int row = threadIdx.x / Tile::CHUNKS, chunk = threadIdx.x % Tile::CHUNKS;
    const int bytes = min(max(columns - chunk * PER_CHUNK, 0), PER_CHUNK) * (int)sizeof(Element);
    const Element* from = source + row * row_stride + chunk * PER_CHUNK;
    constexpr int COPIES = ceil_div(Tile::ROWS, STEP), UNROLL = COPIES > 16 || Tile::CHUNKS > 32 ? 8 : COPIES;   // the addresses of more copies do not fit in the registers
#pragma unroll UNROLL
    for (int i = 0; i < COPIES; ++i) {
      if (Tile::ROWS % STEP == 0 || row + i * STEP < Tile::ROWS) cp_async(tile.at(row + i * STEP, chunk), from, row + i * STEP < rows ? bytes : 0);
      from += STEP * row_stride;
    }
  } else {
#pragma unroll 4
    for (int i = 0; i < ceil_div(COUNT, THREADS); ++i) {
      const int index = i * THREADS + threadIdx.x, row = index / Tile::CHUNKS, chunk = index % Tile::CHUNKS;
      if (COUNT % THREADS != 0 && index >= COUNT) break;
      const int bytes = row < rows ? min(max(columns - chunk * PER_CHUNK, 0), PER_CHUNK) * (int)sizeof(Element) : 0;
      cp_async(tile.at(row, chunk), source + row * row_stride + chunk * PER_CHUNK, bytes);
    }
  }
}

// Rows [first_row, first_row + ROWS) of a tile to device memory, by one group of THREADS threads; `target` points at row 0 of the tile.
template <int THREADS, int ROWS, typename Tile>
__device__ __forceinline__ void store_rows(const Tile& tile, int first_row, int thread, typename Tile::Element* target, i64 row_stride, int rows, int columns) {
  using Element = typename Tile::Element;
  constexpr int PER_CHUNK = 16 / (int)sizeof(Element);
  const bool whole = whole_chunks(target, row_stride, columns);
  for (int index = thread; index < ROWS * Tile::CHUNKS; index += THREADS) {
    int row = first_row + index / Tile::CHUNKS, chunk = index % Tile::CHUNKS;
    int valid = row < rows ? columns - chunk * PER_CHUNK : 0;
    if (valid <= 0) continue;
    uint4 x = load_shared_16_bytes(tile.at(row, chunk));
    Element* to = target + row * row_stride + chunk * PER_CHUNK;
    if (whole) {
      *(uint4*)to = x;
    } else {
      const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int j = 0; j < PER_CHUNK; ++j) {
        if (j >= valid) break;
        if constexpr (sizeof(Element) == 2) { Element y; y.bits = (u16)(words[j / 2] >> (j % 2 * 16)); to[j] = y; }
        else if constexpr (sizeof(Element) == 4) to[j] = __uint_as_float(words[j]);
        else to[j] = __hiloint2double(words[2 * j + 1], words[2 * j]);
      }
    }
  }
}
