// A GPU of compute capability 8.0 or 9.0 on a CPU: it executes the PTX of kernels, for tests where there is no GPU.
//
// A launch keeps some blocks resident, starts the others in order as these end, and goes on with one warp at a time, for as many instructions as a seed
// draws. Of the lanes of a warp those that are furthest behind go first; they wait for others only where an instruction names both. So the order differs
// from seed to seed, and what a kernel's barriers do not order shows up as a wrong result, or (gpu_watch) is reported as a race. Every access of
// device memory is checked against the allocations, and every copy and reduction that a GPU makes on its own happens late (copies.h). What it does not have:
// caches, clusters, time.
#include "parser.h"

// ---------------------------------------------------------------- a warp
static bool together(Warp& warp, const Instruction& code, u32 lanes) {
  if (code.members == -1) return true;
  const u32 members = code.members == -2 ? warp.alive : warp.alive & warp.at<u32>(code.members)[__builtin_ctz(lanes)];
  return (members & ~lanes) == 0;
}
static void arrive_at_barrier(Warp& warp, const Instruction& code, u32 lanes) {   // result, barrier, threads, predicate
  auto value = [&](u32 k) { return warp.operand<u32>(code, k)[__builtin_ctz(lanes)]; };
  const u32 id = value(1), expected = code.operand[2] == NONE ? 0 : value(2);   // 0: all threads
  if (id > 15 || expected % 32) fail("a named barrier " + text(id) + " of " + text(expected) + " threads");
  NamedBarrier& barrier = warp.block->named[id];
  if (barrier.arrived && barrier.expected != expected) fail("named barrier " + text(id) + " has " + text(expected) + " threads for some, " + text(barrier.expected) + " for others");
  barrier.expected = expected, barrier.arrived += 32;
  if (code.written) {
    for_lanes(lanes, [&](int lane) { barrier.any |= warp.operand<u32>(code, 3)[lane] != 0; });
    barrier.results.push_back({&warp, code.operand[0]});
  }
  release_to(warp, barrier.known);
  if (code.mode == 0) warp.waiting |= lanes, barrier.waiting.push_back({&warp, lanes});
}
static void open_barriers(Block& block) {
  for (NamedBarrier& barrier : block.named) {
    if (!barrier.arrived) continue;
    u32 expected = barrier.expected;
    if (!expected) for (auto& warp : block.warps) expected += warp->alive ? 32 : 0;
    if (barrier.arrived < expected) continue;
    if (barrier.arrived > expected) fail(text(barrier.arrived) + " threads at a named barrier of " + text(expected));
    for (auto& [warp, at] : barrier.results) for (int lane = 0; lane < 32; ++lane) warp->at<u32>(at)[lane] = barrier.any;
    for (auto& [warp, lanes] : barrier.waiting) { warp->waiting &= ~lanes; if (watching) warp->known.join(barrier.known); }
    barrier.arrived = 0, barrier.any = false, barrier.waiting.clear(), barrier.results.clear();
  }
}

// Executes up to `budget` instructions of a warp; returns whether anything went on.
static bool run(Warp& warp, int budget) {
  const vector<Instruction>& program = warp.program->code;
  bool progress = false;
  warp.spun = false;
  while (budget > 0 && !warp.spun) {
    const u32 ready = warp.alive & ~warp.waiting;
    u32 pc = 0, lanes = 0, next = ~0u;   // of those that are next, and the place of others before which they stop
    // Lanes that have waited in vain let others of their warp go first.
    for (u32 left = ready & ~warp.spinning ? ready & ~warp.spinning : ready; left; left &= ~lanes) {
      pc = ~0u, lanes = 0;
      for_lanes(left, [&](int lane) { pc = std::min(pc, warp.pc[lane]); });
      for_lanes(left, [&](int lane) { lanes |= (u32)(warp.pc[lane] == pc) << lane; });
      if (together(warp, program[pc], lanes)) break;
      if (lanes == left) { warp.spinning = 0; return progress; }
    }
    warp.spinning = 0;
    if (!ready) return progress;
    for_lanes(ready, [&](int lane) { if (warp.pc[lane] > pc) next = std::min(next, warp.pc[lane]); });
    auto set_pc = [&](u32 to) { for_lanes(lanes, [&](int lane) { warp.pc[lane] = to; }); };
    for (bool on = true; on; on = on && budget > 0 && pc < next) {
      const Instruction& code = program[pc];
      if (!together(warp, code, lanes)) break;
      u32 active = lanes;
      if (code.predicate >= 0) for_lanes(lanes, [&](int lane) { if ((warp.at<u32>(code.predicate)[lane] != 0) == code.negated) active &= ~(1u << lane); });
      --budget, ++warp.block->launch->executed, ++pc;
      try {
        if (watching && (active || warp.any_tainted) && code.kind != Instruction::BRANCH && code.run != wgmma) check_registers(warp, code, active, lanes);
        switch (code.kind) {
          case Instruction::PLAIN:
            if (active) code.run(warp, code, active);
            break;
          case Instruction::TRY_WAIT:
            if (active) code.run(warp, code, active);
            on = !warp.spun;
            break;
          case Instruction::BRANCH:
            if (watching && code.predicate >= 0 && warp.tainted[code.predicate / 32] & lanes) fail("a branch depends on this: " + warp.taint);
            if (active == lanes) pc = code.target;
            else if (active) { for_lanes(lanes, [&](int lane) { warp.pc[lane] = active >> lane & 1 ? code.target : pc; }); lanes = 0, on = false; }
            break;
          case Instruction::EXIT:
            if (watching) check_adds(warp, active);
            warp.alive &= ~active, lanes &= ~active, on = false;
            if (!warp.alive) open_barriers(*warp.block);
            break;
          case Instruction::BARRIER:
            set_pc(pc);
            if (active) arrive_at_barrier(warp, code, active), open_barriers(*warp.block);
            on = false;
            break;
        }
      } catch (std::exception& error) {
        fail(string(error.what()) + "\n  at " + line_of(warp, code.line) + " of block " + text(warp.block->id) + ", warp " + text(warp.id));
      }
      progress |= code.kind != Instruction::BRANCH && !warp.spun;
    }
    set_pc(pc);
  }
  return progress;
}

// ---------------------------------------------------------------- a launch
static std::unique_ptr<Block> start_block(Launch& launch, u32 id, u32 shared_bytes) {
  auto block = std::make_unique<Block>();
  const Program& program = *launch.program;
  block->launch = &launch, block->id = id, block->shared_bytes = program.shared_bytes + shared_bytes;
  block->memory.assign(block->shared_bytes + 1024, 0xff);
  block->shared = (u8*)(((u64)block->memory.data() + 1023) / 1024 * 1024);
  if (watching) block->words.resize(block->shared_bytes / 4 + 1);
  for (u32 k = 0; k < (launch.threads + 31) / 32; ++k) {
    auto warp = std::make_unique<Warp>();
    warp->block = block.get(), warp->program = launch.program, warp->id = k;
    warp->memory.assign(program.register_bytes + 64, 0xff);
    warp->registers = (u8*)(((u64)warp->memory.data() + 63) / 64 * 64);
    warp->local.assign(program.local_bytes * 32, 0xff);
    if (launch.threads - k * 32 < 32) warp->alive = (1u << (launch.threads - k * 32)) - 1;
    auto set = [&](u32 at, u32 bytes, int lane, u64 value) { if (bytes == 8) warp->at<u64>(at)[lane] = value; else warp->at<u32>(at)[lane] = value; };
    for (int lane = 0; lane < 32; ++lane) {
      warp->pc[lane] = 0;
      for (auto& constant : program.constants) set(constant.at, constant.bytes, lane, constant.value);
      for (auto& [kind, at] : program.given) {
        if (kind >= Program::PARAMETER) set(at, 8, lane, (u64)launch.parameters[kind - Program::PARAMETER].data());
        else if (kind == Program::LOCAL) set(at, 8, lane, (u64)warp->local.data() + lane * program.local_bytes);
        else set(at, 4, lane, kind == Program::THREAD ? k * 32 + lane : kind == Program::BLOCK ? id : kind == Program::GRID ? launch.grid : kind == Program::THREADS ? launch.threads : lane);
      }
    }
    if (watching) {
      const size_t count = program.register_bytes / 32 + 1;   // registers begin at multiples of 32 bytes
      warp->busy.assign(count, 0), warp->tainted.assign(count, 0), warp->modified.assign(count, 0), warp->known.clock[k] = 1;
    }
    block->warps.push_back(std::move(warp));
  }
  return block;
}
static string places(const Block& block) {
  string all;
  for (auto& warp : block.warps) {
    std::set<u32> at;
    for_lanes(warp->alive, [&](int lane) { at.insert(warp->pc[lane]); });
    for (u32 pc : at) all += "\n  warp " + text(warp->id) + (warp->waiting ? " waits behind " : " is at ") + warp->program->lines[warp->program->code[pc - (warp->waiting != 0)].line].substr(0, 100);
  }
  return all;
}
static void execute(Launch& launch, u32 shared_bytes, u32 resident, u64 limit) {
  vector<std::unique_ptr<Block>> blocks;
  u32 started = 0;
  u64 idle = 0;
  while (started < launch.grid || blocks.size()) {
    while (blocks.size() < resident && started < launch.grid) blocks.push_back(start_block(launch, started++, shared_bytes));
    const size_t index = launch.random() % blocks.size();
    Block& block = *blocks[index];
    Warp& warp = *block.warps[launch.random() % block.warps.size()];
    ++launch.tick;
    bool progress = run(warp, launch.random() % 8 ? 20 + launch.random() % 200 : 2000);
    for (size_t k = 0; k < block.copies.size();) {
      if (block.copies[k].ready > launch.tick) { ++k; continue; }
      const Copy copy = std::move(block.copies[k]);
      block.copies.erase(block.copies.begin() + k), copy.finish(), progress = true;
    }
    finish_some_adds(warp, false);
    if (std::all_of(block.warps.begin(), block.warps.end(), [](auto& own) { return !own->alive; })) {
      if (block.copies.size()) fail("block " + text(block.id) + " ended before its bulk copies");
      for (auto& own : block.warps) finish_some_adds(*own, true);
      blocks.erase(blocks.begin() + index), progress = true;
    }
    idle = progress ? 0 : idle + 1;
    if (idle > 4000 * blocks.size()) fail("nothing goes on any more" + places(*blocks[0]));
    if (launch.executed > limit) fail("more than " + text(limit) + " instructions");
  }
}

// ---------------------------------------------------------------- what cupy/__init__.py calls
static string error;
extern "C" {
const char* gpu_error() { return error.c_str(); }
void gpu_watch(int on) { watching = on; }
void gpu_allocate(u64 at, u64 bytes) { allocations[at] = at + bytes; }
void gpu_free(u64 at) { allocations.erase(at); }

// A program, or NULL and gpu_error.
void* gpu_load(const char* ptx, const char* entry) {
  try {
    auto program = std::make_unique<Program>();
    program->name = entry;
    Parser(*program, ptx, entry);
    return program.release();
  } catch (std::exception& caught) { error = string(entry) + ": " + caught.what(); return nullptr; }
}

// How many instructions warps have executed, or -1 and gpu_error.
s64 gpu_launch(void* program, u32 grid, u32 threads, u32 shared_bytes, u32 count, const void** parameters, const u32* bytes, u64 seed, u32 resident, u64 limit) {
  try {
    Launch launch{(Program*)program, grid, threads, {}, std::mt19937_64(seed)};
    if (threads > 32 * MOST_WARPS) fail(text(threads) + " threads");
    if (count != launch.program->parameters) fail(text(count) + " parameters");
    for (u32 k = 0; k < count; ++k) launch.parameters.emplace_back((const u8*)parameters[k], (const u8*)parameters[k] + bytes[k]);
    execute(launch, shared_bytes, resident, limit);
    return launch.executed;
  } catch (std::exception& caught) { error = ((Program*)program)->name + ": " + caught.what(); return -1; }
}

// The driver's function, for maps as cuflash/cupy_backend/tensormap.py makes them.
int cuTensorMapEncodeTiled(void* map, u32 type, u32 rank, u64 address, const u64* sizes, const u64* strides, const u32* box, const u32* steps, int interleave, int swizzle, int, int outside) {
  constexpr u32 FLOAT16_NUMBERS = 6, BFLOAT16_NUMBERS = 9, SWIZZLE_128_BYTES = 3;
  TensorMap made{address, {}, {}, {}, 2};
  if (rank != 5 || address % 16 || interleave || swizzle != SWIZZLE_128_BYTES || outside || (type != FLOAT16_NUMBERS && type != BFLOAT16_NUMBERS)) return 1;
  for (int k = 0; k < 5; ++k) {
    if (!sizes[k] || sizes[k] > 1ull << 32 || box[k] != (k == 0 ? 64 : k == 1 ? box[1] : 1) || !box[k] || box[k] > 256 || steps[k] != 1) return 1;
    made.size[k] = sizes[k], made.box[k] = box[k];
  }
  for (int k = 0; k < 4; ++k) {
    if (strides[k] % 16 || strides[k] >= 1ull << 40) return 1;
    made.stride[k] = strides[k];
  }
  memset(map, 0, 128);
  memcpy(map, &made, sizeof made);
  return 0;
}
}
