// The weight gradient of large kernels at stride 1 on maps of 5x5 to 16x16 pixels. The outermost taps are sums of a few
// products, in which the rounding errors of a DFT would dominate. Therefore only Winograd's products of halves are
// used, along both axes.
//
//   x   = x0 | x1        taps   -S+1 ... -half | ... 0 ... | half ... S-1        S = 2 half, the side of the map
//   dy  = y0 | y1               x0 y1            all three   x1 y0
//   products (x0 - x1)(y0 - y1), x1 y0 and x0 y1: 3 per axis instead of 4, 9 per map instead of 16
// Channels map to SIMD lanes.
#pragma once
#include "depthwise_small_map.h"

namespace large_kernel {

// Along an axis of two halves of `half` pixels, the gradient of tap d is the sum of x[r] * dy[o] over r - o = d. With
// |d| < half and the products
//   difference[d] = the sum of (x0 - x1)[r] * (dy0 - dy1)[o],
//   first[d] = the sum of x1[r] * dy0[o],   second[d] = the sum of x0[r] * dy1[o],
// over r - o = d, the gradient of tap d is the sum of all three at d, plus first[d - half] and second[d + half] where
// these exist: three products instead of four (Winograd, 1980, transposed).
enum Product { kDifference, kFirst, kSecond };

inline int product_count(const Axis& axis) { return axis.parts == 2 ? 3 : 1; }
inline int half_taps(const Axis& axis) { return 2 * axis.half - 1; }

// Writes a - b.
inline void subtract_rows(Grid2D a, Grid2D b, int rows, int columns, Grid2D to) {
  for (; rows > 0; rows--, a.at += a.row, b.at += b.row, to.at += to.row) {
    for (int i = 0; i < columns; i++) to.at[i] = a.at[i] - b.at[i];
  }
}

// One factor of each product, indexed by the products along the rows and along the columns of the map.
struct Factors {
  Grid2D grid[3][3];
};

// Vectors of scratch memory for the factors.
inline int factors_scratch(const Axis& h, const Axis& w) { return (h.size() + 3 * h.half) * w.half; }

// The factors of an input, or with `output` of an output gradient.
inline Factors factors_of(const Grid2D& map, bool output, const Axis& h, const Axis& w, Vec* memory) {
  const Product low = output ? kFirst : kSecond, high = output ? kSecond : kFirst;
  Factors factors = {};
  Grid2D columns[3] = {map};
  if (w.parts == 2) {
    columns[low] = map;
    columns[high] = map.shifted(0, w.half);
    columns[kDifference] = {memory, w.half};
    subtract_rows(columns[low], columns[high], h.size(), w.half, columns[kDifference]);
    memory += h.size() * w.half;
  }
  for (int i = 0; i < product_count(w); i++) {
    factors.grid[0][i] = columns[i];
    if (h.parts == 1) continue;
    factors.grid[low][i] = columns[i];
    factors.grid[high][i] = columns[i].shifted(h.half, 0);
    factors.grid[kDifference][i] = {memory, w.half};
    subtract_rows(columns[i], factors.grid[high][i], h.half, w.half, factors.grid[kDifference][i]);
    memory += h.half * w.half;
  }
  return factors;
}

// The pairs of rows of x and dy that contribute to row d of the taps: `count` per image, in images `step` vectors
// apart.
struct RowPairs {
  const Vec *in, *from;
  std::ptrdiff_t in_row, from_row, step;
  int images, count;
};

// Calls f with each pair of rows.
template <class F>
LK_INLINE void for_each_pair(RowPairs pairs, F f) {
  for (int image = 0; image < pairs.images; image++, pairs.in += pairs.step, pairs.from += pairs.step) {
    const Vec *in = pairs.in, *from = pairs.from;
    for (int r = pairs.count; r > 0; r--, in += pairs.in_row, from += pairs.from_row) f(in, from);
  }
}

// Adds the gradient of a row of taps to sum [2 W - 1].
template <int W>
LK_INLINE void gradient_row(const RowPairs& pairs, Vec* sum) {
  for_each_pair(pairs, [&](const Vec* in, const Vec* from) {
    Vec value[W];
#pragma GCC unroll 8
    for (int i = 0; i < W; i++) value[i] = in[i];
#pragma GCC unroll 8
    for (int o = 0; o < W; o++) {
      const Vec v = from[o];
#pragma GCC unroll 8
      for (int i = 0; i < W; i++) sum[i - o + W - 1] += v * value[i];
    }
  });
}

// The same, with each row split into halves of A and B pixels and three products again. It uses about 30 registers.
template <int W>
LK_INLINE void gradient_row_halves(const RowPairs& pairs, Vec* sum) {
  constexpr int A = (W + 1) / 2, B = W / 2;
  Vec difference[2 * A - 1] = {}, first[W - 1] = {}, second[W - 1] = {};
  for_each_pair(pairs, [&](const Vec* in, const Vec* from) {
    Vec x0[A], x1[B], minus[A];
#pragma GCC unroll 4
    for (int i = 0; i < A; i++) x0[i] = in[i];
#pragma GCC unroll 4
    for (int i = 0; i < B; i++) x1[i] = in[A + i];
#pragma GCC unroll 4
    for (int i = 0; i < A; i++) minus[i] = i < B ? x0[i] - x1[i] : x0[i];
#pragma GCC unroll 4
    for (int o = 0; o < A; o++) {
      const Vec v = from[o], v_minus = o < B ? v - from[A + o] : v;
#pragma GCC unroll 4
      for (int i = 0; i < A; i++) difference[i - o + A - 1] += v_minus * minus[i];
#pragma GCC unroll 4
      for (int i = 0; i < B; i++) first[i - o + A - 1] += v * x1[i];
    }
#pragma GCC unroll 4
    for (int o = 0; o < B; o++) {
      const Vec v = from[A + o];
#pragma GCC unroll 4
      for (int i = 0; i < A; i++) second[i - o + B - 1] += v * x0[i];
    }
  });
#pragma GCC unroll 8
  for (int i = 0; i < 2 * A - 1; i++) sum[i + B] += difference[i];
#pragma GCC unroll 8
  for (int i = 0; i < W - 1; i++) {
    sum[i + B] += first[i], sum[i + W] += first[i];
    sum[i + A] += second[i], sum[i] += second[i];
  }
}

// Computes the gradient of the taps, [2 rows - 1, 2 W - 1], of images whose factors are `step` apart. Unless `first`,
// adds it to `out`: each group of images is summed separately, so that small terms are not lost in large sums. The
// function is flattened because GCC would otherwise keep the loop bodies as calls and their sums in memory.
template <int W>
__attribute__((noinline, flatten)) void gradient_leaf(Grid2D x, Grid2D dy, std::ptrdiff_t step, int images, int rows,
                                                      bool first, Vec* out) {
  constexpr int few = 2;  // with so few pairs of rows, terms that cancel could dominate the sum
  for (int d = 1 - rows; d < rows; d++, out += 2 * W - 1) {
    const int count = rows - std::abs(d);
    const RowPairs pairs = {
        x.at + std::max(d, 0) * x.row, dy.at + std::max(-d, 0) * dy.row, x.row, dy.row, step, images, count};
    Vec sum[2 * W - 1] = {};
    if (kRegisters == 32 && count > few) gradient_row_halves<W>(pairs, sum);
    else gradient_row<W>(pairs, sum);
#pragma GCC unroll 16
    for (int i = 0; i < 2 * W - 1; i++) out[i] = first ? sum[i] : out[i] + sum[i];
  }
}

// ---- from products to taps ----

// Row y of the taps, `columns` vectors wide; products are `step` vectors apart.
inline void merge_row(const Vec* product, std::ptrdiff_t step, const Axis& h, int y, int columns, Vec* out) {
  auto row = [&](int i, int y) { return product + i * step + (y + h.half - 1) * columns; };
  if (h.parts == 1) {
    std::copy_n(row(0, y), columns, out);
  } else if (std::abs(y) >= h.half) {
    std::copy_n(y > 0 ? row(kFirst, y - h.half) : row(kSecond, y + h.half), columns, out);
  } else {
    const Vec *difference = row(kDifference, y), *first = row(kFirst, y), *second = row(kSecond, y);
    for (int i = 0; i < columns; i++) out[i] = difference[i] + first[i] + second[i];
    if (y == 0) return;
    const Vec* far = y > 0 ? row(kFirst, y - h.half) : row(kSecond, y + h.half);
    for (int i = 0; i < columns; i++) out[i] += far[i];
  }
}

// A row of taps from a row of each product, [3, half_taps(w)].
inline void merge_columns(const Vec* difference, const Axis& w, Vec* out) {
  const Vec *first = difference + half_taps(w), *second = first + half_taps(w);
  const int half = w.half;
  auto sum = [&](int i) { return difference[i] + first[i] + second[i]; };
  for (int i = 0; i < half; i++) out[i] = second[i];
  for (int i = 0; i < half - 1; i++) out[half + i] = sum(i) + second[half + i];
  out[2 * half - 1] = sum(half - 1);
  for (int i = 0; i < half - 1; i++) out[2 * half + i] = sum(half + i) + first[i];
  for (int i = half - 1; i < 2 * half - 1; i++) out[2 * half + i] = first[i];
}

// dweight [C, K, K], dbias [C] or null. One thread sums a block of channels over the batch, in order. Blocks with a
// value that is not finite are left to weight_gradient_fir.
inline void weight_gradient_small_map(const float* x, const float* dy, const Shape& s, float* dweight, float* dbias) {
  constexpr int together = 4;  // images
  const Axis h(s.height), w(s.width);
  const int k = s.kernel, area = k * k, pixels = s.height * s.width, size = h.size() * w.size();
  const bool exact = pixels == size;
  const int map_size = size + factors_scratch(h, w), leaf = half_taps(h) * half_taps(w);
  const int count = product_count(h) * product_count(w);
  std::vector<char> failed(s.blocks());
  WorkStealingTasks blocks(s.blocks());
#pragma omp parallel
  {
    const int lines = 3 * half_taps(w) + 2 * w.size() - 1;
    Scratch scratch((std::size_t)(2 * together * map_size + count * leaf + area + pixels + lines) * kLanes);
    Vec *in = scratch.vectors(), *from = in + together * map_size, *sums = from + together * map_size;
    Vec *kernel = sums + count * leaf, *unpadded = kernel + area, *line = unpadded + pixels;
    Vec* const merged = line + 3 * half_taps(w);
    std::fill_n(in, 2 * together * map_size, Vec{});
    std::fill_n(kernel, area, Vec{});
    blocks.for_each([&](int block) {
      const int lanes = s.lanes(block);
      Vec bias = {};
      for (int image = 0; image < s.batch; image += together) {
        const int images = std::min(together, s.batch - image);
        Factors xs, dys;
        auto read = [&](const float* data, bool output, int i, Vec* map) {
          const std::ptrdiff_t offset = ((std::ptrdiff_t)(image + i) * s.channels + block * kLanes) * pixels;
          pack(data + offset, pixels, lanes, pixels, exact ? map : unpadded);
          if (!exact) copy_rows({unpadded, s.width}, {map, w.size()}, s.height, s.width);
          return factors_of({map, w.size()}, output, h, w, map + size);
        };
        for (int i = images - 1; i >= 0; i--) {
          xs = read(x, false, i, in + i * map_size);
          dys = read(dy, true, i, from + i * map_size);
        }
        for (int i = 0; i < (dbias ? images : 0); i++) {
          bias += std::accumulate(from + i * map_size, from + i * map_size + size, Vec{});
        }
        with_static_size(w.half, [&](auto columns) {
          for (int i = 0; i < product_count(h); i++) {
            for (int j = 0; j < product_count(w); j++) {
              gradient_leaf<columns()>(xs.grid[i][j], dys.grid[i][j], map_size, images, h.half, image == 0,
                                       sums + (i * product_count(w) + j) * leaf);
            }
          }
        });
      }
      const int high = std::min(k / 2, s.height - 1), wide = std::min(k / 2, s.width - 1);
      for (int y = -high; y <= high; y++) {
        for (int j = 0; j < product_count(w); j++) {
          merge_row(sums + j * leaf, product_count(w) * leaf, h, y, half_taps(w), line + j * half_taps(w));
        }
        Vec* const to = kernel + (k / 2 + y) * k + k / 2 - wide;
        if (w.parts == 2 && wide == w.size() - 1) {
          merge_columns(line, w, to);
        } else {
          if (w.parts == 2) merge_columns(line, w, merged);
          std::copy_n((w.parts == 2 ? merged : line) + w.size() - 1 - wide, 2 * wide + 1, to);
        }
      }
      FiniteCheck finite;
      unpack(kernel, area, dweight + (std::ptrdiff_t)block * kLanes * area, area, lanes, [&](Vec v) {
        finite.see(v);
        return v;
      });
      failed[block] = !finite.all();
      if (dbias) store_partial(dbias + block * kLanes, bias, lanes);
    });
  }
  if (any_failed(failed)) weight_gradient_fir(x, dy, s, dweight, dbias, failed);
}

}  // namespace large_kernel
