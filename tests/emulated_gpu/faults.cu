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

// A bulk reduction from shared memory that is written again before it has been read.
template <bool WAITS> __global__ void bulk_reduction(float* numbers) {
  const u32 base = shared_start();
  store_shared(base + threadIdx.x * 4, 0x3f800000);
  fence_for_async_proxy();
  __syncthreads();
  if (threadIdx.x == 0) {
    reduce_add_bytes(numbers, base, 128 * 4);
    if (WAITS) wait_until_read();
  }
  __syncthreads();
  store_shared(base + threadIdx.x * 4, 0);
}

// D = A Bᵀ of two 64 x 64 tiles, by a warpgroup. The fault: no fence between stores and the product, or no wait for it.
template <bool FENCES, bool WAITS> __device__ __forceinline__ void product(float* numbers) {
  const u32 base = shared_start();
  for (int k = threadIdx.x; k < 4096; k += 128) store_shared(base + k * 4, 0x3c003c00);   // ones, half precision
  if (FENCES) fence_for_async_proxy();
  __syncthreads();
  float d[8][4];
  multiply_rows<FLOAT16, 64, 64, BYTES, BYTES>(d, base, base + BYTES);
  if (WAITS) wgmma_wait<0>();
  pin(d);
  numbers[threadIdx.x] = d[3][2];
  wgmma_wait<0>();
}
template <bool RIGHT> __global__ void product_of_stores(float* numbers) { product<RIGHT, true>(numbers); }
template <bool RIGHT> __global__ void product_in_flight(float* numbers) { product<true, RIGHT>(numbers); }

// A store behind the last number.
template <bool RIGHT> __global__ void outside(float* numbers) { numbers[4096 - 128 + threadIdx.x + !RIGHT] = 0; }

// A wait for more threads than come.
template <bool RIGHT> __global__ void waits_for_ever(float* numbers) {
  named_barrier_sync(1, RIGHT ? 128 : 256);
  numbers[threadIdx.x] = 0;
}
