// The inner kernel of the large-kernel algorithms: one run of a row's outputs, in registers over all rows that
// contribute to it. Used by depthwise_large_fir.h on vectors and by depthwise_large_dft.h on complex frequencies.
//
//   stream   x0 x1 x2 x3 ...        each element is loaded once and multiplied by up to W neighbouring entries of the
//   table    t5 t4 t3 t2 t1 t0      table (memory operands), a window that moves by one entry per element
//   sums     y0 y1 ... y(W - 1)     in registers
#pragma once
#include <algorithm>
#include <utility>

#include "vector.h"

namespace large_kernel {

// Output j < W of a run is from[j], or 0 if `from` is null, plus the sum over rows and over steps s in [first, last) of
//   stream[row][s] * table[row][length - 1 - s + j],   for the table entries that exist.
// In the forward pass a row of inputs is streamed past a table of weights, in the weight gradient a row of output
// gradients past a table of inputs. Entries exist for j <= s and j > s - length: a prefix of the run while s < W - 1, a
// suffix from s = length on, the whole run in between. Taps on padding are thus skipped exactly. All callers have W <=
// length, first < length and last >= W, so that each region is cut short at one end only. Half of the registers hold
// accumulators; with more, GCC spills.

constexpr int kMaxRun = kRegisters == 32 ? 16 : 12;

// The element type E: a vector of reals, or a pair of vectors that is either a complex number or two reals.
struct Complex {
  Vec re, im;
};
struct RealPair {
  Vec first, second;
};

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
LK_INLINE void store_sums(E (&sum)[W], E* out, std::integer_sequence<int, J...>) {
  ((out[J] = sum[J]), ...);
}

template <class E, int W>
__attribute__((noinline)) void correlate_run(RowOperands<E> rows, int length, int first, int last, const E* from,
                                             E* out) {
  constexpr auto all = std::make_integer_sequence<int, W>{};
  constexpr auto edge = std::make_integer_sequence<int, W - 1>{};
  const int full = std::min(last, length) - std::max(first, W - 1);
  E sum[W];
  load_sums(sum, from, all);
  for (int i = rows.count; i > 0; --i) {
    const E* stream = rows.stream;
    const E* table = rows.table + (length - 1 - first);
    if (first < W - 1) enter_run(sum, stream, table, rows.stream_step, first, edge);
    if (int n = full; n > 0) do
        accumulate_step<0, W>(sum, stream, table, rows.stream_step);
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

// The longest run of elements E that fits in the accumulator registers.
template <class E>
constexpr int max_run(E) {
  return (int)(kMaxRun * sizeof(Vec) / sizeof(E));
}

template <class E>
RunKernel<E> select_run_kernel(int width, E) {
  return select_run_kernel<E>(width, std::make_integer_sequence<int, max_run(E{})>{});
}

// Calls f(begin, end) for runs of nearly equal length, at most kMaxRun and `limit`.
template <class F>
LK_INLINE void for_each_run(int width, int limit, F f) {
  limit = std::min(limit, kMaxRun);
  const int count = (width + limit - 1) / limit;
  for (int i = 0; i < count; i++) f(width * i / count, width * (i + 1) / count);
}

}  // namespace large_kernel
