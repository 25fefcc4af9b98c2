// Large kernels, stride 1: channels in vector lanes, a run of outputs in registers, taps on padding skipped exactly, and
// fewer multiplications than taps.
#pragma once
#include <omp.h>

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "epilogue.h"
#include "feature_map.h"

namespace large_kernel {

struct Shape {
  int batch, channels, height, width, kernel, stride;
  int out_height() const { return (height - 1) / stride + 1; }
  int out_width() const { return (width - 1) / stride + 1; }
  int blocks() const { return (channels + kLanes - 1) / kLanes; }
  int lanes(int block) const { return std::min(kLanes, channels - block * kLanes); }
};

constexpr int kMaxStaticSize = 8;

// Calls f with a size from 5 to kMaxStaticSize, rows or columns that are held in registers, as a type.
template <class F>
void with_static_size(int size, F f) {
  using std::integral_constant;
  static_assert(kMaxStaticSize == 8);
  switch (size) {
    case 5: return f(integral_constant<int, 5>{});
    case 6: return f(integral_constant<int, 6>{});
    case 7: return f(integral_constant<int, 7>{});
    case 8: return f(integral_constant<int, 8>{});
  }
}

// ---- the inner kernel ----
// Output j < W of a run gets from[j], or 0 without `from`, plus the sum over rows and over steps s in [first, last) of
//   stream[row][s] * table[row][length - 1 - s + j],   where that entry of the table exists.
// A forward row streams inputs past a table of weights; a weight-gradient row streams output gradients past a table of
// inputs. Entries exist for j <= s and j > s - length: a prefix of the run while s < W - 1, a suffix from s = length on,
// all of it in between. W <= length, first < length and last >= W hold for every caller, so each region is entered or
// left early at one end only. Half of the registers hold accumulators: with more, GCC spills.

constexpr int kMaxRun = kRegisters == 32 ? 16 : 12;

// Numbers E: vectors, or pairs of them as Complex or Reals.
struct Complex { Vec re, im; };
struct RealPair { Vec first, second; };

LK_INLINE void accumulate_product(Vec& sum, Vec a, Vec b) { sum += a * b; }
LK_INLINE void accumulate_product(RealPair& sum, const RealPair& a, const RealPair& b) {
  sum.first += a.first * b.first;
  sum.second += a.second * b.second;
}
LK_INLINE void accumulate_product(Complex& sum, const Complex& a, const Complex& b) {
  sum.re += a.re * b.re;
  sum.im += a.im * b.re;
  sum.re -= a.im * b.im;
  sum.im += a.re * b.im;
}

template <class E>
struct RowOperands {
  const E* stream;
  std::ptrdiff_t stream_step, stream_row;
  const E* table;
  std::ptrdiff_t table_row;
  int count;
};

template <int First, class E, int W, int... J>
LK_INLINE void multiply_add(E (&sum)[W], const E* stream, const E* table, std::integer_sequence<int, J...>) {
  const E value = *stream;
  (accumulate_product(sum[First + J], value, table[First + J]), ...);
}

template <int First, int Last, class E, int W>
LK_INLINE void accumulate_step(E (&sum)[W], const E*& stream, const E*& table, std::ptrdiff_t stream_step) {
  multiply_add<First>(sum, stream, table, std::make_integer_sequence<int, Last - First>{});
  stream += stream_step;
  --table;
}

template <class E, int W, int... S>
LK_INLINE void enter_run(E (&sum)[W], const E*& stream, const E*& table, [[maybe_unused]] std::ptrdiff_t stream_step,
                      int first, std::integer_sequence<int, S...>) {
  ((S >= first ? accumulate_step<0, S + 1>(sum, stream, table, stream_step) : void()), ...);
}

template <class E, int W, int... S>
LK_INLINE void leave_run(E (&sum)[W], const E*& stream, const E*& table, [[maybe_unused]] std::ptrdiff_t stream_step,
                       int last, std::integer_sequence<int, S...>) {
  ((S < last ? accumulate_step<S + 1, W>(sum, stream, table, stream_step) : void()), ...);
}

template <class E, int W, int... J>
LK_INLINE void load_sums(E (&sum)[W], const E* from, std::integer_sequence<int, J...>) {
  ((sum[J] = from ? from[J] : E{}), ...);
}

template <class E, int W, int... J>
LK_INLINE void store_sums(E (&sum)[W], E* out, std::integer_sequence<int, J...>) { ((out[J] = sum[J]), ...); }

template <class E, int W>
__attribute__((noinline)) void correlate_run(RowOperands<E> rows, int length, int first, int last, const E* from, E* out) {
  constexpr auto all = std::make_integer_sequence<int, W>{};
  constexpr auto edge = std::make_integer_sequence<int, W - 1>{};
  const int full = std::min(last, length) - std::max(first, W - 1);
  E sum[W];
  load_sums(sum, from, all);
  for (int i = rows.count; i > 0; --i) {
    const E* stream = rows.stream;
    const E* table = rows.table + (length - 1 - first);
    if (first < W - 1) enter_run(sum, stream, table, rows.stream_step, first, edge);
    if (int n = full; n > 0) do accumulate_step<0, W>(sum, stream, table, rows.stream_step);
      while (--n);
    if (last > length) leave_run(sum, stream, table, rows.stream_step, last - length, edge);
    rows.stream += rows.stream_row;
    rows.table += rows.table_row;
  }
  store_sums(sum, out, all);
}

template <class E>
using RunKernel = void (*)(RowOperands<E>, int, int, int, const E*, E*);

template <class E, int... W>
RunKernel<E> select_run_kernel(int width, std::integer_sequence<int, W...>) {
  static constexpr RunKernel<E> kernels[] = {correlate_run<E, W + 1>...};
  return kernels[width - 1];
}

// Longest run of numbers E: the registers are the same.
template <class E>
constexpr int max_run(E) { return (int)(kMaxRun * sizeof(Vec) / sizeof(E)); }

template <class E>
RunKernel<E> select_run_kernel(int width, E) {
  return select_run_kernel<E>(width, std::make_integer_sequence<int, max_run(E{})>{});
}

// Calls f(begin, end) for runs of nearly equal length, none longer than the registers or `limit` allow.
template <class F>
LK_INLINE void for_each_run(int width, int limit, F f) {
  limit = std::min(limit, kMaxRun);
  const int count = (width + limit - 1) / limit;
  for (int i = 0; i < count; i++) f(width * i / count, width * (i + 1) / count);
}

// ---- correlation over rows, with a quarter of the multiplications saved at each level ----
// Result row i is the sum over b of filter[b] * input[i + b], where the product of two rows is what `run` computes. With the
// even and odd filter rows f0, f1 and input rows u, v, and s = f0 + f1, rows 2a and 2a + 1 of the result are
//   s * v + f0 * (u - v)   and   s * v + f1 * (u shifted by one - v):
// three products of half the length instead of four (the fast FIR algorithm: Mou and Duhamel, 1991, transposed). Each of the
// three is again a correlation over rows.

// Row i, lo <= i < hi, begins at data + i * stride.
struct RowView {
  const Vec* data;
  std::ptrdiff_t stride;
  int lo, hi;

  const Vec* row(int i) const { return data + i * stride; }
  RowView even() const { return {data, 2 * stride, (lo + 1) / 2, (hi + 1) / 2}; }
  RowView odd() const { return {data + stride, 2 * stride, lo / 2, hi / 2}; }
  RowView shifted() const { return {data + stride, stride, lo - 1, hi - 1}; }
};

// Writes a + sign * b, rows of `width` vectors, to `to` and moves it behind them. A row that one of the two lacks is zeros.
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
constexpr int kFirRowGroup = 8;                     // rows of a result that depend on each other at the most levels

// The filter or the input of a correlation and of the three it is reduced to, and so on: node n has children 3 n + 1 to 3.
struct FirTree {
  RowView node[40];
  int levels;

  // Vectors of memory for the combined rows of a set of `rows` rows.
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

// Rows [lo, hi) of the result, row i at out + i * stride, of `width` columns; with `from`, plus row i of from.
// product(filter row, its stride, input row, its stride, count, from, out) calls `run`.
template <class F>
void fast_fir_rows(const FirTree& filter, const FirTree& input, int node, int lo, int hi, int width, const Vec* from,
                    std::ptrdiff_t from_stride, Vec* out, std::ptrdiff_t stride, F product) {
  if (node >= kFirInnerNodes[filter.levels]) {
    const RowView &f = filter.node[node], &x = input.node[node];
    for (int i = lo; i < hi; i++) {
      const int b = std::max(f.lo, x.lo - i), count = std::max(0, std::min(f.hi, x.hi - i) - b);
      product(f.row(b), f.stride, x.row(i + b), x.stride, count, from ? from + i * from_stride : nullptr, out + i * stride);
    }
    return;
  }
  constexpr int rows = 8;  // of the shared product at a time
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

// How many levels pay, measured: combining rows costs less than what it saves from here on.
inline int fir_levels(int filter_rows, int input_rows) {
  const int rows = std::min(filter_rows, input_rows);
  return rows >= 24 && !has_large_l1() ? 3 : rows >= 12 ? 2 : rows >= 8 ? 1 : 0;
}

// Rows [begin, end) of the output of one block of channels, from the packed input and the packed kernel, [K][K] with each
// row reversed.
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

enum class Pass { kForward, kInputGradient };

// One block of weights, [kLanes, K, K] -> the rows `correlate` takes, each reversed, for the input gradient of the kernel
// rotated by 180 degrees. They stand in `table` in reverse order.
inline RowView pack_weights(const float* weight, int k, int lanes, Pass pass, Vec* table) {
  const bool backwards = pass == Pass::kForward;
  pack(weight, k * k, lanes, k * k, backwards ? table + k * k - 1 : table, backwards ? -1 : 1);
  return {table + (k - 1) * k, -k, 0, k};
}

// How many parts each of `tasks` equal tasks is cut into to keep all threads busy to the end.
inline int slice_count(std::ptrdiff_t tasks, int limit) {
  const std::ptrdiff_t wanted = 4 * (std::ptrdiff_t)omp_get_max_threads();
  if (tasks >= wanted || omp_get_max_threads() == 1) return 1;
  return (int)std::min<std::ptrdiff_t>((wanted + tasks - 1) / tasks, limit);
}

// A correlation as tasks: a part of an image of a block of channels each, those of a block one after another. Threads take
// `per_block` of them at a time, a whole block where there are enough, and pack its weights once.
struct CorrelationTasks {
  int threads, slices;
  std::ptrdiff_t per_block, count;

  explicit CorrelationTasks(const Shape& s)
      : threads(omp_get_max_threads()), slices(slice_count((std::ptrdiff_t)s.blocks() * s.batch, (s.height + 15) / 16)),
        per_block((std::ptrdiff_t)s.batch * slices), count(per_block * s.blocks()) {}
};

inline bool any_failed(const std::vector<char>& flags) { return std::find(flags.begin(), flags.end(), 1) != flags.end(); }

// Sums up whether all vectors it has seen were finite.
struct FiniteCheck {
  Vec zero = {};
  LK_INLINE void see(Vec v) { zero += v - v; }
  bool all() const {
    std::uint64_t differs[sizeof(Vec) / 8], any = 0;
    const VecI32 mask = zero != Vec{};
    std::memcpy(differs, &mask, sizeof(mask));
    for (std::uint64_t bits : differs) any |= bits;
    return !any;
  }
};

// x [N, C, H, W] -> y [N, C, H, W]. Where a value is not finite, differences of rows would carry it to outputs that do not
// meet it: then the block is computed again without them. With `only`, [blocks, N], just where it is set.
inline void correlate_fir(const FeatureMap<const float>& x, const float* weight, const Epilogue& epilogue, const Shape& s,
                            Pass pass, const FeatureMap<float>& y, const std::vector<char>& only = {}) {
  const std::ptrdiff_t plane = (std::ptrdiff_t)s.height * s.width;
  const int area = s.kernel * s.kernel, pad = s.kernel / 2, levels = fir_levels(s.kernel, s.height);
  const int strip = std::min(s.height, std::max(16, 512 / s.width / 16 * 16));  // rows of output computed together
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
      // Cut between groups of rows that are computed out of each other: so results do not depend on the number of threads.
      const int begin = s.height * slice / tasks.slices / kFirRowGroup * kFirRowGroup;
      const int end = slice + 1 == tasks.slices ? s.height : s.height * (slice + 1) / tasks.slices / kFirRowGroup * kFirRowGroup;
      const int in_begin = std::max(0, begin - pad), in_end = std::min(s.height, end + pad);
      if (packed != block) {
        const RowView rows = pack_weights(weight + (std::ptrdiff_t)channel * area, s.kernel, lanes, pass, table);
        filter = FirTree::of_filter(rows, s.kernel, levels, table + area);
        packed = block;
      }
      x.read(image, channel, lanes, (std::ptrdiff_t)in_begin * s.width, (in_end - in_begin) * s.width, in);
      // input row i stands at i + pad, where the kernel's first row meets it
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

// Adds rows [begin, end) of one image's weight gradient to `sum`, [end - begin][K]: rows of the output gradient stand for
// the filter, the kernel's rows for the output.
inline void weight_gradient_fir_rows(const FirTree& x, const FirTree& dy, const Shape& s, int begin, int end, Vec* sum) {
  const int k = s.kernel, pad = k / 2;
  const int reach = std::min(pad, s.width - 1);  // taps further out only meet padding
  const int lo = std::max(begin, pad - s.height + 1), hi = std::min(end, pad + s.height);
  // Where fewer than `few` rows meet, the rows that only cancel would dominate the rounding error.
  constexpr int rows = 16;
  const int few = 4 * x.levels;
  const FirTree plain_x = {{x.node[0]}, 0}, plain_dy = {{dy.node[0]}, 0};
  Vec part[rows * kMaxRun];
  for_each_run(2 * reach + 1, s.width, [&](int k0, int k1) {
    const auto correlate_run = select_run_kernel(k1 - k0, Vec{});
    const int first = std::max(0, reach - k0), last = s.width - k0 + reach;
    for (int ky = lo, stop; ky < hi; ky = stop) {
      const int full = pad - s.height + few, last_full = pad + s.height - few;  // of the rows that meet `few` or more
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

// dweight [C, K, K], dbias [C] or null. Each value is summed by one thread in the order of the batch, so the result
// does not depend on the number of threads. With `only`, just the blocks where it is set.
inline void weight_gradient_fir(const float* x, const float* dy, const Shape& s, float* dweight, float* dbias,
                                  const std::vector<char>& only = {}) {
  const std::ptrdiff_t plane = (std::ptrdiff_t)s.height * s.width;
  const int k = s.kernel, pad = k / 2, area = k * k, threads = omp_get_max_threads(), slices = slice_count(s.blocks(), (k + 7) / 8);
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
                               FirTree::of_filter({pdy, s.width, 0, s.height}, s.width, levels, pdy + plane), s, begin,
                               end, sum);
          if (dbias && slice == 0) {
            Vec bias = {};  // of rows and of images by themselves, so that small terms do not drown in large sums
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
