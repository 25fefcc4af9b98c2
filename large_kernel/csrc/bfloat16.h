// Conversion between vectors of float and bfloat16, the upper half of a float. Values are rounded to the nearest, ties
// to even.
#pragma once
#include "vector.h"

namespace large_kernel {

typedef uint16_t Bfloat16;  // the bits of a bfloat16
typedef uint16_t VecU16 __attribute__((vector_size(kLanes * 2), may_alias));
typedef uint16_t VecU16Unaligned __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

LK_INLINE Vec load_bfloat16(const Bfloat16* p) {
  return (Vec)(__builtin_convertvector(*reinterpret_cast<const VecU16Unaligned*>(p), VecU32) << 16);
}

LK_INLINE VecU16 to_bfloat16(Vec v) {
#if defined(__AVX512BF16__) && LK_LANES == 16
  return (VecU16)_mm512_cvtneps_pbh((__m512)v);  // turns subnormal values into zeros
#else
  const VecU32 bits = (VecU32)v;
  const VecU32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const VecU32 nan = bits >> 16 | 0x40;  // rounding could turn a NaN into an infinity
  return __builtin_convertvector(v == v ? rounded : nan, VecU16);
#endif
}

LK_INLINE void store_bfloat16(Bfloat16* p, Vec v) { *reinterpret_cast<VecU16Unaligned*>(p) = to_bfloat16(v); }

LK_INLINE Bfloat16 to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40;
}

}  // namespace large_kernel
