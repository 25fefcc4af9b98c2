// Single results, tap by tap, with nothing for taps on padding. The fast kernels multiply padding and zeros of their
// matrices, where an Inf or NaN becomes NaN, which then shows in their results: those that are not finite are computed
// again by these functions.
#pragma once
#include "types.cuh"

namespace large_kernel::cuda {

template <typename In>
__device__ float exact_output(const Forward<In>& f, int n, int c, int yo, int xo) {
  const int K = f.s.K, p = K / 2, H = f.s.H, W = f.s.W;
  const In* plane = f.x + ((size_t)n * f.s.C + c) * H * W;
  float sum = 0.f;
  for (int ky = max(0, p - yo); ky < min(K, H + p - yo); ky++) {
    float line = 0.f;
    for (int kx = max(0, p - xo); kx < min(K, W + p - xo); kx++) {
      const float w = to_float(from_float<In>(f.w[f.tap(c, ky * K + kx)]));
      line += to_float(plane[(size_t)(yo + ky - p) * W + xo + kx - p]) * w;
    }
    sum += line;
  }
  return sum;
}

// Computes again what is not finite among rows [y0, y1) x columns [x0, x1) of the results of images [n0, n1).
template <typename In>
__device__ void redo_outputs(const Forward<In>& f, int c, int n0, int n1, int y0, int y1, int x0, int x1) {
  const int columns = x1 - x0, per_image = (y1 - y0) * columns;
  const float shift = f.shift(c);
  for (int n = n0; n < min(n1, f.s.N); n++)
    for (int u = threadIdx.x; u < per_image; u += blockDim.x) {
      const int yo = y0 + u / columns, xo = x0 + u % columns;
      In* out = f.y + (((size_t)n * f.s.C + c) * f.s.H + yo) * f.s.W + xo;
      if (!isfinite(to_float(*out))) *out = from_float<In>(f.activate(exact_output(f, n, c, yo, xo) + shift));
    }
}

template <typename In>
__device__ float exact_weight_gradient(const In* x, const In* dy, const Shape& s, int c, int ky, int kx) {
  const int p = s.K / 2, dr = ky - p, dc = kx - p;
  float sum = 0.f;
  for (int n = 0; n < s.N; n++) {
    const size_t plane = ((size_t)n * s.C + c) * s.H * s.W;
    float image = 0.f;
    for (int yo = max(0, -dr); yo < min(s.H, s.H - dr); yo++) {
      float line = 0.f;
      for (int xo = max(0, -dc); xo < min(s.W, s.W - dc); xo++)
        line += to_float(dy[plane + (size_t)yo * s.W + xo]) * to_float(x[plane + (size_t)(yo + dr) * s.W + xo + dc]);
      image += line;
    }
    sum += image;
  }
  return sum;
}

}  // namespace large_kernel::cuda
