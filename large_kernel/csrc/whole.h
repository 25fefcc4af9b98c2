// Large kernels, stride 1, on small maps, where they reach from nearly every pixel to every other: channels in vector lanes,
// no taps skipped, and three products instead of four along either axis.
#pragma once
#include "large.h"

namespace dwconv {

// Along an axis, output o is the sum over r of taps[r - o] * x[r]. An axis of more than kLeaf pixels is cut in two halves of
// `half` pixels. With t = taps[d], t+ = taps[d + half] and t- = taps[d - half], |d| < half, the halves of the output are
//   (t+ + t) x1 + t (x0 - x1)   and   (t- + t) x0 - t (x0 - x1):
// three products of Toeplitz matrices and vectors instead of four (Winograd, 1980). Transposed, the same three give the
// gradient of the taps. Rounding errors are relative to the whole map, met by a kernel or not.
constexpr int kLeaf = kLargestSize;

enum Product { kDifference, kFirst, kSecond };  // t (x0 - x1), what else the first half of the output needs, the second

struct Axis {
  int half, parts;  // pixels; 1 part or 2

  explicit Axis(int size) : half(size > kLeaf ? (size + 1) / 2 : size), parts(size > kLeaf ? 2 : 1) {}
  int size() const { return half * parts; }  // with a zero behind an odd number of pixels
  int taps() const { return 2 * size() - 1; }
  int products() const { return parts == 2 ? 3 : 1; }
  int half_taps() const { return 2 * half - 1; }
  int sums() const { return 3 * half - 1; }  // of two taps that are `half` apart
};

// Rows of vectors.
struct Grid {
  Vec* at;
  std::ptrdiff_t row;

  Grid moved(int rows, int columns) const { return {at + rows * row + columns, row}; }
};

inline void copy_rows(Grid from, Grid to, int rows, int columns) {
  if (from.at == to.at) from.at += from.row, to.at += to.row, rows--;  // the first one is there
  for (; rows > 0; rows--, from.at += from.row, to.at += to.row) std::copy_n(from.at, columns, to.at);
}

// Writes a + sign * b.
inline void add_rows(Grid a, Grid b, float sign, int rows, int columns, Grid to) {
  for (; rows > 0; rows--, a.at += a.row, b.at += b.row, to.at += to.row) {
    for (int i = 0; i < columns; i++) to.at[i] = a.at[i] + sign * b.at[i];
  }
}

// One factor of each product, by product along the rows and along the columns; of taps, the one in the middle.
struct Factors {
  Grid grid[3][3];
};

// Vectors of memory for them.
inline int map_factors_size(const Axis& h, const Axis& w) { return (h.size() + 3 * h.half) * w.half; }
inline int tap_factors_size(const Axis& h, const Axis& w) {
  return h.taps() * w.sums() + h.sums() * (w.half_taps() + w.sums());
}

// Of an input, or of the gradient of an output.
inline Factors map_factors(const Grid& map, bool output, const Axis& h, const Axis& w, Vec* memory) {
  const Product low = output ? kFirst : kSecond, high = output ? kSecond : kFirst;
  Factors factors = {};
  Grid columns[3] = {map};
  if (w.parts == 2) {
    columns[low] = map;
    columns[high] = map.moved(0, w.half);
    columns[kDifference] = {memory, w.half};
    add_rows(columns[low], columns[high], -1.f, h.size(), w.half, columns[kDifference]);
    memory += h.size() * w.half;
  }
  for (int i = 0; i < w.products(); i++) {
    factors.grid[0][i] = columns[i];
    if (h.parts == 1) continue;
    factors.grid[low][i] = columns[i];
    factors.grid[high][i] = columns[i].moved(h.half, 0);
    factors.grid[kDifference][i] = {memory, w.half};
    add_rows(columns[i], factors.grid[high][i], -1.f, h.half, w.half, factors.grid[kDifference][i]);
    memory += h.half * w.half;
  }
  return factors;
}

// `taps` is the one in the middle. Row by row, so that what is added up is still in the first cache.
inline Factors tap_factors(const Grid& taps, const Axis& h, const Axis& w, Vec* memory) {
  Grid columns[3] = {taps}, rows[3];
  int count[3] = {w.half_taps()}, before[3] = {w.half - 1};  // columns, and those before the middle
  Vec* const sums = memory;
  if (w.parts == 2) {
    columns[kFirst] = Grid{sums, w.sums()}.moved(h.size() - 1, w.size() - 1);
    columns[kSecond] = columns[kFirst].moved(0, -w.half);
    memory += h.taps() * w.sums();
    count[kFirst] = w.sums(), before[kFirst] = w.size() - 1;
  }
  const int sets = w.parts;  // the second product takes the sums of the first
  for (int i = 0; i < sets; i++) {
    rows[i] = Grid{memory, count[i]}.moved(h.size() - 1, before[i]);
    memory += h.sums() * count[i];
  }
  for (int y = 1 - h.size(); y < h.size(); y++) {
    if (w.parts == 2) {
      const Grid from = taps.moved(y, 1 - w.size());
      add_rows(from, from.moved(0, w.half), 1.f, 1, w.sums(), columns[kFirst].moved(y, 1 - w.size()));
    }
    const int low = y - h.half;
    for (int i = 0; h.parts == 2 && low > -h.size() && i < sets; i++) {
      add_rows(columns[i].moved(low, -before[i]), columns[i].moved(y, -before[i]), 1.f, 1, count[i],
               rows[i].moved(low, -before[i]));
    }
  }
  Factors factors = {};
  for (int i = 0; i < w.products(); i++) {
    factors.grid[0][i] = columns[i];
    factors.grid[kFirst][i] = i == kSecond ? rows[kFirst].moved(0, -w.half) : rows[i];
    factors.grid[kSecond][i] = factors.grid[kFirst][i].moved(-h.half, 0);
  }
  return factors;
}

// ---- products of `rows` rows of W columns ----

// out = taps * x + sign_a * a + sign_b * b, where a and b may be missing.
template <int W>
__attribute__((noinline)) void correlate_leaf(Grid x, Grid taps, int rows, Grid a, float sign_a, Grid b, float sign_b,
                                              Grid out) {
  for (int o = 0; o < rows; o++, taps.at -= taps.row, a.at += a.row, b.at += b.row, out.at += out.row) {
    Vec sum[W] = {};
    if (a.row) {
#pragma GCC unroll 8
      for (int i = 0; i < W; i++) sum[i] = sign_a * a.at[i];
    }
    if (b.row) {
#pragma GCC unroll 8
      for (int i = 0; i < W; i++) sum[i] += sign_b * b.at[i];
    }
    const Vec *from = x.at, *tap = taps.at;
    for (int r = 0; r < rows; r++, from += x.row, tap += taps.row) {
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
    for (int i = 0; i < W; i++) out.at[i] = sum[i];
  }
}

// The gradient of the taps, [2 rows - 1, 2 W - 1], of images whose factors are `step` apart; unless `first`, added to what is
// there: images are summed by themselves, so that small terms do not drown in large sums.
template <int W>
__attribute__((noinline)) void gradient_leaf(Grid x, Grid dy, std::ptrdiff_t step, int images, int rows, bool first, Vec* out) {
  for (int d = 1 - rows; d < rows; d++, out += 2 * W - 1) {
    Vec sum[2 * W - 1] = {};
    const Vec *first_in = x.at + std::max(d, 0) * x.row, *first_from = dy.at + std::max(-d, 0) * dy.row;
    for (int image = 0; image < images; image++, first_in += step, first_from += step) {
      const Vec *in = first_in, *from = first_from;
      for (int r = rows - std::abs(d); r > 0; r--, in += x.row, from += dy.row) {
        Vec value[W];
#pragma GCC unroll 8
        for (int i = 0; i < W; i++) value[i] = in[i];
#pragma GCC unroll 8
        for (int o = 0; o < W; o++) {
          const Vec v = from[o];
#pragma GCC unroll 8
          for (int i = 0; i < W; i++) sum[i - o + W - 1] += v * value[i];
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < 2 * W - 1; i++) out[i] = first ? sum[i] : out[i] + sum[i];
  }
}

// ---- the whole map ----

// out [h.size(), w.size()]; `work` [h.half, w.size() + w.half].
template <int W>
void correlate_products(const Factors& x, const Factors& taps, const Axis& h, const Axis& w, Vec* work, Grid out) {
  const Grid none = {nullptr, 0}, difference = {work, out.row}, part = {work + h.half * out.row, W};
  for (int i = 0; i < h.products(); i++) {
    const bool shared = h.parts == 2 && i == kDifference;
    const Grid rows = h.parts == 2 && !shared ? difference : none;
    const Grid to = shared ? difference : i == kSecond ? out.moved(h.half, 0) : out;
    const float sign = i == kSecond ? -1.f : 1.f;
    auto product = [&](int j, Grid a, float sign_a, Grid b, Grid to) {
      correlate_leaf<W>(x.grid[i][j], taps.grid[i][j], h.half, a, sign_a, b, sign, to);
    };
    if (w.parts == 1) {
      product(0, none, 0, rows, to);
    } else {
      product(kDifference, none, 0, none, part);
      product(kFirst, part, 1.f, rows, to);
      product(kSecond, part, -1.f, shared || h.parts == 1 ? none : rows.moved(0, W), to.moved(0, W));
    }
  }
}

inline bool is_any(const std::vector<char>& flags) { return std::find(flags.begin(), flags.end(), 1) != flags.end(); }

// Whether kernels reach at least this share of the longest way across the map: those that do not would waste more products
// on taps they do not have than are saved.
inline bool is_whole(const Shape& s, float share) {
  const int longest = std::max(s.height, s.width), shortest = std::min(s.height, s.width);
  return longest <= 2 * kLeaf && shortest > kLeaf / 2 && s.kernel / 2 >= share * (longest - 1);
}

constexpr float kWholeMap = 0.75f, kWholeGradient = 0.55f;  // measured

// x [N, C, H, W] -> y [N, C, H, W]. Where a result is not finite, what is not may have been carried to outputs that do not meet
// it: those blocks of an image are left to `correlate_large`.
template <class T>
void correlate_whole(const Map<const T>& x, const T* weight, const Epilogue& epilogue, const Shape& s, Order order,
                     const Map<T>& y) {
  const Axis h(s.height), w(s.width);
  const int k = s.kernel, area = k * k, pixels = s.height * s.width, size = h.size() * w.size();
  const bool exact = pixels == size, covers = k / 2 >= h.size() - 1 && k / 2 >= w.size() - 1;
  const int padded = covers ? 0 : h.taps() * w.taps(), taps_size = area + padded + tap_factors_size(h, w);
  const int in_size = size + map_factors_size(h, w);
  const std::ptrdiff_t tasks = (std::ptrdiff_t)s.blocks() * s.batch;
  const std::ptrdiff_t chunk = std::max<std::ptrdiff_t>(1, tasks / (8 * omp_get_max_threads()));
  std::vector<char> failed(tasks);
#pragma omp parallel
  {
    Scratch scratch((std::size_t)(taps_size + in_size + 3 * size) * kLanes);
    Vec *table = scratch.vectors(), *in = table + taps_size, *out = in + in_size, *work = out + size;
    std::fill_n(in, size, Vec{});
    std::fill_n(table + area, padded, Vec{});
    Factors taps;
    int packed = -1;
#pragma omp for schedule(monotonic : dynamic, chunk)
    for (std::ptrdiff_t task = 0; task < tasks; task++) {
      const int image = task % s.batch, block = task / s.batch, lanes = s.lanes(block), channel = block * kLanes;
      if (packed != block) {
        const bool rotated = order == Order::kInputGradient;
        pack(weight + (std::ptrdiff_t)channel * area, area, lanes, area, rotated ? table + area - 1 : table, rotated ? -1 : 1);
        Grid all = {table + area / 2, k};
        if (!covers) {
          const Grid inside = {table + area + padded / 2, w.taps()};
          const int rows = std::min(k / 2, h.size() - 1), columns = std::min(k / 2, w.size() - 1);
          copy_rows(all.moved(-rows, -columns), inside.moved(-rows, -columns), 2 * rows + 1, 2 * columns + 1);
          all = inside;
        }
        taps = tap_factors(all, h, w, table + area + padded);
        packed = block;
      }
      x.read(image, channel, lanes, 0, pixels, exact ? in : out);
      if (!exact) copy_rows({out, s.width}, {in, w.size()}, s.height, s.width);
      const Factors map = map_factors({in, w.size()}, false, h, w, in + size);
      with_size(w.half, [&](auto columns) { correlate_products<columns()>(map, taps, h, w, work, {out, w.size()}); });
      if (!exact) copy_rows({out, w.size()}, {out, s.width}, s.height, s.width);
      epilogue.with_channels(channel, lanes, [&](auto finish) {
        Finite finite;
        y.write(out, image, channel, lanes, 0, pixels, [&](Vec v) {
          finite.see(v);
          return finish(v);
        });
        failed[task] = !finite.all();
      });
    }
  }
  if (is_any(failed)) correlate_large(x, weight, epilogue, s, order, y, failed);
}

// ---- gradients of the products back to those of the taps ----
// A tap is t in the factors of all three products, t+ in that of x1 and t- in that of x0. So its gradient is the sum of theirs,
// of that of x1 `half` taps further down, and of that of x0 `half` taps further up, as far as there are such.

// Row y of `columns` vectors; products are `step` vectors apart.
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

// A row, [taps()], of one of each product, [3, half_taps()].
inline void merge_columns(const Vec* difference, const Axis& w, Vec* out) {
  const Vec *first = difference + w.half_taps(), *second = first + w.half_taps();
  const int half = w.half;
  auto sum = [&](int i) { return difference[i] + first[i] + second[i]; };
  for (int i = 0; i < half; i++) out[i] = second[i];
  for (int i = 0; i < half - 1; i++) out[half + i] = sum(i) + second[half + i];
  out[2 * half - 1] = sum(half - 1);
  for (int i = 0; i < half - 1; i++) out[2 * half + i] = sum(half + i) + first[i];
  for (int i = half - 1; i < 2 * half - 1; i++) out[2 * half + i] = first[i];
}

// dweight [C, K, K], dbias [C] or null. One thread sums a block of channels over the batch, in its order. Blocks with a value
// that is not finite are left to `weight_gradient_large`.
template <class T>
void weight_gradient_whole(const T* x, const T* dy, const Shape& s, T* dweight, T* dbias) {
  constexpr int together = 4;  // images
  const Axis h(s.height), w(s.width);
  const int k = s.kernel, area = k * k, pixels = s.height * s.width, size = h.size() * w.size();
  const bool exact = pixels == size;
  const int map_size = size + map_factors_size(h, w), leaf = h.half_taps() * w.half_taps();
  const int products = h.products() * w.products();
  std::vector<char> failed(s.blocks());
#pragma omp parallel
  {
    Scratch scratch((std::size_t)(2 * together * map_size + products * leaf + area + pixels + 3 * w.half_taps() + w.taps()) *
                    kLanes);
    Vec *in = scratch.vectors(), *from = in + together * map_size, *sums = from + together * map_size;
    Vec *kernel = sums + products * leaf, *unpadded = kernel + area, *line = unpadded + pixels;
    Vec* const merged = line + 3 * w.half_taps();
    std::fill_n(in, 2 * together * map_size, Vec{});
    std::fill_n(kernel, area, Vec{});
#pragma omp for schedule(monotonic : dynamic, 1)
    for (int block = 0; block < s.blocks(); block++) {
      const int lanes = s.lanes(block);
      Vec bias = {};
      for (int image = 0; image < s.batch; image += together) {
        const int images = std::min(together, s.batch - image);
        Factors xs, dys;
        auto read = [&](const T* data, bool output, int i, Vec* map) {
          const std::ptrdiff_t offset = ((std::ptrdiff_t)(image + i) * s.channels + block * kLanes) * pixels;
          pack(data + offset, pixels, lanes, pixels, exact ? map : unpadded);
          if (!exact) copy_rows({unpadded, s.width}, {map, w.size()}, s.height, s.width);
          return map_factors({map, w.size()}, output, h, w, map + size);
        };
        for (int i = images - 1; i >= 0; i--) {
          xs = read(x, false, i, in + i * map_size);
          dys = read(dy, true, i, from + i * map_size);
        }
        for (int i = 0; i < (dbias ? images : 0); i++) {
          bias += std::accumulate(from + i * map_size, from + i * map_size + size, Vec{});
        }
        with_size(w.half, [&](auto columns) {
          for (int i = 0; i < h.products(); i++) {
            for (int j = 0; j < w.products(); j++) {
              gradient_leaf<columns()>(xs.grid[i][j], dys.grid[i][j], map_size, images, h.half, image == 0,
                                       sums + (i * w.products() + j) * leaf);
            }
          }
        });
      }
      const int high = std::min(k / 2, s.height - 1), wide = std::min(k / 2, s.width - 1);
      for (int y = -high; y <= high; y++) {
        for (int j = 0; j < w.products(); j++) {
          merge_row(sums + j * leaf, w.products() * leaf, h, y, w.half_taps(), line + j * w.half_taps());
        }
        Vec* const to = kernel + (k / 2 + y) * k + k / 2 - wide;
        if (w.parts == 2 && wide == w.size() - 1) {
          merge_columns(line, w, to);
        } else {
          if (w.parts == 2) merge_columns(line, w, merged);
          std::copy_n((w.parts == 2 ? merged : line) + w.size() - 1 - wide, 2 * wide + 1, to);
        }
      }
      Finite finite;
      unpack(kernel, area, dweight + (std::ptrdiff_t)block * kLanes * area, area, lanes, [&](Vec v) {
        finite.see(v);
        return v;
      });
      failed[block] = !finite.all();
      if (dbias) store_part(dbias + block * kLanes, bias, lanes);
    }
  }
  if (is_any(failed)) weight_gradient_large(x, dy, s, dweight, dbias, failed);
}

}  // namespace dwconv
