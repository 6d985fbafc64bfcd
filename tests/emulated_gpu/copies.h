// Loads, stores and atomics; and what the GPU copies on its own: cp.async, bulk copies with the mbarriers that announce them, bulk reductions. These take effect at
// a drawn moment between being asked for and being waited for (cp.async and reductions at the end of that time where races are watched for).
#pragma once
#include "arithmetic.h"
#include "watch.h"

inline u64 address_of(Warp& warp, const Instruction& code, u32 k, int lane) {
  return (code.narrow ? (u64)warp.operand<u32>(code, k)[lane] : warp.operand<u64>(code, k)[lane]) + code.number;
}
template <class Memory, class Register> void load(Warp& warp, const Instruction& code, u32 lanes) {   // `count` registers, address
  for_lanes(lanes, [&](int lane) {
    const u64 at = address_of(warp, code, code.count, lane);
    const u8* from = memory_at(warp, code.space, at, sizeof(Memory) * code.count);
    for (u32 k = 0; k < code.count; ++k) {
      Memory x;
      memcpy(&x, from + k * sizeof x, sizeof x);
      warp.operand<Register>(code, k)[lane] = (Register)x;
      // One by one: of a vector the compiler may need some alone.
      if (watching && code.space == SHARED && !note_read(warp, at + k * sizeof x, sizeof x, code.line)) warp.tainted[code.operand[k] / 32] |= 1u << lane;
    }
  });
}
inline void store(Warp& warp, const Instruction& code, u32 lanes) {
  for_lanes(lanes, [&](int lane) {
    const u64 at = address_of(warp, code, code.count, lane);
    const u32 bytes = code.bytes * code.count;
    u8 *to = memory_at(warp, code.space, at, bytes), x[32];
    for (u32 k = 0; k < code.count; ++k) memcpy(x + k * code.bytes, warp.registers + code.operand[k] + lane * code.lane_bytes, code.bytes);
    if (code.space == SHARED) warp.unfenced |= 1u << lane;
    if (watching && code.space == SHARED) note_write(warp, at, bytes, code.line, x, to);
    memcpy(to, x, bytes);
  });
}
template <class T, auto F> void atomic(Warp& warp, const Instruction& code, u32 lanes) {   // mode 1: the old value; address, `count` values
  for_lanes(lanes, [&](int lane) {
    u8* at = memory_at(warp, code.space, address_of(warp, code, code.mode, lane), sizeof(T) * code.count);
    if (watching && code.space == SHARED) note_atomic(warp, at - warp.block->shared, sizeof(T) * code.count, code.line);
    for (u32 k = 0; k < code.count; ++k) {
      T last;
      memcpy(&last, at + k * sizeof last, sizeof last);
      const T next = F(last, warp.operand<T>(code, code.mode + 1 + k)[lane]);
      memcpy(at + k * sizeof next, &next, sizeof next);
      if (code.mode) warp.operand<T>(code, 0)[lane] = last;
    }
  });
}

// ---------------------------------------------------------------- cp.async
inline void finish_copy(Warp& warp, const LaneCopy& copy) {
  u8* target = shared_at(warp, copy.target, 16);
  memset(target, 0, 16);
  if (copy.bytes) memcpy(target, (void*)copy.source, copy.bytes);
}
inline void cp_async(Warp& warp, const Instruction& code, u32 lanes) {   // target, source, bytes
  for_lanes(lanes, [&](int lane) {
    const LaneCopy copy{warp.copy_group[lane], warp.operand<u32>(code, 0)[lane], warp.operand<u64>(code, 1)[lane], warp.operand<u32>(code, 2)[lane]};
    shared_at(warp, copy.target, 16);
    if (copy.bytes) check_alignment(copy.source, 16);
    if (copy.bytes > 16 || (copy.bytes && !allocated(copy.source, copy.bytes))) fail("cp.async: " + text(copy.bytes) + " bytes at " + text(copy.source) + " are not allocated");
    if (watching) note_copy(warp, copy.target, 16, code.line, warp.id, Word::IN_FLIGHT);
    if (watching || warp.random() & 1) warp.copies[lane].push_back(copy);
    else finish_copy(warp, copy);
  });
}
inline void cp_async_commit(Warp& warp, const Instruction&, u32 lanes) { for_lanes(lanes, [&](int lane) { ++warp.copy_group[lane]; }); }
inline void cp_async_wait(Warp& warp, const Instruction& code, u32 lanes) {
  for_lanes(lanes, [&](int lane) {
    std::erase_if(warp.copies[lane], [&](const LaneCopy& copy) {
      if (copy.group + code.number >= warp.copy_group[lane]) return false;
      finish_copy(warp, copy);
      if (watching) for (u32 k = 0; k < 4; ++k) warp.block->words[copy.target / 4 + k].written = warp.known.clock[warp.id];
      return true;
    });
  });
}

// ---------------------------------------------------------------- mbarriers
inline Mbarrier& mbarrier_at(Block& block, u32 at) {
  auto found = block.mbarriers.find(at);
  if (found == block.mbarriers.end()) fail("there is no mbarrier at " + text(at));
  return found->second;
}
inline void end_phase(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.parity ^= 1, barrier.pending = barrier.expected, ++barrier.phases;
  if (watching) barrier.arriving.clock[MOST_WARPS + barrier.index] = barrier.phases, barrier.done.join(barrier.arriving);
}
inline void mbarrier_init(Warp& warp, const Instruction& code, u32 lanes) {   // address, arrivals
  for_lanes(lanes, [&](int lane) {
    const u32 at = address_of(warp, code, 0, lane), arrivals = warp.operand<u32>(code, 1)[lane], index = warp.block->mbarriers.size();
    shared_at(warp, at, 8);
    if (warp.block->mbarriers.count(at) || index >= MOST_MBARRIERS) fail("mbarrier.init: one is there, or there are too many");
    Mbarrier& barrier = warp.block->mbarriers[at];
    barrier.expected = barrier.pending = arrivals, barrier.index = index, barrier.maker = warp.id, barrier.made = warp.known.clock[warp.id];
    if (watching) for (u32 k = at / 4; k < at / 4 + 2; ++k) { note_write(warp, 4 * k, 4, code.line, (const u8*)"made", (const u8*)"not"); warp.block->words[k].of_mbarrier = true; }
  });
}
inline void mbarrier_arrive(Warp& warp, const Instruction& code, u32 lanes) {   // address; mode 1: bytes that will be copied
  for_lanes(lanes, [&](int lane) {
    Mbarrier& barrier = mbarrier_at(*warp.block, address_of(warp, code, 0, lane));
    check_made(warp, barrier);
    if (code.mode) barrier.bytes += warp.operand<u32>(code, 1)[lane];
    if (barrier.pending-- == 0) fail("more arrivals than the mbarrier was initialised for");
    release_to(warp, barrier.arriving);
    end_phase(barrier);
  });
}
inline void mbarrier_try_wait(Warp& warp, const Instruction& code, u32 lanes) {   // done, address, parity
  bool any = false;
  for_lanes(lanes, [&](int lane) {
    const Mbarrier& barrier = mbarrier_at(*warp.block, address_of(warp, code, 1, lane));
    const u32 parity = warp.operand<u32>(code, 2)[lane];
    check_made(warp, barrier);
    if (parity > 1) fail("parity " + text(parity));
    const bool done = barrier.parity != parity;
    warp.operand<u32>(code, 0)[lane] = done, any |= done;
    if (watching && done) warp.known.join(barrier.done);
  });
  warp.spun = !any;
  if (!any) warp.spinning = lanes;
}

// ---------------------------------------------------------------- bulk copies
struct TensorMap { u64 address, size[5], stride[4]; u32 box[5], bytes; };   // what the 128 bytes of a tensor map hold here
static_assert(sizeof(TensorMap) <= 128);

inline void start_bulk_copy(Warp& warp, const Instruction& code, u32 target, u32 bytes, u32 barrier_at, std::function<void()> finish) {
  if (target < SHARED_START || (u64)target + bytes > warp.block->shared_bytes) fail("a bulk copy to outside of shared memory");
  const Mbarrier& announcing = mbarrier_at(*warp.block, barrier_at);
  check_made(warp, announcing);
  if (watching) note_bulk_copy(warp, target, bytes, code.line, announcing);
  Launch& launch = *warp.block->launch;
  const u64 ready = launch.tick + launch.random() % (launch.random() % 4 ? 8 : 200);
  warp.block->copies.push_back({ready, [block = warp.block, bytes, barrier_at, phase = announcing.phases, finish] {
    finish();
    Mbarrier& barrier = mbarrier_at(*block, barrier_at);
    if (barrier.phases != phase) fail("the mbarrier's phase has ended before a bulk copy that was asked for in it: fewer bytes were expected");
    barrier.bytes -= bytes;
    end_phase(barrier);
  }});
}
inline void load_box(Warp& warp, const Instruction& code, u32 lanes) {   // target, map, five coordinates, barrier
  for_lanes(lanes, [&](int lane) {
    TensorMap map;
    memcpy(&map, generic_at(warp, warp.operand<u64>(code, 1)[lane], 128), sizeof map);
    std::array<s64, 5> at;
    for (int k = 0; k < 5; ++k) at[k] = warp.operand<s32>(code, 2 + k)[lane];
    const u32 target = warp.operand<u32>(code, 0)[lane];
    if (target % 128) fail("a box to " + text(target) + ", which is no multiple of 128");
    start_bulk_copy(warp, code, target, map.box[1] * 128, warp.operand<u32>(code, 7)[lane], [block = warp.block, map, at, target] {
      bool inside = true;
      for (int k = 2; k < 5; ++k) inside &= at[k] >= 0 && (u64)at[k] < map.size[k];
      for (u32 row = 0; row < map.box[1]; ++row)
        for (u32 chunk = 0; chunk < 8; ++chunk) {
          u8 numbers[16] = {};   // what is outside of the array
          const s64 from_row = at[1] + row;
          for (u32 n = 0; n < 16 / map.bytes && inside && from_row >= 0 && (u64)from_row < map.size[1]; ++n) {
            const s64 column = at[0] + chunk * (16 / map.bytes) + n;
            if (column < 0 || (u64)column >= map.size[0]) continue;
            const u64 from = map.address + column * map.bytes + from_row * map.stride[0] + at[2] * map.stride[1] + at[3] * map.stride[2] + at[4] * map.stride[3];
            memcpy(numbers + n * map.bytes, device_at(from, map.bytes), map.bytes);
          }
          const u32 to = target + row * 128 + chunk * 16;
          memcpy(block->shared + (to ^ (to >> 7 & 7) << 4), numbers, 16);
        }
    });
  });
}
inline void load_bytes(Warp& warp, const Instruction& code, u32 lanes) {   // target, source, bytes, barrier
  for_lanes(lanes, [&](int lane) {
    const u32 target = warp.operand<u32>(code, 0)[lane], bytes = warp.operand<u32>(code, 2)[lane];
    const u64 source = warp.operand<u64>(code, 1)[lane];
    if (target % 16 || bytes % 16 || source % 16) fail("a bulk copy that is not in pieces of 16 bytes");
    if (bytes && !allocated(source, bytes)) fail("a bulk copy from device memory that is not allocated");
    start_bulk_copy(warp, code, target, bytes, warp.operand<u32>(code, 3)[lane], [=, block = warp.block] { memcpy(block->shared + target, (void*)source, bytes); });
  });
}

// ---------------------------------------------------------------- bulk reductions
inline void read_for(Warp& warp, BulkAdd& add) {
  if (add.is_read) return;
  add.numbers.resize(add.bytes / 4), add.is_read = true;
  memcpy(add.numbers.data(), warp.block->shared + add.source, add.bytes);
}
inline void finish_add(Warp& warp, BulkAdd& add) {
  read_for(warp, add);
  float* target = (float*)add.target;
  for (size_t k = 0; k < add.numbers.size(); ++k) target[k] = add.stores ? add.numbers[k] : flush(target[k] + add.numbers[k]);
}
inline void add_bytes(Warp& warp, const Instruction& code, u32 lanes) {   // target, source, bytes; mode 1: what was there does not matter
  for_lanes(lanes, [&](int lane) {
    BulkAdd add{warp.add_group[lane], warp.operand<u32>(code, 1)[lane], warp.operand<u64>(code, 0)[lane], warp.operand<u32>(code, 2)[lane], {}, false, false, code.mode == 1};
    if (add.source % 16 || add.target % 16 || add.bytes % 16) fail("a bulk reduction that is not in pieces of 16 bytes");
    if (add.source < SHARED_START || (u64)add.source + add.bytes > warp.block->shared_bytes || !allocated(add.target, add.bytes)) fail("a bulk reduction outside of memory");
    if (watching)
      for (u32 k = add.source / 4; k < (add.source + add.bytes) / 4; ++k) {
        Word& word = warp.block->words[k];
        const string why = unreadable(warp, k, word, true);
        if (why.size()) fail(why);
        ++word.pending_reads, word.read_line = code.line;
      }
    warp.adds[lane].push_back(add);
  });
}
inline void add_bytes_commit(Warp& warp, const Instruction&, u32 lanes) { for_lanes(lanes, [&](int lane) { ++warp.add_group[lane]; }); }
inline void add_bytes_wait(Warp& warp, const Instruction& code, u32 lanes) {   // mode 1: until shared memory is read
  for_lanes(lanes, [&](int lane) {
    std::erase_if(warp.adds[lane], [&](BulkAdd& add) {
      if (add.group + code.number >= warp.add_group[lane]) return false;
      if (watching && !add.waited_for) for (u32 k = add.source / 4; k < (add.source + add.bytes) / 4; ++k) finish_read(warp, k, false);
      add.waited_for = true;
      if (code.mode) read_for(warp, add);
      else finish_add(warp, add);
      return !code.mode;
    });
  });
}
inline void finish_some_adds(Warp& warp, bool all) {   // but those that are watched not before they are waited for
  for (auto& adds : warp.adds)
    while (adds.size() && (all || warp.random() % 3 == 0) && (!watching || adds.front().waited_for)) finish_add(warp, adds.front()), adds.erase(adds.begin());
}
inline void check_adds(Warp& warp, u32 lanes) {   // of lanes that end
  for_lanes(lanes, [&](int lane) { for (auto& add : warp.adds[lane]) if (!add.waited_for) fail("a thread ends before its bulk reductions have been read"); });
}
