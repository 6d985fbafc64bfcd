// What the emulated GPU consists of: programs, launches, blocks, warps, and the memory they reach.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

using u8 = uint8_t; using u16 = uint16_t; using u32 = uint32_t; using u64 = uint64_t;
using s8 = int8_t; using s16 = int16_t; using s32 = int32_t; using s64 = int64_t;
using half = _Float16;
using std::string; using std::vector;

[[noreturn]] inline void fail(const string& what) { throw std::runtime_error(what); }
template <class T> string text(T x) { std::ostringstream stream; stream << x; return stream.str(); }
template <class To, class From> inline To bits(From x) { static_assert(sizeof(To) == sizeof(From)); To y; memcpy(&y, &x, sizeof y); return y; }

constexpr u32 ALL = ~0u, NONE = ~0u;   // lanes; and an operand that is left out
constexpr u32 MOST_WARPS = 32, MOST_MBARRIERS = 64;
constexpr u32 SHARED_START = 1024;     // a GPU of compute capability 9.0 keeps the first KiB to itself

// ---------------------------------------------------------------- programs
struct Warp;
struct Instruction;
using Run = void (*)(Warp&, const Instruction&, u32 lanes);

struct Instruction {
  enum Kind : u8 { PLAIN, BRANCH, EXIT, BARRIER, TRY_WAIT } kind = PLAIN;
  bool negated = false;         // of the predicate
  s32 predicate = -1;           // its register, or -1
  s32 members = -1;             // lanes that come together to execute it: -1 any, -2 all of the warp, else a register that names them
  Run run = nullptr;
  const u32* operand = nullptr; // where the lanes' numbers lie among the registers of a warp; first those that are written
  u32 operands = 0, written = 0;
  s64 number = 0;               // an offset of an address, or how many groups may be pending
  s32 target = -1;              // of a branch
  u32 bytes = 0, count = 0;     // of an element in memory, and how many of them; columns of a product
  u32 space = 0, element = 0, mode = 0, lane_bytes = 0;
  bool narrow = false;          // an address has 32 bits
  bool moves = false, selects = false;
  u32 line = 0;                 // its text
};

struct Program {
  string name;
  vector<Instruction> code;
  vector<string> lines;
  std::deque<vector<u32>> operands;
  u32 register_bytes = 0, shared_bytes = SHARED_START, local_bytes = 0, parameters = 0;
  struct Constant { u32 at; u64 value; u32 bytes; };
  vector<Constant> constants;
  std::deque<vector<u8>> globals;
  // Registers that a launch sets: THREAD, BLOCK, GRID, THREADS, LANE; LOCAL the address of local memory, PARAMETER + k that of parameter k.
  enum Given : u32 { THREAD, BLOCK, GRID, THREADS, LANE, LOCAL = 0x80, PARAMETER = 0x100 };
  std::map<u32, u32> given;
};

// ---------------------------------------------------------------- launches
// How far a warp knows what warps, and mbarriers, have done (vector clocks): what a clock counts was done before what this warp does next. `fenced` counts
// what is also there for the async proxy.
struct Knowledge {
  u32 clock[MOST_WARPS + MOST_MBARRIERS] = {}, fenced[MOST_WARPS] = {};
  void join(const Knowledge& other) {
    for (u32 k = 0; k < MOST_WARPS + MOST_MBARRIERS; ++k) clock[k] = std::max(clock[k], other.clock[k]);
    for (u32 k = 0; k < MOST_WARPS; ++k) fenced[k] = std::max(fenced[k], other.fenced[k]);
  }
};

// Four bytes of shared memory: who wrote them last (a warp, or MOST_WARPS + an mbarrier that announces a copy) and when, who has read them since and when.
struct Word {
  static constexpr u32 IN_FLIGHT = ~0u;
  u32 written = 0, writer = 0, write_line = 0, pending_reads = 0, read_line = 0;
  u32 read[MOST_WARPS] = {}, read_by_product = 0;   // a bit for each warp
  bool of_mbarrier = false;
};

struct Mbarrier { u32 expected = 0, pending = 0; s64 bytes = 0; u32 parity = 0, index = 0, phases = 0, maker = 0, made = 0; Knowledge arriving, done; };
struct NamedBarrier {
  u32 arrived = 0, expected = 0; bool any = false;
  vector<std::pair<Warp*, u32>> waiting, results;   // lanes; registers that receive `any`
  Knowledge known;
};
struct Copy { u64 ready; std::function<void()> finish; };

struct Launch {
  Program* program; u32 grid, threads; vector<vector<u8>> parameters; std::mt19937_64 random; u64 tick = 0, executed = 0;
};

struct Block {
  Launch* launch; u32 id; vector<u8> memory; u8* shared; u32 shared_bytes;
  std::unordered_map<u32, Mbarrier> mbarriers;
  std::array<NamedBarrier, 16> named;
  vector<Copy> copies;   // bulk copies under way
  vector<std::unique_ptr<Warp>> warps;
  vector<Word> words;   // what follows is of gpu_watch
  std::unordered_map<u32, vector<std::pair<u32, u32>>> same, atomics;   // who wrote to a word what stood there already, and who by atomics: warps and clocks
};

struct LaneCopy { u32 group, target; u64 source; u32 bytes; };
struct BulkAdd { u32 group, source; u64 target; u32 bytes; vector<float> numbers; bool is_read, waited_for, stores; };

struct ProductRead { u32 group, word; const Instruction* code; int row, column; };   // of the result, that it goes into; the other one is -1

struct Warp {
  Block* block; Program* program; u32 id; vector<u8> memory, local; u8* registers;
  u32 pc[32], alive = ALL, waiting = 0;
  bool spun = false;   // it asked for the end of a phase in vain,
  u32 spinning = 0;    // and which lanes did
  vector<LaneCopy> copies[32]; u32 copy_group[32] = {};
  vector<BulkAdd> adds[32]; u32 add_group[32] = {};
  Knowledge known;
  u32 unfenced = 0;    // lanes that have stored to shared memory since their last fence for the async proxy
  // Of wgmma: registers that other instructions wrote since its last fence, groups so far, what pending products read, and for each
  // register the group, plus one, of the pending product that writes it.
  vector<u8> modified; u32 product_groups = 0; vector<ProductRead> product_reads; vector<u32> busy; bool any_busy = false;
  vector<u32> tainted; bool any_tainted = false; string taint;   // for each register the lanes that hold what was read too early, and what that was

  template <class T> T* at(u32 offset) { return (T*)(registers + offset); }
  template <class T> T* operand(const Instruction& code, u32 k) { return at<T>(code.operand[k]); }
  u64 random() { return block->launch->random(); }
};

template <class F> inline void for_lanes(u32 lanes, F f) {
  if (lanes == ALL) { for (int lane = 0; lane < 32; ++lane) f(lane); return; }
  for (int lane = 0; lane < 32; ++lane) if (lanes >> lane & 1) f(lane);
}

// ---------------------------------------------------------------- memory
inline std::map<u64, u64> allocations;   // of device memory: start -> end

inline bool allocated(u64 at, u64 bytes) {
  auto next = allocations.upper_bound(at);
  if (next == allocations.begin()) return false;
  const u64 end = (--next)->second;
  return at < end && bytes <= end - at;
}
inline void check_alignment(u64 at, u32 bytes) { if (bytes <= 16 && at % bytes) fail("address " + text(at) + " is no multiple of " + text(bytes)); }

inline u8* shared_at(Warp& warp, u32 at, u32 bytes) {
  check_alignment(at, bytes);
  if (at < SHARED_START || (u64)at + bytes > warp.block->shared_bytes) fail("shared memory: " + text(bytes) + " bytes at " + text(at) + " are outside of " + text(warp.block->shared_bytes));
  return warp.block->shared + at;
}
inline u8* device_at(u64 at, u32 bytes) {
  check_alignment(at, bytes);
  if (allocated(at, bytes)) return (u8*)at;
  string near;
  auto next = allocations.upper_bound(at);
  if (next != allocations.begin()) --next, near = "; the allocation before has " + text(next->second - next->first) + " bytes and ends " + text((s64)(at - next->second)) + " before";
  fail("device memory: " + text(bytes) + " bytes at " + text(at) + " are not allocated" + near);
}
inline u8* generic_at(Warp& warp, u64 at, u32 bytes) {
  auto within = [&](const void* start, u64 size) { return at - (u64)start < size && bytes <= size - (at - (u64)start); };
  if (within(warp.block->shared, warp.block->shared_bytes) || within(warp.local.data(), warp.local.size())) return (u8*)at;
  for (auto& parameter : warp.block->launch->parameters) if (within(parameter.data(), parameter.size())) return (u8*)at;
  for (auto& global : warp.program->globals) if (within(global.data(), global.size())) return (u8*)at;
  return device_at(at, bytes);
}
enum Space : u32 { GENERIC, SHARED };   // all but shared memory have addresses of one kind here
inline u8* memory_at(Warp& warp, u32 space, u64 at, u32 bytes) { return space == SHARED ? shared_at(warp, (u32)at, bytes) : generic_at(warp, at, bytes); }
