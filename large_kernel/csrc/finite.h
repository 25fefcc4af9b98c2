// Detection of NaN and Inf. Algorithms that combine values before multiplying them (fast FIR, DFT, Winograd) or
// multiply a border of zeros would carry these to outputs whose window does not contain them. Such results are detected
// and computed again.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vector.h"

namespace large_kernel {

// Whether any task has set its flag.
inline bool any_failed(const std::vector<char>& flags) {
  return std::find(flags.begin(), flags.end(), 1) != flags.end();
}

// Records whether all vectors passed to `see` are finite: v - v is zero then, otherwise NaN.
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

inline bool all_finite(const float* p, int count) {
  for (int i = 0; i < count; i++) {
    if (!std::isfinite(p[i])) return false;
  }
  return true;
}

inline bool all_finite(const Vec* p, int count) {
  return all_finite(reinterpret_cast<const float*>(p), count * kLanes);
}

}  // namespace large_kernel
