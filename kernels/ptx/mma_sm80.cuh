// mma.sync: D (16 x 8, float32) += A (16 x 32 bytes) · B (32 bytes x 8), one warp (sm_80 and newer). Float64: D (16 x 8) += A (16 x 8) · B (8 x 8).
// Lane l holds, with g = l / 4 and t = l % 4 and 32-bit words (float64: numbers) along k:
//   A: (row g, word t), (g + 8, t), (g, t + 4), (g + 8, t + 4);   B: (word t, column g), (t + 4, g);   D: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
#pragma once
#include "../types.cuh"

#define CUFLASH_MMA(NAME, SHAPE_AND_TYPES)                                                                                              \
  __device__ __forceinline__ void NAME(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {                                           \
    asm("mma.sync.aligned." SHAPE_AND_TYPES " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                    \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));            \
  }
CUFLASH_MMA(mma_float16, "m16n8k16.row.col.f32.f16.f16.f32")
CUFLASH_MMA(mma_bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
CUFLASH_MMA(mma_tfloat32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef CUFLASH_MMA

__device__ __forceinline__ void mma_float64(double (&d)[4], const double (&a)[4], const double (&b)[2]) {
#if __CUDA_ARCH__ == 900
  asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3]) : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#else   // others have 8 x 8 x 4: each half of the rows and of k is one
#pragma unroll
  for (int k = 0; k < 2; ++k)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};" : "+d"(d[2 * half]), "+d"(d[2 * half + 1]) : "d"(a[2 * k + half]), "d"(b[k]));
#endif
}

__device__ __forceinline__ u32 round_to_tfloat32(u32 x) { u32 y; asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x))); return y; }
