// Large kernels, stride 1, that reach from every pixel of a small map to every other: pixels of a row in vector lanes and all
// rows of the map in registers. Nothing is transposed, nothing has a border, and no tap falls on padding: values that are not
// finite go where they should by themselves.
#pragma once
#include "rows.h"

namespace dwconv {

constexpr int kNarrow = 8;  // pixels of a row at most, and floats of a vector
constexpr int kPlane = kNarrow * kNarrow + std::max(kLanes, kNarrow);  // memory for a plane and what is written behind it
constexpr int kTogether = 8;  // channels, and images, whose planes a thread takes through one step before the next: a load of
                              // what was just stored in other pieces has to wait

// Fewer rows leave too much of the registers empty.
inline bool is_narrow(const Shape& s) {
  const int longest = std::max(s.height, s.width);
  return kLanes >= kNarrow && longest <= kNarrow && s.height > kNarrow / 2 && s.kernel / 2 >= longest - 1;
}

// Calls f with the height as a type.
template <class F>
void with_height(const Shape& s, F f) {
  using std::integral_constant;
  static_assert(kNarrow == 8);
  switch (s.height) {
    case 5: return f(integral_constant<int, 5>{});
    case 6: return f(integral_constant<int, 6>{});
    case 7: return f(integral_constant<int, 7>{});
    case 8: return f(integral_constant<int, 8>{});
  }
}

constexpr int kLine = std::min(kNarrow, kLanes);  // with fewer lanes than kNarrow this only has to compile
typedef float Line __attribute__((vector_size(kLine * 4), may_alias));
typedef int32_t LineBits __attribute__((vector_size(kLine * 4)));
typedef float LineUnaligned __attribute__((vector_size(kLine * 4), aligned(4), may_alias));

DW_INLINE Line load_line(const float* p) { return *reinterpret_cast<const LineUnaligned*>(p); }
DW_INLINE void store_line(float* p, Line v) { *reinterpret_cast<LineUnaligned*>(p) = v; }

// One plane of H rows. `taps` points to the middle of a kernel rotated by 180 degrees, or for the input gradient as it is.
// Writes out [H, width], and up to kNarrow - 1 floats behind it.
template <int H>
__attribute__((noinline)) void correlate_plane(const float* x, int width, const float* taps, int kernel, float* out) {
  constexpr int chains = kRegisters == 32 ? 2 : 1;  // of additions, so that one need not wait for the one before
  Line sum[chains][H] = {};
  taps += (H - 1) * kernel;  // row y + d of the input meets row -d of the taps
  for (const float* end = x + width; x < end; x++, taps--) {
    Line value[H];
#pragma GCC unroll 8
    for (int y = 0; y < H; y++) value[y] = x[y * width] - Line{};
    const float* row = taps;
#pragma GCC unroll 16
    for (int d = 1 - H; d < H; d++, row -= kernel) {
      const Line tap = load_line(row);
#pragma GCC unroll 8
      for (int y = 0; y < H; y++) {
        if (y + d >= 0 && y + d < H) sum[d & (chains - 1)][y] += tap * value[y + d];
      }
    }
  }
#pragma GCC unroll 8
  for (int y = 0; y < H; y++) store_line(out + y * width, chains == 2 ? sum[0][y] + sum[chains - 1][y] : sum[0][y]);
}

// Adds to the gradient of the weight, whose middle is at `sum`, the products of one column of dy with all of x, summed over
// planes that are kPlane apart.
template <int H>
__attribute__((noinline)) void add_column(const float* x, const float* dy, int planes, int width, int column, int kernel,
                                          float* sum) {
  Line part[2 * H - 1] = {};
  for (int i = 0; i < planes; i++, x += kPlane, dy += kPlane) {
    Line row[H];
#pragma GCC unroll 8
    for (int y = 0; y < H; y++) row[y] = load_line(x + y * width);
#pragma GCC unroll 8
    for (int y = 0; y < H; y++) {
      const Line value = dy[y * width + column] - Line{};
#pragma GCC unroll 8
      for (int from = 0; from < H; from++) part[from - y + H - 1] += value * row[from];
    }
  }
  LineBits inside;
  for (int i = 0; i < kLine; i++) inside[i] = i < width ? -1 : 0;
  sum -= (H - 1) * kernel + column;
#pragma GCC unroll 16
  for (int d = 0; d < 2 * H - 1; d++, sum += kernel) store_line(sum, load_line(sum) + (Line)((LineBits)part[d] & inside));
}

// A channel's weights, rotated by 180 degrees if `rotated`.
template <class T>
void read_taps(const T* weight, int area, bool rotated, float* taps) {
  for_each_window(
      area,
      [&](int i) {
        const Vec v = load(weight + i);
        store(taps + (rotated ? area - kLanes - i : i), rotated ? reverse(v) : v);
      },
      [] {});  // the smallest kernel is 9x9
}

// What will be read soon, of the next image or the next channels: the processor does not guess where that is.
template <class T>
DW_INLINE void prefetch(const T* from, int count) {
  for (int i = 0; i < count; i += 64 / (int)sizeof(T)) __builtin_prefetch(from + i);
}

// `count` values to other memory, as another type, through `finish`.
template <class T, class U, class F = Identity>
DW_INLINE void copy_values(const T* from, int count, U* to, F finish = {}) {
  for_each_window(
      count, [&](int i) { store(to + i, finish(load(from + i))); },
      [&] { store_part(to, finish(load_part(from, count)), count); });
}

// x [N, C, H, W] -> y [N, C, H, W].
template <class T, int H>
void correlate_narrow(const T* x, const T* weight, const Epilogue& epilogue, const Shape& s, Order order, T* y) {
  const int area = s.kernel * s.kernel, pixels = H * s.width, groups = (s.channels + kTogether - 1) / kTogether;
  const std::ptrdiff_t tasks = (std::ptrdiff_t)groups * s.batch, fair = tasks / (4 * omp_get_max_threads());
  const std::ptrdiff_t chunk = std::clamp<std::ptrdiff_t>(fair, 1, s.batch);
#pragma omp parallel
  {
    const std::size_t taps_size = area + kLanes;
    Scratch scratch(kTogether * (taps_size + 2 * kPlane));
    float *taps = scratch.floats(), *in = taps + kTogether * taps_size, *out = in + kTogether * kPlane;
    int packed = -1;
#pragma omp for schedule(monotonic : dynamic, chunk)
    for (std::ptrdiff_t task = 0; task < tasks; task++) {
      const int channel = task / s.batch * kTogether, image = task % s.batch, count = std::min(kTogether, s.channels - channel);
      const std::ptrdiff_t offset = ((std::ptrdiff_t)image * s.channels + channel) * pixels;
      const T *w = weight + (std::ptrdiff_t)channel * area, *from = x + offset;
      for (int i = 0; packed != channel && i < count; i++) {
        read_taps(w + i * area, area, order == Order::kForward, taps + i * taps_size);
      }
      packed = channel;
      if (image + 1 < s.batch) prefetch(from + (std::ptrdiff_t)s.channels * pixels, count * pixels);
      for (int i = 0; i < count; i++) {
        const float* plane = in + i * kPlane;
        if constexpr (std::is_same_v<T, float>) {
          plane = from + i * pixels;
        } else {
          copy_values(from + i * pixels, pixels, in + i * kPlane);
        }
        correlate_plane<H>(plane, s.width, taps + i * taps_size + area / 2, s.kernel, out + i * kPlane);
      }
      for (int i = 0; i < count; i++) {
        T* to = y + offset + i * pixels;
        epilogue.with_channel(channel + i, [&](auto finish) { copy_values(out + i * kPlane, pixels, to, finish); });
      }
    }
  }
}

template <class T>
void correlate_narrow(const T* x, const T* weight, const Epilogue& epilogue, const Shape& s, Order order, T* y) {
  with_height(s, [&](auto height) { correlate_narrow<T, height()>(x, weight, epilogue, s, order, y); });
}

// dweight [C, K, K], dbias [C] or null. One thread sums a channel over the batch, in its order.
template <class T, int H>
void weight_gradient_narrow(const T* x, const T* dy, const Shape& s, T* dweight, T* dbias) {
  const int area = s.kernel * s.kernel, pixels = H * s.width, groups = (s.channels + kTogether - 1) / kTogether;
#pragma omp parallel
  {
    constexpr int block = kTogether * kPlane, blocks = kTogether * block;
    const std::size_t sum_size = area + kLanes;
    Scratch scratch(2 * blocks + kTogether * sum_size);
    float *in = scratch.floats(), *out = in + blocks, *sums = out + blocks;
    std::fill_n(in, 2 * blocks, 0.f);
#pragma omp for schedule(static)
    for (int group = 0; group < groups; group++) {
      const int channel = group * kTogether, count = std::min(kTogether, s.channels - channel);
      float bias[kTogether] = {};
      std::fill_n(sums, kTogether * sum_size, 0.f);
      for (int image = 0; image < s.batch; image += kTogether) {
        const int images = std::min(kTogether, s.batch - image);
        for (int j = 0; j < images * count; j++) {
          const int i = j % count;
          const std::ptrdiff_t plane = (std::ptrdiff_t)(image + j / count) * s.channels + channel + i;
          prefetch(x + (plane + kTogether) * pixels, pixels);
          prefetch(dy + (plane + kTogether) * pixels, pixels);
          copy_values(x + plane * pixels, pixels, in + i * block + j / count * kPlane);
          copy_values(dy + plane * pixels, pixels, out + i * block + j / count * kPlane);
        }
        for (int i = 0; i < count; i++) {
          for (int column = 0; column < s.width; column++) {
            add_column<H>(in + i * block, out + i * block, images, s.width, column, s.kernel, sums + i * sum_size + area / 2);
          }
          Vec sum = {};
          for (int j = 0; j < images * kPlane; j += kLanes) sum += load(out + i * block + j);
          bias[i] += sum_lanes(sum);
        }
      }
      for (int i = 0; i < count; i++) {
        copy_values(sums + i * sum_size, area, dweight + (std::ptrdiff_t)(channel + i) * area);
        if (dbias) store_part(dbias + channel + i, splat(bias[i]), 1);
      }
    }
  }
}

template <class T>
void weight_gradient_narrow(const T* x, const T* dy, const Shape& s, T* dweight, T* dbias) {
  with_height(s, [&](auto height) { weight_gradient_narrow<T, height()>(x, dy, s, dweight, dbias); });
}

}  // namespace dwconv
