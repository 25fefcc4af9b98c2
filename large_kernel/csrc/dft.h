// The discrete Fourier transform of rows of pixels and rows of taps, in registers. A correlation is a product of
// frequencies.
//
//   4 M numbers  ->  [4][M] matrix, by n mod 4 and n mod M  ->  DFT of length 4 by column: real, real, complex
//                ->  DFT of length M by row                  ->  2 M pairs: (real, real), (re, im), (re, im), ...
#pragma once
#include <algorithm>
#include <cmath>
#include <utility>

#include "vector.h"

namespace large_kernel {

// Calls f with 0 ... N - 1 as types: an unrolled loop, whose arrays can be registers.
template <class F, int... I>
LK_INLINE void unroll(std::integer_sequence<int, I...>, F f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
LK_INLINE void unroll(F f) {
  unroll(std::make_integer_sequence<int, N>{}, f);
}

// Transforms of length 4 M, M odd, of arbitrary rows, or of rows of 2 M pixels and 4 M - 1 taps, which connect each
// pixel with each other one without wrapping around. Prime-factor algorithm (Good, 1958): element n has the indices n
// mod 4 and n mod M, and the transform is one of length 4 along the first and one of length M along the second, with no
// twiddle factors in between. The 4 M real numbers that hold the frequencies of a real row are stored as 2 M pairs: two
// real frequencies in pair 0, complex ones, some of them conjugated, in the others.
template <int M>
class Dft {
 public:
  static constexpr int kPairs = 2 * M, kPixels = 2 * M;

  // With a scale of 1, forward and inverse transform multiply by 2 M.
  explicit Dft(float scale = 1) : one_(splat(scale)), half_(splat(scale / 2)) {
    for (int i = 0; i <= kHalf; i++) {
      const double angle = 2 * 3.14159265358979323846 * i / M;
      cosine_[i] = splat(scale * (float)std::cos(angle)), sine_[i] = splat(scale * (float)std::sin(angle));
    }
  }

  // Calls put(pair, first, second) for the frequencies of x [2 M], followed by 2 M zeros.
  template <class Put>
  LK_INLINE void forward_padded(const Vec* x, Put put) const {
    auto even = [&](auto b) { return x[b % 2 ? b + M : b]; };
    auto odd = [&](auto b) { return x[b % 2 ? b : b + M]; };
    length_m_transforms([&](auto b) { return even(b) + odd(b); }, [&](auto b) { return even(b) - odd(b); },
                        [&](auto b) { return (b % 2 ? b + M : b) % 4 == 0 ? even(b) : -even(b); },
                        [&](auto b) { return (b % 2 ? b : b + M) % 4 == 3 ? odd(b) : -odd(b); }, put);
  }

  // The same for taps -2 M + 1 to 2 M - 1 in reverse order, as a correlation needs them. `middle` points to tap 0.
  template <class Put>
  LK_INLINE void forward_taps(const Vec* middle, Put put) const {
    forward([&](auto n) { return n == 2 * M ? Vec{} : middle[n < 2 * M ? -n : 4 * M - n]; }, put);
  }

  // The same for 4 M numbers get(n).
  template <class Get, class Put>
  LK_INLINE void forward(Get get, Put put) const {
    Vec sum[M], alternating[M], re[M], im[M];
    unroll<M>([&](auto b) {
      Vec v[4];
      unroll<4>([&](auto i) { v[(b + i * M) % 4] = get(std::integral_constant<int, b + i * M>{}); });
      const Vec even = v[0] + v[2], odd = v[1] + v[3];
      sum[b] = even + odd, alternating[b] = even - odd;
      re[b] = v[0] - v[2], im[b] = v[3] - v[1];
    });
    length_m_transforms([&](auto b) { return sum[b]; }, [&](auto b) { return alternating[b]; },
                        [&](auto b) { return re[b]; }, [&](auto b) { return im[b]; }, put);
  }

  // The inverse transform of frequencies get(pair, 0 or 1): calls put(n, value) for all 4 M numbers.
  template <class Get, class Put>
  LK_INLINE void inverse(Get get, Put put) const {
    // number n and number n + 2 M, for which the transform of length 4 has the opposite sign
    auto put_both = [&](auto n, bool plus, Vec a, Vec b) {
      put(n, plus ? a + b : a - b);
      put(std::integral_constant<int, (n + 2 * M) % (4 * M)>{}, plus ? a - b : a + b);
    };
    Vec c[kHalf], s[kHalf], sum[M], alternating[M];
    unroll<kHalf>([&](auto q) { c[q] = get(1 + q, 0), s[q] = get(1 + q, 1); });
    hermitian_inverse(half_ * get(0, 0), c, s, [&](auto b, Vec v) { sum[b] = v; });
    unroll<kHalf>([&](auto q) { c[q] = get(1 + kHalf + q, 0), s[q] = get(1 + kHalf + q, 1); });
    hermitian_inverse(half_ * get(0, 1), c, s, [&](auto b, Vec v) { alternating[b] = sum[b] - v, sum[b] += v; });
    unroll<kHalf>([&](auto q) {
      constexpr int near = M + 1 + q, far = near + kHalf;
      c[q] = get(near, 0) + get(far, 0), s[q] = get(far, 1) - get(near, 1);
    });
    hermitian_inverse(one_ * get(M, 0), c, s, [&](auto b, Vec v) {
      constexpr int n = b % 2 ? b + M : b;
      put_both(std::integral_constant<int, n>{}, n % 4 == 0, sum[b], v);
    });
    unroll<kHalf>([&](auto q) {
      constexpr int near = M + 1 + q, far = near + kHalf;
      c[q] = get(near, 1) + get(far, 1), s[q] = get(near, 0) - get(far, 0);
    });
    hermitian_inverse(one_ * get(M, 1), c, s, [&](auto b, Vec v) {
      constexpr int n = b % 2 ? b : b + M;
      put_both(std::integral_constant<int, n>{}, n % 4 == 3, alternating[b], v);
    });
  }

 private:
  static constexpr int kHalf = (M - 1) / 2;

  Vec one_, half_, cosine_[kHalf + 1], sine_[kHalf + 1];

  // start + the sum over b = 1 ... kHalf of cos(2 pi Q b / M) v[b - 1]
  template <int Q>
  LK_INLINE Vec cosines(Vec start, const Vec* v) const {
    unroll<kHalf>([&](auto b) {
      constexpr int i = Q * (b + 1) % M;
      start += cosine_[std::min(i, M - i)] * v[b];
    });
    return start;
  }

  template <int Q>
  LK_INLINE Vec sines(const Vec* v) const {
    Vec total = {};
    unroll<kHalf>([&](auto b) {
      constexpr int i = Q * (b + 1) % M;
      if constexpr (i > kHalf) total -= sine_[M - i] * v[b];
      else total += sine_[i] * v[b];
    });
    return total;
  }

  // Transforms M real numbers v(0) ... v(M - 1). Returns their sum; frequency q = 1 ... kHalf is c[q - 1] - i s[q - 1].
  template <class V>
  LK_INLINE Vec forward_real(V v, Vec* c, Vec* s) const {
    using std::integral_constant;
    Vec even[kHalf], odd[kHalf];
    const Vec first = v(integral_constant<int, 0>{});
    Vec sum = first;
    unroll<kHalf>([&](auto b) {
      const Vec low = v(integral_constant<int, b + 1>{}), high = v(integral_constant<int, M - 1 - b>{});
      even[b] = low + high, odd[b] = low - high;
      sum += even[b];
    });
    unroll<kHalf>([&](auto q) { c[q] = cosines<q + 1>(first, even), s[q] = sines<q + 1>(odd); });
    return sum;
  }

  // The inverse: calls put(b, v[b]), where v[b] = zero + the sum over q = 1 ... kHalf of cos(2 pi q b / M) c[q - 1] +
  // sin(2 pi q b / M) s[q - 1], scaled except for `zero`.
  template <class Put>
  LK_INLINE void hermitian_inverse(Vec zero, const Vec* c, const Vec* s, Put put) const {
    using std::integral_constant;
    Vec all = zero;
    unroll<kHalf>([&](auto q) { all += one_ * c[q]; });
    put(integral_constant<int, 0>{}, all);
    unroll<kHalf>([&](auto b) {
      const Vec even = cosines<b + 1>(zero, c), odd = sines<b + 1>(s);
      put(integral_constant<int, b + 1>{}, even + odd);
      put(integral_constant<int, M - 1 - b>{}, even - odd);
    });
  }

  // The transforms of length M that follow those of length 4: of two real rows and a complex one.
  template <class Sum, class Alternating, class Re, class Im, class Put>
  LK_INLINE void length_m_transforms(Sum sum, Alternating alternating, Re re, Im im, Put put) const {
    Vec c[kHalf], s[kHalf], ci[kHalf], si[kHalf];
    const Vec zero = forward_real(sum, c, s);
    unroll<kHalf>([&](auto q) { put(1 + q, c[q], s[q]); });
    put(0, zero, forward_real(alternating, c, s));
    unroll<kHalf>([&](auto q) { put(1 + kHalf + q, c[q], s[q]); });
    const Vec zero_re = forward_real(re, c, s);
    put(M, zero_re, forward_real(im, ci, si));
    unroll<kHalf>([&](auto q) {
      put(M + 1 + q, c[q] + si[q], ci[q] - s[q]);
      put(M + 1 + kHalf + q, c[q] - si[q], ci[q] + s[q]);
    });
  }
};

}  // namespace large_kernel
