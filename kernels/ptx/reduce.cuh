// Sums in device memory, result not returned.
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
// Four neighbours; `address` is 16-byte aligned.
__device__ __forceinline__ void reduce_add(float* address, const float (&x)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" :: "l"(address), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}
#endif
