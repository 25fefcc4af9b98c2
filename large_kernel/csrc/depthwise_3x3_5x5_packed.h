// 3x3 and 5x5 kernels at stride 1 and 2 on packed planes: all NCHW16c maps, and in NCHW 5x5 kernels and 3x3 kernels on
// narrow maps. Forward and backward. Channels map to SIMD lanes; planes are packed with a border of zeros and stay in
// the caches.
//
//   0 0 0 0 0 0 0     each cell is a vector of kLanes channels
//   0 p p p p p 0     forward: strips of rows, runs of 7 outputs in registers
//   0 p p p p p 0     backward: whole planes
//   0 0 0 0 0 0 0
#pragma once
#include <algorithm>
#include <cstring>
#include <numeric>

#include "depthwise_scalar.h"
#include "feature_map.h"
#include "finite.h"

namespace large_kernel {

constexpr int kStripPixels = 4096;
constexpr int kPackedRun = 7;  // outputs of a run: the widths of the network's maps are multiples of 7

// R outputs of a row. `in` points to the window of the first output; `taps` are the taps of this window.
template <int KY, int KX, int S, int R>
LK_INLINE void packed_run(const Vec* in, std::ptrdiff_t pitch, const TapView& taps, Vec* out, int out_step) {
  Vec sum[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) sum[r] = Vec{};
#pragma GCC unroll 8
  for (int y = 0; y < KY; y++) {
#pragma GCC unroll 32
    for (int i = 0; i < S * (R - 1) + KX; i++) {
      const Vec value = in[y * pitch + i];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        if (i - S * r >= 0 && i - S * r < KX) sum[r] += value * taps.at(y, i - S * r);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) out[r * out_step] = sum[r];
}

// A row of `width` outputs, `out_step` apart.
template <int KY, int KX, int S>
void packed_row(const Vec* in, std::ptrdiff_t pitch, const TapView& taps, int width, Vec* out, int out_step) {
  int x = 0;
  for (; x + kPackedRun <= width; x += kPackedRun) {
    packed_run<KY, KX, S, kPackedRun>(in + x * S, pitch, taps, out + x * out_step, out_step);
  }
  for (; x < width; x++) packed_run<KY, KX, S, 1>(in + x * S, pitch, taps, out + x * out_step, out_step);
}

// One thread's planes of a block of channels: padded input, padded output gradient, and a plane without padding.
struct PackedWorkspace {
  std::ptrdiff_t x_pitch, x_size, dy_pitch, dy_size;
  Scratch memory;
  Vec *x, *dy, *plane, *weight, *sum;

  explicit PackedWorkspace(const Shape& s)
      : x_pitch(s.width + s.kernel),
        x_size(x_pitch * (s.height + s.kernel)),
        dy_pitch(s.out_width() + 2 * s.kernel),
        dy_size(dy_pitch * (s.out_height() + 2 * s.kernel)),
        memory((x_size + dy_size + (std::ptrdiff_t)s.height * s.width + 2 * s.kernel * s.kernel) * kLanes) {
    x = memory.vectors();
    dy = x + x_size;
    plane = dy + dy_size;
    weight = plane + (std::ptrdiff_t)s.height * s.width;
    sum = weight + s.kernel * s.kernel;
    std::fill(x, plane, Vec{});
  }
};

// Reads rows [first, last) of x into `to`, by way of `plane`, with a border on both sides; rows outside the map are
// zeros.
inline void read_bordered(const FeatureMap<const float>& x, int image, int channel, int lanes, int height, int width,
                          int first, int last, Vec* plane, Vec* to, std::ptrdiff_t pitch, int border) {
  const int begin = std::max(first, 0), end = std::min(last, height);
  x.read(image, channel, lanes, (std::ptrdiff_t)begin * width, (end - begin) * width, plane);
  for (int y = first; y < last; y++, to += pitch) {
    if (y < begin || y >= end) {
      std::fill_n(to + border, width, Vec{});
    } else {
      std::memcpy(to + border, plane + (std::ptrdiff_t)(y - begin) * width, width * sizeof(Vec));
    }
  }
}

// Computes rows [begin, end) of the output in w.plane from the input in w.x, skipping the taps on padding.
inline void packed_scalar(PackedWorkspace& w, const Shape& s, int begin, int end) {
  const int k = s.kernel, pad = k / 2;
  Vec* out = w.plane;
  for (int oy = begin; oy < end; oy++) {
    for (int ox = 0; ox < s.out_width(); ox++, out++) {
      *out = Vec{};
      for (int tap = 0; tap < k * k; tap++) {
        const int iy = oy * s.stride + tap / k - pad, ix = ox * s.stride + tap % k - pad;
        if (iy < 0 || iy >= s.height || ix < 0 || ix >= s.width) continue;
        *out += w.x[(iy - begin * s.stride + pad) * w.x_pitch + ix + pad] * w.weight[tap];
      }
    }
  }
}

// Computes strips of rows that are small enough to stay in the L2 cache.
template <int K, int S>
void forward_packed(const FeatureMap<const float>& x, const float* weight, const Epilogue& epilogue, const Shape& s,
                    const FeatureMap<float>& y) {
  const int height = std::clamp(kStripPixels / s.out_width(), 1, s.out_height());
  const int strips = (s.out_height() + height - 1) / height;
  Shape strip = s;
  strip.height = (height - 1) * S + K;
  WorkStealingTasks tasks((std::ptrdiff_t)s.batch * s.blocks() * strips);
#pragma omp parallel
  {
    PackedWorkspace w(strip);
    tasks.for_each([&](std::ptrdiff_t task) {
      const int image = task / strips % s.batch, block = task / strips / s.batch, lanes = s.lanes(block);
      const int begin = s.out_height() * (task % strips) / strips, end = s.out_height() * (task % strips + 1) / strips;
      const int channel = block * kLanes, first = begin * S - K / 2, last = (end - 1) * S + K - K / 2;
      pack(weight + (std::ptrdiff_t)channel * K * K, K * K, lanes, K * K, w.weight);
      read_bordered(x, image, channel, lanes, s.height, s.width, first, last, w.plane, w.x, w.x_pitch, K / 2);
      if (all_finite(w.weight, K * K)) {
        for (int row = 0; row < end - begin; row++) {
          y.prefetch<true>(image, channel, lanes, (std::ptrdiff_t)(begin + row) * s.out_width(), s.out_width());
          packed_row<K, K, S>(w.x + row * S * w.x_pitch, w.x_pitch, {w.weight, K, K, K, 1}, s.out_width(),
                              w.plane + (std::ptrdiff_t)row * s.out_width(), 1);
        }
      } else {
        packed_scalar(w, s, begin, end);
      }
      epilogue.with_channels(channel, lanes, [&](auto finish) {
        const int width = s.out_width();
        y.write(w.plane, image, channel, lanes, (std::ptrdiff_t)begin * width, (end - begin) * width, finish);
      });
    });
  }
}

// One phase of the input gradient, for dy in w.dy with a border of K; see input_gradient_plane in depthwise_generic.h.
template <int K, int S, int PY, int PX, class F>
void packed_input_gradient_phase(const Shape& s, PackedWorkspace& w, F prefetch) {
  constexpr int ny = (K - PY + S - 1) / S, nx = (K - PX + S - 1) / S, pad = K / 2;
  const TapView taps = {w.weight + (PY + S * (ny - 1)) * K + PX + S * (nx - 1), ny, nx, -S * K, -S};
  const int y0 = (PY + S * pad - pad) % S, x0 = (PX + S * pad - pad) % S;  // the first pixel of the phase
  for (int y = y0; y < s.height; y += S) {
    if (PX == 0) prefetch(y);
    const int a = (y + pad) / S, b = (x0 + pad) / S;
    packed_row<ny, nx, 1>(w.dy + (a + K + 1 - ny) * w.dy_pitch + (b + K + 1 - nx), w.dy_pitch, taps,
                          (s.width - x0 + S - 1) / S, w.plane + (std::ptrdiff_t)y * s.width + x0, S);
  }
}

// Writes w.plane; calls prefetch(row) between the rows.
template <int K, int S, class F>
void packed_input_gradient(const Shape& s, PackedWorkspace& w, F prefetch) {
  packed_input_gradient_phase<K, S, 0, 0>(s, w, prefetch);
  if constexpr (S == 2) {
    packed_input_gradient_phase<K, S, 0, 1>(s, w, prefetch);
    packed_input_gradient_phase<K, S, 1, 0>(s, w, prefetch);
    packed_input_gradient_phase<K, S, 1, 1>(s, w, prefetch);
  }
}

// Adds KY rows of one image's weight gradient, starting at kernel row ky, to w.sum. A few rows of the image are summed
// at a time, so that small terms are not lost in large sums.
template <int K, int S, int KY>
void packed_weight_gradient(const Shape& s, PackedWorkspace& w, int ky) {
  constexpr int terms = 256;
  const int rows = std::max(1, terms / s.out_width());
  for (int begin = 0; begin < s.out_height(); begin += rows) {
    Vec sum[KY * K] = {};
    for (int row = begin; row < std::min(begin + rows, s.out_height()); row++) {
      const Vec* dy = w.dy + (row + K) * w.dy_pitch + K;
      const Vec* x = w.x + (row * S + ky) * w.x_pitch;
      for (int column = 0; column < s.out_width(); column++, x += S) {
        const Vec value = dy[column];
#pragma GCC unroll 32
        for (int i = 0; i < KY * K; i++) sum[i] += value * x[i / K * w.x_pitch + i % K];
      }
    }
#pragma GCC unroll 32
    for (int i = 0; i < KY * K; i++) w.sum[ky * K + i] += sum[i];
  }
}

// dx, dweight and dbias may be null. One thread sums a block of channels over the batch, in order.
template <int K, int S>
void backward_packed(const float* x, const float* weight, const float* dy, const Shape& s, float* dx, float* dweight,
                     float* dbias) {
  const std::ptrdiff_t in = (std::ptrdiff_t)s.height * s.width, out = (std::ptrdiff_t)s.out_height() * s.out_width();
  constexpr int rows = std::min(K, (kRegisters == 32 ? 25 : 10) / K);
  WorkStealingTasks blocks(s.blocks());
#pragma omp parallel
  {
    PackedWorkspace w(s);
    blocks.for_each([&](int block) {
      const int lanes = s.lanes(block);
      const std::ptrdiff_t first = (std::ptrdiff_t)block * kLanes;
      pack(weight + first * K * K, K * K, lanes, K * K, w.weight);
      const bool finite = all_finite(w.weight, K * K);
      std::fill(w.sum, w.sum + K * K, Vec{});
      Vec bias_sum = {};
      for (int image = 0; image < s.batch; image++) {
        const std::ptrdiff_t plane = (std::ptrdiff_t)image * s.channels + first;
        read_bordered(FeatureMap<const float>{dy, s.channels, out}, image, (int)first, lanes, s.out_height(),
                      s.out_width(), -K, s.out_height() + K, w.plane, w.dy, w.dy_pitch, K);
        if (dbias) bias_sum += std::accumulate(w.plane, w.plane + out, Vec{});
        if (dx && finite) {
          packed_input_gradient<K, S>(s, w, [&](int row) {
            FeatureMap<float>{dx, s.channels, in}.prefetch<true>(image, (int)first, lanes,
                                                                 (std::ptrdiff_t)row * s.width, s.width);
          });
          unpack(w.plane, (int)in, dx + plane * in, in, lanes);
        }
        for (int c = 0; dx && !finite && c < lanes; c++) {
          scalar_input_gradient(dy + (plane + c) * out, weight + (first + c) * K * K, s, dx + (plane + c) * in);
        }
        if (dweight) {
          read_bordered(FeatureMap<const float>{x, s.channels, in}, image, (int)first, lanes, s.height, s.width,
                        -(K / 2), s.height + K / 2, w.plane, w.x, w.x_pitch, K / 2);
          int ky = 0;
          for (; ky + rows <= K; ky += rows) packed_weight_gradient<K, S, rows>(s, w, ky);
          if constexpr (K % rows != 0) packed_weight_gradient<K, S, K % rows>(s, w, ky);
        }
      }
      if (dweight) unpack(w.sum, K * K, dweight + first * K * K, K * K, lanes);
      for (int c = 0; dweight && !all_finite(w.sum, K * K) && c < lanes; c++) {
        scalar_weight_gradient(x + (first + c) * in, dy + (first + c) * out, s, dweight + (first + c) * K * K);
      }
      if (dbias) store_partial(dbias + first, bias_sum, lanes);
    });
  }
}

}  // namespace large_kernel
