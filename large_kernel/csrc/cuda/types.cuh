// Types: shapes, the element types and how the matrix units see them.
#pragma once
#include <type_traits>

#include "device.cuh"
#include "kernels.h"

namespace large_kernel::cuda {

struct Shape {
  int N, C, H, W, K;
};

template <typename T>
__device__ __forceinline__ float to_float(T v) {
  if constexpr (sizeof(T) == 4)
    return v;
  else if constexpr (std::is_same_v<T, __half>)
    return __half2float(v);
  else
    return __bfloat162float(v);
}
template <typename T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (sizeof(T) == 4)
    return v;
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half(v);
  else
    return __float2bfloat16(v);
}

// Parameters, whose type need not be that of the map.
struct Parameters {
  const void* data;
  int type;  // LargeKernelType
  __device__ __forceinline__ float operator[](size_t i) const {
    if (type == kFloat16) return __half2float(((const __half*)data)[i]);
    if (type == kBfloat16) return __bfloat162float(((const __nv_bfloat16*)data)[i]);
    return ((const float*)data)[i];
  }
};
struct ParameterGradients {
  void* data;
  int type;
  __device__ __forceinline__ void set(size_t i, float v) const {
    if (type == kFloat16)
      ((__half*)data)[i] = __float2half(v);
    else if (type == kBfloat16)
      ((__nv_bfloat16*)data)[i] = __float2bfloat16(v);
    else
      ((float*)data)[i] = v;
  }
};

// The operands of y = x * w + bias, or with `rotate` of the input gradient, where x is dy and y is dx.
template <typename In>
struct Forward {
  const In* x;
  Parameters w, bias;
  In* y;
  Shape s;
  int rotate, relu;

  // Index of tap t of a channel in its weights.
  __device__ __forceinline__ size_t tap(int c, int t) const {
    return (size_t)c * s.K * s.K + (rotate ? s.K * s.K - 1 - t : t);
  }
  __device__ __forceinline__ float shift(int c) const { return bias.data ? bias[c] : 0.f; }
  __device__ __forceinline__ float activate(float v) const { return relu && v < 0.f ? 0.f : v; }  // NaN stays
};

// What the matrix units multiply, PARTS of which add up to a value: float32 is three bfloat16.
template <typename In>
struct Unit {
  using T = In;
  static constexpr int PARTS = 1;
};
template <>
struct Unit<float> {
  using T = __nv_bfloat16;
  static constexpr int PARTS = 3;
};

template <typename In, typename T, int PARTS>
__device__ __forceinline__ void split(In v, T* out) {
  if constexpr (PARTS == 1)
    out[0] = v;
  else {
    float f = v;
    const T high = __float2bfloat16(f);
    f -= __bfloat162float(high);
    const T middle = __float2bfloat16(f);
    f -= __bfloat162float(middle);
    out[0] = high;
    out[1] = middle;
    out[2] = __float2bfloat16(f);
  }
}

// The products of parts that count, the smallest first; the others are below a float32's last bit.
template <int PARTS>
struct Products {
  static constexpr int COUNT = PARTS == 1 ? 1 : 6;
  static __host__ __device__ constexpr int a(int m) { return PARTS == 1 ? 0 : m == 0 ? 2 : m == 2 || m == 3; }
  static __host__ __device__ constexpr int b(int m) { return PARTS == 1 ? 0 : m == 1 ? 2 : m == 2 || m == 4; }
};

}  // namespace large_kernel::cuda
