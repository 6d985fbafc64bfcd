// PTX as NVRTC writes it, and as the kernels' own asm statements have it -> a Program. What is not known here is refused when a kernel is loaded.
#pragma once
#include "copies.h"
#include "matrices.h"

inline string strip(const string& s) {
  const size_t first = s.find_first_not_of(" \t\r\n"), last = s.find_last_not_of(" \t\r\n");
  return first == string::npos ? "" : s.substr(first, last - first + 1);
}
inline vector<string> split(const string& s, char by) {   // not within brackets
  vector<string> parts(1);
  int depth = 0;
  for (char c : s) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == by && !depth) parts.emplace_back(); else parts.back() += c;
  }
  for (string& part : parts) part = strip(part);
  return parts;
}
inline vector<string> list_of(const string& s) { return s[0] == '{' ? split(s.substr(1, s.size() - 2), ',') : vector<string>{s}; }
inline string inner(const string& s) { return strip(s.substr(1, s.rfind(']') - 1)); }
inline u32 bytes_of(const string& type) {
  if (type == "pred" || type == "tf32" || type == "f16x2" || type == "bf16x2") return 4;
  const size_t digits = type.find_first_of("0123456789");
  return digits == string::npos ? 0 : std::stoi(type.substr(digits)) / 8;
}
inline u32 lane_bytes_of(const string& type) { return bytes_of(type) == 8 ? 8 : 4; }   // smaller ones take four bytes too

class Parser {
 public:
  Parser(Program& program, const string& source, const string& entry) : program(program) {
    parse(source, entry);
    if (program.code.empty()) fail("there is no entry " + entry);
    for (const Jump& jump : jumps) {
      auto found = labels.end();
      for (auto scope = jump.scopes.rbegin(); scope != jump.scopes.rend() && found == labels.end(); ++scope) found = labels.find({*scope, jump.label});
      if (found == labels.end()) fail("there is no label " + jump.label);
      program.code[jump.at].target = found->second;
    }
    program.register_bytes = (registers + 63) / 64 * 64;
  }

 private:
  struct Register { u32 at, bytes; };
  struct Jump { size_t at; string label; vector<int> scopes; };
  Program& program;
  u32 registers = 0;
  vector<std::map<string, Register>> names{{}};   // of each scope that is open
  vector<int> scopes{0};
  int last_scope = 0;
  std::map<std::pair<int, string>, s32> labels;
  vector<Jump> jumps;
  std::map<string, u32> shared, parameters, globals;
  string dynamic_shared, local;
  std::map<std::pair<u64, u32>, u32> constants;

  // ---------------------------------------------------------------- operands
  u32 new_register(u32 bytes) { const u32 at = (registers + 31) / 32 * 32; registers = at + 32 * bytes; return at; }
  const Register* find(const string& name) const {
    for (auto scope = names.rbegin(); scope != names.rend(); ++scope) if (auto found = scope->find(name); found != scope->end()) return &found->second;
    return nullptr;
  }
  u32 constant(u64 value, u32 bytes) {
    auto [found, is_new] = constants.insert({{value, bytes}, 0});
    if (is_new) found->second = new_register(bytes), program.constants.push_back({found->second, value, bytes});
    return found->second;
  }
  u32 given(u32 kind, u32 bytes) {
    auto [found, is_new] = program.given.insert({kind, 0});
    if (is_new) found->second = new_register(bytes);
    return found->second;
  }
  static u64 number(const string& s) {
    if (s.size() > 2 && s[0] == '0' && strchr("fFdD", s[1])) return std::stoull(s.substr(2), nullptr, 16);
    return s[0] == '-' ? -std::stoull(s.substr(1), nullptr, 0) : std::stoull(s, nullptr, 0);
  }
  // Where an operand of `bytes` a lane lies: a register, or one that holds a constant or what a launch gives.
  u32 operand(const string& s, u32 bytes) {
    static const std::map<string, u32> special{
        {"%tid.x", Program::THREAD}, {"%ctaid.x", Program::BLOCK}, {"%nctaid.x", Program::GRID}, {"%ntid.x", Program::THREADS}, {"%laneid", Program::LANE}};
    if (const Register* own = find(s)) { if (own->bytes != bytes) fail("operand " + s + " has another width"); return own->at; }
    if (auto found = special.find(s); found != special.end() && bytes == 4) return given(found->second, 4);
    if (auto found = shared.find(s); found != shared.end()) return constant(found->second, bytes);
    if (auto found = parameters.find(s); found != parameters.end() && bytes == 8) return given(Program::PARAMETER + found->second, 8);
    if (auto found = globals.find(s); found != globals.end() && bytes == 8) return constant((u64)program.globals[found->second].data(), 8);
    if (s == local && bytes == 8) return given(Program::LOCAL, 8);
    if (s.empty() || !strchr("-0123456789", s[0])) fail("operand " + s + " is not known here");
    return constant(bytes == 4 ? (u32)number(s) : number(s), bytes);
  }

  // ---------------------------------------------------------------- the text
  static string name_before_bracket(const string& s) { const size_t open = s.find('['), space = s.find_last_of(" \t", open); return s.substr(space + 1, open - space - 1); }
  static u64 number_in_brackets(const string& s) {
    const size_t open = s.find('['), close = s.find(']');
    return open == string::npos || close <= open + 1 ? 0 : std::stoull(s.substr(open + 1, close - open - 1));
  }
  void declare_shared(const string& s) {
    u32& at = shared[name_before_bracket(s)];
    if (s.find(".extern") == 0) { dynamic_shared = name_before_bracket(s); return; }
    at = program.shared_bytes, program.shared_bytes = (at + number_in_brackets(s) + 1023) / 1024 * 1024;
  }
  void declare_global(const string& s) {   // .global .align 4 .u32 NAME[n] = {...};
    const size_t equal = s.find('=');
    const string left = strip(s.substr(0, std::min(equal, s.find(';')))), head = left.substr(0, left.find('['));
    u32 bytes = 0;
    for (const string& word : split(head, ' ')) if (word.size() > 2 && strchr("busf", word[1]) && isdigit(word[2])) bytes = bytes_of(word.substr(1));
    vector<u8> data;
    if (equal != string::npos) {
      const string right = strip(s.substr(equal + 1, s.rfind(';') - equal - 1));
      for (const string& x : list_of(right)) { const u64 value = number(x); data.insert(data.end(), (const u8*)&value, (const u8*)&value + bytes); }
    }
    data.resize(std::max<size_t>(data.size(), bytes * std::max<u64>(1, number_in_brackets(left))));
    globals[strip(head).substr(strip(head).find_last_of(" \t") + 1)] = program.globals.size();
    program.globals.push_back(data);
  }
  void parse(const string& source, const string& entry) {
    std::istringstream stream(source);
    string line, body;
    enum { OUTSIDE, HEADER, BODY } place = OUTSIDE;
    int depth = 0;
    while (std::getline(stream, line)) {
      line = strip(line.substr(0, line.find("//")));
      if (line.empty()) continue;
      if (place == BODY) {
        depth += (line == "{" || line.find("{ ") == 0) - (line == "}");
        if (line.find(".shared") == 0) declare_shared(line); else body += line + "\n";
        if (line == "}" && depth == 0) break;
      } else if (place == HEADER) {
        if (line.find(".param") == 0) add_parameter(line);
        if (line == "{") place = BODY, depth = 1;
      } else if (line.find(".entry") != string::npos) {
        if (line.find(".entry " + entry + "(") != string::npos) place = HEADER;
      } else if (line.find(".shared") != string::npos) {
        declare_shared(line);
      } else if (line.find(".global") != string::npos || line.find(".const") == 0) {
        declare_global(line);
      }
    }
    if (dynamic_shared.size()) shared[dynamic_shared] = program.shared_bytes;
    statements(body);
  }
  void add_parameter(string s) {   // .param .align 64 .b8 NAME[n],
    if (s.back() == ',') s.pop_back();
    s = strip(s.substr(0, s.find('[')));
    parameters[s.substr(s.find_last_of(" \t") + 1)] = program.parameters++;
  }
  void statements(const string& body) {
    size_t at = 0;
    auto skip = [&] { at = body.find_first_not_of(" \t\r\n;", at); };
    for (skip(); at != string::npos; skip()) {
      const size_t stop = body.find_first_of(" \t\n;:", at);
      if (body[at] == '{') { names.emplace_back(), scopes.push_back(++last_scope), ++at; continue; }
      if (body[at] == '}') { if (scopes.size() > 1) names.pop_back(), scopes.pop_back(); ++at; continue; }
      if (stop != string::npos && body[stop] == ':' && body[stop + 1] != ':') { labels[{scopes.back(), body.substr(at, stop - at)}] = program.code.size(), at = stop + 1; continue; }
      const size_t end = body.find(';', at);
      string statement = strip(body.substr(at, end - at));
      std::replace(statement.begin(), statement.end(), '\n', ' ');
      at = end;
      try {
        if (statement[0] == '.') declare(statement); else instruction(statement);
      } catch (std::exception& error) {
        fail(statement + ": " + error.what());
      }
    }
  }
  void declare(const string& s) {
    if (s.find(".reg") == 0) {
      std::istringstream words(s);
      string directive, type, rest;
      words >> directive >> type, std::getline(words, rest);
      const u32 bytes = lane_bytes_of(type.substr(1));
      for (const string& name : split(rest, ',')) {
        const size_t open = name.find('<');
        if (open == string::npos) names.back()[name] = {new_register(bytes), bytes};
        else for (int k = 0, count = std::stoi(name.substr(open + 1)); k < count; ++k) names.back()[name.substr(0, open) + text(k)] = {new_register(bytes), bytes};
      }
    } else if (s.find(".local") == 0) {
      local = name_before_bracket(s), program.local_bytes = number_in_brackets(s);
    }
  }

  // ---------------------------------------------------------------- instructions
  struct Statement {
    string full, op, type;
    vector<string> parts, arguments;
    bool has(const char* part) const { return std::find(parts.begin(), parts.end(), part) != parts.end(); }
    bool starts(const char* s) const { return full.rfind(s, 0) == 0; }
  };
  Instruction code;
  vector<u32> operands;
  void take(const string& s, u32 bytes) { operands.push_back(operand(s, bytes)); }
  void take_list(const string& s, u32 bytes) { for (const string& name : list_of(s)) take(name, bytes); }
  void take_all(const Statement& s, std::initializer_list<u32> bytes) {
    if (s.arguments.size() != bytes.size()) fail("other operands were expected");
    size_t k = 0;
    for (u32 own : bytes) take(s.arguments[k++], own);
  }
  void take_address(const string& s) {   // [register or symbol + number]
    const string whole = inner(s), base = strip(whole.substr(0, whole.find('+')));
    code.number = whole.find('+') == string::npos ? 0 : std::stoll(whole.substr(whole.find('+') + 1));
    const Register* own = find(base);
    code.narrow = own ? own->bytes == 4 : shared.count(base);
    take(base, code.narrow ? 4 : 8);
  }
  static bool take_not(string& s) { const bool negated = s[0] == '!'; if (negated) s = s.substr(1); return negated; }

  void instruction(string text) {
    code = Instruction(), operands.clear();
    code.line = program.lines.size();
    program.lines.push_back(text);
    if (text[0] == '@') {
      const size_t space = text.find_first_of(" \t");
      string name = text.substr(1, space - 1);
      code.negated = take_not(name), code.predicate = operand(name, 4), text = strip(text.substr(space));
    }
    Statement s;
    const size_t space = text.find_first_of(" \t");
    s.full = text.substr(0, space);
    if (space != string::npos) s.arguments = split(strip(text.substr(space)), ',');
    for (const string& part : split(s.full, '.')) s.parts.push_back(part);
    s.op = s.parts[0], s.type = s.parts.back();
    code.written = 1;
    if (!control(s) && !memory(s) && !matrices(s) && !copies(s) && !moves(s) && !integers(s) && !conversion(s) && !comparison(s) && !arithmetic(s)) fail("not known here");
    if (code.kind == Instruction::PLAIN && !code.run) fail("not known here in this form");
    if (s.has("aligned") || (s.op == "bar" && !s.has("warp"))) code.members = -2;
    program.operands.push_back(operands);
    code.operand = program.operands.back().data(), code.operands = operands.size();
    program.code.push_back(code);
  }
  static void nothing(Warp&, const Instruction&, u32) {}

  bool control(Statement& s) {
    if (s.op == "bra") {
      code.kind = Instruction::BRANCH, code.written = 0;
      jumps.push_back({program.code.size(), s.arguments[0], scopes});
    } else if (s.op == "ret" || s.op == "exit") {
      code.kind = Instruction::EXIT, code.written = 0;
    } else if (s.op == "bar" && s.has("warp")) {
      take_all(s, {4}), code.run = nothing, code.written = 0, code.members = operands[0];
    } else if (s.op == "bar") {   // result or NONE, barrier, threads or NONE, predicate or NONE; mode 1: goes on at once
      code.kind = Instruction::BARRIER, code.mode = s.has("arrive"), code.written = s.has("red");
      if (code.written && !s.has("or")) fail("not known here");
      operands.push_back(code.written ? operand(s.arguments[0], 4) : NONE);
      take(s.arguments[code.written], 4);
      operands.push_back(!code.written && s.arguments.size() > 1 ? operand(s.arguments[1], 4) : NONE);
      if (code.written) { if (take_not(s.arguments[2])) fail("not known here"); take(s.arguments[2], 4); }
    } else if (s.full == "fence.proxy.async.shared::cta") {
      code.run = fence_async, code.written = 0;
    } else if (s.op == "setmaxnreg" || s.op == "griddepcontrol" || s.op == "fence" || s.op == "membar" || s.op == "prefetch") {
      code.run = nothing, code.written = 0;
    } else if (s.op == "shfl") {
      const vector<string> results = split(s.arguments[0], '|');
      take(results[0], 4), operands.push_back(results.size() > 1 ? operand(results[1], 4) : NONE);
      for (int k = 1; k < 5; ++k) take(s.arguments[k], 4);
      code.mode = s.has("bfly") ? 0 : s.has("idx") ? 1 : s.has("up") ? 2 : 3, code.run = shuffle, code.written = 2, code.members = operands.back();
    } else if (s.op == "vote") {
      code.count = take_not(s.arguments[1]), code.mode = s.has("all") ? 0 : s.has("any") ? 1 : 2;
      take_all(s, {4, 4, 4}), code.run = vote, code.members = operands.back();
    } else if (s.op == "redux") {
      take_all(s, {4, 4, 4}), code.members = operands.back();
      if (s.has("max") && s.type == "u32") code.run = reduce_lanes<[](u32 a, u32 b) { return std::max(a, b); }>;
    } else {
      return false;
    }
    return true;
  }

  bool memory(Statement& s) {
    if (s.op != "ld" && s.op != "st" && s.op != "atom" && s.op != "red") return false;
    code.space = s.has("shared") ? SHARED : GENERIC, code.bytes = bytes_of(s.type);
    const u32 own = lane_bytes_of(s.type);
    if (s.op == "ld") {
      const vector<string> results = list_of(s.arguments[0]);
      const u32 wide = find(results[0])->bytes;
      code.count = code.written = results.size();
      take_list(s.arguments[0], wide), take_address(s.arguments[1]);
      const bool sign = s.type[0] == 's';
      const u32 n = code.bytes;
      if (wide == 8) code.run = n == 8 ? load<u64, u64> : n == 4 ? sign ? load<s32, u64> : load<u32, u64> : n == 2 ? sign ? load<s16, u64> : load<u16, u64> : sign ? load<s8, u64> : load<u8, u64>;
      else if (n < 8) code.run = n == 4 ? load<u32, u32> : n == 2 ? sign ? load<s16, u32> : load<u16, u32> : sign ? load<s8, u32> : load<u8, u32>;
    } else if (s.op == "st") {
      const vector<string> values = list_of(s.arguments[1]);
      const Register* first = find(values[0]);
      code.lane_bytes = first ? first->bytes : own, code.count = values.size(), code.written = 0;
      take_list(s.arguments[1], code.lane_bytes), take_address(s.arguments[0]);
      code.run = store;
    } else {
      code.mode = code.written = s.op == "atom";
      if (code.mode) take(s.arguments[0], own);
      take_address(s.arguments[code.mode]), take_list(s.arguments[code.mode + 1], own);
      code.count = list_of(s.arguments[code.mode + 1]).size();
      if (s.has("add") && s.type == "f32") code.run = atomic<float, [](float a, float b) { return flush(a + b); }>;
      if (s.has("add") && s.type == "f64") code.run = atomic<double, [](double a, double b) { return a + b; }>;
      if (s.has("add") && s.type == "u32") code.run = atomic<u32, [](u32 a, u32 b) { return a + b; }>;
      if (s.has("max") && s.type == "u32") code.run = atomic<u32, [](u32 a, u32 b) { return std::max(a, b); }>;
    }
    return true;
  }

  bool matrices(Statement& s) {
    code.element = s.has("tf32") ? TFLOAT32 : s.has("bf16") ? BFLOAT16 : FLOAT16;
    if (s.op == "ldmatrix") {
      code.count = code.written = list_of(s.arguments[0]).size(), code.mode = s.has("trans"), code.run = ldmatrix;
      take_list(s.arguments[0], 4), take_address(s.arguments[1]);
    } else if (s.op == "stmatrix") {
      code.count = list_of(s.arguments[1]).size(), code.written = 0, code.run = stmatrix;
      take_list(s.arguments[1], 4), take_address(s.arguments[0]);
    } else if (s.op == "mma") {
      const bool wide = s.type == "f64";
      for (const string& group : s.arguments) take_list(group, wide ? 8 : 4);
      code.written = list_of(s.arguments[0]).size();
      if (wide) code.run = s.has("m16n8k8") ? mma_float64<16, 8> : s.has("m8n8k4") ? mma_float64<8, 4> : nullptr;
      else if (s.has(code.element == TFLOAT32 ? "m16n8k8" : "m16n8k16")) code.run = mma;
    } else if (s.starts("wgmma.mma_async")) {
      const bool in_registers = s.arguments[1][0] == '{';
      const string& shape = s.parts[4];   // m64nNk16
      code.count = std::stoi(shape.substr(shape.find('n') + 1)), code.written = code.count / 2, code.run = wgmma;
      take_list(s.arguments[0], 4), take_list(s.arguments[1], in_registers ? 4 : 8), take(s.arguments[2], 8), take(s.arguments[3], 4);
      const bool negates = s.arguments[4] == "-1";
      if ((!negates && s.arguments[4] != "1") || s.arguments[5] != "1" || list_of(s.arguments[0]).size() != code.written) fail("not known here in this form");
      code.mode = in_registers ? 4 | std::stoi(s.arguments[6]) << 1 : std::stoi(s.arguments[6]) | std::stoi(s.arguments[7]) << 1;
      if (negates) code.mode |= 8;
    } else if (s.op == "wgmma") {
      code.written = 0;
      if (s.has("wait_group")) code.number = std::stoi(s.arguments[0]);
      code.run = s.has("commit_group") ? wgmma_commit : s.has("wait_group") ? wgmma_wait : s.has("fence") ? wgmma_fence : nullptr;
    } else {
      return false;
    }
    return true;
  }

  bool copies(Statement& s) {
    if (s.op == "mbarrier") {
      code.written = s.has("try_wait");
      if (s.has("try_wait")) {
        take(s.arguments[0], 4), take_address(s.arguments[1]), take(s.arguments[2], 4);
        code.kind = Instruction::TRY_WAIT, code.run = mbarrier_try_wait;
      } else if (s.has("init")) {
        take_address(s.arguments[0]), take(s.arguments[1], 4), code.run = mbarrier_init;
      } else if (s.has("arrive") && s.arguments[0] == "_") {
        code.mode = s.has("expect_tx");
        take_address(s.arguments[1]), code.run = mbarrier_arrive;
        if (code.mode) take(s.arguments[2], 4);
      }
      return true;
    }
    if (s.op != "cp") return false;
    code.written = 0;
    auto address = [&](const string& x, u32 bytes) { take(inner(x), bytes); };
    if (s.full == "cp.async.commit_group") code.run = cp_async_commit;
    else if (s.full == "cp.async.wait_group") code.run = cp_async_wait, code.number = std::stoi(s.arguments[0]);
    else if (s.full == "cp.async.bulk.commit_group") code.run = add_bytes_commit;
    else if (s.starts("cp.async.bulk.wait_group")) code.run = add_bytes_wait, code.number = std::stoi(s.arguments[0]), code.mode = s.has("read");
    else if (s.starts("cp.async.cg.shared.global") && s.arguments.size() == 4 && s.arguments[2] == "16") {
      address(s.arguments[0], 4), address(s.arguments[1], 8), take(s.arguments[3], 4), code.run = cp_async;
    } else if (s.starts("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier")) {
      const vector<string> map = split(inner(s.arguments[1]), ',');
      address(s.arguments[0], 4), take(map[0], 8), take_list(map[1], 4), address(s.arguments[2], 4), code.run = load_box;
    } else if (s.starts("cp.async.bulk.shared::cluster.global.mbarrier")) {
      address(s.arguments[0], 4), address(s.arguments[1], 8), take(s.arguments[2], 4), address(s.arguments[3], 4), code.run = load_bytes;
    } else if (s.starts("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32")) {
      address(s.arguments[0], 8), address(s.arguments[1], 4), take(s.arguments[2], 4), code.run = add_bytes;
    } else if (s.starts("cp.async.bulk.global.shared::cta.bulk_group")) {
      address(s.arguments[0], 8), address(s.arguments[1], 4), take(s.arguments[2], 4), code.run = add_bytes, code.mode = 1;
    }
    return true;
  }

  bool moves(Statement& s) {
    const u32 own = lane_bytes_of(s.type);
    if (s.op == "mov" && s.arguments[0][0] == '{') {
      take_list(s.arguments[0], 4), take(s.arguments[1], own), code.written = operands.size() - 1;
      if (code.written == 2) code.run = own == 8 ? take_apart_64 : take_apart_32;
    } else if (s.op == "mov" && s.arguments[1][0] == '{') {
      take(s.arguments[0], own), take_list(s.arguments[1], 4);
      if (operands.size() == 3) code.run = own == 8 ? map2<u64, u32, u32, [](u32 a, u32 b) { return a | (u64)b << 32; }> : map2<u32, u32, u32, [](u32 a, u32 b) { return (a & 0xffff) | b << 16; }>;
    } else if (s.op == "mov" || s.op == "cvta") {
      if (s.has("shared")) fail("not known here");
      take_all(s, {own, own}), code.moves = find(s.arguments[1]), code.run = own == 8 ? map1<u64, u64, [](u64 a) { return a; }> : map1<u32, u32, [](u32 a) { return a; }>;
    } else if (s.op == "selp") {
      take_all(s, {own, own, own, 4}), code.selects = true;
      code.run = own == 8 ? map3<u64, u64, u64, u32, [](u64 a, u64 b, u32 c) { return c ? a : b; }> : map3<u32, u32, u32, u32, [](u32 a, u32 b, u32 c) { return c ? a : b; }>;
    } else {
      return false;
    }
    return true;
  }

  // Bits and whole numbers. 16-bit registers hold numbers without sign in 32 bits.
  template <class T> Run bitwise(const string& op) {
    return op == "and" ? map2<T, T, T, [](T a, T b) { return a & b; }> : op == "or" ? map2<T, T, T, [](T a, T b) { return a | b; }> : map2<T, T, T, [](T a, T b) { return a ^ b; }>;
  }
  template <class T> Run shift_right() { return map2<T, T, u32, [](T a, u32 b) -> T { return (a >> std::min<u32>(b, 8 * sizeof(T) - 1)) * ((T)-1 < 0 || b < 8 * sizeof(T)); }>; }
  template <class T> Run shift_left() { return map2<T, T, u32, [](T a, u32 b) -> T { return b < 8 * sizeof(T) ? a << b : 0; }>; }
  template <class T> Run division(const string& op) { return op == "div" ? map2<T, T, T, divide<T>> : map2<T, T, T, remainder<T>>; }
  bool integers(Statement& s) {
    const string &op = s.op, &type = s.type;
    const u32 own = lane_bytes_of(type);
    const bool sign = type[0] == 's', wide = own == 8, is_short = bytes_of(type) == 2;
    if (op == "and" || op == "or" || op == "xor") {
      take_all(s, {own, own, own}), code.run = wide ? bitwise<u64>(op) : bitwise<u32>(op);
      if (type == "pred") code.run = op == "xor" ? map2<u32, u32, u32, [](u32 a, u32 b) -> u32 { return !a != !b; }> : code.run;   // true may stand there as -1
    } else if (op == "not") {
      take_all(s, {own, own});
      code.run = type == "pred" ? map1<u32, u32, [](u32 a) -> u32 { return !a; }>
               : is_short ? map1<u32, u32, [](u32 a) -> u32 { return (u16)~a; }> : wide ? map1<u64, u64, [](u64 a) { return ~a; }> : map1<u32, u32, [](u32 a) { return ~a; }>;
    } else if (op == "shl" || op == "shr") {
      take_all(s, {own, own, 4});
      if (!is_short) code.run = op == "shl" ? wide ? shift_left<u64>() : shift_left<u32>() : wide ? sign ? shift_right<s64>() : shift_right<u64>() : sign ? shift_right<s32>() : shift_right<u32>();
    } else if (s.full == "shf.r.wrap.b32") {
      take_all(s, {4, 4, 4, 4}), code.run = map3<u32, u32, u32, u32, [](u32 a, u32 b, u32 c) -> u32 { return (((u64)b << 32 | a) >> (c & 31)); }>;
    } else if (s.full == "prmt.b32") {
      take_all(s, {4, 4, 4, 4}), code.run = map3<u32, u32, u32, u32, permute>;
    } else if (op == "bfi") {
      take_all(s, {own, own, own, 4, 4}), code.run = wide ? map_insert<u64> : map_insert<u32>;
    } else if (op == "mul" && s.has("wide")) {
      const u32 half_bytes = bytes_of(type);
      take_all(s, half_bytes == 4 ? std::initializer_list<u32>{8, 4, 4} : std::initializer_list<u32>{4, 4, 4});
      if (half_bytes == 4) code.run = sign ? map2<s64, s32, s32, [](s32 a, s32 b) { return (s64)a * b; }> : map2<u64, u32, u32, [](u32 a, u32 b) { return (u64)a * b; }>;
      else code.run = sign ? map2<u32, u32, u32, [](u32 a, u32 b) -> u32 { return (s16)a * (s16)b; }> : map2<u32, u32, u32, [](u32 a, u32 b) { return (u32)(u16)a * (u16)b; }>;
    } else if (op == "mul" && s.has("hi")) {
      take_all(s, {own, own, own});
      if (!wide) code.run = sign ? map2<u32, s32, s32, [](s32 a, s32 b) -> u32 { return ((s64)a * b >> 32); }>
                          : map2<u32, u32, u32, [](u32 a, u32 b) -> u32 { return ((u64)a * b >> 32); }>;
      else code.run = sign ? map2<u64, s64, s64, [](s64 a, s64 b) -> u64 { return ((__int128)a * b >> 64); }>
                    : map2<u64, u64, u64, [](u64 a, u64 b) -> u64 { return ((unsigned __int128)a * b >> 64); }>;
    } else if (op == "mad" && s.has("lo") && !is_short) {
      take_all(s, {own, own, own, own});
      code.run = wide ? map3<u64, u64, u64, u64, [](u64 a, u64 b, u64 c) { return a * b + c; }> : map3<u32, u32, u32, u32, [](u32 a, u32 b, u32 c) { return a * b + c; }>;
    } else if ((op == "div" || op == "rem") && type[0] != 'f') {
      take_all(s, {own, own, own});
      code.run = type == "s32" ? division<s32>(op) : type == "u32" ? division<u32>(op) : type == "s64" ? division<s64>(op) : type == "u64" ? division<u64>(op) : nullptr;
    } else {
      return false;
    }
    return true;
  }

  template <class To> Run from_integer(const string& type) {
    return type == "s32" ? map1<To, s32, [](s32 a) { return (To)a; }> : type == "u32" ? map1<To, u32, [](u32 a) { return (To)a; }>
         : type == "s64" ? map1<To, s64, [](s64 a) { return (To)a; }> : type == "u64" ? map1<To, u64, [](u64 a) { return (To)a; }>
         : type == "u16" ? map1<To, u32, [](u32 a) { return (To)(u16)a; }> : nullptr;
  }
  template <class From, class Storage> Run between_integers(u32 to_bytes) {
    return to_bytes == 8 ? map1<u64, Storage, [](Storage a) -> u64 { return (s64)(From)a; }> : to_bytes == 4 ? map1<u32, Storage, [](Storage a) -> u32 { return (From)a; }>
         : to_bytes == 2 ? map1<u32, Storage, [](Storage a) -> u32 { return (u16)(From)a; }> : map1<u32, Storage, [](Storage a) -> u32 { return (u8)(From)a; }>;
  }
  bool conversion(Statement& s) {
    if (s.op != "cvt") return false;
    const string &from = s.type, &to = s.parts[s.parts.size() - 2];
    const bool ftz = s.has("ftz");
    static const std::set<string> known{"rn", "rni", "rzi", "rna", "ftz", "sat"};
    for (size_t k = 1; k + 2 < s.parts.size(); ++k) if (!known.count(s.parts[k])) return false;
    if (to == "f16x2" || to == "bf16x2") {   // the first operand becomes the upper half
      take_all(s, {4, 4, 4});
      if (from == "f32") code.run = to == "f16x2" ? map2<u32, float, float, [](float a, float b) { return pair((half)b, (half)a); }>
                                  : map2<u32, float, float, [](float a, float b) -> u32 { return to_bfloat(b) | (u32)to_bfloat(a) << 16; }>;
      return true;
    }
    take_all(s, {lane_bytes_of(to), lane_bytes_of(from)});
    if (to == "tf32" && s.has("rna")) code.run = map1<u32, float, to_tfloat>;
    else if (from == "f16" && to == "f32") code.run = map1<float, u32, [](u32 a) { return (float)low_half(a); }>;
    else if (to == "f16" && from == "f32") code.run = map1<u32, float, [](float a) -> u32 { return bits<u16>((half)a); }>;
    else if (to == "bf16" && from == "f32") code.run = map1<u32, float, [](float a) -> u32 { return to_bfloat(a); }>;
    else if (to == "f32" && from == "f32") {
      if (s.has("sat")) code.run = map1<float, float, [](float a) { return std::min(maximum(flush(a), 0.0f), 1.0f); }>;
      else if (s.has("rni")) code.run = map1<float, float, [](float a) { return std::nearbyint(a); }>;
    } else if (to == "f64" && from == "f32") code.run = ftz ? map1<double, float, [](float a) -> double { return flush(a); }> : map1<double, float, [](float a) -> double { return a; }>;
    else if (to == "f32" && from == "f64") code.run = ftz ? map1<float, double, [](double a) { return flush((float)a); }> : map1<float, double, [](double a) { return (float)a; }>;
    else if (to == "s32" && from == "f32" && s.has("rni")) code.run = map1<s32, float, [](float a) { return to_s32(std::nearbyint(a)); }>;
    else if (to == "s32" && from == "f32" && s.has("rzi")) code.run = map1<s32, float, [](float a) { return to_s32(a); }>;
    else if (to == "s32" && from == "f64" && s.has("rni")) code.run = map1<s32, double, [](double a) { return to_s32(std::nearbyint(a)); }>;
    else if (to == "f32" && from[0] != 'f') code.run = from_integer<float>(from);
    else if (to == "f64" && from[0] != 'f') code.run = from_integer<double>(from);
    else if (to[0] != 'f' && to[0] != 'b' && from[0] != 'f' && from[0] != 'b' && !s.has("sat")) {
      const u32 n = bytes_of(to);
      if (n == 1 && to[0] == 's') code.run = nullptr;
      else code.run = from == "u64" ? between_integers<u64, u64>(n) : from == "s64" ? between_integers<s64, u64>(n) : from == "u32" ? between_integers<u32, u32>(n)
                    : from == "s32" ? between_integers<s32, u32>(n)
                    : from == "u16" ? between_integers<u16, u32>(n) : from == "s16" ? between_integers<s16, u32>(n) : from == "u8" ? between_integers<u8, u32>(n) : between_integers<s8, u32>(n);
    }
    return true;
  }

  template <class T, class Storage, auto F> Run comparing(const string& how) {   // F: of what is stored, the number
    using S = Storage;
    return how == "eq" ? map2<u32, S, S, [](S a, S b) -> u32 { return F(a) == F(b); }> : how == "ne" ? map2<u32, S, S, [](S a, S b) -> u32 { return F(a) < F(b) || F(b) < F(a); }>
         : how == "lt" ? map2<u32, S, S, [](S a, S b) -> u32 { return F(a) < F(b); }> : how == "le" ? map2<u32, S, S, [](S a, S b) -> u32 { return F(a) <= F(b); }>
         : how == "gt" ? map2<u32, S, S, [](S a, S b) -> u32 { return F(b) < F(a); }> : how == "ge" ? map2<u32, S, S, [](S a, S b) -> u32 { return F(b) <= F(a); }>
         // true where a number is NaN
         : how == "neu" ? map2<u32, S, S, [](S a, S b) -> u32 { return !(F(a) == F(b)); }> : how == "ltu" ? map2<u32, S, S, [](S a, S b) -> u32 { return !(F(b) <= F(a)); }>
         : how == "leu" ? map2<u32, S, S, [](S a, S b) -> u32 { return !(F(b) < F(a)); }> : how == "gtu" ? map2<u32, S, S, [](S a, S b) -> u32 { return !(F(a) <= F(b)); }>
         : how == "geu" ? map2<u32, S, S, [](S a, S b) -> u32 { return !(F(a) < F(b)); }> : nullptr;
  }
  bool comparison(Statement& s) {
    const string &type = s.type, &how = s.parts[1];
    if (s.full == "set.lt.u32.f16x2") {
      take_all(s, {4, 4, 4});
      code.run = map2<u32, u32, u32, [](u32 a, u32 b) { return (low_half(a) < low_half(b) ? 0xffffu : 0) | (high_half(a) < high_half(b) ? 0xffff0000u : 0); }>;
    } else if (s.full == "setp.lt.xor.f16x2") {
      for (const string& name : split(s.arguments[0], '|')) take(name, 4);
      for (int k = 1; k < 4; ++k) take(s.arguments[k], 4);
      code.written = 2, code.run = compare_halves;
    } else if (s.op == "setp") {
      const u32 own = lane_bytes_of(type);
      take_all(s, {4, own, own});
      if (type == "f32") code.run = s.has("ftz") ? comparing<float, float, [](float a) { return flush(a); }>(how) : comparing<float, float, [](float a) { return a; }>(how);
      else if (type == "f64") code.run = comparing<double, double, [](double a) { return a; }>(how);
      else if (type == "s32") code.run = comparing<s32, u32, [](u32 a) { return (s32)a; }>(how);
      else if (type == "u32" || type == "b32") code.run = comparing<u32, u32, [](u32 a) { return a; }>(how);
      else if (type == "s64") code.run = comparing<s64, u64, [](u64 a) { return (s64)a; }>(how);
      else if (type == "u64" || type == "b64") code.run = comparing<u64, u64, [](u64 a) { return a; }>(how);
      else if (type == "s16") code.run = comparing<s16, u32, [](u32 a) { return (s16)a; }>(how);
      else if (type == "u16" || type == "b16") code.run = comparing<u16, u32, [](u32 a) { return (u16)a; }>(how);
    } else {
      return false;
    }
    return true;
  }

  template <class T, auto F> Run binary(const string& op) {   // F: of operands and results
    return op == "add" ? map2<T, T, T, [](T a, T b) -> T { return F(F(a) + F(b)); }> : op == "sub" ? map2<T, T, T, [](T a, T b) -> T { return F(F(a) - F(b)); }>
         : op == "mul" ? map2<T, T, T, [](T a, T b) -> T { return F(F(a) * F(b)); }> : op == "min" ? map2<T, T, T, [](T a, T b) -> T { return minimum<T>(F(a), F(b)); }>
         : op == "max" ? map2<T, T, T, [](T a, T b) -> T { return maximum<T>(F(a), F(b)); }> : nullptr;
  }
  template <auto F> static u32 by_halves(u32 a, u32 b) { return pair((half)F((float)low_half(a), (float)low_half(b)), (half)F((float)high_half(a), (float)high_half(b))); }
  bool arithmetic(Statement& s) {
    const string &op = s.op, &type = s.type;
    static const std::set<string> known{"rn", "rm", "ftz", "approx", "lo"};
    for (size_t k = 1; k + 1 < s.parts.size(); ++k) if (!known.count(s.parts[k])) return false;
    const u32 own = lane_bytes_of(type);
    const bool ftz = s.has("ftz");
    if (op == "add" || op == "sub" || op == "mul" || op == "min" || op == "max") {
      take_all(s, {own, own, own});
      if (s.has("rm") || (bytes_of(type) == 2 && (op == "min" || op == "max")) || type == "f16" || type == "bf16" || type == "bf16x2") return true;
      if (type == "f32") code.run = ftz ? binary<float, flush>(op) : binary<float, [](float a) { return a; }>(op);
      else if (type == "f64") code.run = binary<double, [](double a) { return a; }>(op);
      else if (type == "f16x2") code.run = op == "mul" ? map2<u32, u32, u32, by_halves<[](float a, float b) { return a * b; }>>
                                         : op == "max" ? map2<u32, u32, u32, by_halves<maximum<float>>> : nullptr;
      else if (bytes_of(type) == 2) code.run = binary<u32, [](u32 a) -> u32 { return (u16)a; }>(op);
      else if (type == "s32") code.run = binary<s32, [](s64 a) -> s64 { return (s32)a; }>(op);
      else if (type == "s64") code.run = op == "min" ? map2<s64, s64, s64, minimum<s64>> : op == "max" ? map2<s64, s64, s64, maximum<s64>> : binary<u64, [](u64 a) { return a; }>(op);
      else code.run = own == 8 ? binary<u64, [](u64 a) { return a; }>(op) : binary<u32, [](u32 a) { return a; }>(op);
    } else if (op == "fma") {
      take_all(s, {own, own, own, own});
      if (type == "f64" && s.has("rn")) code.run = map3<double, double, double, double, [](double a, double b, double c) { return std::fma(a, b, c); }>;
      if (type == "f32" && s.has("rn")) code.run = ftz ? map3<float, float, float, float, [](float a, float b, float c) { return flush(std::fma(flush(a), flush(b), flush(c))); }>
                                                         : map3<float, float, float, float, [](float a, float b, float c) { return std::fma(a, b, c); }>;
      if (type == "f32" && s.has("rm") && ftz) code.run = map3<float, float, float, float, [](float a, float b, float c) { return flush(round_down((double)flush(a) * flush(b) + flush(c))); }>;
    } else if (op == "neg" || op == "abs") {
      take_all(s, {own, own});
      const bool neg = op == "neg";
      if (type == "f32") code.run = neg ? map1<float, float, [](float a) { return -flush(a); }> : map1<float, float, [](float a) { return std::fabs(flush(a)); }>;
      else if (type == "f64") code.run = neg ? map1<double, double, [](double a) { return -a; }> : map1<double, double, [](double a) { return std::fabs(a); }>;
      else if (type == "f16x2") code.run = neg ? map1<u32, u32, [](u32 a) { return a ^ 0x80008000u; }> : map1<u32, u32, [](u32 a) { return a & 0x7fff7fffu; }>;
      else if (type == "s32") code.run = neg ? map1<u32, u32, [](u32 a) { return 0 - a; }> : map1<u32, u32, [](u32 a) { return (s32)a < 0 ? 0 - a : a; }>;
      else if (type == "s64") code.run = neg ? map1<u64, u64, [](u64 a) { return 0 - a; }> : map1<u64, u64, [](u64 a) { return (s64)a < 0 ? 0 - a : a; }>;
    } else if (op == "copysign") {   // the sign of the first operand
      take_all(s, {own, own, own});
      code.run = own == 8 ? map2<double, double, double, [](double a, double b) { return std::copysign(b, a); }> : map2<float, float, float, [](float a, float b) { return std::copysign(b, a); }>;
    } else if (op == "ex2" && type == "f32") {
      take_all(s, {4, 4}), code.run = map1<float, float, [](float a) { return flush(std::exp2(flush(a))); }>;
    } else if (op == "lg2" && type == "f32") {
      take_all(s, {4, 4}), code.run = map1<float, float, [](float a) { return std::log2(flush(a)); }>;
    } else if (op == "tanh" && type == "f32") {
      take_all(s, {4, 4}), code.run = map1<float, float, [](float a) { return std::tanh(a); }>;
    } else if (op == "rcp") {   // of doubles, approx gives the upper 32 bits
      take_all(s, {own, own});
      code.run = own == 4 ? map1<float, float, [](float a) { return flush(1 / flush(a)); }>
               : s.has("approx") ? map1<double, double, [](double a) { return bits<double>(bits<u64>(1 / a) & ~0xffffffffull); }> : map1<double, double, [](double a) { return 1 / a; }>;
    } else if (op == "div" && s.has("rn")) {
      take_all(s, {own, own, own});
      code.run = own == 8 ? map2<double, double, double, [](double a, double b) { return a / b; }> : map2<float, float, float, [](float a, float b) { return flush(flush(a) / flush(b)); }>;
    } else {
      return false;
    }
    return true;
  }
};
