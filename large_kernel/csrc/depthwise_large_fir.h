// Large kernels at stride 1, by the fast FIR algorithm: forward pass, input gradient and weight gradient of the shapes
// that no faster algorithm takes, and the fallback of the others for blocks of channels with NaN or Inf. Rounding
// errors are relative to the rows in the window and up to 7 rows next to it.
//
//   [H * W][lanes] packed map      [K * K][lanes] packed kernel      outputs: runs of up to 16 columns in registers
//     even rows u                    even rows f0                      rows 2a      f0 u + f1 v
//     odd rows  v                    odd rows  f1                      rows 2a + 1  f0 v + f1 u'      u' = u, next row
//   Four products of half the height become three: (f0 + f1) v, f0 (u - v) and f1 (u' - v).
#pragma once
#include <omp.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "dispatch.h"
#include "epilogue.h"
#include "feature_map.h"
#include "finite.h"
#include "run_kernel.h"

namespace large_kernel {

// ---- correlation over rows: each level saves a quarter of the multiplications ----
//
// Row i of the result is the sum over b of filter[b] * input[i + b], where correlate_run computes the product of two
// rows. With the even and odd filter rows f0 and f1, the even and odd input rows u and v, and s = f0 + f1, rows 2a and
// 2a + 1 of the result are
//   s * v + f0 * (u - v)   and   s * v + f1 * (u shifted by one - v):
// three products of half the length instead of four (the transposed fast FIR algorithm, Mou and Duhamel, 1991). Each of
// them is again a correlation over rows.

// Rows lo <= i < hi; row i starts at data + i * stride.
struct RowView {
  const Vec* data;
  std::ptrdiff_t stride;
  int lo, hi;

  const Vec* row(int i) const { return data + i * stride; }
  RowView even() const { return {data, 2 * stride, (lo + 1) / 2, (hi + 1) / 2}; }
  RowView odd() const { return {data + stride, 2 * stride, lo / 2, hi / 2}; }
  RowView shifted() const { return {data + stride, stride, lo - 1, hi - 1}; }
};

// Writes a + sign * b, rows of `width` vectors, to `to` and advances `to`. Rows that only one of the two has count as
// zeros in the other.
inline RowView add_rows(const RowView& a, const RowView& b, float sign, int width, Vec*& to) {
  const int lo = std::min(a.lo, b.lo), hi = std::max(a.hi, b.hi);
  const RowView result = {to - (std::ptrdiff_t)lo * width, width, lo, hi};
  for (int i = lo; i < hi; i++, to += width) {
    const bool in_a = i >= a.lo && i < a.hi, in_b = i >= b.lo && i < b.hi;
    const Vec *p = a.row(i), *q = b.row(i);
    if (in_a && in_b) {
      for (int x = 0; x < width; x++) to[x] = p[x] + sign * q[x];
    } else if (in_a) {
      std::copy_n(p, width, to);
    } else {
      for (int x = 0; x < width; x++) to[x] = sign * q[x];
    }
  }
  return result;
}

constexpr int kFirInnerNodes[] = {0, 1, 4, 13};  // by number of levels
constexpr int kFirRowGroup = 8;  // rows of the result that share products at the highest number of levels

// The filter or the input of a correlation, and of the three correlations that each level reduces it to: the children
// of node n are 3 n + 1 to 3 n + 3.
struct FirTree {
  RowView node[40];
  int levels;

  // Vectors of scratch memory for the combined rows.
  static std::size_t size(int rows, int width, int levels) {
    std::size_t total = 0;
    for (std::size_t sets = 1; levels > 0; levels--, sets *= 3) {
      rows = rows / 2 + 2;
      total += sets * 2 * rows * width;
    }
    return total;
  }

  static FirTree of_filter(const RowView& rows, int width, int levels, Vec* memory) {
    FirTree result = {{rows}, levels};
    for (int n = 0; n < kFirInnerNodes[levels]; n++) {
      const RowView even = result.node[n].even(), odd = result.node[n].odd();
      result.node[3 * n + 1] = add_rows(even, odd, 1.f, width, memory);
      result.node[3 * n + 2] = even;
      result.node[3 * n + 3] = odd;
    }
    return result;
  }

  static FirTree of_input(const RowView& rows, int width, int levels, Vec* memory) {
    FirTree result = {{rows}, levels};
    for (int n = 0; n < kFirInnerNodes[levels]; n++) {
      const RowView even = result.node[n].even(), odd = result.node[n].odd();
      result.node[3 * n + 1] = odd;
      result.node[3 * n + 2] = add_rows(even, odd, -1.f, width, memory);
      result.node[3 * n + 3] = add_rows(even.shifted(), odd, -1.f, width, memory);
    }
    return result;
  }
};

// Computes rows [lo, hi) of the result, `width` columns each, at out + i * stride; adds row i of `from` if it is given.
// product(filter row, its stride, input row, its stride, count, from, out) calls correlate_run.
template <class F>
void fast_fir_rows(const FirTree& filter, const FirTree& input, int node, int lo, int hi, int width, const Vec* from,
                   std::ptrdiff_t from_stride, Vec* out, std::ptrdiff_t stride, F product) {
  if (node >= kFirInnerNodes[filter.levels]) {
    const RowView &f = filter.node[node], &x = input.node[node];
    for (int i = lo; i < hi; i++) {
      const int b = std::max(f.lo, x.lo - i), count = std::max(0, std::min(f.hi, x.hi - i) - b);
      product(f.row(b), f.stride, x.row(i + b), x.stride, count, from ? from + i * from_stride : nullptr,
              out + i * stride);
    }
    return;
  }
  constexpr int rows = 8;  // rows of the shared product computed at a time
  Vec shared[rows * kMaxRun];
  for (int a = lo / 2; a < (hi + 1) / 2; a += rows) {
    const int end = std::min(a + rows, (hi + 1) / 2);
    Vec* at = shared - (std::ptrdiff_t)a * kMaxRun;
    fast_fir_rows(filter, input, 3 * node + 1, a, end, width, nullptr, 0, at, kMaxRun, product);
    for (int odd = 0; odd < 2; odd++) {
      const int first = std::max(a, (lo - odd + 1) / 2), last = std::min(end, (hi - odd + 1) / 2);
      fast_fir_rows(filter, input, 3 * node + 2 + odd, first, last, width, at, kMaxRun, out + odd * stride, 2 * stride,
                    product);
    }
    for (int i = std::max(lo, 2 * a); from && i < std::min(hi, 2 * end); i++) {
      for (int j = 0; j < width; j++) out[i * stride + j] += from[i * from_stride + j];
    }
  }
}

// Computes rows [begin, end) of the output of one block of channels from the packed input and the packed kernel, [K][K]
// with each row reversed.
inline void correlate_block(const FirTree& table, const FirTree& in, const Shape& s, int begin, int end, Vec* out) {
  const int k = s.kernel, pad = k / 2;
  for_each_run(s.width, k, [&](int x0, int x1) {
    const auto correlate_run = select_run_kernel(x1 - x0, Vec{});
    const int first = std::max(0, pad - x0), last = std::min(k - 1 + x1 - x0, s.width - x0 + pad);
    fast_fir_rows(table, in, 0, begin, end, x1 - x0, nullptr, 0, out - (std::ptrdiff_t)begin * s.width + x0, s.width,
                  [&](const Vec* f, std::ptrdiff_t f_stride, const Vec* x, std::ptrdiff_t x_stride, int count,
                      const Vec* from, Vec* to) {
      correlate_run({x + (x0 - pad + first), 1, x_stride, f, f_stride, count}, k, first, last, from, to);
    });
  });
}

// Packs a block of weights, [kLanes, K, K], into rows for correlate_block, each row reversed; for the input gradient,
// of the kernel rotated by 180 degrees. The rows are stored in reverse order.
inline RowView pack_weights(const float* weight, int k, int lanes, Pass pass, Vec* table) {
  const bool backwards = pass == Pass::kForward;
  pack(weight, k * k, lanes, k * k, backwards ? table + k * k - 1 : table, backwards ? -1 : 1);
  return {table + (k - 1) * k, -k, 0, k};
}

// x [N, C, H, W] -> y [N, C, H, W]. If a result is not finite, its slice is computed again without the fast FIR
// algorithm, whose differences of rows carry NaN and Inf to windows that do not contain them. With `only`, [blocks, N],
// computes just the flagged images and blocks of channels.
inline void correlate_fir(const FeatureMap<const float>& x, const float* weight, const Epilogue& epilogue,
                          const Shape& s, Pass pass, const FeatureMap<float>& y, const std::vector<char>& only = {}) {
  const std::ptrdiff_t plane = (std::ptrdiff_t)s.height * s.width;
  const int area = s.kernel * s.kernel, pad = s.kernel / 2, levels = fir_levels(s.kernel, s.height);
  const int strip = std::min(s.height, std::max(16, 512 / s.width / 16 * 16));  // output rows computed together
  const CorrelationTasks tasks(s);
  const std::size_t table_size = area + FirTree::size(s.kernel, s.kernel, levels);
  const std::size_t in_size = plane + FirTree::size(s.height, s.width, levels);
  const std::size_t per_thread = in_size + (std::size_t)strip * s.width + table_size;
  Scratch scratch(per_thread * tasks.threads * kLanes);
  WorkStealingTasks shared(tasks.count, tasks.per_block);
#pragma omp parallel num_threads(tasks.threads)
  {
    Vec* in = scratch.vectors() + per_thread * omp_get_thread_num();
    Vec *out = in + in_size, *table = out + strip * s.width;
    FirTree filter = {};
    int packed = -1;
    shared.for_each([&](std::ptrdiff_t task) {
      const int slice = task % tasks.slices, image = task / tasks.slices % s.batch, block = task / tasks.per_block;
      const int lanes = s.lanes(block), channel = block * kLanes;
      if (!only.empty() && !only[task / tasks.slices]) return;
      // Slices start at multiples of kFirRowGroup, so that results do not depend on the number of threads.
      const int begin = s.height * slice / tasks.slices / kFirRowGroup * kFirRowGroup;
      const int end =
          slice + 1 == tasks.slices ? s.height : s.height * (slice + 1) / tasks.slices / kFirRowGroup * kFirRowGroup;
      const int in_begin = std::max(0, begin - pad), in_end = std::min(s.height, end + pad);
      if (packed != block) {
        const RowView rows = pack_weights(weight + (std::ptrdiff_t)channel * area, s.kernel, lanes, pass, table);
        filter = FirTree::of_filter(rows, s.kernel, levels, table + area);
        packed = block;
      }
      x.read(image, channel, lanes, (std::ptrdiff_t)in_begin * s.width, (in_end - in_begin) * s.width, in);
      // input row i is row i + pad here, which the kernel's first row meets
      const RowView rows = {in - (std::ptrdiff_t)(in_begin + pad) * s.width, s.width, in_begin + pad, in_end + pad};
      const FirTree input = FirTree::of_input(rows, s.width, levels, in + plane);
      epilogue.with_channels(channel, lanes, [&](auto finish) {
        auto compute = [&](const FirTree& f) {
          FiniteCheck finite;
          for (int row = begin; row < end; row += strip) {
            const int stop = std::min(end, row + strip);
            correlate_block(f, input, s, row, stop, out);
            y.write(out, image, channel, lanes, (std::ptrdiff_t)row * s.width, (stop - row) * s.width, [&](Vec v) {
              finite.see(v);
              return finish(v);
            });
          }
          return finite.all();
        };
        if (!compute(filter) && levels) compute({{filter.node[0]}, 0});
      });
    });
  }
}

// Adds rows [begin, end) of one image's weight gradient to `sum`, [end - begin][K]. The rows of dy take the place of
// the filter's rows and the rows of the kernel that of the output.
inline void weight_gradient_fir_rows(const FirTree& x, const FirTree& dy, const Shape& s, int begin, int end,
                                     Vec* sum) {
  const int k = s.kernel, pad = k / 2;
  const int reach = std::min(pad, s.width - 1);  // taps further out only meet padding
  const int lo = std::max(begin, pad - s.height + 1), hi = std::min(end, pad + s.height);
  // Kernel rows that meet fewer than `few` rows of the map are computed directly: the terms that cancel in the fast FIR
  // algorithm would dominate their rounding error.
  constexpr int rows = 16;
  const int few = 4 * x.levels;
  const FirTree plain_x = {{x.node[0]}, 0}, plain_dy = {{dy.node[0]}, 0};
  Vec part[rows * kMaxRun];
  for_each_run(2 * reach + 1, s.width, [&](int k0, int k1) {
    const auto correlate_run = select_run_kernel(k1 - k0, Vec{});
    const int first = std::max(0, reach - k0), last = s.width - k0 + reach;
    for (int ky = lo, stop; ky < hi; ky = stop) {
      const int full = pad - s.height + few,
                last_full = pad + s.height - few;  // the range that meets at least `few` rows
      stop = std::min({hi, ky + rows, ky < full ? full : ky <= last_full ? last_full + 1 : hi});
      const bool direct = ky < full || ky > last_full;
      fast_fir_rows(direct ? plain_dy : dy, direct ? plain_x : x, 0, ky, stop, k1 - k0, nullptr, 0,
                    part - (std::ptrdiff_t)ky * kMaxRun, kMaxRun,
                    [&](const Vec* d, std::ptrdiff_t d_stride, const Vec* in, std::ptrdiff_t in_stride, int count,
                        const Vec* from, Vec* to) {
        correlate_run({d + (last - 1 - first), -1, d_stride, in, in_stride, count}, s.width, first,
                      std::min(last, s.width - 1 + k1 - k0), from, to);
      });
      for (int y = ky; y < stop; y++) {
        Vec* out = sum + (std::ptrdiff_t)(y - begin) * k + (pad - reach + k0);
        for (int i = 0; i < k1 - k0; i++) out[i] += part[(y - ky) * kMaxRun + i];
      }
    }
  });
}

// dweight [C, K, K], dbias [C] or null. One thread sums each value in the order of the batch, so that results do not
// depend on the number of threads. With `only`, computes just the flagged blocks of channels.
inline void weight_gradient_fir(const float* x, const float* dy, const Shape& s, float* dweight, float* dbias,
                                const std::vector<char>& only = {}) {
  const std::ptrdiff_t plane = (std::ptrdiff_t)s.height * s.width;
  const int k = s.kernel, pad = k / 2, area = k * k, threads = omp_get_max_threads(),
            slices = slice_count(s.blocks(), (k + 7) / 8);
  const int levels = fir_levels(s.height, s.kernel);
  const std::size_t size = plane + FirTree::size(s.height, s.width, levels), per_thread = 2 * size + area;
  Scratch scratch(per_thread * threads * kLanes);
  WorkStealingTasks tasks((std::ptrdiff_t)s.blocks() * slices);
#pragma omp parallel num_threads(threads)
  {
    Vec* px = scratch.vectors() + per_thread * omp_get_thread_num();
    Vec *pdy = px + size, *sum = pdy + size;
    tasks.for_each([&](int task) {
      const int slice = task % slices, block = task / slices, lanes = s.lanes(block);
      if (!only.empty() && !only[block]) return;
      const int begin = k * slice / slices, end = k * (slice + 1) / slices, count = (end - begin) * k;
      Vec total = {};
      auto compute = [&](int levels) {
        std::fill(sum, sum + count, Vec{});
        total = Vec{};
        for (int image = 0; image < s.batch; image++) {
          const std::ptrdiff_t offset = ((std::ptrdiff_t)image * s.channels + block * kLanes) * plane;
          pack(x + offset, plane, lanes, (int)plane, px);
          pack(dy + offset, plane, lanes, (int)plane, pdy);
          const RowView rows = {px - (std::ptrdiff_t)pad * s.width, s.width, pad, s.height + pad};
          weight_gradient_fir_rows(FirTree::of_input(rows, s.width, levels, px + plane),
                                   FirTree::of_filter({pdy, s.width, 0, s.height}, s.width, levels, pdy + plane), s,
                                   begin, end, sum);
          if (dbias && slice == 0) {
            Vec bias = {};  // of each row and image separately, so that small terms are not lost in large sums
            for (int y = 0; y < s.height; y++) {
              const Vec* const row = pdy + (std::ptrdiff_t)y * s.width;
              bias += std::accumulate(row, row + s.width, Vec{});
            }
            total += bias;
          }
        }
        FiniteCheck finite;
        for (int i = 0; i < count; i++) finite.see(sum[i]);
        return finite.all();
      };
      if (!compute(levels) && levels) compute(0);
      unpack(sum, count, dweight + (std::ptrdiff_t)block * kLanes * area + begin * k, area, lanes);
      if (dbias && slice == 0) store_partial(dbias + block * kLanes, total, lanes);
    });
  }
}

}  // namespace large_kernel
