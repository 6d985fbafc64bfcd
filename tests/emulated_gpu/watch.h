// Whether threads of a block touch shared memory in an order that the kernel guarantees, whatever the order is in which the warps happen to run here.
//
// Guaranteed are: a warp's own order, with that of its lanes (a __syncwarp that is missing is not seen); a named barrier; an arrival at an mbarrier and a wait
// for its phase; a bulk copy and a wait for the phase that it completes; a cp.async and its wait, in the thread that asked. wgmma and bulk reductions read
// until they have been waited for, and see what threads wrote only after these threads' fence.proxy.async. Two writes of the same are no conflict, nor are
// two atomics. Words of four bytes count as one: bytes of a word that different warps write would be reported.
//
// What was read too early is no fault in itself (kernels multiply what lies there where a branch would cost more): it and what is computed of it is tainted,
// and a fault if anything depends on it. The same with what a product makes of rows that another warp stores to while it reads. Registers of a product that
// has not been waited for may not be touched. Memory of the device, and who writes it first, is not watched.
#pragma once
#include "machine.h"

inline bool watching = false;

inline string line_of(Warp& warp, u32 line) { return "[" + warp.program->lines[line] + "]"; }
inline string writer_of(Warp& warp, const Word& word) {
  return line_of(warp, word.write_line) + (word.writer < MOST_WARPS ? " of warp " + text(word.writer) : " that mbarrier " + text(word.writer - MOST_WARPS) + " announces");
}
inline bool knows(Warp& warp, u32 writer, u32 when, bool async) {
  return (writer == warp.id || when <= warp.known.clock[writer]) && !(async && writer < MOST_WARPS && when > warp.known.fenced[writer]);
}

// Why this warp, or what it asks of the async proxy, may not read a word yet; "" if it may.
inline string unreadable(Warp& warp, u32 index, const Word& word, bool async) {
  if (!word.written) return "nothing was written at " + text(4 * index);
  if (auto found = warp.block->atomics.find(index); found != warp.block->atomics.end())
    for (auto& [writer, when] : found->second) if (!knows(warp, writer, when, async)) return "race: a read at " + text(4 * index) + " after an atomic of warp " + text(writer);
  if (word.written != Word::IN_FLIGHT && knows(warp, word.writer, word.written, async)) return "";
  auto others = warp.block->same.find(index);
  if (others != warp.block->same.end()) for (auto& other : others->second) if (knows(warp, other.first, other.second, async)) return "";
  const bool fence = word.written != Word::IN_FLIGHT && knows(warp, word.writer, word.written, false);
  return string("race: a read at ") + text(4 * index) + (fence ? " by the async proxy, without a fence," : "") + " after " + writer_of(warp, word);
}
inline void taint_result(Warp& warp, const ProductRead& read) {
  const int columns = read.code->count;
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < columns; ++column)
      if (read.row == row || read.column == column) warp.tainted[read.code->operand[column / 8 * 4 + row / 8 * 2 + column % 2] / 32] |= 1u << (row % 8 * 4 + column % 8 / 2);
}
inline void check_readers(Warp& warp, u32 index, const Word& word, bool copy) {
  // Where a product is done by now, but might not have been, a store would have tainted it: that is seen in another order.
  for (u32 reader = 0; reader < MOST_WARPS; ++reader)
    if (reader != warp.id && word.read[reader] > warp.known.clock[reader] && (copy || !(word.read_by_product >> reader & 1)))
      fail("race: a write at " + text(4 * index) + " after " + line_of(warp, word.read_line) + " or another read of warp " + text(reader));
}
inline void check_write(Warp& warp, u32 index, Word& word, u32 line, bool copy) {
  auto race = [&](const string& what) { fail("race: a write at " + text(4 * index) + " after " + what); };
  if (word.of_mbarrier) race("an mbarrier was made there");
  if (word.written && (word.written == Word::IN_FLIGHT || !knows(warp, word.writer, word.written, false))) race(writer_of(warp, word));
  for (auto* others : {&warp.block->same, &warp.block->atomics})
    if (auto found = others->find(index); found != others->end())
      for (auto& [writer, when] : found->second) if (!knows(warp, writer, when, false)) race("another of warp " + text(writer));
  for (auto& other : warp.block->warps) {
    if (!word.pending_reads || copy) break;
    std::erase_if(other->product_reads, [&](const ProductRead& read) {
      if (read.word != index || other.get() == &warp) return false;
      taint_result(*other, read), --word.pending_reads;
      other->taint = "race: a write at " + text(4 * index) + " by " + line_of(warp, line) + " while " + line_of(warp, read.code->line) + " reads", other->any_tainted = true;
      return true;
    });
  }
  if (word.pending_reads) race(line_of(warp, word.read_line) + ", which may still read");
  check_readers(warp, index, word, copy);
}

// Whether all of what a lane reads is there; else it taints.
inline bool note_read(Warp& warp, u32 at, u32 bytes, u32 line) {
  for (u32 k = at / 4; k < (at + bytes + 3) / 4; ++k) {
    const string why = unreadable(warp, k, warp.block->words[k], false);
    if (why.size()) { warp.taint = why + ", by " + line_of(warp, line), warp.any_tainted = true; return false; }
  }
  for (u32 k = at / 4; k < (at + bytes + 3) / 4; ++k) {
    Word& word = warp.block->words[k];
    word.read[warp.id] = warp.known.clock[warp.id], word.read_line = line, word.read_by_product &= ~(1u << warp.id);
  }
  return true;
}
inline void set_writer(Warp& warp, u32 index, u32 writer, u32 when, u32 line, bool copy) {
  Word& word = warp.block->words[index];
  check_write(warp, index, word, line, copy);
  word.written = when, word.writer = writer, word.write_line = line;
  if (!warp.block->same.empty()) warp.block->same.erase(index);
  if (!warp.block->atomics.empty()) warp.block->atomics.erase(index);
}
inline void note_write(Warp& warp, u32 at, u32 bytes, u32 line, const u8* next, const u8* last) {
  for (u32 k = at / 4; k < (at + bytes + 3) / 4; ++k) {
    const u32 from = std::max(4 * k, at), to = std::min(4 * k + 4, at + bytes);
    const Word& word = warp.block->words[k];
    const bool stands = word.written && word.written != Word::IN_FLIGHT && (word.writer < MOST_WARPS || knows(warp, word.writer, word.written, false));
    if (stands && !word.of_mbarrier && !memcmp(next + from - at, last + from - at, to - from)) warp.block->same[k].push_back({warp.id, warp.known.clock[warp.id]});
    else set_writer(warp, k, warp.id, warp.known.clock[warp.id], line, false);
  }
}
inline void note_atomic(Warp& warp, u32 at, u32 bytes, u32 line) {
  for (u32 k = at / 4; k < (at + bytes + 3) / 4; ++k) {
    const bool first = !warp.block->atomics.count(k);
    if (first) set_writer(warp, k, warp.id, warp.known.clock[warp.id], line, false);
    else check_readers(warp, k, warp.block->words[k], false);
    warp.block->atomics[k].push_back({warp.id, warp.known.clock[warp.id]});
  }
}
inline void note_copy(Warp& warp, u32 at, u32 bytes, u32 line, u32 writer, u32 when) { for (u32 k = at / 4; k < (at + bytes) / 4; ++k) set_writer(warp, k, writer, when, line, true); }
inline void note_bulk_copy(Warp& warp, u32 at, u32 bytes, u32 line, const Mbarrier& barrier) { note_copy(warp, at, bytes, line, MOST_WARPS + barrier.index, barrier.phases + 1); }

// What this warp did so far is there for whoever waits for it.
inline void release_to(Warp& warp, Knowledge& known) { if (watching) known.join(warp.known), ++warp.known.clock[warp.id]; }
inline void fence_async(Warp& warp, const Instruction&, u32 lanes) {
  warp.unfenced &= ~lanes;
  if (watching && !warp.unfenced) warp.known.fenced[warp.id] = warp.known.clock[warp.id], ++warp.known.clock[warp.id];
}
inline void check_made(Warp& warp, const Mbarrier& barrier) {
  if (watching && !knows(warp, barrier.maker, barrier.made, false)) fail("race: an mbarrier that warp " + text(barrier.maker) + " may not have made yet");
}
inline void finish_read(Warp& warp, u32 index, bool product) {
  Word& word = warp.block->words[index];
  --word.pending_reads, word.read[warp.id] = warp.known.clock[warp.id];
  word.read_by_product = (word.read_by_product & ~(1u << warp.id)) | (u32)product << warp.id;
}

// Before an instruction other than a product is executed by some lanes, of those whose predicate was asked.
inline void check_registers(Warp& warp, const Instruction& code, u32 lanes, u32 asked) {
  if (lanes) for (u32 k = 0; k < code.written; ++k) if (code.operand[k] != NONE) warp.modified[code.operand[k] / 32] = code.moves ? warp.modified[code.operand[1] / 32] : 1;
  if (warp.any_busy) {
    if (code.moves) warp.busy[code.operand[0] / 32] = warp.busy[code.operand[1] / 32];   // the compiler gives both names to one register
    else for (u32 k = 0; k < code.operands; ++k) if (code.operand[k] != NONE && warp.busy[code.operand[k] / 32]) fail("a register of a product before the product has been waited for");
  }
  if (!warp.any_tainted) return;
  auto tainted = [&](u32 k) { return code.operand[k] == NONE ? 0 : warp.tainted[code.operand[k] / 32] & lanes; };
  u32 taint = code.predicate >= 0 ? warp.tainted[code.predicate / 32] & asked : 0;
  if (code.selects) {   // only what is selected counts
    u32 first = 0;
    for_lanes(lanes, [&](int lane) { first |= (u32)(warp.operand<u32>(code, 3)[lane] != 0) << lane; });
    taint |= tainted(3) | (first & tainted(1)) | (~first & tainted(2));
  } else {
    for (u32 k = code.written; k < code.operands; ++k) taint |= tainted(k);
  }
  if (taint && (code.written == 0 || code.kind != Instruction::PLAIN)) fail("something depends on this: " + warp.taint);
  if (taint && code.members != -1) taint = lanes;   // numbers go from lane to lane
  for (u32 k = 0; k < code.written; ++k) if (code.operand[k] != NONE) { u32& own = warp.tainted[code.operand[k] / 32]; own = (own & ~lanes) | taint; }
}
