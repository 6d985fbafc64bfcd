// ldmatrix, mma.sync and wgmma. The layouts are those of kernels/ptx/mma_sm80.cuh and kernels/ptx/wgmma.cuh; sums are made in double and rounded once an instruction.
#pragma once
#include "arithmetic.h"
#include "watch.h"

enum Element : u32 { FLOAT16, BFLOAT16, TFLOAT32 };
inline float number_of(u16 x, u32 element) { return element == FLOAT16 ? (float)bits<half>(x) : from_bfloat(x); }

inline void ldmatrix(Warp& warp, const Instruction& code, u32) {   // words of `count` matrices, address; mode: transposed
  const u32 *addresses = warp.operand<u32>(code, code.count), count = code.count;
  u16 matrix[4][8][8];
  for (u32 k = 0; k < 8 * count; ++k) {
    const u32 at = addresses[k] + (u32)code.number;
    memcpy(matrix[k / 8][k % 8], shared_at(warp, at, 16), 16);
    if (watching && !note_read(warp, at, 16, code.line)) warp.tainted[code.operand[k / 8] / 32] = ALL;
  }
  for (u32 k = 0; k < count; ++k)
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      warp.operand<u32>(code, k)[lane] = code.mode ? matrix[k][column][row] | (u32)matrix[k][column + 1][row] << 16 : matrix[k][row][column] | (u32)matrix[k][row][column + 1] << 16;
    }
}

inline void stmatrix(Warp& warp, const Instruction& code, u32) {   // address, words of `count` matrices
  const u32 *addresses = warp.operand<u32>(code, code.count), count = code.count;
  for (u32 k = 0; k < 8 * count; ++k) {
    u16 row[8];
    for (int column = 0; column < 8; ++column) row[column] = warp.operand<u32>(code, k / 8)[k % 8 * 4 + column / 2] >> column % 2 * 16;
    const u32 at = addresses[k] + (u32)code.number;
    u8* to = shared_at(warp, at, 16);
    warp.unfenced = ALL;
    if (watching) note_write(warp, at, 16, code.line, (const u8*)row, to);
    memcpy(to, row, 16);
  }
}

inline void mma(Warp& warp, const Instruction& code, u32) {   // d 4, a 4, b 2, c 4
  const bool single = code.element == TFLOAT32;   // numbers of a word
  const int depth = single ? 8 : 16;
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane)
    for (int k = 0; k < 6; ++k) {
      const u32 x = warp.operand<u32>(code, 4 + k)[lane];
      const int word = lane % 4 + (k < 4 ? k / 2 : k - 4) * 4, row = lane / 4 + (k < 4 ? k % 2 * 8 : 0);
      for (int n = 0; n < (single ? 1 : 2); ++n) {
        const float y = single ? bits<float>(x & ~0x1fffu) : number_of(n ? x >> 16 : x, code.element);
        (k < 4 ? a[row][single ? word : 2 * word + n] : b[single ? word : 2 * word + n][row]) = y;
      }
    }
  float sums[4][32];
  for (int lane = 0; lane < 32; ++lane)
    for (int k = 0; k < 4; ++k) {
      double sum = warp.operand<float>(code, 10 + k)[lane];
      for (int n = 0; n < depth; ++n) sum += (double)a[lane / 4 + k / 2 * 8][n] * b[n][lane % 4 * 2 + k % 2];
      sums[k][lane] = (float)sum;
    }
  for (int k = 0; k < 4; ++k) memcpy(warp.operand<float>(code, k), sums[k], sizeof sums[k]);
}
template <int ROWS, int DEPTH> void mma_float64(Warp& warp, const Instruction& code, u32) {
  constexpr int A_NUMBERS = ROWS / 8 * (DEPTH / 4), B_NUMBERS = DEPTH / 4, D_NUMBERS = ROWS / 4;
  double a[ROWS][DEPTH], b[DEPTH][8], sums[D_NUMBERS][32];
  for (int lane = 0; lane < 32; ++lane) {
    for (int k = 0; k < A_NUMBERS; ++k) a[lane / 4 + k % (ROWS / 8) * 8][lane % 4 + k / (ROWS / 8) * 4] = warp.operand<double>(code, D_NUMBERS + k)[lane];
    for (int k = 0; k < B_NUMBERS; ++k) b[lane % 4 + 4 * k][lane / 4] = warp.operand<double>(code, D_NUMBERS + A_NUMBERS + k)[lane];
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int k = 0; k < D_NUMBERS; ++k) {
      double sum = warp.operand<double>(code, D_NUMBERS + A_NUMBERS + B_NUMBERS + k)[lane];
      for (int n = 0; n < DEPTH; ++n) sum = std::fma(a[lane / 4 + k / 2 * 8][n], b[n][lane % 4 * 2 + k % 2], sum);
      sums[k][lane] = sum;
    }
  for (int k = 0; k < D_NUMBERS; ++k) memcpy(warp.operand<double>(code, k), sums[k], sizeof sums[k]);
}

// Where element (row, k) of an operand of wgmma lies, as its descriptor says. `across`: rows in memory run along the operand's rows, not along k.
inline u32 place_in_operand(u64 descriptor, int row, int k, bool across) {
  const u32 start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4, swizzle = descriptor >> 62;
  if (descriptor >> 49 & 7) fail("a base offset other than 0 is not known here");
  if (swizzle == 0 && !across) return start + row / 8 * stride + k / 8 * leading + row % 8 * 16 + k % 8 * 2;
  if (swizzle != 1) fail("this layout of an operand is not known here");
  const u32 at = across ? start + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2 : start + row / 8 * stride + row % 8 * 128 + k * 2;
  return at ^ (at >> 7 & 7) << 4;
}

// The 16 rows of a warp, at once. d N / 2, a 4 (mode & 4: in registers) or 1, b, add; count: N; mode: A across k | B across k << 1 | -A << 3.
inline void wgmma(Warp& warp, const Instruction& code, u32) {
  const int columns = code.count, results = columns / 2;
  const bool registers = code.mode & 4;
  const u64 b_descriptor = warp.operand<u64>(code, results + (registers ? 4 : 1))[0];
  const bool add = warp.operand<u32>(code, code.operands - 1)[0];
  std::set<std::pair<int, int>> early;   // rows (or -1) and columns (or -1) of the result for which something was read too early
  auto element = [&](u64 descriptor, int row, int k, bool across, int result_row, int result_column) {
    const u32 at = place_in_operand(descriptor, row, k, across);
    u16 x;
    memcpy(&x, shared_at(warp, at, 2), 2);
    if (watching && at % 4 == 0 && !early.count({result_row, result_column})) {
      Word& word = warp.block->words[at / 4];
      const string why = unreadable(warp, at / 4, word, true);
      if (why.size()) early.insert({result_row, result_column}), warp.taint = why + ", by " + line_of(warp, code.line), warp.any_tainted = true;
      else ++word.pending_reads, word.read_line = code.line, warp.product_reads.push_back({warp.product_groups, at / 4, &code, result_row, result_column});
    }
    return number_of(x, code.element);
  };
  float a[16][16];
  static thread_local float b[16][256];
  if (registers) {
    for (int lane = 0; lane < 32; ++lane)
      for (int k = 0; k < 4; ++k) {
        const u32 x = warp.operand<u32>(code, results + k)[lane];
        const int row = lane / 4 + k % 2 * 8, column = 2 * (lane % 4 + k / 2 * 4);
        a[row][column] = number_of(x, code.element), a[row][column + 1] = number_of(x >> 16, code.element);
      }
  } else {
    const u64 a_descriptor = warp.operand<u64>(code, results)[0];
    for (int row = 0; row < 16; ++row) for (int k = 0; k < 16; ++k) a[row][k] = element(a_descriptor, row + 16 * (warp.id % 4), k, code.mode & 1, row, -1);
  }
  for (int n = 0; n < columns; ++n) for (int k = 0; k < 16; ++k) b[k][n] = element(b_descriptor, n, k, code.mode & 2, -1, n);
  for (int row = 0; row < 16; ++row) {
    double sums[256] = {};
    for (int k = 0; k < 16; ++k) for (int n = 0; n < columns; ++n) sums[n] += (code.mode & 8 ? -(double)a[row][k] : a[row][k]) * b[k][n];
    for (int n = 0; n < columns; ++n) {
      float& d = warp.operand<float>(code, n / 8 * 4 + row / 8 * 2 + n % 2)[row % 8 * 4 + n % 8 / 2];
      d = (float)(add ? sums[n] + d : sums[n]);
    }
  }
  if (!watching) return;
  bool taint = false;
  for (u32 k = results; k < code.operands; ++k) {
    if (warp.busy[code.operand[k] / 32]) fail("an operand of a product is one that has not been waited for");
    if (registers && k < (u32)results + 4 && warp.modified[code.operand[k] / 32]) fail("A was written without a wgmma.fence after it");
    taint |= warp.tainted[code.operand[k] / 32];
  }
  for (int k = 0; k < results && add; ++k) if (warp.modified[code.operand[k] / 32]) fail("D was written without a wgmma.fence after it");
  for (int k = 0; k < results; ++k) { u32& own = warp.tainted[code.operand[k] / 32]; own = taint ? ALL : add ? own : 0, warp.busy[code.operand[k] / 32] = warp.product_groups + 1; }
  for (auto& [row, column] : early) taint_result(warp, {0, 0, &code, row, column});
  warp.any_busy = true;
}
inline void wgmma_fence(Warp& warp, const Instruction&, u32) { std::fill(warp.modified.begin(), warp.modified.end(), 0); }
inline void wgmma_commit(Warp& warp, const Instruction&, u32) { ++warp.product_groups; }
inline void wgmma_wait(Warp& warp, const Instruction& code, u32) {
  if (!watching) return;
  const u32 done = warp.product_groups - std::min<u32>(warp.product_groups, code.number);   // groups before this one
  std::erase_if(warp.product_reads, [&](auto& read) { if (read.group < done) finish_read(warp, read.word, true); return read.group < done; });
  warp.any_busy = false;
  for (u32& group : warp.busy) if (group && group <= done) group = 0; else if (group) warp.any_busy = true;
}
