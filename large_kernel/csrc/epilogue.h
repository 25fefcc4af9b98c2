// The epilogue of a convolution, applied as results are written: y = activation(scale * conv + shift).
#pragma once
#include <algorithm>

#include "vector.h"

namespace large_kernel {

enum class Activation { kNone, kRelu, kGelu };

// erf with a relative error of at most 3.6e-7: an odd over an even polynomial, fitted on [-4, 4]. Beyond that, erf is
// +-1 in float.
LK_INLINE Vec erf(Vec x) {
  const Vec u = x * x;
  const Vec p =
      x * (1.12837914f + u * (0.193547267f + u * (0.0531020469f +
                                                  u * (0.00388344286f + u * (0.000284568879f + u * 1.98677434e-06f)))));
  const Vec q =
      1.f + u * (0.504859354f + u * (0.115350921f + u * (0.015207446f + u * (0.00118559667f + u * 3.74202498e-05f))));
  const Vec one = splat(1.f);
  return x >= 4.f ? one : x <= -4.f ? -one : divide(p, q);
}

template <Activation A>
LK_INLINE Vec activate(Vec v) {
  if constexpr (A == Activation::kRelu) return v < 0.f ? Vec{} : v;  // keeps NaN
  if constexpr (A == Activation::kGelu) return 0.5f * v * (1.f + erf(v * 0.70710678f));
  return v;
}

struct Epilogue {
  const float *scale = nullptr, *shift = nullptr;  // [C_out]; null means 1 and 0
  Activation activation = Activation::kNone;

  // Calls f with the epilogue as a function of vectors of `lanes` channels, starting at `channel`.
  template <class F>
  LK_INLINE void with_channels(int channel, int lanes, F f) const {
    apply(scale ? load_lanes(scale + channel, lanes) : splat(1.f), shift ? load_lanes(shift + channel, lanes) : Vec{},
          f);
  }

  // Calls f with the epilogue as a function of vectors of pixels of one channel.
  template <class F>
  LK_INLINE void with_channel(int channel, F f) const {
    apply(splat(scale ? scale[channel] : 1.f), splat(shift ? shift[channel] : 0.f), f);
  }

  template <class F>
  LK_INLINE void apply(Vec s, Vec t, F f) const {
    switch (activation) {
      case Activation::kNone: return f([s, t](Vec v) { return v * s + t; });
      case Activation::kRelu: return f([s, t](Vec v) { return activate<Activation::kRelu>(v * s + t); });
      case Activation::kGelu: return f([s, t](Vec v) { return activate<Activation::kGelu>(v * s + t); });
    }
  }

  // Applies only the activation, in place.
  void activate_plane(std::ptrdiff_t pixels, float* plane) const {
    if (activation == Activation::kNone) return;
    Epilogue{nullptr, nullptr, activation}.with_channels(0, 1, [&](auto finish) {
      for (std::ptrdiff_t i = 0; i < pixels; i += kLanes) {
        const int count = (int)std::min<std::ptrdiff_t>(kLanes, pixels - i);
        store_partial(plane + i, finish(load_partial(plane + i, count)), count);
      }
    });
  }
};

}  // namespace large_kernel
