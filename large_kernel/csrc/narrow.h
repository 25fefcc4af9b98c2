// Large kernels, stride 1, that reach from every pixel of a small map to every other: pixels of a row in vector lanes and all
// rows of the map in registers. Nothing is transposed, nothing has a border, and no tap falls on padding: values that are not
// finite go where they should by themselves.
#pragma once
#include "rows.h"

namespace dwconv {

constexpr int kNarrow = kLargestSize;  // pixels of a row at most, and floats of a vector
constexpr int kPlane = kNarrow * kNarrow + std::max(kLanes, kNarrow);  // memory for a plane and what is touched behind it
constexpr int kTogether = 16;  // images whose planes stay in the first cache

// Fewer rows or columns leave too much of the registers empty; besides, what is touched behind a plane must be in the next one.
// Where two vectors of 16 lanes are multiplied in a cycle, those of 8 give away more than transposing costs.
inline bool is_narrow(const Shape& s) {
  const int longest = std::max(s.height, s.width);
  const bool serves = kLanes == kNarrow || (kLanes > kNarrow && !has_large_cache());
  return serves && longest <= kNarrow && s.height > kNarrow / 2 && s.width >= kNarrow / 2 &&
         s.kernel / 2 >= longest - 1;
}

constexpr int kLine = std::min(kNarrow, kLanes);  // with fewer lanes than kNarrow this only has to compile
typedef float Line __attribute__((vector_size(kLine * 4), may_alias));
typedef int32_t LineBits __attribute__((vector_size(kLine * 4)));
typedef float LineUnaligned __attribute__((vector_size(kLine * 4), aligned(4), may_alias));

DW_INLINE Line load_line(const float* p) { return *reinterpret_cast<const LineUnaligned*>(p); }
DW_INLINE void store_line(float* p, Line v) { *reinterpret_cast<LineUnaligned*>(p) = v; }

// Lanes width - 1 to 0, and after them any.
DW_INLINE Line reverse_line(Line v, int width) {
#if defined(__AVX2__)
  LineBits from;
  for (int i = 0; i < kLine; i++) from[i] = width - 1 - i;  // of each its last three bits count
  return (Line)_mm256_permutevar8x32_ps((__m256)v, (__m256i)from);
#else
  Line reversed = v;
  for (int i = 0; i < std::min(width, kLine); i++) reversed[i] = v[width - 1 - i];
  return reversed;
#endif
}

// One plane of H rows. `taps` points to the middle of a kernel, which is read as it lies: for the output its rows would have to
// run backwards, so there the lanes do, until the end. Writes out [H, width]; unless `exact`, up to kNarrow - 1 floats behind
// it too.
template <int H, Order order>
DW_INLINE void correlate_plane(const float* x, int width, const float* taps, int kernel, float* out, bool exact) {
  constexpr bool forward = order == Order::kForward;
  constexpr int chains = kRegisters == 32 ? 2 : 1;  // of additions, so that one need not wait for the one before
  const std::ptrdiff_t column = forward ? 1 : -1, down = column * kernel;
  taps -= (H - 1) * down + (forward ? width - 1 : 0);
  Line sum[chains][H] = {};
  for (const float* end = x + width; x < end; x++, taps += column) {
    Line value[H];
#pragma GCC unroll 8
    for (int y = 0; y < H; y++) value[y] = x[y * width] - Line{};
    const float* row = taps;
#pragma GCC unroll 16
    for (int d = 1 - H; d < H; d++, row += down) {  // row y + d of the input meets this row of the taps
      const Line tap = load_line(row);
#pragma GCC unroll 8
      for (int y = 0; y < H; y++) {
        if (y + d >= 0 && y + d < H) sum[d & (chains - 1)][y] += tap * value[y + d];
      }
    }
  }
#pragma GCC unroll 8
  for (int y = 0; y < H; y++) {
    Line v = chains == 2 ? sum[0][y] + sum[chains - 1][y] : sum[0][y];
    if (forward) v = reverse_line(v, width);
    if (y + 1 < H || !exact) {
      store_line(out + y * width, v);
    } else {
      std::memcpy(out + y * width, &v, width * sizeof(float));
    }
  }
}

// The products of every column of dy with all of x, summed over planes `x_step` and `dy_step` apart: parts
// [width, 2 H - 1, 3 kNarrow], each in the middle of its row.
template <int H>
__attribute__((noinline)) void multiply_columns(const float* x, std::ptrdiff_t x_step, const float* dy, std::ptrdiff_t dy_step,
                                                int planes, int width, float* parts) {
  constexpr int busy = kRegisters == 32 ? H / 2 : -1;  // rows at most this far from the middle have two chains of additions
  LineBits inside;
  for (int i = 0; i < kLine; i++) inside[i] = i < width ? -1 : 0;
  for (int column = 0; column < width; column++, dy++) {
    Line sum[2 * H - 1] = {}, other[2 * H - 1] = {};
    const float *in = x, *from = dy;
    for (int i = 0; i < planes; i++, in += x_step, from += dy_step) {
      Line row[H];
#pragma GCC unroll 8
      for (int y = 0; y < H; y++) row[y] = load_line(in + y * width);
#pragma GCC unroll 8
      for (int y = 0; y < H; y++) {
        const Line value = from[y * width] - Line{};
#pragma GCC unroll 8
        for (int r = 0; r < H; r++) {
          const int d = r - y;
          (y % 2 && d <= busy && -d <= busy ? other : sum)[d + H - 1] += value * row[r];
        }
      }
    }
#pragma GCC unroll 16
    for (int d = 0; d < 2 * H - 1; d++, parts += 3 * kNarrow) {
      const Line total = d - (H - 1) <= busy && H - 1 - d <= busy ? sum[d] + other[d] : sum[d];
      store_line(parts + kNarrow, (Line)((LineBits)total & inside));
    }
  }
}

// The gradient of the taps out of what multiply_columns wrote and, if there are, sums [2 H - 1, 2 kNarrow] of earlier images:
// to `to` if given, as such sums, or to a kernel's gradient with its middle at `middle`.
template <int H>
__attribute__((noinline)) void merge_columns(const float* parts, int width, const float* from, float* to, float* middle,
                                             int kernel) {
  constexpr int rows = 2 * H - 1, row = 3 * kNarrow;
  const int reach = width - 1;
  float* at = middle - (H - 1) * kernel - reach;
  parts += kNarrow - reach;
  for (int d = 0; d < rows; d++, at += kernel, parts += row) {
    for (int i = 0; i < 2 * kNarrow; i += kLanes) {
      Vec sum = {};
      const float* part = parts + i;
      for (int column = 0; column < width; column++, part += rows * row + 1) sum += load(part);
      if (from) sum += load(from + d * 2 * kNarrow + i);
      if (to) {
        store(to + d * 2 * kNarrow + i, sum);
      } else {  // zeros behind a row belong there or are written over by the next row
        store_first(at + i, sum, d + 1 < rows ? kLanes : 2 * reach + 1 - i);
      }
    }
  }
}

// `count` values to other memory, as another type, through `finish`.
template <class T, class U, class F = Identity>
DW_INLINE void copy_values(const T* from, int count, U* to, F finish = {}) {
  for_each_window(
      count, [&](int i) { store(to + i, finish(load(from + i))); },
      [&] { store_part(to, finish(load_part(from, count)), count); });
}

// The middle of a channel's weights: where they lie, or copied, with what is read behind them.
template <class T>
DW_INLINE const float* middle_tap(const T* weight, int channel, const Shape& s, float* copied) {
  const int area = s.kernel * s.kernel;
  const T* from = weight + (std::ptrdiff_t)channel * area;
  if constexpr (std::is_same_v<T, float>) {
    if (channel + 1 < s.channels) return from + area / 2;
  }
  copy_values(from, area, copied);
  return copied + area / 2;
}

// Calls f(first channel, last channel) once in each thread that has any: the same ones in every call, so that they find in
// their caches what they had there.
template <class F>
DW_INLINE void for_channels(const Shape& s, F f) {
  const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
  const auto first = [&](int thread) { return (int)((std::int64_t)s.channels * thread / threads); };
  if (first(thread) < first(thread + 1)) f(first(thread), first(thread + 1));
}

// One plane of x -> one of y. More than y is written, unless `exact`; `in` and `out` are memory for a plane each.
template <int H, Order order, class T, class F>
DW_INLINE void correlate_to(const T* x, const float* taps, const Shape& s, T* y, bool exact, float* in, float* out, F finish) {
  const int pixels = H * s.width;
  constexpr bool is_float = std::is_same_v<T, float>;
  if constexpr (is_float && std::is_same_v<F, Identity>) {
    return correlate_plane<H, order>(x, s.width, taps, s.kernel, y, exact);
  }
  const float* from = in;
  if constexpr (is_float) {
    from = x;
  } else {
    copy_values(x, pixels, in);
  }
  correlate_plane<H, order>(from, s.width, taps, s.kernel, out, false);
  copy_values(out, pixels, y, finish);
}

// x [N, C, H, W] -> y [N, C, H, W].
template <class T, int H>
void forward_narrow(const T* x, const T* weight, const Epilogue& epilogue, const Shape& s, T* y) {
  const int pixels = H * s.width;
  const bool plain = !epilogue.scale && !epilogue.shift && epilogue.activation == Activation::kNone;
#pragma omp parallel
  {
    Scratch scratch(2 * kPlane + s.kernel * s.kernel + kLanes);
    float *const in = scratch.floats(), *const out = in + kPlane, *const copied = out + kPlane;
    for_channels(s, [&](int begin, int end) {
      for (int channel = begin; channel < end; channel++) {
        const float* taps = middle_tap(weight, channel, s, copied);
        auto run = [&](auto finish) {
          for (int image = 0; image < s.batch; image++) {
            const std::ptrdiff_t plane = ((std::ptrdiff_t)image * s.channels + channel) * pixels;
            correlate_to<H, Order::kForward>(x + plane, taps, s, y + plane, channel + 1 == end, in, out, finish);
          }
        };
        plain ? run(Identity{}) : epilogue.with_channel(channel, run);
      }
    });
  }
}

template <class T>
void forward_narrow(const T* x, const T* weight, const Epilogue& epilogue, const Shape& s, T* y) {
  with_size(s.height, [&](auto height) { forward_narrow<T, height()>(x, weight, epilogue, s, y); });
}

// dx, dweight [C, K, K] and dbias [C] may be null. One thread sums a channel over the batch, in its order.
template <class T, int H>
void backward_narrow(const T* x, const T* weight, const T* dy, const Shape& s, T* dx, T* dweight, T* dbias) {
  constexpr bool is_float = std::is_same_v<T, float>;
  constexpr int rows = 2 * H - 1, parts_size = kNarrow * rows * 3 * kNarrow, sums_size = rows * 2 * kNarrow;
  const int k = s.kernel, area = k * k, pixels = H * s.width;
  const std::ptrdiff_t step = (std::ptrdiff_t)s.channels * pixels;
#pragma omp parallel
  {
    Scratch scratch(2 * kTogether * kPlane + parts_size + sums_size + area + 2 * kNarrow + 2 * kLanes);
    float *const in = scratch.floats(), *const out = in + kTogether * kPlane, *const parts = out + kTogether * kPlane;
    float *const sums = parts + parts_size, *const copied = sums + sums_size;  // of taps, then of their gradient
    std::fill_n(in, 2 * kTogether * kPlane + parts_size, 0.f);
    auto input_gradient = [&](int channel, bool exact) {
      const float* taps = middle_tap(weight, channel, s, copied);
      for (int image = 0; image < s.batch; image++) {
        const std::ptrdiff_t plane = image * step + (std::ptrdiff_t)channel * pixels;
        correlate_to<H, Order::kInputGradient>(dy + plane, taps, s, dx + plane, exact, in, out, Identity{});
      }
    };
    auto weight_gradient = [&](int channel) {
      float bias = 0, *to = copied;
      if constexpr (is_float) to = dweight + (std::ptrdiff_t)channel * area;
      if (k > rows || k / 2 > s.width - 1) std::fill_n(to, area, 0.f);
      for (int image = 0; image < s.batch; image += kTogether) {
        const int images = std::min(kTogether, s.batch - image);
        const T *from = x + image * step + (std::ptrdiff_t)channel * pixels, *grad = dy + (from - x);
        bool direct = false;
        if constexpr (is_float) {
          direct = channel + 1 < s.channels;  // the last one is copied, since more than it is read
          if (direct) multiply_columns<H>(from, step, grad, step, images, s.width, parts);
        }
        if (!direct) {
          for (int i = 0; i < images; i++) {
            copy_values(from + i * step, pixels, in + i * kPlane);
            copy_values(grad + i * step, pixels, out + i * kPlane);
          }
          multiply_columns<H>(in, kPlane, out, kPlane, images, s.width, parts);
        }
        const bool last = image + images == s.batch;
        merge_columns<H>(parts, s.width, image ? sums : nullptr, last ? nullptr : sums, to + area / 2, k);
        for (int i = 0; dbias && i < images; i++) {
          Vec sum = {};
          for (int j = 0; j < pixels; j += kLanes) sum += load_first(grad + i * step + j, pixels - j);
          bias += sum_lanes(sum);
        }
      }
      if constexpr (!is_float) copy_values(copied, area, dweight + (std::ptrdiff_t)channel * area);
      if (dbias) store_part(dbias + channel, splat(bias), 1);
    };
    for_channels(s, [&](int begin, int end) {
      for (int channel = begin; dx && channel < end; channel++) input_gradient(channel, channel + 1 == end);
      for (int channel = begin; dweight && channel < end; channel++) weight_gradient(channel);
    });
  }
}

template <class T>
void backward_narrow(const T* x, const T* weight, const T* dy, const Shape& s, T* dx, T* dweight, T* dbias) {
  with_size(s.height, [&](auto height) { backward_narrow<T, height()>(x, weight, dy, s, dx, dweight, dbias); });
}

}  // namespace dwconv
