// Programmatic dependent launch: a kernel that the host lets begin before the one before it in its stream has ended (driver.py). Of other kernels these do nothing.
#pragma once

// Until the kernels before have ended, and all that they did is seen. Some block has to, or the kernel after this one may begin before those have ended.
__device__ __forceinline__ void wait_for_kernels_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once a thread of each block has come here, or the block has ended, blocks of the next kernel may begin where there is room.
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
