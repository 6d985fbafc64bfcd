// Arithmetic by lanes. Functions of approximations (ex2.approx, tanh.approx, rcp.approx) are exact to rounding here.
#pragma once
#include "machine.h"

inline float flush(float x) { const u32 u = bits<u32>(x); return u & 0x7f800000u ? x : bits<float>(u & 0x80000000u); }
template <class T> inline T maximum(T a, T b) { return a != a ? b : b != b ? a : a > b ? a : b; }
template <class T> inline T minimum(T a, T b) { return a != a ? b : b != b ? a : a < b ? a : b; }
inline half low_half(u32 x) { return bits<half>((u16)x); }
inline half high_half(u32 x) { return bits<half>((u16)(x >> 16)); }
inline u32 pair(half low, half high) { return bits<u16>(low) | (u32)bits<u16>(high) << 16; }
inline float from_bfloat(u16 x) { return bits<float>((u32)x << 16); }
inline u16 to_bfloat(float x) { const u32 u = bits<u32>(x); return x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16; }
inline u32 to_tfloat(float x) { const u32 u = bits<u32>(x); return x != x || std::isinf(x) ? u : (u + 0x1000) & ~0x1fffu; }
inline s32 to_s32(double x) { return x != x ? 0 : x >= 2147483648.0 ? INT32_MAX : x < -2147483648.0 ? INT32_MIN : (s32)x; }
inline u32 permute(u32 a, u32 b, u32 selection) {   // prmt
  const u64 source = (u64)b << 32 | a;
  u32 result = 0;
  for (int k = 0; k < 4; ++k) {
    const u32 pick = selection >> 4 * k, byte = source >> 8 * (pick & 7) & 255;
    result |= (pick & 8 ? byte & 128 ? 255 : 0 : byte) << 8 * k;
  }
  return result;
}
template <class T> inline T insert(T a, T b, u32 at, u32 count) {   // bfi
  constexpr u32 WIDTH = 8 * sizeof(T);
  at &= 255, count &= 255;
  if (at >= WIDTH) return b;
  const T mask = (count >= WIDTH ? ~(T)0 : ((T)1 << count) - 1) << at;
  return (b & ~mask) | ((T)(a << at) & mask);
}
template <class T> inline T divide(T a, T b) { return b == 0 ? (T)-1 : (T)-1 < 0 && b == (T)-1 ? (T)(0 - (u64)a) : (T)(a / b); }
template <class T> inline T remainder(T a, T b) { return b == 0 ? a : (T)-1 < 0 && b == (T)-1 ? 0 : (T)(a % b); }
inline float round_down(double x) { const float y = (float)x; return y > x ? std::nextafter(y, -INFINITY) : y; }

template <class D, class A, auto F> void map1(Warp& warp, const Instruction& code, u32 lanes) {
  D* d = warp.operand<D>(code, 0); const A* a = warp.operand<A>(code, 1);
  for_lanes(lanes, [=](int lane) { d[lane] = F(a[lane]); });
}
template <class D, class A, class B, auto F> void map2(Warp& warp, const Instruction& code, u32 lanes) {
  D* d = warp.operand<D>(code, 0); const A* a = warp.operand<A>(code, 1); const B* b = warp.operand<B>(code, 2);
  for_lanes(lanes, [=](int lane) { d[lane] = F(a[lane], b[lane]); });
}
template <class D, class A, class B, class C, auto F> void map3(Warp& warp, const Instruction& code, u32 lanes) {
  D* d = warp.operand<D>(code, 0); const A* a = warp.operand<A>(code, 1); const B* b = warp.operand<B>(code, 2); const C* c = warp.operand<C>(code, 3);
  for_lanes(lanes, [=](int lane) { d[lane] = F(a[lane], b[lane], c[lane]); });
}
template <class T> void map_insert(Warp& warp, const Instruction& code, u32 lanes) {
  for_lanes(lanes, [&](int lane) {
    warp.operand<T>(code, 0)[lane] = insert(warp.operand<T>(code, 1)[lane], warp.operand<T>(code, 2)[lane], warp.operand<u32>(code, 3)[lane], warp.operand<u32>(code, 4)[lane]);
  });
}
inline void take_apart_32(Warp& warp, const Instruction& code, u32 lanes) {
  for_lanes(lanes, [&](int lane) { const u32 x = warp.operand<u32>(code, 2)[lane]; warp.operand<u32>(code, 0)[lane] = x & 0xffff, warp.operand<u32>(code, 1)[lane] = x >> 16; });
}
inline void take_apart_64(Warp& warp, const Instruction& code, u32 lanes) {
  for_lanes(lanes, [&](int lane) { const u64 x = warp.operand<u64>(code, 2)[lane]; warp.operand<u32>(code, 0)[lane] = x, warp.operand<u32>(code, 1)[lane] = x >> 32; });
}
inline void compare_halves(Warp& warp, const Instruction& code, u32 lanes) {   // setp.lt.xor.f16x2 p|q, a, b, c
  for_lanes(lanes, [&](int lane) {
    const u32 a = warp.operand<u32>(code, 2)[lane], b = warp.operand<u32>(code, 3)[lane], c = warp.operand<u32>(code, 4)[lane];
    warp.operand<u32>(code, 0)[lane] = (low_half(a) < low_half(b)) ^ c, warp.operand<u32>(code, 1)[lane] = (high_half(a) < high_half(b)) ^ c;
  });
}

// ---------------------------------------------------------------- between lanes
inline void shuffle(Warp& warp, const Instruction& code, u32 lanes) {   // d, p or NONE, a, b, c, members; mode: bfly, idx, up, down
  u32 values[32];
  memcpy(values, warp.operand<u32>(code, 2), sizeof values);
  for_lanes(lanes, [&](int lane) {
    const int b = warp.operand<u32>(code, 3)[lane] & 31, c = warp.operand<u32>(code, 4)[lane], segment = c >> 8 & 31, bound = (lane & segment) | (c & 31 & ~segment);
    const int from = code.mode == 0 ? lane ^ b : code.mode == 1 ? (lane & segment) | (b & ~segment) : code.mode == 2 ? lane - b : lane + b;
    const bool inside = code.mode == 2 ? from >= bound : from <= bound;
    warp.operand<u32>(code, 0)[lane] = values[inside ? from : lane];
    if (code.operand[1] != NONE) warp.operand<u32>(code, 1)[lane] = inside;
  });
}
inline void vote(Warp& warp, const Instruction& code, u32 lanes) {   // d, p, members; mode: all, any, ballot; count: p is negated
  u32 ballot = 0;
  lanes &= warp.operand<u32>(code, 2)[__builtin_ctz(lanes)];
  for_lanes(lanes, [&](int lane) { ballot |= (u32)((warp.operand<u32>(code, 1)[lane] != 0) != (bool)code.count) << lane; });
  for_lanes(lanes, [&](int lane) { warp.operand<u32>(code, 0)[lane] = code.mode == 0 ? ballot == lanes : code.mode == 1 ? ballot != 0 : ballot; });
}
template <auto F> void reduce_lanes(Warp& warp, const Instruction& code, u32 lanes) {   // redux
  const u32* a = warp.operand<u32>(code, 1);
  u32 result = a[__builtin_ctz(lanes)];
  for_lanes(lanes, [&](int lane) { if (lane > __builtin_ctz(lanes)) result = F(result, a[lane]); });
  for_lanes(lanes, [&](int lane) { warp.operand<u32>(code, 0)[lane] = result; });
}
