// Large kernels, stride 1, on larger maps: channels in vector lanes and rows as frequencies, so that along the rows a correlation
// is a product. Along the columns frequencies are correlated tap by tap. Rounding errors are relative to a row's largest pixels.
#pragma once
#include "dft.h"
#include "large.h"

namespace dwconv {

// ---- rows of `length` numbers and their frequencies: Reals and then Complex numbers, `pairs` in all, `step` apart ----

struct RowTransform {
  const int length, pairs;
  RowTransform(int length) : length(length), pairs(length / 2) {}
  virtual ~RowTransform() = default;
  // Of a row.
  virtual void there(const Vec* row, Vec* pairs, std::ptrdiff_t step) const = 0;
  // Of a row of taps around `middle`, zeros included, as a correlation has them.
  virtual void taps(const Vec* middle, Vec* pairs, std::ptrdiff_t step) const = 0;
  virtual void back(const Vec* pairs, std::ptrdiff_t step, Vec* row) const = 0;
};

// Flattened: see gradient_leaf.
template <int M>
class Transform : public RowTransform {
 public:
  Transform() : RowTransform(4 * M), back_(1.f / (2 * M)) {}

  __attribute__((flatten)) void there(const Vec* row, Vec* to, std::ptrdiff_t step) const override {
    const Dft<M> dft = there_;  // a copy, which writing results cannot change
    dft.row([&](auto n) { return row[n]; }, [&](int pair, Vec a, Vec b) { put(to + pair * step, a, b); });
  }

  __attribute__((flatten)) void taps(const Vec* middle, Vec* to, std::ptrdiff_t step) const override {
    const Dft<M> dft = there_;
    dft.taps(middle, [&](int pair, Vec a, Vec b) { put(to + pair * step, a, b); });
  }

  __attribute__((flatten)) void back(const Vec* from, std::ptrdiff_t step, Vec* row) const override {
    const Dft<M> dft = back_;
    dft.back([&](int pair, int i) { return from[pair * step + i]; }, [&](auto n, Vec v) { row[n] = v; });
  }

 private:
  const Dft<M> there_, back_;
  static DW_INLINE void put(Vec* to, Vec a, Vec b) { to[0] = a, to[1] = b; }
};

// Pairs of a row (or column) of outputs and the inputs that meet them.
inline std::int64_t meetings(int size, int kernel) {
  const std::int64_t reach = std::min(kernel / 2, size - 1);
  return size + reach * (2 * size - 1 - reach);
}

// Rows are cut into tiles of outputs, each a cyclic correlation of the inputs it reaches, which are so few, or stand so far from
// the ends, that nothing comes around to these outputs.
struct Tiling {
  int length = 0, tiles = 0;  // numbers of a transform; 0: none serves
  float cost = 0;             // of a map, about, in multiply-adds

  static Tiling of(int length, const Shape& s) {
    const int reach = s.kernel / 2, m = length / 4;
    const int most = s.width + reach <= length ? s.width : length - 2 * reach;  // outputs of a tile
    if (reach >= length / 2 || most < 1) return {};
    const int tiles = (s.width + most - 1) / most;
    const float transform = 2.f * m * m + 24 * m;
    const int tap_rows = std::min(s.kernel, 2 * s.height - 1);
    return {length, tiles, tap_rows * transform + tiles * (2 * s.height * transform + 2.f * length * meetings(s.height, s.kernel))};
  }
};

inline Tiling best_tiling(const Shape& s) {
  Tiling best;
  for (int length : {44, 60, 76}) {
    const Tiling tiling = Tiling::of(length, s);
    if (tiling.length && (!best.length || tiling.cost < best.cost)) best = tiling;
  }
  return best;
}

template <class F>
void with_transform(int length, F f) {
  switch (length) {
    case 44: return f(Transform<11>());
    case 60: return f(Transform<15>());
    case 76: return f(Transform<19>());
  }
}

// Whether frequencies take less time than the taps themselves, measured.
inline bool is_frequent(const Shape& s) {
  const Tiling tiling = best_tiling(s);
  return tiling.length && tiling.cost < 0.75f * meetings(s.height, s.kernel) * meetings(s.width, s.kernel);
}

constexpr int kStrip = 64;  // output rows whose frequencies are in memory together

// x [N, C, H, W] -> y [N, C, H, W]. Where a result is not finite, what is not may have been carried to outputs that do not meet
// it: those blocks of an image are left to `correlate_large`.
template <class T>
void correlate_frequencies(const Map<const T>& x, const T* weight, const Epilogue& epilogue, const Shape& s, Order order,
                           const Map<T>& y, const Tiling& tiling, const RowTransform& transform) {
  const int k = s.kernel, pad = k / 2, area = k * k, width = s.width, length = transform.length, pairs = transform.pairs;
  const int strip = std::min(s.height, kStrip), in_rows = std::min(s.height, strip + k - 1);
  const int threads = omp_get_max_threads(), cuts = parts((std::ptrdiff_t)s.blocks() * s.batch, (s.height + 15) / 16);
  const std::ptrdiff_t per_block = (std::ptrdiff_t)s.batch * cuts, tasks = per_block * s.blocks();
  const std::ptrdiff_t chunk = std::max<std::ptrdiff_t>(1, std::min(per_block, tasks / (4 * threads)));
  // From one pair's numbers to the next one's: an odd number of pairs, or all of them would share a few cache sets.
  const std::ptrdiff_t step = 2 * (in_rows | 1), taps_step = 2 * k;
  const std::size_t per_thread = 2 * length + pairs * taps_step + std::max<std::size_t>((pairs + 1) * step, area);
  Scratch scratch(per_thread * threads * kLanes);
  std::vector<char> failed(tasks);
#pragma omp parallel num_threads(threads)
  {
    Vec* const row = scratch.vectors() + per_thread * omp_get_thread_num();  // of 2 length numbers
    Vec *const table = row + 2 * length, *const out_pairs = table + pairs * taps_step, *const in_pairs = out_pairs + step;
    int packed = -1;
    // without "monotonic" the library that Paddle brings takes several times as long
#pragma omp for schedule(monotonic : dynamic, chunk)
    for (std::ptrdiff_t task = 0; task < tasks; task++) {
      const int cut = task % cuts, image = task / cuts % s.batch, block = task / per_block, lanes = s.lanes(block);
      const int channel = block * kLanes;
      if (packed != block) {
        const bool rotated = order == Order::kInputGradient;
        pack(weight + (std::ptrdiff_t)channel * area, area, lanes, area, rotated ? out_pairs + area - 1 : out_pairs,
             rotated ? -1 : 1);
        std::fill_n(row, 2 * length, Vec{});
        // those that meet any row of the map, in reverse, as `run` takes them
        for (int ky = std::max(0, pad - s.height + 1); ky < std::min(k, pad + s.height); ky++) {
          std::copy_n(out_pairs + ky * k, k, row + length - pad);
          transform.taps(row + length, table + 2 * (k - 1 - ky), taps_step);
        }
        packed = block;
      }
      const int end = s.height * (cut + 1) / cuts;
      Finite finite;
      for (int begin = s.height * cut / cuts, stop; begin < end; begin = stop) {
        stop = std::min(end, begin + strip);
        const int first = std::max(0, begin - pad), last = std::min(s.height, stop + pad);
        for (int tile = 0; tile < tiling.tiles; tile++) {
          const int x0 = width * tile / tiling.tiles, x1 = width * (tile + 1) / tiling.tiles;
          const int left = tiling.tiles == 1 ? 0 : std::max(0, x0 - pad);
          const int right = tiling.tiles == 1 ? width : std::min(width, x1 + pad);
          std::fill_n(row + (right - left), length - (right - left), Vec{});
          for (int i = first; i < last; i++) {
            x.read(image, channel, lanes, (std::ptrdiff_t)i * width + left, right - left, row);
            transform.there(row, in_pairs + 2 * (i - first), step);
          }
          // a pair's results take the place of the pair before
          for (int pair = 0; pair < pairs; pair++) {
            auto multiply = [&](auto number) {
              typedef decltype(number) E;
              const E *stream = reinterpret_cast<const E*>(in_pairs + pair * step);
              const E *taps = reinterpret_cast<const E*>(table + pair * taps_step);
              E* to = reinterpret_cast<E*>(out_pairs + pair * step);
              for_each_run(stop - begin, std::min(k, most_run<E>()), [&](int a, int b) {
                const int above = begin + a - pad, skipped = std::max(0, -above);  // the kernel's first row meets row `above`
                select_run(b - a, E{})({stream + (above + skipped - first), 1, 0, taps, 0, 1}, k, skipped,
                                       std::min(k - 1 + b - a, s.height - above), nullptr, to + a);
              });
            };
            pair ? multiply(Complex{}) : multiply(Reals{});
          }
          epilogue.with_channels(channel, lanes, [&](auto finish) {
            for (int i = begin; i < stop; i++) {
              transform.back(out_pairs + 2 * (i - begin), step, row);
              y.write(row + (x0 - left), image, channel, lanes, (std::ptrdiff_t)i * width + x0, x1 - x0, [&](Vec v) {
                finite.see(v);
                return finish(v);
              });
            }
          });
        }
      }
      failed[task] = !finite.all();
    }
  }
  if (std::find(failed.begin(), failed.end(), 1) == failed.end()) return;
  std::vector<char> blocks(tasks / cuts);
  for (std::ptrdiff_t task = 0; task < tasks; task++) blocks[task / cuts] |= failed[task];
  correlate_large(x, weight, epilogue, s, order, y, blocks);
}

}  // namespace dwconv
