// 3x3 kernels at stride 2 on maps of up to 8 output columns, with vectors of 16 lanes (AVX-512): two rows of outputs
// per vector.
//
//   lanes 0-7: output row o        lanes 8-15: output row o + 1
#pragma once
#include "depthwise_3x3_strips.h"

namespace large_kernel {

#if defined(__AVX512F__)
// The input columns of two rows that meet the middle tap (`even`) and the right tap (`odd`) of a kernel row. The left
// tap meets `odd` for the next output.
struct ParityColumns {
  Vec even, odd;

  // rows a and b, followed by zeros
  LK_INLINE ParityColumns(Vec a, Vec b)
      : even(LK_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)),
        odd(LK_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)) {}
  // the second row of a and the first row of b
  LK_INLINE ParityColumns(const ParityColumns& a, const ParityColumns& b)
      : even(second_first(a.even, b.even)),
        odd(second_first(a.odd, b.odd)) {}

  static LK_INLINE Vec second_first(Vec a, Vec b) {
    return LK_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23);
  }
  LK_INLINE Vec times(const Vec* weight) const { return even * weight[1] + odd * weight[2]; }
};

// Calls f(first output row of two, the columns that meet the kernel's three rows).
template <class F>
LK_INLINE void for_each_row_pair(const Plane<const float>& x, int rows, F f) {
  const LaneMask first(x.width);
  const float* at = x.data;
  int y = 0;
  auto next = [&] {
    if (y++ >= x.height) return Vec{};
    const Vec row = first.read(at);
    at += x.width;
    return row;
  };
  ParityColumns before(Vec{}, Vec{});
  for (int o = 0; o < rows; o += 2) {
    __builtin_prefetch(at + kPrefetchAhead);
    __builtin_prefetch(at + kPrefetchAhead + 2 * x.width);
    const Vec a = next(), b = next(), c = next(), d = next();
    const ParityColumns bottom(b, d);
    f(o, ParityColumns(before, bottom), ParityColumns(a, c), bottom);
    before = bottom;
  }
}

template <class F>
__attribute__((noinline)) void correlate_row_pairs(const Plane<const float>& x, const float* weight,
                                                   const Plane<float>& out, F finish) {
  // the lanes of both rows, adjacent; only the last four bits of each index count
  VecI32 together;
  for (int i = 0; i < kLanes; i++) together[i] = i < out.width ? i : i - out.width + kLanes / 2;
  Vec w[9];
  splat9(weight, w);
  const LaneMask both(2 * out.width), one(out.width);
  for_each_row_pair(x, out.height,
                    [&](int o, const ParityColumns& top, const ParityColumns& middle, const ParityColumns& bottom) {
    const Vec left = top.odd * w[0] + middle.odd * w[3] + bottom.odd * w[6];
    Vec sum = LK_SHUFFLE(left, Vec{}, 16, 0, 1, 2, 3, 4, 5, 6, 16, 8, 9, 10, 11, 12, 13, 14);
    sum += top.times(w) + middle.times(w + 3) + bottom.times(w + 6);
    // the mask avoids a GCC 12 warning in its own header
    const Vec rows = (Vec)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)together, (__m512)finish(sum));
    (o + 1 < out.height ? both : one).write(out.row(o), rows);
  });
}

inline __attribute__((noinline)) void weight_gradient_row_pairs(const Plane<const float>& x,
                                                                const Plane<const float>& dy, Vec* sums) {
  const LaneMask first(dy.width);
  Vec sum[9] = {};
  for_each_row_pair(x, dy.height,
                    [&](int o, const ParityColumns& top, const ParityColumns& middle, const ParityColumns& bottom) {
    const Vec a = first.read(dy.row(o)), b = o + 1 < dy.height ? first.read(dy.row(o + 1)) : Vec{};
    const Vec value = LK_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const Vec next = LK_SHUFFLE(a, b, 1, 2, 3, 4, 5, 6, 7, 8, 17, 18, 19, 20, 21, 22, 23, 24);
    auto add = [&](Vec* sum, const ParityColumns& row) {
      sum[0] += row.odd * next;
      sum[1] += row.even * value;
      sum[2] += row.odd * value;
    };
    add(sum, top);
    add(sum + 3, middle);
    add(sum + 6, bottom);
  });
#pragma GCC unroll 9
  for (int i = 0; i < 9; i++) sums[i] += sum[i];
}

// A row of the input gradient fits in a vector: each output's gradient is in the lanes of the two columns it meets, and
// the gradient of the next output in the second of these.
inline __attribute__((noinline)) void input_gradient_row_pairs(const Plane<const float>& dy, const float* weight,
                                                               const Plane<float>& dx) {
  auto both = [&](int even, int odd) {
    return LK_SHUFFLE(splat(weight[even]), splat(weight[odd]), 0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16);
  };
  const Vec even = both(4, 5), even_right = splat(weight[3]), odd = both(7, 8), odd_right = splat(weight[6]);
  const Vec next = both(1, 2), next_right = splat(weight[0]);
  const LaneMask from(dy.width), to(dx.width);
  struct Row {
    Vec here, right;
    LK_INLINE explicit Row(Vec v)
        : here(LK_SHUFFLE(v, v, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7)),
          right(LK_SHUFFLE(v, Vec{}, 16, 1, 16, 2, 16, 3, 16, 4, 16, 5, 16, 6, 16, 7, 16, 8)) {}
  };
  Row p(from.read(dy.data));
  for (int y = 0; y < dy.height; y++) {
    const Row q(y + 1 < dy.height ? from.read(dy.row(y + 1)) : Vec{});
    to.write(dx.row(2 * y), p.here * even + p.right * even_right);
    if (2 * y + 1 < dx.height) {
      to.write(dx.row(2 * y + 1), p.here * odd + p.right * odd_right + (q.here * next + q.right * next_right));
    }
    p = q;
  }
}
#endif

}  // namespace large_kernel
