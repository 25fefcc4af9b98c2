// What large_kernel/csrc/cuda uses of a GPU, on a CPU: it replaces device.cuh's instructions and CUDA's headers, so that
// g++ compiles the kernels as they are.
//
// The threads of a block are fibers of one thread. A fiber runs until it waits for others: at a barrier for the block, at
// a warp instruction (mma, ldmatrix, reductions) for the 32 lanes, whose last one computes it for all. Asynchronous
// copies happen when they are waited for. Shared memory starts as NaN and is followed by a guard. A mistake (lanes at
// different instructions, a wait that never ends, an address outside or misaligned, a write past the end) ends the
// launch with an error that says which.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::isfinite;
using std::max;
using std::min;

// ---- types

struct uint3_ {
  unsigned x;
};
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
template <typename To, typename From>
To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __bfloat162float(__nv_bfloat16 v) { return bits_of<float>((uint32_t)v.bits << 16); }
inline __nv_bfloat16 __float2bfloat16(float f) {  // to nearest, ties to even
  const uint32_t u = bits_of<uint32_t>(f);
  if (f != f) return {0x7fff};
  return {(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline float __half2float(__half v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? std::ldexp(1024.f + fraction, exponent - 25)
                                    : std::ldexp((float)fraction, -24);
  return v.bits >> 15 ? -size : size;
}
inline __half __float2half(float f) {
  const uint16_t sign = bits_of<uint32_t>(f) >> 31 << 15;
  const float size = std::fabs(f);
  if (f != f) return {0x7fff};
  if (size == 0.f || size >= 65520.f) return {(uint16_t)(size == 0.f ? sign : sign | 0x7c00)};
  int exponent;
  std::frexp(size, &exponent);                          // size < 2^exponent
  const int last = std::max(exponent - 11, -24);        // of the last bit
  const int steps = (int)std::nearbyint(std::ldexp(size, -last));  // to nearest, ties to even
  return {(uint16_t)(sign | (last == -24 ? steps : ((last + 24) << 10) + steps))};
}

// ---- the runtime

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
const char* cudaGetErrorString(cudaError_t status);

namespace emulation {

extern uint3_ thread, block, threads;  // of the fiber that runs

cudaError_t run(int blocks, int block_threads, size_t shared_bytes, const std::function<void()>& kernel);
[[noreturn]] void fail(const char* what);
unsigned char* shared(size_t* bytes);  // of the present block

// What the lanes of a warp do together; `operands` of lane i, which they may change, are `all[i]`.
using Together = void (*)(void** all);
void warp(Together together, void* operands);
bool barrier(bool any);  // whether `any` of the threads of the block
void copy_async(void* to, const void* from, int bytes, bool inside);
void copy_commit();
void copy_wait(int left);

template <typename T>
float value(uint32_t pair, int high) {
  const uint16_t bits = high ? pair >> 16 : pair & 0xffff;
  if constexpr (std::is_same_v<T, __half>)
    return __half2float({bits});
  else
    return __bfloat162float({bits});
}

struct Mma {
  float* acc;
  uint32_t a[4], b[2];
};

// Fragments as PTX defines them: g = lane / 4, q = lane % 4; a: rows g and g + 8, columns 2 q and 2 q + 8; b: rows 2 q and
// 2 q + 8, column g; acc: rows g and g + 8, columns 2 q.
template <typename T, int K>
void mma(void** all) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const Mma& m = *(Mma*)all[lane];
    const int g = lane / 4, q = lane % 4;
    for (int r = 0; r < K / 4; r++)
      for (int h = 0; h < 2; h++) a[g + 8 * (r & 1)][2 * q + h + 8 * (r >> 1)] = value<T>(m.a[r], h);
    for (int r = 0; r < K / 8; r++)
      for (int h = 0; h < 2; h++) b[2 * q + h + 8 * r][g] = value<T>(m.b[r], h);
  }
  for (int lane = 0; lane < 32; lane++) {
    Mma& m = *(Mma*)all[lane];
    for (int e = 0; e < 4; e++) {
      const float *row = a[lane / 4 + 8 * (e >> 1)], *col = &b[0][lane % 4 * 2 + (e & 1)];
      float sum = 0.f;
      for (int k = 0; k < K; k++) sum += row[k] * col[8 * k];
      m.acc[e] += sum;
    }
  }
}

struct Matrices {
  uint32_t* r;
  uint32_t address;
};
template <bool TRANSPOSED>
void load_matrices(void** all) {
  size_t bytes;
  const unsigned char* memory = shared(&bytes);
  for (int lane = 0; lane < 32; lane++) {
    const uint32_t address = ((Matrices*)all[lane])->address;
    if (address % 16 || address + 16 > bytes) fail("ldmatrix: an address that is misaligned or outside");
  }
  auto element = [&](int m, int row, int col) {
    uint16_t v;
    std::memcpy(&v, memory + ((Matrices*)all[8 * m + row])->address + 2 * col, 2);
    return (uint32_t)v;
  };
  for (int lane = 0; lane < 32; lane++)
    for (int m = 0; m < 4; m++) {
      const int i = lane / 4, j = lane % 4 * 2;
      ((Matrices*)all[lane])->r[m] = TRANSPOSED ? element(m, j, i) | element(m, j + 1, i) << 16
                                                : element(m, i, j) | element(m, i, j + 1) << 16;
    }
}

template <bool LEAST>
void reduce(void** all) {
  int found = *(int*)all[0];
  for (int lane = 1; lane < 32; lane++)
    found = LEAST ? std::min(found, *(int*)all[lane]) : std::max(found, *(int*)all[lane]);
  for (int lane = 0; lane < 32; lane++) *(int*)all[lane] = found;
}

inline void nothing(void**) {}

}  // namespace emulation

// ---- instructions

#define threadIdx emulation::thread
#define blockIdx emulation::block
#define blockDim emulation::threads

template <typename T>
T __ldg(const T* p) {
  if ((uintptr_t)p % sizeof(T)) emulation::fail("a misaligned load");
  return *p;
}
inline void __syncthreads() { emulation::barrier(false); }
inline int __syncthreads_or(int any) { return emulation::barrier(any); }
inline void __syncwarp() { emulation::warp(emulation::nothing, nullptr); }
inline int __reduce_min_sync(unsigned, int v) {
  emulation::warp(emulation::reduce<true>, &v);
  return v;
}
inline int __reduce_max_sync(unsigned, int v) {
  emulation::warp(emulation::reduce<false>, &v);
  return v;
}

namespace large_kernel::cuda {

template <typename T>
void mma16(float* acc, const uint32_t* a, uint32_t b0, uint32_t b1) {
  emulation::Mma m = {acc, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulation::warp(emulation::mma<T, 16>, &m);
}
template <typename T>
void mma8(float* acc, uint32_t a0, uint32_t a1, uint32_t b0) {
  emulation::Mma m = {acc, {a0, a1}, {b0}};
  emulation::warp(emulation::mma<T, 8>, &m);
}
inline void load_matrices(uint32_t* r, uint32_t address) {
  emulation::Matrices m = {r, address};
  emulation::warp(emulation::load_matrices<false>, &m);
}
inline void load_matrices_transposed(uint32_t* r, uint32_t address) {
  emulation::Matrices m = {r, address};
  emulation::warp(emulation::load_matrices<true>, &m);
}

inline unsigned char* dynamic_shared_memory() {
  size_t bytes;
  return emulation::shared(&bytes);
}
// Pointers may go outside for rows that are never read, so only what is read is checked.
inline uint32_t shared_address(const void* p) { return (uint32_t)((const unsigned char*)p - dynamic_shared_memory()); }

template <int BYTES>
void copy_async(uint32_t to, const void* from, bool inside) {
  size_t bytes;
  unsigned char* memory = emulation::shared(&bytes);
  if (to % BYTES || to + BYTES > bytes || (uintptr_t)from % BYTES)
    emulation::fail("cp.async: an address that is misaligned or outside");
  emulation::copy_async(memory + to, from, BYTES, inside);
}
inline void copy_commit() { emulation::copy_commit(); }
template <int LEFT>
void copy_wait() {
  emulation::copy_wait(LEFT);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, int threads, size_t shared_bytes, cudaStream_t,
                   const Arguments&... arguments) {
  return emulation::run(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace large_kernel::cuda
