// The Paddle operators `large_kernel_conv` and `large_kernel_conv_bias` with their gradients, on the CPU.
#include <vector>

#include "depthwise.h"
#include "paddle/phi/api/ext/op_meta_info.h"
#include "paddle/phi/api/include/api.h"
#include "paddle/phi/core/dense_tensor.h"

namespace phi::funcs {
// Exported by Paddle builds with oneDNN; absent from others.
__attribute__((weak)) void TransDataLayoutFromOneDNN(DataLayout from, DataLayout to, const DenseTensor& in,
                                                     DenseTensor* out, Place place, bool always_copy);
}

namespace {

using paddle::DataType;
using paddle::Tensor;

dwconv::Shape check(const Tensor& x, const Tensor& weight, int stride) {
  PD_CHECK(x.is_cpu() && weight.is_cpu(), "large_kernel_conv runs on the CPU only");
  PD_CHECK(x.dtype() == weight.dtype(), "large_kernel_conv needs input and weight of the same dtype");
  const auto &in = x.shape(), &w = weight.shape();
  PD_CHECK(in.size() == 4 && w.size() == 4 && w[0] == in[1] && w[1] == 1 && w[2] == w[3] && w[2] % 2 == 1 &&
               (stride == 1 || stride == 2),
           "large_kernel_conv needs input [N, C, H, W], weight [C, 1, K, K] with odd K, and stride 1 or 2");
  return {(int)in[0], (int)in[1], (int)in[2], (int)in[3], (int)w[2], stride};
}

// Paddle Inference hands over what a oneDNN operator produced in oneDNN's own blocked layout.
Tensor plain(const Tensor& x) {
  if (x.layout() != phi::DataLayout::ONEDNN) return x;
  PD_CHECK(phi::funcs::TransDataLayoutFromOneDNN, "large_kernel_conv: oneDNN layout in a Paddle without oneDNN");
  auto out = std::make_shared<phi::DenseTensor>();
  phi::funcs::TransDataLayoutFromOneDNN(phi::DataLayout::ONEDNN, phi::DataLayout::NCHW,
                                        *std::static_pointer_cast<phi::DenseTensor>(x.impl()), out.get(),
                                        phi::CPUPlace(), false);
  return Tensor(out);
}

// Calls f with a null pointer of the element type the tensor holds.
template <class F>
void dispatch(const Tensor& x, F f) {
  switch (x.dtype()) {
    case DataType::FLOAT32: return f(static_cast<float*>(nullptr));
    case DataType::BFLOAT16: return f(static_cast<dwconv::bfloat16*>(nullptr));
    case DataType::FLOAT16: return f(static_cast<dwconv::float16*>(nullptr));
    default: PD_THROW("large_kernel_conv takes float32, bfloat16 and float16");
  }
}

template <class T>
const T* read(const Tensor& t) { return static_cast<const T*>(t.data()); }

template <class T>
T* written(Tensor& t) { return static_cast<T*>(t.data()); }

Tensor run_forward(const Tensor& input, const Tensor& weight, const Tensor* bias, int stride) {
  const Tensor x = plain(input);
  const dwconv::Shape s = check(x, weight, stride);
  Tensor y = paddle::experimental::empty({s.batch, s.channels, s.out_height(), s.out_width()}, x.dtype(), x.place());
  dispatch(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dwconv::forward(read<T>(x), read<T>(weight), bias ? read<T>(*bias) : nullptr, s, written<T>(y));
  });
  return y;
}

// A gradient that nobody asked for comes back as zeros.
std::vector<Tensor> run_backward(const Tensor& x, const Tensor& weight, const Tensor* bias, const Tensor& dy, int stride,
                                 bool input_grad, bool weight_grad) {
  const dwconv::Shape s = check(x, weight, stride);
  auto make = [](const Tensor& like, bool wanted) {
    return wanted ? paddle::experimental::empty_like(like) : paddle::experimental::full(like.shape(), 0, like.dtype(), like.place());
  };
  std::vector<Tensor> grads = {make(x, input_grad), make(weight, weight_grad)};
  if (bias) grads.push_back(make(*bias, weight_grad));
  dispatch(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    dwconv::backward(read<T>(x), read<T>(weight), read<T>(dy), s, input_grad ? written<T>(grads[0]) : nullptr,
                     weight_grad ? written<T>(grads[1]) : nullptr,
                     weight_grad && bias ? written<T>(grads[2]) : nullptr);
  });
  return grads;
}

std::vector<Tensor> Forward(const Tensor& x, const Tensor& weight, int stride, bool, bool) {
  return {run_forward(x, weight, nullptr, stride)};
}

std::vector<Tensor> ForwardBias(const Tensor& x, const Tensor& weight, const Tensor& bias, int stride, bool, bool) {
  return {run_forward(x, weight, &bias, stride)};
}

std::vector<Tensor> Backward(const Tensor& x, const Tensor& weight, const Tensor& dy, int stride, bool input_grad,
                             bool weight_grad) {
  return run_backward(x, weight, nullptr, dy, stride, input_grad, weight_grad);
}

std::vector<Tensor> BackwardBias(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& dy, int stride,
                                 bool input_grad, bool weight_grad) {
  return run_backward(x, weight, &bias, dy, stride, input_grad, weight_grad);
}

using Dims = std::vector<int64_t>;

Dims out_shape(Dims x, int stride) {
  for (int i = 2; i < 4; i++) x[i] = x[i] < 0 ? -1 : (x[i] - 1) / stride + 1;  // -1: not known before the run
  return x;
}

std::vector<Dims> InferShape(const Dims& x, const Dims&, int stride, bool, bool) { return {out_shape(x, stride)}; }
std::vector<Dims> InferShapeBias(const Dims& x, const Dims&, const Dims&, int stride, bool, bool) {
  return {out_shape(x, stride)};
}
std::vector<DataType> InferDtype(const DataType& x, const DataType&) { return {x}; }
std::vector<DataType> InferDtypeBias(const DataType& x, const DataType&, const DataType&) { return {x}; }

}  // namespace

PD_BUILD_OP(large_kernel_conv)
    .Inputs({"X", "Filter"})
    .Outputs({"Out"})
    .Attrs({"stride: int", "input_grad: bool", "weight_grad: bool"})
    .SetKernelFn(PD_KERNEL(Forward))
    .SetInferShapeFn(PD_INFER_SHAPE(InferShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(InferDtype));

PD_BUILD_GRAD_OP(large_kernel_conv)
    .Inputs({"X", "Filter", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Filter")})
    .Attrs({"stride: int", "input_grad: bool", "weight_grad: bool"})
    .SetKernelFn(PD_KERNEL(Backward));

PD_BUILD_OP(large_kernel_conv_bias)
    .Inputs({"X", "Filter", "Bias"})
    .Outputs({"Out"})
    .Attrs({"stride: int", "input_grad: bool", "weight_grad: bool"})
    .SetKernelFn(PD_KERNEL(ForwardBias))
    .SetInferShapeFn(PD_INFER_SHAPE(InferShapeBias))
    .SetInferDtypeFn(PD_INFER_DTYPE(InferDtypeBias));

PD_BUILD_GRAD_OP(large_kernel_conv_bias)
    .Inputs({"X", "Filter", "Bias", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Filter"), paddle::Grad("Bias")})
    .Attrs({"stride: int", "input_grad: bool", "weight_grad: bool"})
    .SetKernelFn(PD_KERNEL(BackwardBias));
