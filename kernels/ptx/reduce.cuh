// Sums in device memory, result not returned; and words by which blocks take turns at them.
#pragma once
#include "../types.cuh"

// Two neighbours; `address` is 8-byte aligned. One instruction from sm_90 on.
__device__ __forceinline__ void reduce_add(float* address, float x, float y) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v2.f32 [%0], {%1,%2};" :: "l"(address), "f"(x), "f"(y) : "memory");
#else
  atomicAdd(address, x);
  atomicAdd(address + 1, y);
#endif
}

__device__ __forceinline__ void reduce_add(double* address, double x, double y) {
  atomicAdd(address, x);
  atomicAdd(address + 1, y);
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void reduce_add(float* address, float x) { asm volatile("red.global.add.f32 [%0], %1;" :: "l"(address), "f"(x) : "memory"); }

// Four neighbours; `address` is 16-byte aligned.
__device__ __forceinline__ void reduce_add(float* address, const float (&x)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" :: "l"(address), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}

// A word that counts who has come to a sum, in its lower half, and who has added to it, in its upper half.
constexpr u32 ONE_CAME = 1, ONE_ADDED = 0x10000;
__device__ __forceinline__ u32 came(u32 word) { return word % ONE_ADDED; }
__device__ __forceinline__ u32 added(u32 word) { return word / ONE_ADDED; }

// How many have come for a number at that word before.
template <int WORD> __device__ __forceinline__ u32 take_number(u32* words) {
  u32 x; asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1+%2], 1;" : "=r"(x) : "l"(words), "n"(4 * WORD) : "memory"); return x;
}

// What the thread did before is there for whoever finds the value, and what bulk copies it asked for then do comes after.
__device__ __forceinline__ void store_release(u32* address, u32 value) { asm volatile("st.release.gpu.global.u32 [%0], %1;" :: "l"(address), "r"(value) : "memory"); }
__device__ __forceinline__ void add_release(u32* address, u32 value) { asm volatile("red.release.gpu.global.add.u32 [%0], %1;" :: "l"(address), "r"(value) : "memory"); }
__device__ __forceinline__ u32 add_acquire(u32* address, u32 value) { u32 x; asm volatile("atom.acquire.gpu.global.add.u32 %0, [%1], %2;" : "=r"(x) : "l"(address), "r"(value) : "memory"); return x; }
__device__ __forceinline__ void store_relaxed(u32* address, u32 value) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(address), "r"(value) : "memory"); }
__device__ __forceinline__ u32 load_relaxed(const u32* address) { u32 x; asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(address) : "memory"); return x; }
__device__ __forceinline__ u32 load_acquire(const u32* address) { u32 x; asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(address) : "memory"); return x; }
__device__ __forceinline__ void wait_for_value(const u32* address, u32 value) {
  asm volatile(
      "{\n.reg .pred other;\n.reg .u32 found;\n"
      "AGAIN:\nld.acquire.gpu.global.u32 found, [%0];\nsetp.ne.u32 other, found, %1;\n@other bra AGAIN;\n"
      "fence.proxy.async.global;\n}"
      :: "l"(address), "r"(value) : "memory");
}
// The same for a number that only grows.
__device__ __forceinline__ void wait_for_at_least(const u32* address, u32 value) {
  asm volatile(
      "{\n.reg .pred less;\n.reg .u32 found;\n"
      "AGAIN:\nld.acquire.gpu.global.u32 found, [%0];\nsetp.lt.u32 less, found, %1;\n@less bra AGAIN;\n"
      "fence.proxy.async.global;\n}"
      :: "l"(address), "r"(value) : "memory");
}
#endif
