// Sums in a fixed order: over the shares of a weight gradient, and of dy for the bias gradient.
#pragma once
#include "exact.cuh"

namespace large_kernel::cuda {

// dw from the sums of `splits` shares, `partial` [splits][C][K][K].
template <typename In>
__global__ void sum_shares(const float* partial, const In* x, const In* dy, ParameterGradients dw, Shape s, int splits) {
  const int taps = s.K * s.K, size = s.C * taps, i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= size) return;
  float sum = 0.f;
  for (int k = 0; k < splits; k++) sum += partial[(size_t)k * size + i];
  if (!isfinite(sum)) sum = exact_weight_gradient(x, dy, s, i / taps, i % taps / s.K, i % s.K);
  dw.set(i, sum);
}

// dbias[c] = sum of dy over images and pixels. A block has a channel.
template <typename In>
__global__ void bias_gradient(const In* dy, ParameterGradients dbias, Shape s) {
  float* sums = (float*)dynamic_shared_memory();
  const int c = blockIdx.x, size = s.H * s.W, t = threadIdx.x;
  float sum = 0.f;
  for (int n = 0; n < s.N; n++) {
    const In* plane = dy + ((size_t)n * s.C + c) * size;
    float image = 0.f;
    for (int i = t; i < size; i += blockDim.x) image += to_float(plane[i]);
    sum += image;
  }
  sums[t] = sum;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (t < half) sums[t] += sums[t + half];
    __syncthreads();
  }
  if (t == 0) dbias.set(c, sums[0]);
}

}  // namespace large_kernel::cuda
