// Large kernels at stride 1 on larger maps, by a DFT along the rows: there a correlation becomes a product of
// frequencies. Along the columns, each frequency is correlated tap by tap (run_kernel.h). Forward pass, input gradient
// and weight gradient. Rounding errors are relative to the largest pixels of a row.
//
//   map, H rows          forward DFT        frequencies, per pair: H x (re, im)      inverse DFT      output, H rows
//   [x0 x1 ... | 0 0]  ------------->  pair 0    | | |  correlated down the      ------------->  [y0 y1 ... | unused]
//   length 44, 60 or 76                pair 1    | | |  column with the taps'
//                                      ...       v v v  frequencies
// Channels map to SIMD lanes. Wide maps are divided into tiles of columns, tall ones into strips of rows.
#pragma once
#include "depthwise_large_fir.h"
#include "dft.h"

namespace large_kernel {

// ---- transforms of rows ----

// Transforms `length` numbers into `pairs` pairs, `step` apart: pair 0 is a RealPair, the others are Complex.
struct RowTransform {
  const int length, pairs;
  RowTransform(int length) : length(length), pairs(length / 2) {}
  virtual ~RowTransform() = default;
  virtual void forward(const Vec* row, Vec* pairs, std::ptrdiff_t step) const = 0;
  // For a row of taps, with tap d at index d or length + d: the factor that turns products into a correlation.
  virtual void forward_taps(const Vec* row, Vec* pairs, std::ptrdiff_t step) const = 0;
  virtual void inverse(const Vec* pairs, std::ptrdiff_t step, Vec* row) const = 0;
};

// The functions are flattened for the reason given at gradient_leaf.
template <int M>
class Transform : public RowTransform {
 public:
  Transform() : RowTransform(4 * M), inverse_(1.f / (2 * M)) {}

  __attribute__((flatten)) void forward(const Vec* row, Vec* to, std::ptrdiff_t step) const override {
    const Dft<M> dft = forward_;  // a local copy, which the stores of results cannot alias
    dft.forward([&](auto n) { return row[n]; }, [&](int pair, Vec a, Vec b) { put(to + pair * step, a, b); });
  }

  __attribute__((flatten)) void forward_taps(const Vec* row, Vec* to, std::ptrdiff_t step) const override {
    const Dft<M> dft = forward_;
    dft.forward([&](auto n) { return row[(4 * M - n) % (4 * M)]; },
                [&](int pair, Vec a, Vec b) { put(to + pair * step, a, b); });
  }

  __attribute__((flatten)) void inverse(const Vec* from, std::ptrdiff_t step, Vec* row) const override {
    const Dft<M> dft = inverse_;
    dft.inverse([&](int pair, int i) { return from[pair * step + i]; }, [&](auto n, Vec v) { row[n] = v; });
  }

 private:
  const Dft<M> forward_, inverse_;
  static LK_INLINE void put(Vec* to, Vec a, Vec b) { to[0] = a, to[1] = b; }
};

// Calls f with the best tiling of a shape, which has to exist, and its transform.
template <class F>
void with_tiling(const Shape& s, F f) {
  const Tiling tiling = best_tiling(s);
  switch (tiling.length) {
    case 44: return f(tiling, Transform<11>());
    case 60: return f(tiling, Transform<15>());
    case 76: return f(tiling, Transform<19>());
  }
}

constexpr int kStripRows = 64;  // output rows whose frequencies are in memory at the same time

// Vectors from one pair's column of `rows` rows to the next one's: an odd number of rows, or all columns would share a
// few cache sets.
inline std::ptrdiff_t pair_stride(int rows) { return 2 * (rows | 1); }

// Calls f(first row, end row, first input row, end input row) for each strip of outputs.
template <class F>
LK_INLINE void for_each_strip(int begin, int end, const Shape& s, F f) {
  for (int stop; begin < end; begin = stop) {
    stop = std::min(end, begin + kStripRows);
    f(begin, stop, std::max(0, begin - s.kernel / 2), std::min(s.height, stop + s.kernel / 2));
  }
}

// Calls f(first column, end column, first input column, end input column) for each tile of outputs.
template <class F>
LK_INLINE void for_each_tile(const Tiling& tiling, const Shape& s, F f) {
  const int reach = tiling.tiles == 1 ? s.width : s.kernel / 2;
  for (int tile = 0; tile < tiling.tiles; tile++) {
    const int x0 = s.width * tile / tiling.tiles, x1 = s.width * (tile + 1) / tiling.tiles;
    f(x0, x1, std::max(0, x0 - reach), std::min(s.width, x1 + reach));
  }
}

// Calls f(pair, an element of the type that the pair holds).
template <class F>
LK_INLINE void for_each_pair(const RowTransform& transform, F f) {
  f(0, RealPair{});
  for (int pair = 1; pair < transform.pairs; pair++) f(pair, Complex{});
}

template <class E>
LK_INLINE E* as_numbers(Vec* pairs, E) {
  return reinterpret_cast<E*>(pairs);
}

// x [N, C, H, W] -> y [N, C, H, W]. Blocks of channels with a result that is not finite are left to correlate_fir: a
// DFT carries NaN and Inf to windows that do not contain them.
inline void correlate_dft(const FeatureMap<const float>& x, const float* weight, const Epilogue& epilogue,
                          const Shape& s, Pass pass, const FeatureMap<float>& y, const Tiling& tiling,
                          const RowTransform& transform) {
  const int k = s.kernel, pad = k / 2, area = k * k, length = transform.length, pairs = transform.pairs;
  const CorrelationTasks tasks(s);
  const std::ptrdiff_t step = pair_stride(std::min(s.height, kStripRows + k - 1)), taps_step = pair_stride(k);
  const std::size_t per_thread = length + pairs * taps_step + std::max<std::size_t>((pairs + 1) * step, area);
  Scratch scratch(per_thread * tasks.threads * kLanes);
  std::vector<char> failed(tasks.count);
  WorkStealingTasks shared(tasks.count, tasks.per_block);
#pragma omp parallel num_threads(tasks.threads)
  {
    Vec* const row = scratch.vectors() + per_thread * omp_get_thread_num();
    Vec *const table = row + length, *const out_pairs = table + pairs * taps_step, *const in_pairs = out_pairs + step;
    int packed = -1;
    shared.for_each([&](std::ptrdiff_t task) {
      const int slice = task % tasks.slices, image = task / tasks.slices % s.batch, block = task / tasks.per_block;
      const int lanes = s.lanes(block), channel = block * kLanes;
      if (packed != block) {
        const bool rotated = pass == Pass::kInputGradient;
        pack(weight + (std::ptrdiff_t)channel * area, area, lanes, area, rotated ? out_pairs + area - 1 : out_pairs,
             rotated ? -1 : 1);
        std::fill_n(row, length, Vec{});
        // the kernel rows that meet any of the map, in reverse order, as correlate_run expects them
        for (int ky = std::max(0, pad - s.height + 1); ky < std::min(k, pad + s.height); ky++) {
          const Vec* const middle = out_pairs + ky * k + pad;
          std::copy_n(middle, pad + 1, row);
          std::copy_n(middle - pad, pad, row + length - pad);
          transform.forward_taps(row, table + 2 * (k - 1 - ky), taps_step);
        }
        packed = block;
      }
      FiniteCheck finite;
      const int top = s.height * slice / tasks.slices, bottom = s.height * (slice + 1) / tasks.slices;
      for_each_strip(top, bottom, s, [&](int begin, int stop, int first, int last) {
        for_each_tile(tiling, s, [&](int x0, int x1, int left, int right) {
          std::fill_n(row + (right - left), length - (right - left), Vec{});
          for (int i = first; i < last; i++) {
            if (i + 1 < last)
              x.prefetch<false>(image, channel, lanes, (std::ptrdiff_t)(i + 1) * s.width + left, right - left);
            x.read(image, channel, lanes, (std::ptrdiff_t)i * s.width + left, right - left, row);
            transform.forward(row, in_pairs + 2 * (i - first), step);
          }
          for_each_pair(transform, [&](int pair, auto number) {
            const auto *stream = as_numbers(in_pairs + pair * step, number),
                       *taps = as_numbers(table + pair * taps_step, number);
            auto* const to = as_numbers(out_pairs + pair * step, number);  // overwrites the previous pair's input
            for_each_run(stop - begin, std::min(k, max_run(number)), [&](int a, int b) {
              const int above = begin + a - pad;  // the input row that the kernel's first row meets
              const int skipped = std::max(0, -above);
              select_run_kernel(b - a, number)({stream + (above + skipped - first), 1, 0, taps, 0, 1}, k, skipped,
                                               std::min(k - 1 + b - a, s.height - above), nullptr, to + a);
            });
          });
          epilogue.with_channels(channel, lanes, [&](auto finish) {
            for (int i = begin; i < stop; i++) {
              if (i + 1 < stop)
                y.prefetch<true>(image, channel, lanes, (std::ptrdiff_t)(i + 1) * s.width + x0, x1 - x0);
              transform.inverse(out_pairs + 2 * (i - begin), step, row);
              y.write(row + (x0 - left), image, channel, lanes, (std::ptrdiff_t)i * s.width + x0, x1 - x0, [&](Vec v) {
                finite.see(v);
                return finish(v);
              });
            }
          });
        });
      });
      failed[task] = !finite.all();
    });
  }
  if (!any_failed(failed)) return;
  std::vector<char> blocks(tasks.count / tasks.slices);
  for (std::ptrdiff_t task = 0; task < tasks.count; task++) blocks[task / tasks.slices] |= failed[task];
  correlate_fir(x, weight, epilogue, s, pass, y, blocks);
}

// dweight [C, K, K], dbias [C] or null. One thread sums the frequencies over rows, tiles and images, in this order, so
// that results do not depend on the number of threads.
inline void weight_gradient_dft(const float* x, const float* dy, const Shape& s, float* dweight, float* dbias,
                                const Tiling& tiling, const RowTransform& transform) {
  const std::ptrdiff_t plane = (std::ptrdiff_t)s.height * s.width;
  const int k = s.kernel, pad = k / 2, area = k * k, length = transform.length, pairs = transform.pairs;
  const int threads = omp_get_max_threads(), slices = slice_count(s.blocks(), (k + 7) / 8);
  const std::ptrdiff_t x_step = pair_stride(std::min(s.height, kStripRows + k - 1)),
                       dy_step = pair_stride(std::min(s.height, kStripRows));
  const std::ptrdiff_t sum_step = pair_stride(k);
  const std::size_t per_thread = length + pairs * (x_step + dy_step + sum_step) + area;
  Scratch scratch(per_thread * threads * kLanes);
  std::vector<char> failed(s.blocks() * slices);
  WorkStealingTasks tasks((std::ptrdiff_t)s.blocks() * slices);
#pragma omp parallel num_threads(threads)
  {
    Vec* const row = scratch.vectors() + per_thread * omp_get_thread_num();
    Vec *const x_pairs = row + length, *const dy_pairs = x_pairs + pairs * x_step,
               *const sums = dy_pairs + pairs * dy_step;
    Vec* const out = sums + pairs * sum_step;
    tasks.for_each([&](int task) {
      const int slice = task % slices, block = task / slices, lanes = s.lanes(block), channel = block * kLanes;
      const int ky0 = k * slice / slices, ky1 = k * (slice + 1) / slices;
      std::fill_n(sums, pairs * sum_step, Vec{});
      Vec total = {};
      for (int image = 0; image < s.batch; image++) {
        const FeatureMap<const float> in = {x, s.channels, plane}, grad = {dy, s.channels, plane};
        for_each_strip(0, s.height, s, [&](int begin, int stop, int first, int last) {
          for_each_tile(tiling, s, [&](int x0, int x1, int left, int right) {
            std::fill_n(row + (right - left), length - (right - left), Vec{});
            for (int i = first; i < last; i++) {
              if (i + 1 < last)
                in.prefetch<false>(image, channel, lanes, (std::ptrdiff_t)(i + 1) * s.width + left, right - left);
              in.read(image, channel, lanes, (std::ptrdiff_t)i * s.width + left, right - left, row);
              transform.forward(row, x_pairs + 2 * (i - first), x_step);
            }
            std::fill_n(row, length, Vec{});
            // summed separately, so that small terms are not lost in large sums
            Vec bias = {};
            for (int i = begin; i < stop; i++) {  // in reverse order, as correlate_run expects them
              if (i + 1 < stop)
                grad.prefetch<false>(image, channel, lanes, (std::ptrdiff_t)(i + 1) * s.width + x0, x1 - x0);
              grad.read(image, channel, lanes, (std::ptrdiff_t)i * s.width + x0, x1 - x0, row + (x0 - left));
              if (dbias && slice == 0) bias += std::accumulate(row + (x0 - left), row + (x1 - left), Vec{});
              transform.forward_taps(row, dy_pairs + 2 * (stop - 1 - i), dy_step);
            }
            total += bias;
            const int low = std::max(ky0, pad - stop + 1), high = std::min(ky1, s.height - begin + pad),
                      rows = last - first;
            if (high <= low) return;
            for_each_pair(transform, [&](int pair, auto number) {
              const auto *stream = as_numbers(dy_pairs + pair * dy_step, number),
                         *table = as_numbers(x_pairs + pair * x_step, number);
              for_each_run(high - low, std::min(rows, max_run(number)), [&](int a, int b) {
                // the row of dy past the strip would meet row `below` of these rows of x
                const int below = stop + low + a - pad - first;
                Vec part[kMaxRun];  // summed separately, too
                select_run_kernel(b - a, number)(
                    {stream + std::max(0, below - rows), 1, 0, table, 0, 1}, rows, std::max(0, rows - below),
                    std::min(rows - below + stop - begin, rows - 1 + b - a), nullptr, as_numbers(part, number));
                Vec* const sum = sums + pair * sum_step + 2 * (low + a);
                for (int i = 0; i < 2 * (b - a); i++) sum[i] += part[i];
              });
            });
          });
        });
      }
      FiniteCheck finite;
      for (int ky = ky0; ky < ky1; ky++) {
        transform.inverse(sums + 2 * ky, sum_step, row);
        Vec* const to = out + (ky - ky0) * k;
        std::copy_n(row, pad + 1, to + pad);
        std::copy_n(row + length - pad, pad, to);
        for (int i = 0; i < k; i++) finite.see(to[i]);
      }
      failed[task] = !finite.all();
      unpack(out, (ky1 - ky0) * k, dweight + (std::ptrdiff_t)channel * area + ky0 * k, area, lanes);
      if (dbias && slice == 0) store_partial(dbias + channel, total, lanes);
    });
  }
  if (!any_failed(failed)) return;
  std::vector<char> blocks(s.blocks());
  for (std::size_t task = 0; task < failed.size(); task++) blocks[task / slices] |= failed[task];
  weight_gradient_fir(x, dy, s, dweight, dbias, blocks);
}

}  // namespace large_kernel
