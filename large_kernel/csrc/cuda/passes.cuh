// Which kernel computes a pass.
#pragma once
#include "direct_forward.cuh"
#include "direct_weight_gradient.cuh"
#include "passes.h"
#include "reductions.cuh"
#include "tensor_core_forward.cuh"
#include "tensor_core_weight_gradient.cuh"

namespace large_kernel::cuda {

// Small float32 maps: three bfloat16 parts, six products, cost more there than the multiply-adds that tiles with padding
// waste. From the times of another library's float32 kernels, which are of this kind; not measured with these.
constexpr int DIRECT_FLOAT32_SIDE = 28;

template <typename In>
int run_forward(const Forward<In>& f, int path, const Card& card, cudaStream_t stream) {
  const bool small_float = sizeof(In) == 4 && f.s.H <= DIRECT_FLOAT32_SIDE && f.s.W <= DIRECT_FLOAT32_SIDE;
  if (card.capability >= 80 && (path == kAutomatic ? !small_float : path == kTensorCores)) {
    const int status = launch_tensor_core_forward(f, card, stream);
    if (status != DOES_NOT_FIT) return status;
  }
  return launch_direct_forward(f, card, stream);
}

template <typename In>
int run_weight_gradient(const In* x, const In* dy, const ParameterGradients& dw, float* partial, const Shape& s,
                        int path, const Card& card, cudaStream_t stream) {
  int splits = 0, status = DOES_NOT_FIT;
  if (card.capability >= 80 && path != kDirect)
    status = launch_tensor_core_weight_gradient(x, dy, partial, s, card, stream, &splits);
  if (status == DOES_NOT_FIT) status = launch_direct_weight_gradient(x, dy, partial, s, card, stream, &splits);
  if (status) return status;
  const int size = s.C * s.K * s.K;
  return launch(sum_shares<In>, (size + 255) / 256, 256, 0, stream, partial, x, dy, dw, s, splits);
}

template <typename In>
int run_bias_gradient(const In* dy, const ParameterGradients& dbias, const Shape& s, cudaStream_t stream) {
  constexpr int THREADS = 512;  // a power of two
  return launch(bias_gradient<In>, s.C, THREADS, THREADS * sizeof(float), stream, dy, dbias, s);
}

#define LARGE_KERNEL_INSTANTIATE(In)                                                                                  \
  template int run_forward<In>(const Forward<In>&, int, const Card&, cudaStream_t);                                   \
  template int run_weight_gradient<In>(const In*, const In*, const ParameterGradients&, float*, const Shape&, int,    \
                                       const Card&, cudaStream_t);                                                    \
  template int run_bias_gradient<In>(const In*, const ParameterGradients&, const Shape&, cudaStream_t);

}  // namespace large_kernel::cuda
