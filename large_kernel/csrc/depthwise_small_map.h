// Large kernels at stride 1 on maps of 5x5 to 16x16 pixels, most of whose pixels meet each other: forward pass and
// input gradient. Rounding errors are relative to the whole map, including pixels outside the window.
//
//   rows of up to 8 pixels:   multiplied directly, a row of inputs and a row of sums in registers
//   rows of 9 to 16 pixels:   DFT along the row (length 20, 28 or 36), then for each frequency
//                             column of 2 H numbers  x0 | x1   as 3 products of H x H instead of 4:
//                             t (x0 - x1),  (t+ + t) x1,  (t- + t) x0      t, t+, t-: taps at distance d, d + H, d - H
// Channels map to SIMD lanes. Missing taps count as zeros, and no taps are skipped.
#pragma once
#include "depthwise_large_fir.h"
#include "dft.h"

namespace large_kernel {

// An axis of more than kDirectSide pixels is split in two halves; an odd number of pixels is padded with a zero.
struct Axis {
  int half, parts;  // pixels of a half; 1 or 2

  explicit Axis(int size) : half(size > kDirectSide ? (size + 1) / 2 : size), parts(size > kDirectSide ? 2 : 1) {}
  int size() const { return half * parts; }
};

// A matrix of vectors.
struct Grid2D {
  Vec* at;
  std::ptrdiff_t row;

  Grid2D shifted(int rows, int columns) const { return {at + rows * row + columns, row}; }
};

inline void copy_rows(Grid2D from, Grid2D to, int rows, int columns) {
  if (from.at == to.at) from.at += from.row, to.at += to.row, rows--;  // the first row is in place already
  for (; rows > 0; rows--, from.at += from.row, to.at += to.row) std::copy_n(from.at, columns, to.at);
}

// Prefetches during a correlation: `count` floats of the memory that its result will be written to, and of the next
// input.
struct MapPrefetcher {
  const float *result, *next;
  int count;

  // Prefetches one of `shares` equal shares.
  LK_INLINE void prefetch(int share, int shares) const {
    const int lines = (count + kCacheLine - 1) / kCacheLine;
    for (int i = lines * share / shares; i < lines * (share + 1) / shares; i++) {
      __builtin_prefetch(result + i * kCacheLine, 1);
      __builtin_prefetch(next + i * kCacheLine);
    }
  }
};

// ---- correlation of one map: output (i, j) is the sum over (r, c) of tap (r - i, c - j) times pixel (r, c) ----

struct SmallMapCorrelation {
  const int height, width, memory;  // of the map including padding; vectors of scratch memory

  SmallMapCorrelation(int height, int width, int memory) : height(height), width(width), memory(memory) {}
  virtual ~SmallMapCorrelation() = default;
  // Prepares the taps, [2 height - 1, 2 width - 1] around `middle`, which must remain in place.
  virtual void prepare(Grid2D middle, Vec* memory) const = 0;
  virtual void apply(const Vec* in, Grid2D middle, Vec* memory, Vec* out, const MapPrefetcher& prefetcher) const = 0;
};

// W inputs and W sums of a row are in registers: a tap is loaded once for up to W products.
template <int W>
class DirectCorrelation : public SmallMapCorrelation {
 public:
  explicit DirectCorrelation(int height) : SmallMapCorrelation(height, W, 0) {}
  void prepare(Grid2D, Vec*) const override {}
  void apply(const Vec* in, Grid2D taps, Vec*, Vec* out, const MapPrefetcher& prefetcher) const override {
    for (int o = 0; o < height; o++, taps.at -= taps.row, out += W) {
      prefetcher.prefetch(o, height);
      Vec sum[W] = {};
      const Vec *from = in, *tap = taps.at;
      for (int r = 0; r < height; r++, from += W, tap += taps.row) {
#pragma GCC unroll 16
        for (int d = 1 - W; d < W; d++) {
          const Vec t = tap[d];
#pragma GCC unroll 8
          for (int i = 0; i < W; i++) {
            if (i + d >= 0 && i + d < W) sum[i] += t * from[i + d];
          }
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < W; i++) out[i] = sum[i];
    }
  }
};

// Adds to the H sums re, im the products of H inputs xr, xi, a column of one frequency, and the taps t[d], |d| < H, or
// t[d] + also[d]. With kReal, re and im belong to two real frequencies.
template <int H, bool kReal>
LK_INLINE void multiply_column(const Vec* xr, const Vec* xi, const Vec* t, const Vec* also, Vec* re, Vec* im) {
#pragma GCC unroll 16
  for (int d = 1 - H; d < H; d++) {
    const Vec tr = also ? t[2 * d] + also[2 * d] : t[2 * d];
    const Vec ti = also ? t[2 * d + 1] + also[2 * d + 1] : t[2 * d + 1];
#pragma GCC unroll 8
    for (int i = 0; i < H; i++) {
      if (i + d < 0 || i + d >= H) continue;
      re[i] += tr * xr[i + d];
      im[i] += (kReal ? ti : tr) * xi[i + d];
    }
#pragma GCC unroll 8
    for (int i = 0; i < H; i++) {
      if (kReal || i + d < 0 || i + d >= H) continue;
      re[i] -= ti * xi[i + d];
      im[i] += ti * xr[i + d];
    }
  }
}

// Replaces a column of a pair of frequencies, x [parts * H][2], by its correlation with taps [2 parts * H - 1][2]. With
// t = t[d], t+ = t[d + H] and t- = t[d - H], |d| < H, the halves of the output are
//   (t+ + t) x1 + t (x0 - x1)   and   (t- + t) x0 - t (x0 - x1):
// three products instead of four (Winograd, 1980).
template <int H, bool kReal>
__attribute__((noinline)) void correlate_column(Vec* x, const Vec* taps, int parts) {
  const Vec* const t = taps + 2 * (parts * H - 1);
  Vec *const x1 = x + 2 * H, xr[H], xi[H], re[H] = {}, im[H] = {};
#pragma GCC unroll 8
  for (int i = 0; i < H; i++) {
    xr[i] = parts == 2 ? x[2 * i] - x1[2 * i] : x[2 * i];
    xi[i] = parts == 2 ? x[2 * i + 1] - x1[2 * i + 1] : x[2 * i + 1];
  }
  multiply_column<H, kReal>(xr, xi, t, nullptr, re, im);
  if (parts == 1) {
#pragma GCC unroll 8
    for (int i = 0; i < H; i++) x[2 * i] = re[i], x[2 * i + 1] = im[i];
    return;
  }
  Vec difference[2 * H];
#pragma GCC unroll 8
  for (int i = 0; i < H; i++) {
    difference[2 * i] = re[i], difference[2 * i + 1] = im[i];
    xr[i] = x1[2 * i], xi[i] = x1[2 * i + 1];
  }
  multiply_column<H, kReal>(xr, xi, t, t + 2 * H, re, im);
#pragma GCC unroll 8
  for (int i = 0; i < H; i++) {
    xr[i] = x[2 * i], xi[i] = x[2 * i + 1];
    x[2 * i] = re[i], x[2 * i + 1] = im[i];
    re[i] = -difference[2 * i], im[i] = -difference[2 * i + 1];
  }
  multiply_column<H, kReal>(xr, xi, t, t - 2 * H, re, im);
#pragma GCC unroll 8
  for (int i = 0; i < H; i++) x1[2 * i] = re[i], x1[2 * i + 1] = im[i];
}

// DFT along the rows, direct correlation along the columns. The functions are flattened for the reason given at
// gradient_leaf.
template <int M>
class DftCorrelation : public SmallMapCorrelation {
 public:
  explicit DftCorrelation(const Axis& axis)
      : SmallMapCorrelation(axis.size(), D::kPixels, D::kPairs * 2 * (3 * axis.size() - 1)),
        axis_(axis),
        inverse_(1.f / D::kPixels) {}

  __attribute__((flatten)) void prepare(Grid2D middle, Vec* memory) const override {
    const D dft = forward_;
    const Grid2D first = middle.shifted(1 - height, 0);
    for (int y = 0; y < taps(); y++) {
      dft.forward_taps(first.shifted(y, 0).at,
                       [&](int pair, Vec a, Vec b) { put(memory + 2 * (pair * taps() + y), a, b); });
    }
  }

  __attribute__((flatten)) void apply(const Vec* in, Grid2D, Vec* memory, Vec* out,
                                      const MapPrefetcher& prefetcher) const override {
    Vec* const columns = memory + D::kPairs * 2 * taps();
    const D dft = forward_, inverse = inverse_;  // local copies, which the stores of results cannot alias
    for (int y = 0; y < height; y++) {
      dft.forward_padded(in + y * width, [&](int pair, Vec a, Vec b) { put(columns + 2 * (pair * height + y), a, b); });
    }
    with_static_size(axis_.half, [&](auto half) {
      correlate_column<half(), true>(columns, memory, axis_.parts);
      for (int pair = 1; pair < D::kPairs; pair++) {
        prefetcher.prefetch(pair - 1, D::kPairs - 1);
        correlate_column<half(), false>(columns + 2 * pair * height, memory + pair * 2 * taps(), axis_.parts);
      }
    });
    for (int y = 0; y < height; y++) {
      inverse.inverse([&](int pair, int i) { return columns[2 * (pair * height + y) + i]; }, [&](auto n, Vec v) {
        if (n < width) out[y * width + n] = v;
      });
    }
  }

 private:
  using D = Dft<M>;
  const Axis axis_;
  const D forward_, inverse_;

  int taps() const { return 2 * height - 1; }
  static LK_INLINE void put(Vec* to, Vec a, Vec b) { to[0] = a, to[1] = b; }
};

// Calls f with the correlation for maps of this size.
template <class F>
void with_correlation(int height, int width, F f) {
  const Axis rows(height);
  if (width <= kDirectSide) return with_static_size(width, [&](auto w) { f(DirectCorrelation<w()>(height)); });
  if (width <= Dft<5>::kPixels) return f(DftCorrelation<5>(rows));
  if (width <= Dft<7>::kPixels) return f(DftCorrelation<7>(rows));
  f(DftCorrelation<9>(rows));
}

// ---- tensors ----

// x [N, C, H, W] -> y [N, C, H, W]. Images and blocks of channels with a result that is not finite are left to
// correlate_fir.
inline void correlate_small_map(const FeatureMap<const float>& x, const float* weight, const Epilogue& epilogue,
                                const Shape& s, Pass pass, const FeatureMap<float>& y,
                                const SmallMapCorrelation& correlation) {
  const int k = s.kernel, area = k * k, pixels = s.height * s.width, height = correlation.height,
            width = correlation.width;
  const int size = height * width;
  const bool exact = pixels == size, covers = k / 2 >= height - 1 && k / 2 >= width - 1;
  const int padded = covers ? 0 : (2 * height - 1) * (2 * width - 1);
  const std::ptrdiff_t tasks = (std::ptrdiff_t)s.blocks() * s.batch;
  std::vector<char> failed(tasks);
  WorkStealingTasks shared(tasks, s.batch);
#pragma omp parallel
  {
    Scratch scratch((std::size_t)(area + padded + correlation.memory + 2 * size) * kLanes);
    Vec *table = scratch.vectors(), *memory = table + area + padded, *in = memory + correlation.memory,
        *out = in + size;
    std::fill_n(in, size, Vec{});
    std::fill_n(table + area, padded, Vec{});
    const Grid2D kernel = {table + area / 2, k}, inside = {table + area + padded / 2, 2 * width - 1};
    const Grid2D taps = covers ? kernel : inside;
    int packed = -1;
    shared.for_each([&](std::ptrdiff_t task) {
      const int image = task % s.batch, block = task / s.batch, lanes = s.lanes(block), channel = block * kLanes;
      if (packed != block) {
        const bool rotated = pass == Pass::kInputGradient;
        pack(weight + (std::ptrdiff_t)channel * area, area, lanes, area, rotated ? table + area - 1 : table,
             rotated ? -1 : 1);
        if (!covers) {
          const int rows = std::min(k / 2, height - 1), columns = std::min(k / 2, width - 1);
          copy_rows(kernel.shifted(-rows, -columns), inside.shifted(-rows, -columns), 2 * rows + 1, 2 * columns + 1);
        }
        correlation.prepare(taps, memory);
        packed = block;
      }
      x.read(image, channel, lanes, 0, pixels, exact ? in : out);
      if (!exact) copy_rows({out, s.width}, {in, width}, s.height, s.width);
      const std::ptrdiff_t then = std::min(task + 1, tasks - 1);
      correlation.apply(in, taps, memory, out,
                        {y.at(image, channel, 0), x.at(then % s.batch, (int)(then / s.batch) * kLanes, 0),
                         pixels * (y.nchw16c ? kChannelBlock : lanes)});
      if (!exact) copy_rows({out, width}, {out, s.width}, s.height, s.width);
      epilogue.with_channels(channel, lanes, [&](auto finish) {
        FiniteCheck finite;
        y.write(out, image, channel, lanes, 0, pixels, [&](Vec v) {
          finite.see(v);
          return finish(v);
        });
        failed[task] = !finite.all();
      });
    });
  }
  if (any_failed(failed)) correlate_fir(x, weight, epilogue, s, pass, y, failed);
}

}  // namespace large_kernel
