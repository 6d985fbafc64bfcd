// Names for the built-in types (NVRTC ships no <cstdint>), the precisions, and conversions between elements and what is computed with.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

// How a product is made. TFLOAT32 rounds float32 inputs to 11 significant bits; FLOAT32 keeps float32 accuracy by splitting each input in two such parts.
enum Precision { FLOAT16 = 0, BFLOAT16 = 1, TFLOAT32 = 2, FLOAT32 = 3, FLOAT64 = 4 };

struct half_t { u16 bits; };
struct bfloat_t { u16 bits; };

template <int PRECISION> struct ElementOf { using type = float; };
template <> struct ElementOf<FLOAT16> { using type = half_t; };
template <> struct ElementOf<BFLOAT16> { using type = bfloat_t; };
template <> struct ElementOf<FLOAT64> { using type = double; };

// What scores, sums and statistics are computed in.
template <int PRECISION> struct RealOf { using type = float; };
template <> struct RealOf<FLOAT64> { using type = double; };
template <int PRECISION> using Real = typename RealOf<PRECISION>::type;

// A number as a type, for functions that need it at compile time.
template <int N> struct Constant { static constexpr int value = N; };

__device__ __forceinline__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// What is derived from `x` is worked out from here on, not before: hoisted out of the main loop it would take registers that the accumulators need.
template <typename T> __device__ __forceinline__ void keep_here(T& x) { asm volatile("" : "+r"(x)); }

// The same in all lanes of a warp, and the compiler knows: what follows from it can live in uniform registers, and branches on it do not diverge.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffff, x, 0); }

// What was written to memory is read from there again.
__device__ __forceinline__ void keep_memory_here() { asm volatile("" ::: "memory"); }

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half_t x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
__device__ __forceinline__ float to_float(bfloat_t x) { return __uint_as_float((u32)x.bits << 16); }

__device__ __forceinline__ void from_float(float& y, float x) { y = x; }
__device__ __forceinline__ void from_float(half_t& y, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ __forceinline__ void from_float(bfloat_t& y, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

// An element as what is computed with, and back.
template <typename Element> __device__ __forceinline__ float to_real(Element x) { return to_float(x); }
__device__ __forceinline__ double to_real(double x) { return x; }
template <typename Element> __device__ __forceinline__ void from_real(Element& y, float x) { from_float(y, x); }
__device__ __forceinline__ void from_real(double& y, double x) { y = x; }

// The larger; a NaN is neither.
__device__ __forceinline__ float maximum(float x, float y) { return fmaxf(x, y); }
__device__ __forceinline__ double maximum(double x, double y) { return y > x ? y : x; }   // a NaN may stay where it comes first: it shows in what is made of it

// Two neighbours in device memory, written at once.
__device__ __forceinline__ void store_pair(float* to, float x, float y) { *(float2*)to = make_float2(x, y); }
__device__ __forceinline__ void store_pair(double* to, double x, double y) { *(double2*)to = make_double2(x, y); }

// 16 bytes to device memory, by a predicate: a branch would take the time of each store in turn.
__device__ __forceinline__ void store_16_bytes_if(bool wanted, void* to, uint4 x) {
  asm volatile("{\n.reg .pred wanted;\nsetp.ne.s32 wanted, %0, 0;\n@wanted st.global.v4.b32 [%1], {%2,%3,%4,%5};\n}" :: "r"((int)wanted), "l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// Whether rows of device memory can be read and written 16 bytes at a time.
template <typename Element> __device__ __forceinline__ bool whole_chunks(const Element* row, i64 row_stride, int columns) {
  return (((unsigned long long)row | (unsigned long long)row_stride * sizeof(Element) | (unsigned long long)columns * sizeof(Element)) & 15) == 0;
}

// Two neighbours in one register, the first in the low half.
template <int PRECISION> __device__ __forceinline__ u32 pack(float first, float second) {
  u32 packed;
  if constexpr (PRECISION == FLOAT16) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}

// tanh(scale x), in place, by all lanes of a warp. For 16-bit inputs good to 2^-11: the unit for exponentials has an instruction for it. As softmax takes
// that unit's time too, the FMA units do three of four elements, where a warp has them all below 1 in size and all lanes say so: by a polynomial, to 8.2e-5.
// Else to the last bits.
template <int PRECISION, int COUNT> __device__ __forceinline__ void hyperbolic_tangents(Real<PRECISION> (&d)[COUNT][4], Real<PRECISION> scale, bool polynomial) {
  if constexpr (PRECISION == FLOAT16 || PRECISION == BFLOAT16) {
    const auto instruction = [](float x) { float y; asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; };
    u32 bits = 0;   // of 2 scale x: of numbers below 2, and of no others, the highest bit of the exponent is 0
#pragma unroll
    for (int n = 0; n < COUNT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i) d[n][i] *= 2.0f * scale, bits |= __float_as_uint(d[n][i]);
        else d[n][i] = instruction(d[n][i] * scale);
      }
    if (__any_sync(0xffffffff, !polynomial || bits & 0x40000000)) {
#pragma unroll
      for (int n = 0; n < COUNT; ++n)
#pragma unroll
        for (int i = 1; i < 4; ++i) d[n][i] = instruction(0.5f * d[n][i]);
    } else {
#pragma unroll
      for (int n = 0; n < COUNT; ++n)
#pragma unroll
        for (int i = 1; i < 4; ++i) {
          const float y = d[n][i], square = y * y;
          d[n][i] = y * fmaf(fmaf(fmaf(-0.000208044308f, square, 0.00371554843f), square, -0.0413317904f), square, 0.49995929f);
        }
    }
  } else {
#pragma unroll
    for (int n = 0; n < COUNT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) d[n][i] = tanh(d[n][i] * scale);
  }
}

__device__ __forceinline__ float exp2_approximate(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// Both to two roundings.
__device__ __forceinline__ float log2_approximate(float x) { float y; asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float reciprocal_approximate(float x) { float y; asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
