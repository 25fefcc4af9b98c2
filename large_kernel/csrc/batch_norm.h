// Batch norm with batch statistics and the activation that follows it, for training, on planes [N, C, pixels]: y =
// activation((x - mean) / sqrt(variance + epsilon) * weight + bias). Backward recomputes the activation's input instead
// of storing it. One thread computes a channel, whose planes stay in the caches between the passes over them.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "epilogue.h"
#include "work_stealing.h"

namespace large_kernel {

struct BatchNormShape {
  int batch, channels;
  std::ptrdiff_t pixels;

  double count() const { return (double)batch * pixels; }
};

inline float inverse_std(float variance, float epsilon) { return (float)(1 / std::sqrt((double)variance + epsilon)); }

// exp(x) for -87 <= x <= 0 with a relative error of at most 2e-7.
LK_INLINE Vec exp_nonpositive(Vec x) {
  const VecI32 power = __builtin_convertvector(x * 1.44269504f - 0.5f, VecI32);  // rounded to nearest
  const Vec n = __builtin_convertvector(power, Vec), r = x - n * 0.693145752f - n * 1.42860677e-6f;
  const Vec p =
      1.f +
      r * (1.f + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * (0.00833333333f + r * 0.00138888889f)))));
  return (Vec)((VecI32)p + (power << 23));
}

template <Activation A>
LK_INLINE Vec activation_derivative(Vec v) {
  if constexpr (A == Activation::kRelu) return v > 0.f ? splat(1.f) : Vec{};
  if constexpr (A == Activation::kGelu) {
    v = v < -13.f ? splat(-13.f) : v > 13.f ? splat(13.f) : v;  // the derivative is constant beyond; keeps NaN
    return 0.5f * (1.f + erf(v * 0.70710678f)) + v * 0.39894228f * exp_nonpositive(v * v * -0.5f);
  }
  return splat(1.f);
}

// Calls f(i, n) for each vector in [first, last): n values starting at i.
template <class F>
LK_INLINE void for_each_vector(std::ptrdiff_t first, std::ptrdiff_t last, F f) {
  for (; first + kLanes <= last; first += kLanes) f(first, kLanes);
  if (first < last) f(first, (int)(last - first));
}

// Calls f(i, n) for each vector in the planes of channel c.
template <class F>
LK_INLINE void for_each_channel_vector(const BatchNormShape& s, int c, F f) {
  for (int image = 0; image < s.batch; image++) {
    const std::ptrdiff_t plane = ((std::ptrdiff_t)image * s.channels + c) * s.pixels;
    for_each_vector(plane, plane + s.pixels, f);
  }
}

// Sums over the planes of channel c: term(at, n, terms) computes the contributions of n values starting at `at`, by
// lanes; lanes past n are ignored. Partial sums of kFloatTerms values are float, the totals double.
template <int S, class F>
LK_INLINE void sum_channel(const BatchNormShape& s, int c, double (&totals)[S], F term) {
  constexpr std::ptrdiff_t kFloatTerms = 2048;
  std::fill_n(totals, S, 0.);
  for (int image = 0; image < s.batch; image++) {
    const std::ptrdiff_t plane = ((std::ptrdiff_t)image * s.channels + c) * s.pixels;
    for (std::ptrdiff_t first = 0; first < s.pixels; first += kFloatTerms) {
      Vec sums[S] = {};
      for_each_vector(plane + first, plane + std::min(first + kFloatTerms, s.pixels), [&](std::ptrdiff_t at, int n) {
        Vec terms[S];
        term(at, n, terms);
        for (int i = 0; i < S; i++) sums[i] += n < kLanes ? keep_first(terms[i], n) : terms[i];
      });
      for (int i = 0; i < S; i++) {
        for (int lane = 0; lane < kLanes; lane++) totals[i] += sums[i][lane];
      }
    }
  }
}

// Calls f with the activation as a type.
template <class F>
void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::kNone: return f(std::integral_constant<Activation, Activation::kNone>{});
    case Activation::kRelu: return f(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kGelu: return f(std::integral_constant<Activation, Activation::kGelu>{});
  }
}

// Computes y and the batch's mean and biased variance [C]. Updates the running statistics [C] to momentum * running +
// (1 - momentum) * batch, unless momentum is 1.
inline void batch_norm_forward(const float* x, const float* weight, const float* bias, float epsilon,
                               Activation activation, const BatchNormShape& s, float* y, float* mean, float* variance,
                               float momentum, float* running_mean, float* running_variance) {
  with_activation(activation, [&](auto a) {
    WorkStealingTasks channels(s.channels);
#pragma omp parallel num_threads(omp_get_max_threads())
    channels.for_each([&](int c) {
      double sum[1], squares[1];
      sum_channel(s, c, sum, [&](std::ptrdiff_t at, int n, Vec* terms) { terms[0] = load_clamped(x + at, n); });
      const float m = (float)(sum[0] / s.count());
      sum_channel(s, c, squares, [&](std::ptrdiff_t at, int n, Vec* terms) {
        const Vec d = load_clamped(x + at, n) - m;
        terms[0] = d * d;
      });
      mean[c] = m;
      variance[c] = (float)(squares[0] / s.count());
      if (momentum != 1) {
        running_mean[c] = momentum * running_mean[c] + (1 - momentum) * mean[c];
        running_variance[c] = momentum * running_variance[c] + (1 - momentum) * variance[c];
      }
      const float scale = weight[c] * inverse_std(variance[c], epsilon), shift = bias[c];
      for_each_channel_vector(s, c, [&](std::ptrdiff_t at, int n) {
        store_clamped(y + at, activate<a()>((load_clamped(x + at, n) - m) * scale + shift), n);
      });
    });
  });
}

// The gradients of x, weight [C] and bias [C], from the arguments and results of batch_norm_forward.
inline void batch_norm_backward(const float* x, const float* weight, const float* bias, const float* mean,
                                const float* variance, const float* dy, float epsilon, Activation activation,
                                const BatchNormShape& s, float* dx, float* dweight, float* dbias) {
  with_activation(activation, [&](auto a) {
    // dx holds the gradient of the activation's input between the two passes
    const float* const inner = a == Activation::kNone ? dy : dx;
    WorkStealingTasks channels(s.channels);
#pragma omp parallel num_threads(omp_get_max_threads())
    channels.for_each([&](int c) {
      const float m = mean[c], inverse = inverse_std(variance[c], epsilon), scale = weight[c] * inverse,
                  shift = bias[c];
      double sums[2];  // of g, and of g * (x - mean)
      sum_channel(s, c, sums, [&](std::ptrdiff_t at, int n, Vec* terms) {
        const Vec d = load_clamped(x + at, n) - m;
        Vec g = load_clamped(dy + at, n);
        if (a != Activation::kNone) {
          g *= activation_derivative<a()>(d * scale + shift);
          store_clamped(dx + at, g, n);
        }
        terms[0] = g;
        terms[1] = g * d;
      });
      dweight[c] = (float)(sums[1] * inverse);
      dbias[c] = (float)sums[0];
      const float per_value = (float)(sums[0] / s.count());
      const float slope = (float)(sums[1] / s.count() * inverse * inverse);
      for_each_channel_vector(s, c, [&](std::ptrdiff_t at, int n) {
        const Vec d = load_clamped(x + at, n) - m;
        store_clamped(dx + at, scale * (load_clamped(inner + at, n) - per_value - d * slope), n);
      });
    });
  });
}

}  // namespace large_kernel
