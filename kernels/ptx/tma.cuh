// Bulk copies by the tensor memory accelerator (sm_90). A tensor map, encoded by the host, describes a view (columns, rows, heads, two batch dimensions) and
// the box that one copy moves; what a box covers outside the view arrives as zeros.
#pragma once
#include "mbarrier.cuh"

struct alignas(64) TensorMap { u8 bytes[128]; };

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory"); }

// One thread issues it; `barrier` then counts the bytes as they arrive.
__device__ __forceinline__ void load_box(u32 target, const TensorMap& map, int column, int row, int head, int batch, int outer_batch, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2,%3,%4,%5,%6}], [%7];"
               :: "r"(target), "l"(&map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(outer_batch), "r"(barrier) : "memory");
}

// `bytes` in one piece, a multiple of 16 as both addresses are.
__device__ __forceinline__ void load_bytes(u32 target, const void* source, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" :: "r"(target), "l"(source), "r"(bytes), "r"(barrier) : "memory");
}

// Adds `bytes` of float32 in shared memory to as many in device memory, in one piece (sm_90). The thread that asked waits until all its pieces are read, or added.
__device__ __forceinline__ void reduce_add_bytes(float* target, u32 source, u32 bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\ncp.async.bulk.commit_group;" :: "l"(target), "r"(source), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait_until_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void wait_until_added() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// What threads wrote to shared memory becomes visible to bulk copies and wgmma.
__device__ __forceinline__ void fence_for_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
