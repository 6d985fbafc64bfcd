// Float32 sums in device memory, result not returned.
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
