// wgmma (sm_90a): D (64 x N, float32) (+)= A · B by the four warps of a warpgroup, asynchronously. Warp w holds rows 16 w .. 16 w + 15 of D (and of A, where A
// is in registers) in the layout of mma_sm80.cuh: d[n] are its 8 columns from 8 n on. Operands in shared memory are named by descriptors: tiles of 128-byte
// rows as TMA writes them with 128-byte swizzle (64 columns of 16 bits), further columns in further tiles.
#pragma once
#include "shared_memory.cuh"

// Rows (of A, or of Bᵀ) run along k: a k step of 16 is 32 bytes further, 64 columns the next tile.
__device__ __forceinline__ unsigned long long descriptor_along_k(u32 address) {
  return (unsigned long long)((address & 0x3ffff) >> 4) | (1024ull >> 4) << 32 | 1ull << 62;
}
// Rows of B are k: a k step of 16 is 16 rows, 2,048 bytes, further; the next 64 columns lie `tile_bytes` on.
__device__ __forceinline__ unsigned long long descriptor_across_k(u32 address, u32 tile_bytes) {
  return (unsigned long long)((address & 0x3ffff) >> 4) | (unsigned long long)(tile_bytes >> 4) << 16 | (1024ull >> 4) << 32 | 1ull << 62;
}
// Rows of Bᵀ run along k and are 8 columns, 16 bytes, long, one after the other, without swizzle: so 8 of them further lie the next 8 rows. As the next 8
// columns too are taken to lie there, A has to be 0 in these.
__device__ __forceinline__ unsigned long long descriptor_of_short_rows(u32 address) {
  return (unsigned long long)((address & 0x3ffff) >> 4) | (128ull >> 4) << 16 | (128ull >> 4) << 32;
}

// Before the first wgmma after registers of D or A were written.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the last PENDING groups are done.
template <int PENDING> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory"); }
// What is computed of these registers above and below this line stays there: the compiler does not see that waits are about registers.
template <int COUNT> __device__ __forceinline__ void pin(float (&d)[COUNT][4]) {
#pragma unroll
  for (int n = 0; n < COUNT; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i]) :: "memory");
}

// multiply_shared: A and B from shared memory, both along k (multiply_shared_across_k: both across). multiply_registers: A from registers, B across k (multiply_registers_along_k: along). ADD: to D as it is, else to zero. NEGATE: A.
template <int PRECISION, int N> struct Wgmma;

#define CUFLASH_D(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define CUFLASH_NAMES_16 "%0,%1,%2,%3,%4,%5,%6,%7"
#define CUFLASH_D_16 CUFLASH_D(0), CUFLASH_D(1)
#define CUFLASH_NAMES_32 CUFLASH_NAMES_16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define CUFLASH_D_32 CUFLASH_D_16, CUFLASH_D(2), CUFLASH_D(3)
#define CUFLASH_NAMES_48 CUFLASH_NAMES_32 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define CUFLASH_D_48 CUFLASH_D_32, CUFLASH_D(4), CUFLASH_D(5)
#define CUFLASH_NAMES_64 CUFLASH_NAMES_48 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define CUFLASH_D_64 CUFLASH_D_48, CUFLASH_D(6), CUFLASH_D(7)
#define CUFLASH_NAMES_80 CUFLASH_NAMES_64 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define CUFLASH_D_80 CUFLASH_D_64, CUFLASH_D(8), CUFLASH_D(9)
#define CUFLASH_NAMES_96 CUFLASH_NAMES_80 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define CUFLASH_D_96 CUFLASH_D_80, CUFLASH_D(10), CUFLASH_D(11)
#define CUFLASH_NAMES_112 CUFLASH_NAMES_96 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define CUFLASH_D_112 CUFLASH_D_96, CUFLASH_D(12), CUFLASH_D(13)
#define CUFLASH_NAMES_128 CUFLASH_NAMES_112 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define CUFLASH_D_128 CUFLASH_D_112, CUFLASH_D(14), CUFLASH_D(15)
#define CUFLASH_NAMES_144 CUFLASH_NAMES_128 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define CUFLASH_D_144 CUFLASH_D_128, CUFLASH_D(16), CUFLASH_D(17)
#define CUFLASH_NAMES_160 CUFLASH_NAMES_144 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define CUFLASH_D_160 CUFLASH_D_144, CUFLASH_D(18), CUFLASH_D(19)
#define CUFLASH_NAMES_176 CUFLASH_NAMES_160 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define CUFLASH_D_176 CUFLASH_D_160, CUFLASH_D(20), CUFLASH_D(21)
#define CUFLASH_NAMES_192 CUFLASH_NAMES_176 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define CUFLASH_D_192 CUFLASH_D_176, CUFLASH_D(22), CUFLASH_D(23)
#define CUFLASH_NAMES_208 CUFLASH_NAMES_192 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define CUFLASH_D_208 CUFLASH_D_192, CUFLASH_D(24), CUFLASH_D(25)
#define CUFLASH_NAMES_224 CUFLASH_NAMES_208 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define CUFLASH_D_224 CUFLASH_D_208, CUFLASH_D(26), CUFLASH_D(27)
#define CUFLASH_NAMES_240 CUFLASH_NAMES_224 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define CUFLASH_D_240 CUFLASH_D_224, CUFLASH_D(28), CUFLASH_D(29)
#define CUFLASH_NAMES_256 CUFLASH_NAMES_240 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define CUFLASH_D_256 CUFLASH_D_240, CUFLASH_D(30), CUFLASH_D(31)

// R0 .. R5: the numbers of the operands after those of D, which are N / 2.
#define CUFLASH_WGMMA(PRECISION, TYPE, N, R0, R1, R2, R3, R4, R5)                                                                                              \
  template <> struct Wgmma<PRECISION, N> {                                                                                                                     \
    template <bool ADD, bool NEGATE = false> static __device__ __forceinline__ void multiply_shared(float (&d)[N / 8][4], unsigned long long a, unsigned long long b) { \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #R2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" CUFLASH_NAMES_##N   \
                   "}, %" #R0 ", %" #R1 ", add, %" #R3 ", 1, 0, 0;\n}" : CUFLASH_D_##N : "l"(a), "l"(b), "n"((int)ADD), "n"(NEGATE ? -1 : 1));                 \
    }                                                                                                                                                          \
    template <bool ADD> static __device__ __forceinline__ void multiply_shared_across_k(float (&d)[N / 8][4], unsigned long long a, unsigned long long b) {    \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #R2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" CUFLASH_NAMES_##N   \
                   "}, %" #R0 ", %" #R1 ", add, 1, 1, 1, 1;\n}" : CUFLASH_D_##N : "l"(a), "l"(b), "n"((int)ADD));                                              \
    }                                                                                                                                                          \
    template <bool ADD> static __device__ __forceinline__ void multiply_registers(float (&d)[N / 8][4], const u32 (&a)[4], unsigned long long b) {             \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #R5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" CUFLASH_NAMES_##N   \
                   "}, {%" #R0 ",%" #R1 ",%" #R2 ",%" #R3 "}, %" #R4 ", add, 1, 1, 1;\n}"                                                                      \
                   : CUFLASH_D_##N : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"((int)ADD));                                                       \
    }                                                                                                                                                          \
    template <bool ADD> static __device__ __forceinline__ void multiply_registers_along_k(float (&d)[N / 8][4], const u32 (&a)[4], unsigned long long b) {     \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #R5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" CUFLASH_NAMES_##N   \
                   "}, {%" #R0 ",%" #R1 ",%" #R2 ",%" #R3 "}, %" #R4 ", add, 1, 1, 0;\n}"                                                                      \
                   : CUFLASH_D_##N : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"((int)ADD));                                                       \
    }                                                                                                                                                          \
  };
#define CUFLASH_WGMMA_WIDTH(...) CUFLASH_WGMMA(FLOAT16, "f16", __VA_ARGS__) CUFLASH_WGMMA(BFLOAT16, "bf16", __VA_ARGS__)
CUFLASH_WGMMA_WIDTH(32, 16, 17, 18, 19, 20, 21)
CUFLASH_WGMMA_WIDTH(64, 32, 33, 34, 35, 36, 37)
CUFLASH_WGMMA_WIDTH(80, 40, 41, 42, 43, 44, 45)
CUFLASH_WGMMA_WIDTH(96, 48, 49, 50, 51, 52, 53)
CUFLASH_WGMMA_WIDTH(128, 64, 65, 66, 67, 68, 69)
CUFLASH_WGMMA_WIDTH(192, 96, 97, 98, 99, 100, 101)
CUFLASH_WGMMA_WIDTH(256, 128, 129, 130, 131, 132, 133)

// D = A Bᵀ, or D += A Bᵀ, or of -A, over DEPTH columns, both from shared memory, rows along k; 64 columns further lie a box on. Between a fence and a commit.
template <bool ADD, int PRECISION, int N, int DEPTH, int A_BOX, int B_BOX, bool NEGATE = false> __device__ __forceinline__ void issue_rows(float (&d)[N / 8][4], u32 a_at, u32 b_at) {
  const unsigned long long a = descriptor_along_k(a_at), b = descriptor_along_k(b_at);
#pragma unroll
  for (int step = 0; step < DEPTH / 16; ++step) {
    const int a_step = step / 4 * A_BOX + step % 4 * 32, b_step = step / 4 * B_BOX + step % 4 * 32;
    if (!ADD && step == 0) Wgmma<PRECISION, N>::template multiply_shared<false, NEGATE>(d, a, b);
    else Wgmma<PRECISION, N>::template multiply_shared<true, NEGATE>(d, a + (a_step >> 4), b + (b_step >> 4));
  }
}
template <int PRECISION, int N, int DEPTH, int A_BOX, int B_BOX> __device__ __forceinline__ void multiply_rows(float (&d)[N / 8][4], u32 a_at, u32 b_at) {
  wgmma_fence();
  issue_rows<false, PRECISION, N, DEPTH, A_BOX, B_BOX>(d, a_at, b_at);
  wgmma_commit();
}
// D -= A Bᵀ.
template <int PRECISION, int N, int DEPTH, int A_BOX, int B_BOX> __device__ __forceinline__ void subtract_rows(float (&d)[N / 8][4], u32 a_at, u32 b_at) {
  wgmma_fence();
  issue_rows<true, PRECISION, N, DEPTH, A_BOX, B_BOX, true>(d, a_at, b_at);
  wgmma_commit();
}
// D = Aᵀ B, or D += Aᵀ B, over DEPTH rows, both from shared memory, their rows k. Between a fence and a commit.
template <bool ADD, int PRECISION, int N, int DEPTH, int A_BOX, int B_BOX> __device__ __forceinline__ void issue_columns(float (&d)[N / 8][4], u32 a_at, u32 b_at) {
  const unsigned long long a = descriptor_across_k(a_at, A_BOX), b = descriptor_across_k(b_at, B_BOX);
#pragma unroll
  for (int step = 0; step < DEPTH / 16; ++step) {
    if (!ADD && step == 0) Wgmma<PRECISION, N>::template multiply_shared_across_k<false>(d, a, b);
    else Wgmma<PRECISION, N>::template multiply_shared_across_k<true>(d, a + (step * 2048 >> 4), b + (step * 2048 >> 4));
  }
}
template <int PRECISION, int N, int DEPTH, int A_BOX, int B_BOX> __device__ __forceinline__ void multiply_columns(float (&d)[N / 8][4], u32 a_at, u32 b_at) {
  wgmma_fence();
  issue_columns<false, PRECISION, N, DEPTH, A_BOX, B_BOX>(d, a_at, b_at);
  wgmma_commit();
}
// D = A B, or D += A B, A from registers, B from shared memory, its rows k. Between a fence and a commit.
template <bool ADD, int PRECISION, int N, int B_BOX, int STEPS> __device__ __forceinline__ void issue_words(float (&d)[N / 8][4], const u32 (&a)[STEPS][4], u32 b_at) {
  const unsigned long long b = descriptor_across_k(b_at, B_BOX);
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    if (!ADD && step == 0) Wgmma<PRECISION, N>::template multiply_registers<false>(d, a[step], b);
    else Wgmma<PRECISION, N>::template multiply_registers<true>(d, a[step], b + (step * 2048 >> 4));
  }
}
template <int PRECISION, int N, int B_BOX, int STEPS> __device__ __forceinline__ void multiply_words(float (&d)[N / 8][4], const u32 (&a)[STEPS][4], u32 b_at) {
  wgmma_fence();
  issue_words<true, PRECISION, N, B_BOX>(d, a, b_at);
  wgmma_commit();
}
