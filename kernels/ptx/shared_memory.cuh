// Shared memory by 32-bit address: ldmatrix, plain loads and stores, and cp.async copies from device memory (sm_80 and newer).
#pragma once
#include "../types.cuh"

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// Four 8 x 8 matrices of 16-bit elements; lanes 8i .. 8i + 7 give the row addresses of matrix i. Plain: lane l receives row l / 4, word l % 4.
__device__ __forceinline__ void ldmatrix(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// The other way round: from the registers to four 8 x 8 matrices (sm_90).
__device__ __forceinline__ void stmatrix(u32 address, const u32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" :: "r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

__device__ __forceinline__ u32 load_shared(u32 address) { u32 x; asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory"); return x; }
__device__ __forceinline__ void load_shared(u32& x, u32& y, u32 address) {
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(x), "=r"(y) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_shared(float& x, float& y, u32 address) {
  u32 first, second;
  load_shared(first, second, address);
  x = __uint_as_float(first), y = __uint_as_float(second);
}
__device__ __forceinline__ void load_shared(double& x, u32 address) { asm volatile("ld.shared.f64 %0, [%1];" : "=d"(x) : "r"(address) : "memory"); }
__device__ __forceinline__ void load_shared(double& x, double& y, u32 address) {
  asm volatile("ld.shared.v2.f64 {%0,%1}, [%2];" : "=d"(x), "=d"(y) : "r"(address) : "memory");
}
__device__ __forceinline__ uint4 load_shared_16_bytes(u32 address) {
  uint4 x; asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory"); return x;
}
__device__ __forceinline__ void store_shared(u32 address, u32 x) { asm volatile("st.shared.b32 [%0], %1;" :: "r"(address), "r"(x) : "memory"); }
__device__ __forceinline__ void store_shared(u32 address, u32 x, u32 y) { asm volatile("st.shared.v2.b32 [%0], {%1,%2};" :: "r"(address), "r"(x), "r"(y) : "memory"); }
__device__ __forceinline__ void store_shared(u32 address, double x, double y) { asm volatile("st.shared.v2.f64 [%0], {%1,%2};" :: "r"(address), "d"(x), "d"(y) : "memory"); }
__device__ __forceinline__ void store_shared_16_bytes(u32 address, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" :: "r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// 16 bytes from device to shared memory, asynchronously; only the first `bytes` are read, the rest become zero.
__device__ __forceinline__ void cp_async(u32 address, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" :: "r"(address), "l"(source), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory"); }
