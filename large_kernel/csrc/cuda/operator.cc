// The Paddle operators on NVIDIA GPUs: `large_kernel_cuda_conv` and `large_kernel_cuda_conv_bias` (depthwise, stride 1,
// with gradients). Here are argument checks, allocation of results and registration; the computation is in the .cu files.
#include <string>
#include <vector>

#include "kernels.h"
#include "paddle/phi/api/all.h"

namespace {

using paddle::DataType;
using paddle::Tensor;
using Dims = std::vector<int64_t>;

#ifdef LARGE_KERNEL_EMULATION  // tests run this operator on a CPU
bool on_device(const Tensor& t) { return t.is_cpu(); }
void* stream(const Tensor&) { return nullptr; }
#else
bool on_device(const Tensor& t) { return t.is_gpu(); }
void* stream(const Tensor& t) { return t.stream(); }
#endif

int type_of(const Tensor& t, const char* name) {
  PD_CHECK(on_device(t), "large_kernel_cuda: ", name, " must be on the GPU");
  switch (t.dtype()) {
    case DataType::FLOAT16: return kFloat16;
    case DataType::BFLOAT16: return kBfloat16;
    case DataType::FLOAT32: return kFloat32;
    default: PD_THROW("large_kernel_cuda: ", name, " must be float16, bfloat16 or float32");
  }
}

LargeKernelConv checked(const Tensor& x, const Tensor& weight) {
  const Dims in = x.shape(), w = weight.shape();
  PD_CHECK(in.size() == 4 && x.numel() > 0 && w.size() == 4 && w[0] == in[1] && w[1] == 1 && w[2] == w[3],
           "large_kernel_cuda needs a non-empty input [N, C, H, W] and a weight [C, 1, K, K]");
  return {(int)in[0], (int)in[1],
          (int)in[2], (int)in[3],
          (int)w[2],  type_of(x, "the input"),
          kAutomatic, (int)x.place().GetDeviceId()};
}

void check(int status) { PD_CHECK(status == 0, "large_kernel_cuda: ", large_kernel_cuda_message(status)); }

Tensor forward(const Tensor& x, const Tensor& weight, const Tensor* bias) {
  const LargeKernelConv conv = checked(x, weight);
  PD_CHECK(!bias || bias->shape() == Dims{x.shape()[1]}, "large_kernel_cuda needs a bias [C]");
  Tensor y = paddle::experimental::empty_like(x);
  check(large_kernel_cuda_forward(&conv, x.data(), weight.data(), type_of(weight, "the weight"),
                                  bias ? bias->data() : nullptr, bias ? type_of(*bias, "the bias") : kFloat32, y.data(),
                                  0, stream(x)));
  return y;
}

// Gradients that are not requested are zeros.
std::vector<Tensor> backward(const Tensor& x, const Tensor& weight, const Tensor* bias, const Tensor& dy,
                             bool input_grad, bool weight_grad) {
  const LargeKernelConv conv = checked(x, weight);
  PD_CHECK(dy.dtype() == x.dtype() && dy.shape() == x.shape() && on_device(dy),
           "large_kernel_cuda needs a gradient of the input's shape and dtype");
  auto make = [](const Tensor& like, bool wanted) {
    return wanted ? paddle::experimental::empty_like(like)
                  : paddle::experimental::full(like.shape(), 0, like.dtype(), like.place());
  };
  std::vector<Tensor> grads = {make(x, input_grad), make(weight, weight_grad)};
  if (bias) grads.push_back(make(*bias, weight_grad));
  const int weight_type = type_of(weight, "the weight");
  if (input_grad)
    check(large_kernel_cuda_input_gradient(&conv, dy.data(), weight.data(), weight_type, grads[0].data(), stream(x)));
  if (weight_grad) {
    Tensor workspace = paddle::experimental::empty({large_kernel_cuda_workspace(&conv)}, DataType::FLOAT32, x.place());
    check(large_kernel_cuda_weight_gradient(&conv, x.data(), dy.data(), grads[1].data(), weight_type,
                                            (float*)workspace.data(), stream(x)));
    if (bias)
      check(large_kernel_cuda_bias_gradient(&conv, dy.data(), grads[2].data(), type_of(*bias, "the bias"), stream(x)));
  }
  return grads;
}

std::vector<Tensor> Forward(const Tensor& x, const Tensor& weight, bool, bool) { return {forward(x, weight, nullptr)}; }

std::vector<Tensor> ForwardBias(const Tensor& x, const Tensor& weight, const Tensor& bias, bool, bool) {
  return {forward(x, weight, &bias)};
}

std::vector<Tensor> Backward(const Tensor& x, const Tensor& weight, const Tensor& dy, bool input_grad,
                             bool weight_grad) {
  return backward(x, weight, nullptr, dy, input_grad, weight_grad);
}

std::vector<Tensor> BackwardBias(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& dy,
                                 bool input_grad, bool weight_grad) {
  return backward(x, weight, &bias, dy, input_grad, weight_grad);
}

std::vector<Tensor> Gradients(const Tensor& x, const Tensor& weight, const Tensor& dy) {
  return backward(x, weight, nullptr, dy, true, true);
}
std::vector<Dims> GradientShapes(const Dims& x, const Dims& weight, const Dims&) { return {x, weight}; }
std::vector<DataType> GradientDtypes(const DataType& x, const DataType& weight, const DataType&) { return {x, weight}; }

std::vector<Dims> InferShape(const Dims& x, const Dims&, bool, bool) { return {x}; }
std::vector<Dims> InferShapeBias(const Dims& x, const Dims&, const Dims&, bool, bool) { return {x}; }
std::vector<DataType> InferDtype(const DataType& x, const DataType&) { return {x}; }
std::vector<DataType> InferDtypeBias(const DataType& x, const DataType&, const DataType&) { return {x}; }

}  // namespace

PD_BUILD_OP(large_kernel_cuda_conv)
    .Inputs({"X", "Filter"})
    .Outputs({"Out"})
    .Attrs({"input_grad: bool", "weight_grad: bool"})
    .SetKernelFn(PD_KERNEL(Forward))
    .SetInferShapeFn(PD_INFER_SHAPE(InferShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(InferDtype));

PD_BUILD_GRAD_OP(large_kernel_cuda_conv)
    .Inputs({"X", "Filter", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Filter")})
    .Attrs({"input_grad: bool", "weight_grad: bool"})
    .SetKernelFn(PD_KERNEL(Backward));

PD_BUILD_OP(large_kernel_cuda_conv_bias)
    .Inputs({"X", "Filter", "Bias"})
    .Outputs({"Out"})
    .Attrs({"input_grad: bool", "weight_grad: bool"})
    .SetKernelFn(PD_KERNEL(ForwardBias))
    .SetInferShapeFn(PD_INFER_SHAPE(InferShapeBias))
    .SetInferDtypeFn(PD_INFER_DTYPE(InferDtypeBias));

PD_BUILD_GRAD_OP(large_kernel_cuda_conv_bias)
    .Inputs({"X", "Filter", "Bias", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Filter"), paddle::Grad("Bias")})
    .Attrs({"input_grad: bool", "weight_grad: bool"})
    .SetKernelFn(PD_KERNEL(BackwardBias));

// The gradients without autograd, for the check before the first use. "_grad" in its name would make Paddle take it for
// the gradient of another operator.
PD_BUILD_OP(large_kernel_cuda_backward)
    .Inputs({"X", "Filter", "DY"})
    .Outputs({"DX", "DFilter"})
    .SetKernelFn(PD_KERNEL(Gradients))
    .SetInferShapeFn(PD_INFER_SHAPE(GradientShapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(GradientDtypes));
