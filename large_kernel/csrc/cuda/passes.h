// The passes for one element type. float16.cu, bfloat16.cu and float32.cu instantiate them, so that they can be compiled
// at the same time.
#pragma once
#include "types.cuh"

namespace large_kernel::cuda {

template <typename In>
int run_forward(const Forward<In>& f, int path, const Card& card, cudaStream_t stream);

template <typename In>
int run_weight_gradient(const In* x, const In* dy, const ParameterGradients& dw, float* partial, const Shape& s,
                        int path, const Card& card, cudaStream_t stream);

template <typename In>
int run_bias_gradient(const In* dy, const ParameterGradients& dbias, const Shape& s, cudaStream_t stream);

}  // namespace large_kernel::cuda
