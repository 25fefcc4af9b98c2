// Large kernels, stride 1: channels in vector lanes, a run of outputs in registers, taps on padding skipped exactly.
#pragma once
#include <omp.h>

#include <algorithm>
#include <utility>

#include "epilogue.h"

namespace dwconv {

struct Shape {
  int batch, channels, height, width, kernel, stride;
  int out_height() const { return (height - 1) / stride + 1; }
  int out_width() const { return (width - 1) / stride + 1; }
  int blocks() const { return (channels + kLanes - 1) / kLanes; }
  int lanes(int block) const { return std::min(kLanes, channels - block * kLanes); }
};

// ---- the inner kernel ----
// Output j < W of a run gets the sum over rows and over steps s in [first, last) of
//   stream[row][s] * table[row][length - 1 - s + j],   where that entry of the table exists.
// A forward row streams inputs past a table of weights; a weight-gradient row streams output gradients past a table of
// inputs. Entries exist for j <= s and j > s - length: a prefix of the run while s < W - 1, a suffix from s = length on,
// all of it in between. W <= length, first < length and last >= W hold for every caller, so each region is entered or
// left early at one end only. Half of the registers hold accumulators: with more, GCC spills.

constexpr int kMaxRun = kRegisters == 32 ? 16 : 12;

struct Rows {
  const Vec* stream;
  std::ptrdiff_t stream_step, stream_row;
  const Vec* table;
  std::ptrdiff_t table_row;
  int count;
};

template <int First, int W, int... J>
DW_INLINE void multiply_add(Vec (&sum)[W], const Vec* stream, const Vec* table, std::integer_sequence<int, J...>) {
  const Vec value = *stream;
  ((sum[First + J] += value * table[First + J]), ...);
}

template <int First, int Last, int W>
DW_INLINE void step(Vec (&sum)[W], const Vec*& stream, const Vec*& table, std::ptrdiff_t stream_step) {
  multiply_add<First>(sum, stream, table, std::make_integer_sequence<int, Last - First>{});
  stream += stream_step;
  --table;
}

template <int W, int... S>
DW_INLINE void rising(Vec (&sum)[W], const Vec*& stream, const Vec*& table, [[maybe_unused]] std::ptrdiff_t stream_step,
                      int first, std::integer_sequence<int, S...>) {
  ((S >= first ? step<0, S + 1>(sum, stream, table, stream_step) : void()), ...);
}

template <int W, int... S>
DW_INLINE void falling(Vec (&sum)[W], const Vec*& stream, const Vec*& table, [[maybe_unused]] std::ptrdiff_t stream_step,
                       int last, std::integer_sequence<int, S...>) {
  ((S < last ? step<S + 1, W>(sum, stream, table, stream_step) : void()), ...);
}

template <int W, int... J>
DW_INLINE void fill(Vec (&sum)[W], Vec value, std::integer_sequence<int, J...>) { ((sum[J] = value), ...); }

template <int W, int... J>
DW_INLINE void put(Vec (&sum)[W], Vec* out, std::integer_sequence<int, J...>) { ((out[J] = sum[J]), ...); }

template <int W>
__attribute__((noinline)) void run(Rows rows, int length, int first, int last, Vec* out) {
  constexpr auto all = std::make_integer_sequence<int, W>{};
  constexpr auto edge = std::make_integer_sequence<int, W - 1>{};
  const int full = std::min(last, length) - std::max(first, W - 1);
  Vec sum[W];
  fill(sum, Vec{}, all);
  for (int i = rows.count; i > 0; --i) {
    const Vec* stream = rows.stream;
    const Vec* table = rows.table + (length - 1 - first);
    if (first < W - 1) rising(sum, stream, table, rows.stream_step, first, edge);
    if (int n = full; n > 0) do step<0, W>(sum, stream, table, rows.stream_step);
      while (--n);
    if (last > length) falling(sum, stream, table, rows.stream_step, last - length, edge);
    rows.stream += rows.stream_row;
    rows.table += rows.table_row;
  }
  put(sum, out, all);
}

using Run = void (*)(Rows, int, int, int, Vec*);

template <int... W>
inline Run select_run(int width, std::integer_sequence<int, W...>) {
  static constexpr Run runs[] = {run<W + 1>...};
  return runs[width - 1];
}

inline Run select_run(int width) { return select_run(width, std::make_integer_sequence<int, kMaxRun>{}); }

// Calls f(begin, end) for runs of nearly equal length, none longer than the registers or `limit` allow.
template <class F>
DW_INLINE void for_each_run(int width, int limit, F f) {
  limit = std::min(limit, kMaxRun);
  const int count = (width + limit - 1) / limit;
  for (int i = 0; i < count; i++) f(width * i / count, width * (i + 1) / count);
}

// ---- correlation of packed rows with a packed kernel ----

// Rows [begin, end) of the output of one block of channels. `in` starts at input row `in_begin`; `table` is [K][K] with
// each row reversed; `out` receives (end - begin) rows.
inline void correlate(const Vec* in, int in_begin, const Shape& s, const Vec* table, int begin, int end, Vec* out) {
  const int k = s.kernel, pad = k / 2;
  for_each_run(s.width, k, [&](int x0, int x1) {
    const Run run = select_run(x1 - x0);
    const int first = std::max(0, pad - x0), last = std::min(k - 1 + x1 - x0, s.width - x0 + pad);
    for (int y = begin; y < end; y++) {
      const int top = std::max(0, y - pad), bottom = std::min(s.height, y + pad + 1);
      const Rows rows = {in + (std::ptrdiff_t)(top - in_begin) * s.width + (x0 - pad + first), 1, s.width,
                         table + (std::ptrdiff_t)(top - y + pad) * k, k, bottom - top};
      run(rows, k, first, last, out + (std::ptrdiff_t)(y - begin) * s.width + x0);
    }
  });
}

enum class Order { kForward, kInputGradient };

// One block of weights, [kLanes, K, K] -> [K][K] vectors in the order `correlate` reads them: every row reversed, for the
// input gradient of the kernel rotated by 180 degrees, which leaves the rows themselves in reverse order.
template <class T>
void pack_weights(const T* weight, int k, int lanes, Order order, Vec* table) {
  pack(weight, k * k, lanes, k * k, table);
  if (order == Order::kForward) {
    for (int y = 0; y < k; y++) std::reverse(table + y * k, table + (y + 1) * k);
  } else {
    for (int y = 0; y < k / 2; y++) std::swap_ranges(table + y * k, table + (y + 1) * k, table + (k - 1 - y) * k);
  }
}

// How many parts each of `tasks` equal tasks is cut into to keep all threads busy to the end.
inline int parts(std::ptrdiff_t tasks, int limit) {
  const std::ptrdiff_t wanted = 4 * (std::ptrdiff_t)omp_get_max_threads();
  if (tasks >= wanted || omp_get_max_threads() == 1) return 1;
  return (int)std::min<std::ptrdiff_t>((wanted + tasks - 1) / tasks, limit);
}

// x [N, C, H, W] -> y [N, C, H, W].
template <class T>
void correlate_large(const T* x, const T* weight, const Epilogue& epilogue, const Shape& s, Order order, T* y) {
  const std::ptrdiff_t plane = (std::ptrdiff_t)s.height * s.width;
  const int area = s.kernel * s.kernel, pad = s.kernel / 2;
  const int strip = std::min(s.height, std::max(1, 512 / s.width));  // rows of output that stay in the first-level cache
  const int threads = omp_get_max_threads(), cuts = parts((std::ptrdiff_t)s.blocks() * s.batch, (s.height + 3) / 4);
  const std::ptrdiff_t per_block = (std::ptrdiff_t)s.batch * cuts, tasks = per_block * s.blocks();
  // A thread takes a whole block where there are enough of them, and packs its weights once.
  const std::ptrdiff_t chunk = std::max<std::ptrdiff_t>(1, std::min(per_block, tasks / (4 * threads)));
  const std::size_t per_thread = plane + (std::size_t)strip * s.width + area;
  Scratch scratch(per_thread * threads * kLanes);
#pragma omp parallel num_threads(threads)
  {
    Vec* in = scratch.vectors() + per_thread * omp_get_thread_num();
    Vec *out = in + plane, *table = out + strip * s.width;
    int packed = -1;
#pragma omp for schedule(monotonic : dynamic, chunk)
    for (std::ptrdiff_t task = 0; task < tasks; task++) {
      const int cut = task % cuts, image = task / cuts % s.batch, block = task / per_block, lanes = s.lanes(block);
      const std::ptrdiff_t offset = ((std::ptrdiff_t)image * s.channels + block * kLanes) * plane;
      const int begin = s.height * cut / cuts, end = s.height * (cut + 1) / cuts;
      const int in_begin = std::max(0, begin - pad), in_end = std::min(s.height, end + pad);
      if (packed != block) {
        pack_weights(weight + (std::ptrdiff_t)block * kLanes * area, s.kernel, lanes, order, table);
        packed = block;
      }
      pack(x + offset + (std::ptrdiff_t)in_begin * s.width, plane, lanes, (in_end - in_begin) * s.width, in);
      epilogue.with_channels(block * kLanes, lanes, [&](auto finish) {
        for (int row = begin; row < end; row += strip) {
          const int stop = std::min(end, row + strip);
          correlate(in, in_begin, s, table, row, stop, out);
          unpack(out, (stop - row) * s.width, y + offset + (std::ptrdiff_t)row * s.width, plane, lanes, finish);
        }
      });
    }
  }
}

// Adds rows [begin, end) of one image's weight gradient to `sum`, [end - begin][K].
inline void weight_gradient_rows(const Vec* x, const Vec* dy, const Shape& s, int begin, int end, Vec* sum) {
  const int k = s.kernel, pad = k / 2;
  const int reach = std::min(pad, s.width - 1);  // taps further out only meet padding
  for_each_run(2 * reach + 1, s.width, [&](int k0, int k1) {
    const Run run = select_run(k1 - k0);
    const int first = std::max(0, reach - k0), last = s.width - k0 + reach;
    for (int ky = std::max(begin, pad - s.height + 1); ky < std::min(end, pad + s.height); ky++) {
      const int top = std::max(0, pad - ky), bottom = std::min(s.height, s.height + pad - ky);
      const Rows rows = {dy + (std::ptrdiff_t)top * s.width + (last - 1 - first), -1, s.width,
                         x + (std::ptrdiff_t)(top + ky - pad) * s.width, s.width, bottom - top};
      Vec part[kMaxRun];
      run(rows, s.width, first, std::min(last, s.width - 1 + k1 - k0), part);
      Vec* out = sum + (std::ptrdiff_t)(ky - begin) * k + (pad - reach + k0);
      for (int i = 0; i < k1 - k0; i++) out[i] += part[i];
    }
  });
}

// dweight [C, K, K], dbias [C] or null. Each value is summed by one thread in the order of the batch, so the result
// does not depend on the number of threads.
template <class T>
void weight_gradient_large(const T* x, const T* dy, const Shape& s, T* dweight, T* dbias) {
  const std::ptrdiff_t plane = (std::ptrdiff_t)s.height * s.width;
  const int k = s.kernel, area = k * k, threads = omp_get_max_threads(), cuts = parts(s.blocks(), k);
  const std::size_t per_thread = 2 * plane + area;
  Scratch scratch(per_thread * threads * kLanes);
#pragma omp parallel num_threads(threads)
  {
    Vec* px = scratch.vectors() + per_thread * omp_get_thread_num();
    Vec *pdy = px + plane, *sum = pdy + plane;
#pragma omp for schedule(monotonic : dynamic, 1)
    for (int task = 0; task < s.blocks() * cuts; task++) {
      const int cut = task % cuts, block = task / cuts, lanes = s.lanes(block);
      const int begin = k * cut / cuts, end = k * (cut + 1) / cuts;
      Vec total = {};
      std::fill(sum, sum + (end - begin) * k, Vec{});
      for (int image = 0; image < s.batch; image++) {
        const std::ptrdiff_t offset = ((std::ptrdiff_t)image * s.channels + block * kLanes) * plane;
        pack(x + offset, plane, lanes, (int)plane, px);
        pack(dy + offset, plane, lanes, (int)plane, pdy);
        weight_gradient_rows(px, pdy, s, begin, end, sum);
        if (dbias && cut == 0) {
          for (int y = 0; y < s.height; y++) {
            Vec row = {};
            for (int i = 0; i < s.width; i++) row += pdy[(std::ptrdiff_t)y * s.width + i];
            total += row;
          }
        }
      }
      unpack(sum, (end - begin) * k, dweight + (std::ptrdiff_t)block * kLanes * area + begin * k, area, lanes);
      if (dbias && cut == 0) store_part(dbias + block * kLanes, total, lanes);
    }
  }
}

}  // namespace dwconv
