// The products that conv_gemm.h sums: of numbers in float32, of pairs in bfloat16, of groups of four in int8. A pair or
// group is a word of 32 bits, so that lanes, tiles and layouts are the same for all of them.
//
//   float32    weight[k] * x[k]
//   bfloat16   weight[2k] * x[2k] + weight[2k + 1] * x[2k + 1]               summed in float32
//   int8       weight[4k] * x[4k] + ... + weight[4k + 3] * x[4k + 3]         weight -128 to 127, x 0 to 255, in int32
//
// Processors with AVX512_BF16, AVX512_VNNI or AVX-VNNI have instructions for the last two; elsewhere they are computed
// with several.
#pragma once
#include "bfloat16.h"

namespace large_kernel {

constexpr int kWords = 16;  // of a row of packed pixels or weights: a cache line

// A 32-bit word in all lanes.
LK_INLINE Vec splat_word(const float* word) {
  int32_t bits;
  std::memcpy(&bits, word, sizeof bits);
  return (Vec)(bits + VecI32{});
}

struct Float32Product {
  typedef float Element;
  static constexpr int kPerWord = 1;

  static LK_INLINE Vec splat(const float* word) { return large_kernel::splat(*word); }
  static LK_INLINE Vec multiply_add(Vec sum, Vec weight, Vec x) { return sum + weight * x; }
  static LK_INLINE Vec sum_value(Vec sum) { return sum; }
  static LK_INLINE Element element(float value) { return value; }
};

struct Bfloat16Product {
  typedef Bfloat16 Element;
  static constexpr int kPerWord = 2;

#if defined(__AVX512BF16__) && LK_LANES == 16
  static constexpr const char* kInstructions = "AVX512_BF16";
#else
  static constexpr const char* kInstructions = "";
#endif

  static LK_INLINE Vec splat(const float* word) { return splat_word(word); }
  static LK_INLINE Vec multiply_add(Vec sum, Vec weight, Vec x) {
#if defined(__AVX512BF16__) && LK_LANES == 16
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight, (__m512bh)x);
#else
    const VecU32 high = 0xffff0000 + VecU32{};
    const Vec even = (Vec)((VecU32)weight << 16) * (Vec)((VecU32)x << 16);
    return sum + even + (Vec)((VecU32)weight & high) * (Vec)((VecU32)x & high);
#endif
  }
  static LK_INLINE Vec sum_value(Vec sum) { return sum; }

  static LK_INLINE Element element(float value) { return to_bfloat16(value); }
  static LK_INLINE void store(Element* to, Vec values) { store_bfloat16(to, values); }
};

struct Int8Product {
  typedef uint8_t Element;  // of x
  static constexpr int kPerWord = 4;
#if defined(__AVX512VNNI__) && LK_LANES == 16
  static constexpr const char* kInstructions = "AVX512_VNNI";
#elif defined(__AVXVNNI__) && LK_LANES == 8
  static constexpr const char* kInstructions = "AVX-VNNI";
#else
  static constexpr const char* kInstructions = "";
#endif

  static LK_INLINE Vec splat(const float* word) { return splat_word(word); }
  static LK_INLINE Vec multiply_add(Vec sum, Vec weight, Vec x) {
#if defined(__AVX512VNNI__) && LK_LANES == 16
    return (Vec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)weight);
#elif defined(__AVXVNNI__) && LK_LANES == 8
    return (Vec)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)weight);
#else
    const VecI32 w = (VecI32)weight;
    const VecU32 u = (VecU32)x;
    VecI32 total = (VecI32)sum;
    total += (w << 24 >> 24) * (VecI32)(u & 255);
    total += (w << 16 >> 24) * (VecI32)(u >> 8 & 255);
    total += (w << 8 >> 24) * (VecI32)(u >> 16 & 255);
    total += (w >> 24) * (VecI32)(u >> 24);
    return (Vec)total;
#endif
  }
  static LK_INLINE Vec sum_value(Vec sum) { return __builtin_convertvector((VecI32)sum, Vec); }

  // `values` rounded to the nearest integer, ties to even, and limited to 0 to 255; NaN becomes 0.
  static LK_INLINE VecI32 rounded(Vec values) {
    const Vec bounded = values > 0.f ? (values < 255.f ? values : 255.f + Vec{}) : Vec{};
    const Vec magic = 8388608.f + Vec{};  // 2 ** 23: the sum has no fractional bits
    return __builtin_convertvector((bounded + magic) - magic, VecI32);
  }
  static LK_INLINE Element element(float value) { return (Element)rounded(large_kernel::splat(value))[0]; }
  static LK_INLINE void store(Element* to, Vec values) {
    typedef uint8_t VecU8 __attribute__((vector_size(kLanes)));
    const VecU8 bytes = __builtin_convertvector(rounded(values), VecU8);
    std::memcpy(to, &bytes, sizeof bytes);
  }
};

}  // namespace large_kernel
