// Large kernels at stride 1 on square maps of 5x5 to 8x8 pixels that the kernel covers completely: forward pass, input
// gradient and weight gradient, in NCHW. Planes and weights are read in place. No tap meets padding, so NaN and Inf
// need no special treatment.
//
//   one column of the map, each value in all lanes:   value[0] ... value[H - 1]   in registers
//   row d of the kernel, shifted by the column:       tap (8 lanes)               loaded once
//   rows of the output, 8 lanes each:                 sum[0] ... sum[H - 1]       in registers
//   for each column and each d:                       sum[y] += tap * value[y + d] for all y
//
// With AVX-512 two planes can share a vector of 16 lanes: of two images, or of two channels of the last image.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "dispatch.h"
#include "epilogue.h"
#include "work_stealing.h"

namespace large_kernel {

// floats of a plane and of what is accessed past it
constexpr int kPlaneFloats = kTinySide * kTinySide + std::max(kLanes, kTinySide);
constexpr int kImagesTogether = 16;  // images whose planes fit in the L1 cache
// with fewer lanes than kTinySide the code has to compile, but is not used
constexpr int kRowLanes = std::min(kTinySide, kLanes);
typedef float RowVec __attribute__((vector_size(kRowLanes * 4), may_alias));
typedef int32_t RowBits __attribute__((vector_size(kRowLanes * 4)));
typedef float RowUnaligned __attribute__((vector_size(kRowLanes * 4), aligned(4), may_alias));

LK_INLINE RowVec load_line(const float* p) { return *reinterpret_cast<const RowUnaligned*>(p); }
LK_INLINE void store_line(float* p, RowVec v) { *reinterpret_cast<RowUnaligned*>(p) = v; }

// How a vector holds the planes that are computed together; the second one is `step` floats after the first. `reverse`
// returns lanes width - 1 to 0 of each plane; the lanes after these are unspecified.
struct OnePlane {
  typedef RowVec Vector;
  static constexpr int kPlanes = 1;

  static LK_INLINE Vector splat(const float* x, std::ptrdiff_t) { return *x - RowVec{}; }
  static LK_INLINE Vector load_taps(const float* taps, std::ptrdiff_t) { return load_line(taps); }
  static LK_INLINE RowVec get(Vector v, int) { return v; }
  static LK_INLINE Vector reverse(Vector v, int width) {
#if defined(__AVX2__)
    RowBits from;
    for (int i = 0; i < kRowLanes; i++) from[i] = width - 1 - i;  // only the last three bits of each index count
    return (RowVec)_mm256_permutevar8x32_ps((__m256)v, (__m256i)from);
#else
    RowVec reversed = v;
    for (int i = 0; i < std::min(width, kRowLanes); i++) reversed[i] = v[width - 1 - i];
    return reversed;
#endif
  }
};

#if defined(__AVX512DQ__)
// Two planes per vector: those of one channel share its taps, those of two channels have their own.
template <bool kSameTaps>
struct TwoPlanes {
  typedef Vec Vector;
  static constexpr int kPlanes = 2;

  static LK_INLINE Vector splat(const float* x, std::ptrdiff_t step) {
    return (Vec)_mm512_mask_broadcastss_ps((__m512)large_kernel::splat(*x), 0xff00, _mm_load_ss(x + step));
  }
  static LK_INLINE Vector load_taps(const float* taps, std::ptrdiff_t step) {
    const __m256 first = _mm256_loadu_ps(taps);
    if (kSameTaps)
      return (Vec)_mm512_maskz_broadcast_f32x8(0xffff, first);  // the mask avoids a GCC 12 warning in its own header
    return (Vec)_mm512_insertf32x8(_mm512_castps256_ps512(first), _mm256_loadu_ps(taps + step), 1);
  }
  static LK_INLINE RowVec get(Vector v, int plane) {
    return (RowVec)(plane ? _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 1)
                          : _mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 0));
  }
  static LK_INLINE Vector reverse(Vector v, int width) {
    VecI32 from;
    for (int i = 0; i < kLanes; i++) from[i] = (i & 8) | ((width - 1 - i) & 7);
    return (Vec)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)from, (__m512)v);
  }
};
typedef TwoPlanes<true> TwoImages;
typedef TwoPlanes<false> TwoChannels;
#else
typedef OnePlane TwoImages, TwoChannels;  // not used
#endif

// Correlates as many planes of H x H pixels as N vectors hold, which share the loads of taps. Planes are x_step apart
// and results out_step apart. `taps` points to the middle of a kernel; that of a vector's second plane is taps_step
// further on. The taps are read in memory order. For the forward pass a kernel's rows would have to be read backwards;
// instead the lanes of the sums are reversed until the end. Writes out [H, H] and, unless `exact`, up to kTinySide - 1
// floats past each plane.
template <class P, int N, int H, Pass pass>
__attribute__((noinline)) void correlate_planes(const float* x, std::ptrdiff_t x_step, const float* taps,
                                                std::ptrdiff_t taps_step, int kernel, float* out,
                                                std::ptrdiff_t out_step, bool exact) {
  typedef typename P::Vector Vector;
  constexpr bool forward = pass == Pass::kForward;
  // independent chains of additions, to hide their latency
  constexpr int chains = N == 1 && kRegisters == 32 ? 2 : 1;
  const std::ptrdiff_t column = forward ? 1 : -1, down = column * kernel, vector_step = P::kPlanes * x_step;
  taps -= (H - 1) * down + (forward ? H - 1 : 0);
  Vector sum[N * chains][H] = {};
  for (const float* end = x + H; x < end; x++, taps += column) {
    Vector value[N][H];
#pragma GCC unroll 2
    for (int i = 0; i < N; i++) {
#pragma GCC unroll 8
      for (int y = 0; y < H; y++) value[i][y] = P::splat(x + i * vector_step + y * H, x_step);
    }
    const float* row = taps;
#pragma GCC unroll 16
    for (int d = 1 - H; d < H; d++, row += down) {  // row y + d of the input meets this row of the taps
      const Vector tap = P::load_taps(row, taps_step);
#pragma GCC unroll 8
      for (int y = 0; y < H; y++) {
#pragma GCC unroll 2
        for (int i = 0; i < N; i++) {
          if (y + d >= 0 && y + d < H) sum[i + (d & (chains - 1))][y] += tap * value[i][y + d];
        }
      }
    }
  }
  // in order, as the floats past one plane may belong to the next
#pragma GCC unroll 4
  for (int plane = 0; plane < N * P::kPlanes; plane++, out += out_step) {
    Vector* const result = sum[plane / P::kPlanes];
#pragma GCC unroll 8
    for (int y = 0; y < H; y++) {
      if (plane % P::kPlanes == 0) {
        if (chains == 2) result[y] += sum[1][y];
        if (forward) result[y] = P::reverse(result[y], H);
      }
      const RowVec v = P::get(result[y], plane % P::kPlanes);
      if (y + 1 < H || !exact) {
        store_line(out + y * H, v);
      } else {
        std::memcpy(out + y * H, &v, H * sizeof(float));
      }
    }
  }
}

// Multiplies every column of dy by all of x and sums over planes `x_step` and `dy_step` apart. Writes parts [H, 2 H -
// 1, 3 kTinySide], with the sums in the middle third of each row.
template <int H>
__attribute__((noinline)) void multiply_columns(const float* x, std::ptrdiff_t x_step, const float* dy,
                                                std::ptrdiff_t dy_step, int planes, float* parts) {
  // rows at most this far from the middle get two chains of additions
  constexpr int busy = kRegisters == 32 ? H / 2 : -1;
  RowBits inside;
  for (int i = 0; i < kRowLanes; i++) inside[i] = i < H ? -1 : 0;
  for (int column = 0; column < H; column++, dy++) {
    RowVec sum[2 * H - 1] = {}, other[2 * H - 1] = {};
    const float *in = x, *from = dy;
    for (int i = 0; i < planes; i++, in += x_step, from += dy_step) {
      RowVec row[H];
#pragma GCC unroll 8
      for (int y = 0; y < H; y++) row[y] = load_line(in + y * H);
#pragma GCC unroll 8
      for (int y = 0; y < H; y++) {
        const RowVec value = from[y * H] - RowVec{};
#pragma GCC unroll 8
        for (int r = 0; r < H; r++) {
          const int d = r - y;
          (y % 2 && d <= busy && -d <= busy ? other : sum)[d + H - 1] += value * row[r];
        }
      }
    }
#pragma GCC unroll 16
    for (int d = 0; d < 2 * H - 1; d++, parts += 3 * kTinySide) {
      const RowVec total = d - (H - 1) <= busy && H - 1 - d <= busy ? sum[d] + other[d] : sum[d];
      store_line(parts + kTinySide, (RowVec)((RowBits)total & inside));
    }
  }
}

// Adds up the parts of multiply_columns and, if given, the sums [2 H - 1, 2 kTinySide] of earlier images. Writes such
// sums to `to` if given, otherwise the gradient of a kernel whose middle is at `middle`.
template <int H>
__attribute__((noinline)) void merge_columns(const float* parts, const float* from, float* to, float* middle,
                                             int kernel) {
  constexpr int rows = 2 * H - 1, row = 3 * kTinySide, reach = H - 1;
  float* at = middle - (H - 1) * kernel - reach;
  parts += kTinySide - reach;
  for (int d = 0; d < rows; d++, at += kernel, parts += row) {
    for (int i = 0; i < 2 * kTinySide; i += kLanes) {
      Vec sum = {};
      const float* part = parts + i;
      for (int column = 0; column < H; column++, part += rows * row + 1) sum += load(part);
      if (from) sum += load(from + d * 2 * kTinySide + i);
      if (to) {
        store(to + d * 2 * kTinySide + i, sum);
      } else {  // the zeros after a row belong there or are overwritten by the next row
        store_clamped(at + i, sum, d + 1 < rows ? kLanes : 2 * reach + 1 - i);
      }
    }
  }
}

// Copies `count` values through `finish`.
template <class F = Identity>
LK_INLINE void copy_values(const float* from, int count, float* to, F finish = {}) {
  for_each_window(count, [&](int i) { store(to + i, finish(load(from + i))); },
                  [&] { store_partial(to, finish(load_partial(from, count)), count); });
}

// The middle of a channel's weights, in place, or in a copy for the last channel, as more than the weights is read.
LK_INLINE const float* middle_tap(const float* weight, int channel, const Shape& s, float* copied) {
  const int area = s.kernel * s.kernel;
  const float* from = weight + (std::ptrdiff_t)channel * area;
  if (channel + 1 < s.channels) return from + area / 2;
  copy_values(from, area, copied);
  return copied + area / 2;
}

// Correlates all planes of channels [begin, end): x [N, C, H, W] -> y. `memory` holds four output planes and two
// channels' weights.
template <int H, Pass pass>
void correlate_channels(const float* x, const float* weight, const Epilogue& epilogue, const Shape& s, int begin,
                        int end, float* y, float* memory) {
  constexpr int pixels = H * H;
  const std::ptrdiff_t image_step = (std::ptrdiff_t)s.channels * pixels;
  const bool direct = !epilogue.scale && !epilogue.shift && epilogue.activation == Activation::kNone;
  float *const out = memory, *const copied = out + 4 * kPlaneFloats;
  const std::ptrdiff_t copied_step = s.kernel * s.kernel + kLanes;

  // Computes `vectors` vectors of planes starting at this image and channel. The next plane is that of the next image
  // or channel.
  auto run = [&](auto planes, auto vectors, int image, int channel, const float* taps, const float* next_taps) {
    typedef decltype(planes) P;
    constexpr int count = P::kPlanes * vectors();
    constexpr int channel_step = P::kPlanes == 2 && std::is_same_v<P, TwoChannels> ? 1 : 0;
    const std::ptrdiff_t first = image * image_step + (std::ptrdiff_t)channel * pixels,
                         step = channel_step ? pixels : image_step;
    const bool exact = channel + channel_step + 1 == end;
    correlate_planes<P, vectors(), H, pass>(x + first, step, taps, next_taps - taps, s.kernel, direct ? y + first : out,
                                            direct ? step : kPlaneFloats, direct && exact);
    for (int i = 0; !direct && i < count; i++) {
      epilogue.with_channel(channel + i * channel_step, [&](auto finish) {
        copy_values(out + i * kPlaneFloats, pixels, y + first + i * step, finish);
      });
    }
  };

  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 2> two;
  const int paired = packs_plane_pairs() ? s.batch / 2 * 2 : 0;  // images
  for (int channel = begin; paired > 0 && channel < end; channel++) {
    const float* taps = middle_tap(weight, channel, s, copied);
    int image = 0;
    for (; image + 4 <= paired; image += 4) run(TwoImages{}, two, image, channel, taps, taps);
    if (image < paired) run(TwoImages{}, one, image, channel, taps, taps);
  }
  for (int channel = begin; paired < s.batch && channel < end; channel++) {
    const float* taps = middle_tap(weight, channel, s, copied);
    if (packs_plane_pairs() && channel + 1 < end) {  // two channels of the last image
      run(TwoChannels{}, one, paired, channel, taps, middle_tap(weight, channel + 1, s, copied + copied_step));
      channel++;
    } else {
      for (int image = paired; image < s.batch; image++) run(OnePlane{}, one, image, channel, taps, taps);
    }
  }
}

// Floats of scratch memory that correlate_channels needs.
inline std::size_t correlation_scratch(const Shape& s) { return 4 * kPlaneFloats + 2 * (s.kernel * s.kernel + kLanes); }

// x [N, C, H, W] -> y [N, C, H, W].
inline void correlate_tiny_map(const float* x, const float* weight, const Epilogue& epilogue, const Shape& s, Pass pass,
                               float* y) {
  if (kLanes < kTinySide) return;  // never selected; lets the compiler drop the code
  with_static_size(s.height, [&](auto height) {
    const auto run = pass == Pass::kForward ? correlate_channels<height(), Pass::kForward>
                                            : correlate_channels<height(), Pass::kInputGradient>;
    WorkStealingTasks pairs((s.channels + 1) / 2, 16);
#pragma omp parallel
    {
      Scratch scratch(correlation_scratch(s));
      pairs.for_each_chunk([&](std::ptrdiff_t begin, std::ptrdiff_t end) {
        run(x, weight, epilogue, s, 2 * (int)begin, std::min(2 * (int)end, s.channels), y, scratch.floats());
      });
    }
  });
}

// dweight [C, K, K], dbias [C] or null. One thread sums a channel over the batch, in order.
template <int H>
void weight_gradient_tiny_map(const float* x, const float* dy, const Shape& s, float* dweight, float* dbias) {
  constexpr int rows = 2 * H - 1, parts_size = kTinySide * rows * 3 * kTinySide, sums_size = rows * 2 * kTinySide;
  const int k = s.kernel, area = k * k;
  constexpr int pixels = H * H;
  const std::ptrdiff_t step = (std::ptrdiff_t)s.channels * pixels;
  WorkStealingTasks channels(s.channels);
#pragma omp parallel
  {
    Scratch scratch(2 * kImagesTogether * kPlaneFloats + parts_size + sums_size);
    float *const in = scratch.floats(), *const grads = in + kImagesTogether * kPlaneFloats,
                 *const parts = grads + kImagesTogether * kPlaneFloats;
    float* const sums = parts + parts_size;
    std::fill_n(in, 2 * kImagesTogether * kPlaneFloats + parts_size, 0.f);
    channels.for_each([&](int channel) {
      float bias = 0, *const to = dweight + (std::ptrdiff_t)channel * area;
      if (k > rows) std::fill_n(to, area, 0.f);
      for (int image = 0; image < s.batch; image += kImagesTogether) {
        const int images = std::min(kImagesTogether, s.batch - image);
        const float *from = x + image * step + (std::ptrdiff_t)channel * pixels, *grad = dy + (from - x);
        if (channel + 1 < s.channels) {
          multiply_columns<H>(from, step, grad, step, images, parts);
        } else {  // the last channel is copied, as more than these planes is read
          for (int i = 0; i < images; i++) {
            copy_values(from + i * step, pixels, in + i * kPlaneFloats);
            copy_values(grad + i * step, pixels, grads + i * kPlaneFloats);
          }
          multiply_columns<H>(in, kPlaneFloats, grads, kPlaneFloats, images, parts);
        }
        const bool last = image + images == s.batch;
        merge_columns<H>(parts, image ? sums : nullptr, last ? nullptr : sums, to + area / 2, k);
        for (int i = 0; dbias && i < images; i++) {
          Vec sum = {};
          for (int j = 0; j < pixels; j += kLanes) sum += load_clamped(grad + i * step + j, pixels - j);
          bias += sum_lanes(sum);
        }
      }
      if (dbias) store_partial(dbias + channel, splat(bias), 1);
    });
  }
}

inline void weight_gradient_tiny_map(const float* x, const float* dy, const Shape& s, float* dweight, float* dbias) {
  if (kLanes < kTinySide) return;  // never selected; lets the compiler drop the code
  with_static_size(s.height, [&](auto height) { weight_gradient_tiny_map<height()>(x, dy, s, dweight, dbias); });
}

}  // namespace large_kernel
