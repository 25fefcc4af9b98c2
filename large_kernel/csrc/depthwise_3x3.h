// 3x3 kernels at stride 1 and 2 in NCHW, on maps at least about a vector wide: forward and backward. Pixels map to SIMD
// lanes, and planes are read and written in place: on such maps a padded or transposed copy takes longer than the
// arithmetic. The inner loops are in depthwise_3x3_strips.h, and in depthwise_3x3_row_pairs.h for narrow maps at stride
// 2.
#pragma once
#include <algorithm>

#include "depthwise_3x3_row_pairs.h"
#include "depthwise_scalar.h"
#include "dispatch.h"
#include "finite.h"
#include "work_stealing.h"

namespace large_kernel {

constexpr int kBandRows = 4;  // output rows of a strip on wide maps

// ---- planes ----

template <int S, class F>
void correlate_3x3(const Plane<const float>& x, const float* weight, const Plane<float>& out, F finish) {
#if defined(__AVX512F__)
  if (S == 2 && packs_row_pairs(out.width)) return correlate_row_pairs(x, weight, out, finish);
#endif
  for_each_column_strip<S>(x.height, x.width, 2 * S, [&](int begin, int end, int first, int last, auto is_inside) {
    correlate_strips<S, is_inside()>(x, weight, out, begin, end, first, last, finish);
  });
}

// Rows of dx that are written together.
inline int band_rows(const Shape& s) { return s.out_width() > 2 * kLanes ? 2 * kBandRows : s.height; }

// The input gradient at stride 2. With `band`, a buffer of band_rows() rows, dx is written with non-temporal stores and
// `to_prefetch` is not prefetched, as that would delay both.
inline void input_gradient_stride2(const Plane<const float>& dy, const float* weight, const Plane<float>& dx,
                                   [[maybe_unused]] float* band, const float* to_prefetch) {
#if defined(__AVX512F__)
  if (packs_row_pairs(dy.width)) return input_gradient_row_pairs(dy, weight, dx);
#endif
  for_each_column_strip<1>(dy.height, dy.width, kBandRows,
                           [&](int begin, int end, int first, int last, auto is_inside) {
#if defined(__AVX512F__)
    if (band) {
      const std::ptrdiff_t before = (std::ptrdiff_t)2 * begin * dx.width;
      input_gradient_strips<is_inside()>(dy, weight, {band - before, dx.height, dx.width}, begin, end, first, last,
                                         band - before);
      const std::ptrdiff_t pixels = (std::ptrdiff_t)std::min(2 * end, dx.height) * dx.width - before;
      for (std::ptrdiff_t i = 0; last == dy.width && i < pixels; i += kLanes) {
        _mm512_stream_ps(dx.data + before + i, (__m512)load(band + i));
      }
      return;
    }
#endif
    input_gradient_strips<is_inside()>(dy, weight, dx, begin, end, first, last, to_prefetch);
  });
}

template <int S>
void weight_gradient_3x3(const Plane<const float>& x, const Plane<const float>& dy, Vec* sums) {
#if defined(__AVX512F__)
  if (S == 2 && packs_row_pairs(dy.width)) return weight_gradient_row_pairs(x, dy, sums);
#endif
  for_each_column_strip<S>(x.height, x.width, 2 * S, [&](int begin, int end, int first, int last, auto is_inside) {
    weight_gradient_strips<S, is_inside()>(x, dy, sums, begin, end, first, last);
  });
}

// Copies nine weights. Returns whether all are finite; otherwise they must not be multiplied by the zeros outside the
// map.
inline bool load_weights_3x3(const float* weight, float* to) {
  FiniteCheck finite;
  for (int i = 0; i < 9; i += kLanes) {
    const Vec v = load_clamped(weight + i, 9 - i);
    finite.see(v);
    store(to + i, v);
  }
  return finite.all();
}

template <int S>
void forward_3x3(const float* x, const float* weight, const Epilogue& epilogue, const Shape& s, float* y) {
  const std::ptrdiff_t in = (std::ptrdiff_t)s.height * s.width, out = (std::ptrdiff_t)s.out_height() * s.out_width();
  WorkStealingTasks planes((std::ptrdiff_t)s.batch * s.channels, 4);
#pragma omp parallel
  planes.for_each([&](std::ptrdiff_t plane) {
    const int channel = (int)(plane % s.channels);
    const float* w = weight + (std::ptrdiff_t)channel * 9;
    float taps[9 + kLanes];
    if (!load_weights_3x3(w, taps)) return scalar_forward(x + plane * in, w, epilogue, channel, s, y + plane * out);
    epilogue.with_channel(channel, [&](auto finish) {
      correlate_3x3<S>(Plane<const float>{x + plane * in, s.height, s.width}, taps,
                       Plane<float>{y + plane * out, s.out_height(), s.out_width()}, finish);
    });
  });
}

// dx, dweight and dbias may be null. One thread sums a channel over the batch, in order.
template <int S>
void backward_3x3(const float* x, const float* weight, const float* dy, const Shape& s, float* dx, float* dweight,
                  float* dbias) {
  const std::ptrdiff_t in = (std::ptrdiff_t)s.height * s.width, out = (std::ptrdiff_t)s.out_height() * s.out_width();
  const bool streamed = S == 2 && dx && streams_past_caches(s, dx);
  WorkStealingTasks channels(s.channels);
#pragma omp parallel
  {
    Scratch memory(streamed ? (std::size_t)band_rows(s) * s.width : 0);
    float* const band = streamed ? memory.floats() : nullptr;
    channels.for_each([&](int channel) {
      const float* w = weight + (std::ptrdiff_t)channel * 9;
      float taps[9 + kLanes], rotated[9];
      Vec sums[9] = {}, bias = {};
      const bool finite = load_weights_3x3(w, taps);
      std::reverse_copy(taps, taps + 9, rotated);
      for (int image = 0; image < s.batch; image++) {
        const std::ptrdiff_t index = (std::ptrdiff_t)image * s.channels + channel;
        const Plane<const float> plane = {x + index * in, s.height, s.width};
        const Plane<const float> gradient = {dy + index * out, s.out_height(), s.out_width()};
        const Plane<float> to = {dx ? dx + index * in : nullptr, s.height, s.width};
        if (dx && !finite) {
          scalar_input_gradient(gradient.data, w, s, to.data);
        } else if (dx && S == 1) {
          correlate_3x3<1>(gradient, rotated, to, Identity{});
        } else if (dx) {
          input_gradient_stride2(gradient, taps, to, band, dweight ? plane.data : to.data);
        }
        if (dweight) {
          if (s.out_width() <= kLanes) {
            weight_gradient_3x3<S>(plane, gradient, sums);
          } else {  // each plane separately, so that small terms are not lost in large sums
            Vec products[9] = {};
            weight_gradient_3x3<S>(plane, gradient, products);
            for (int i = 0; i < 9; i++) sums[i] += products[i];
          }
        }
        if (dbias) {
          Vec sum = {};
          for (std::ptrdiff_t i = 0; i < out; i += kLanes) sum += load_clamped(gradient.data + i, out - i);
          bias += sum;
        }
      }
      if (dweight) {
        float sum[9 + kLanes] = {};  // whole vectors are read
        for (int i = 0; i < 9; i++) sum[i] = sum_lanes(sums[i]);
        float* to = dweight + (std::ptrdiff_t)channel * 9;
        if (all_finite(sum, 9)) {
          write_row(sum, 9, to, to + 9);
        } else {
          scalar_weight_gradient(x + channel * in, dy + channel * out, s, to);
        }
      }
      if (dbias) store_partial(dbias + channel, splat(sum_lanes(bias)), 1);
    });
#if defined(__AVX512F__)
    if (streamed) _mm_sfence();  // makes the non-temporal stores visible to other threads
#endif
  }
}

}  // namespace large_kernel
