// Measures the float32 multiply-add peak of the machine: independent chains in registers, without memory accesses.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE, NEON
#endif
constexpr int kChains = 12;  // enough to cover the latency of two multiply-add units, few enough for 16 registers

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

static float chains(long steps) {
  const Vector half = Vector{} + 0.5f;
  Vector sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = Vector{} + static_cast<float>(i);
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sums[i] = sums[i] * half + half;
  }
  for (int i = 1; i < kChains; ++i) sums[0] += sums[i];
  return sums[0][0];
}

// Floating-point operations of each thread in a call of `fma_peak(steps)`.
extern "C" double flop_per_thread(long steps) { return 2.0 * kChains * kLanes * steps; }

extern "C" float fma_peak(long steps) {
  float total = 0;
#pragma omp parallel reduction(+ : total)
  total += chains(steps);
  return total;
}
