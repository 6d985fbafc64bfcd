// Kernels of one block that are right as <true> and have one fault as <false>, for the tests of the emulated GPU. `numbers`: 4,096 floats of device memory.
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

__device__ __forceinline__ u32 shared_start() {
  extern __shared__ __align__(1024) u8 shared[];
  return shared_address(shared);
}
constexpr u32 BARRIER = 32768, BYTES = 8192;   // of shared memory: an mbarrier behind four tiles

// Each thread reads what one of another warp wrote.
template <bool SYNCHRONISED> __global__ void read_before_write(float* numbers) {
  const u32 base = shared_start(), thread = threadIdx.x;
  store_shared(base + thread * 4, thread);
  if (SYNCHRONISED) __syncthreads();
  numbers[thread] = load_shared(base + (thread + 32) % blockDim.x * 4);
}

// Each thread writes what one of another warp reads.
template <bool SYNCHRONISED> __global__ void write_before_read(float* numbers) {
  const u32 base = shared_start(), thread = threadIdx.x;
  store_shared(base + thread * 4, thread);
  __syncthreads();
  const u32 word = load_shared(base + (thread + 32) % blockDim.x * 4);
  if (SYNCHRONISED) __syncthreads();
  store_shared(base + thread * 4, word + 1);
  __syncthreads();
  numbers[thread] = load_shared(base + thread * 4);
}

// A copy by cp.async that its thread does not wait for.
template <bool WAITS> __global__ void asynchronous_copy(float* numbers) {
  const u32 base = shared_start(), at = base + threadIdx.x * 16;
  cp_async(at, numbers + threadIdx.x * 4, 16);
  cp_async_commit();
  if (WAITS) cp_async_wait<0>();
  numbers[2048 + threadIdx.x] = load_shared(at);
}

// A bulk copy whose mbarrier its reader does not wait for.
template <bool WAITS> __global__ void bulk_copy(float* numbers) {
  const u32 base = shared_start();
  if (threadIdx.x == 0) barrier_init(base + BARRIER, 1), barrier_init_fence();
  __syncthreads();
  if (threadIdx.x == 0) barrier_arrive_expect(base + BARRIER, BYTES), load_bytes(base, numbers, BYTES, base + BARRIER);
  if (WAITS) barrier_wait(base + BARRIER, 0);
  numbers[2048 + threadIdx.x] = load_shared(base + threadIdx.x * 4);
}

// A bulk copy to where another warp still reads.
template <bool WAITS> __global__ void bulk_copy_too_early(float* numbers) {
  const u32 base = shared_start();
  if (threadIdx.x == 0) barrier_init(base + BARRIER, 1), barrier_init(base + BARRIER + 8, 1), barrier_init_fence();
  store_shared(base + threadIdx.x * 4, threadIdx.x);
  fence_for_async_proxy();
  __syncthreads();
  if (threadIdx.x / 32 == 1) {
    numbers[2048 + threadIdx.x] = load_shared(base + threadIdx.x % 32 * 4);
    __syncwarp();
    if (threadIdx.x == 32) barrier_arrive(base + BARRIER + 8);
  }
  if (threadIdx.x == 0) {
    if (WAITS) barrier_wait(base + BARRIER + 8, 0);
    barrier_arrive_expect(base + BARRIER, BYTES), load_bytes(base, numbers, BYTES, base + BARRIER);
    barrier_wait(base + BARRIER, 0);
  }
  __syncthreads();
}

// A bulk copy of more bytes than its mbarrier was told to expect.
template <bool RIGHT> __global__ void too_few_bytes(float* numbers) {
  const u32 base = shared_start();
  if (threadIdx.x == 0) barrier_init(base + BARRIER, 1), barrier_init_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_arrive_expect(base + BARRIER, RIGHT ? BYTES : BYTES / 2);
    for (int at = 0; at < BYTES; at += BYTES / 2) load_bytes(base + at, numbers, BYTES / 2, base + BARRIER);
  }
  barrier_wait(base + BARRIER, 0);
  numbers[2048 + threadIdx.x] = load_shared(base + threadIdx.x * 4);
}

// An mbarrier that not all know to be there.
template <bool SYNCHRONISED> __global__ void mbarrier_too_early(float* numbers) {
  const u32 base = shared_start();
  if (threadIdx.x == 0) barrier_init(base + BARRIER, 128), barrier_init_fence();
  if (SYNCHRONISED) __syncthreads();
  barrier_arrive(base + BARRIER);
  barrier_wait(base + BARRIER, 0);
  numbers[threadIdx.x] = 0;
}

// A tile that covers an mbarrier.
template <bool RIGHT> __global__ void mbarrier_under_a_tile(float* numbers) {
  const u32 base = shared_start();
  if (threadIdx.x == 0) barrier_init(base + 512, 128), barrier_init_fence();
  __syncthreads();
  store_shared(base + (RIGHT ? 1024 : 256) + threadIdx.x * 4, 0);
  barrier_arrive(base + 512);
  barrier_wait(base + 512, 0);
}

// Bulk reductions from where the warp itself writes again before it has been read.
template <bool WAITS> __global__ void bulk_reduction(float* numbers) {
  const u32 slab = shared_start() + threadIdx.x / 32 * 128, lane = threadIdx.x % 32;
  for (int turn = 0; turn < 3; ++turn) {
    if (WAITS && lane == 0) wait_until_read();
    __syncwarp();
    store_shared(slab + lane * 4, turn);
    fence_for_async_proxy();
    __syncwarp();
    if (lane == 0) reduce_add_bytes(numbers, slab, 128);
  }
  if (lane == 0) wait_until_read();
}

// A thread that ends before its bulk reduction has been read.
template <bool WAITS> __global__ void ends_too_early(float* numbers) {
  const u32 base = shared_start();
  store_shared(base + threadIdx.x * 4, 0x3f800000);
  fence_for_async_proxy();
  __syncthreads();
  if (threadIdx.x == 0) reduce_add_bytes(numbers, base, 512);
  if (WAITS && threadIdx.x == 0) wait_until_read();
}

// Atomics of other warps, that nothing orders before a read.
template <bool SYNCHRONISED> __global__ void atomics(float* numbers) {
  const u32 base = shared_start();
  store_shared(base + threadIdx.x * 4, 0);
  __syncthreads();
  asm volatile("red.shared.max.u32 [%0], %1;" :: "r"(base + (threadIdx.x + 32) % 128 * 4), "r"(threadIdx.x) : "memory");
  if (SYNCHRONISED) __syncthreads();
  numbers[threadIdx.x] = load_shared(base + threadIdx.x * 4);
}

// D += A Bᵀ of two 64 x 64 tiles of ones, by a warpgroup. The faults: no fence between stores and the product, or that of one lane alone; none between what
// writes D and the product; no wait for it.
enum Fault { NO_FAULT, NO_FENCE, FENCE_OF_A_LANE, NO_FENCE_OF_REGISTERS, NO_WAIT };
template <Fault FAULT> __device__ __forceinline__ void product(float* numbers) {
  const u32 base = shared_start();
  for (int k = threadIdx.x; k < 4096; k += 128) store_shared(base + k * 4, 0x3c003c00);   // ones, half precision
  if (FAULT != NO_FENCE && (FAULT != FENCE_OF_A_LANE || threadIdx.x % 32 == 0)) fence_for_async_proxy();
  __syncthreads();
  float d[8][4];
#pragma unroll
  for (int n = 0; n < 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) d[n][i] = numbers[threadIdx.x];
  if (FAULT != NO_FENCE_OF_REGISTERS) wgmma_fence();
  issue_rows<true, FLOAT16, 64, 64, BYTES, BYTES>(d, base, base + BYTES);
  wgmma_commit();
  if (FAULT != NO_WAIT) wgmma_wait<0>();
  pin(d);
  numbers[threadIdx.x] = d[3][2];
  wgmma_wait<0>();
}
template <bool RIGHT> __global__ void product_of_stores(float* numbers) { product<RIGHT ? NO_FAULT : NO_FENCE>(numbers); }
template <bool RIGHT> __global__ void product_of_stores_of_other_lanes(float* numbers) { product<RIGHT ? NO_FAULT : FENCE_OF_A_LANE>(numbers); }
template <bool RIGHT> __global__ void product_of_registers(float* numbers) { product<RIGHT ? NO_FAULT : NO_FENCE_OF_REGISTERS>(numbers); }
template <bool RIGHT> __global__ void product_in_flight(float* numbers) { product<RIGHT ? NO_FAULT : NO_WAIT>(numbers); }

// A store behind the last number.
template <bool RIGHT> __global__ void outside(float* numbers) { numbers[4096 - 128 + threadIdx.x + !RIGHT] = 0; }

// A wait for more threads than come.
template <bool RIGHT> __global__ void waits_for_ever(float* numbers) {
  named_barrier_sync(1, RIGHT ? 128 : 256);
  numbers[threadIdx.x] = 0;
}
