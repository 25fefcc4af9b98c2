// Depthwise convolution as plain scalar loops that skip taps on padding: the fallback of kernels that multiply a border
// of zeros, for channels with NaN or Inf in their weights or weight gradients.
#pragma once
#include <algorithm>

#include "epilogue.h"
#include "shape.h"

namespace large_kernel {

// Calls f(index of the output pixel, of the input pixel, of the tap) for every tap that is not on padding.
template <class F>
LK_INLINE void for_each_tap(const Shape& s, F f) {
  const int k = s.kernel, pad = k / 2;
  for (int oy = 0; oy < s.out_height(); oy++) {
    for (int ox = 0; ox < s.out_width(); ox++) {
      for (int ky = 0; ky < k; ky++) {
        for (int kx = 0; kx < k; kx++) {
          const int iy = oy * s.stride + ky - pad, ix = ox * s.stride + kx - pad;
          if (iy < 0 || iy >= s.height || ix < 0 || ix >= s.width) continue;
          f((std::ptrdiff_t)oy * s.out_width() + ox, (std::ptrdiff_t)iy * s.width + ix, ky * k + kx);
        }
      }
    }
  }
}

inline void scalar_forward(const float* x, const float* weight, const Epilogue& epilogue, std::ptrdiff_t channel,
                           const Shape& s, float* y) {
  const float scale = epilogue.scale ? epilogue.scale[channel] : 1.f,
              shift = epilogue.shift ? epilogue.shift[channel] : 0.f;
  const std::ptrdiff_t pixels = (std::ptrdiff_t)s.out_height() * s.out_width();
  Scratch exact(pixels + kLanes);
  float* sum = exact.floats();
  std::fill(sum, sum + pixels, shift);
  for_each_tap(s, [&](auto o, auto i, int tap) { sum[o] += x[i] * (scale * weight[tap]); });
  write_row(sum, (int)pixels, y, y + pixels);
  epilogue.activate_plane(pixels, y);
}

inline void scalar_input_gradient(const float* dy, const float* weight, const Shape& s, float* dx) {
  const std::ptrdiff_t pixels = (std::ptrdiff_t)s.height * s.width;
  Scratch exact(pixels + kLanes);
  float* sum = exact.floats();
  std::fill(sum, sum + pixels, 0.f);
  for_each_tap(s, [&](auto o, auto i, int tap) { sum[i] += dy[o] * weight[tap]; });
  write_row(sum, (int)pixels, dx, dx + pixels);
}

// One channel over the batch; x and dy point to its first plane.
inline void scalar_weight_gradient(const float* x, const float* dy, const Shape& s, float* dweight) {
  const std::ptrdiff_t in = (std::ptrdiff_t)s.height * s.width, out = (std::ptrdiff_t)s.out_height() * s.out_width();
  const int area = s.kernel * s.kernel;
  Scratch exact(area + kLanes);
  float* sum = exact.floats();
  std::fill(sum, sum + area, 0.f);
  for (std::ptrdiff_t image = 0; image < s.batch; image++, x += s.channels * in, dy += s.channels * out) {
    for_each_tap(s, [&](auto o, auto i, int tap) { sum[tap] += dy[o] * x[i]; });
  }
  write_row(sum, area, dweight, dweight + area);
}

}  // namespace large_kernel
