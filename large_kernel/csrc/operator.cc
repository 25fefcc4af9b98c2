// The Paddle operators on the CPU: `large_kernel_conv` and `large_kernel_conv_bias` (depthwise, with gradients),
// `fused_conv` (depthwise or dense with norms, activation and residual, for inference), `fused_convs` (a sequence of
// these), `pointwise_bf16` (1x1 with products in bfloat16, for training) and `batch_norm_act` (batch norm with its
// activation, for training). Here are argument checks, allocation of
// results and registration; the computation is in the headers.
#include <algorithm>
#include <string>
#include <vector>

#include "batch_norm.h"
#include "conv_gemm.h"
#include "depthwise.h"
#include "paddle/phi/api/ext/op_meta_info.h"
#include "paddle/phi/api/include/api.h"
#include "paddle/phi/core/dense_tensor.h"
#include "pointwise_bf16.h"
#include "python_entry.h"

namespace phi::funcs {
// Exported by Paddle builds with oneDNN only.
__attribute__((weak)) void TransDataLayoutFromOneDNN(DataLayout from, DataLayout to, const DenseTensor& in,
                                                     DenseTensor* out, Place place, bool always_copy);
}  // namespace phi::funcs

namespace {

using paddle::DataType;
using paddle::Tensor;

using Dims = std::vector<int64_t>;

constexpr int kMaxKernel = 63;  // MAX_KERNEL in conv.py

// Whether a map is [N, C / 16, H, W, 16] (NCHW16c) and not [N, C, H, W].
bool is_nchw16c(const Dims& x) { return x.size() == 5 && x[4] == large_kernel::kChannelBlock; }

// [N, C, H, W] of either layout.
Dims nchw_shape(const Dims& x) { return is_nchw16c(x) ? Dims{x[0], x[1] * x[4], x[2], x[3]} : x; }

Dims output_shape(Dims x, int stride) {
  PD_CHECK(x.size() == 4, "a convolution takes [N, C, H, W], not ", x.size(), " dimensions");
  for (int i = 2; i < 4; i++) x[i] = x[i] < 0 ? -1 : (x[i] - 1) / stride + 1;  // -1: unknown until the program runs
  return x;
}

Dims nchw16c_shape(const Dims& x) {
  return {x[0], x[1] / large_kernel::kChannelBlock, x[2], x[3], large_kernel::kChannelBlock};
}

// Whether these are the shapes of an input and a weight of `large_kernel_conv`.
bool shapes_fit(const Dims& in, const Dims& w, int stride) {
  return in.size() == 4 && *std::min_element(in.begin(), in.end()) > 0 && w.size() == 4 && w[0] == in[1] && w[1] == 1 &&
         w[2] == w[3] && w[2] % 2 == 1 && w[2] <= kMaxKernel && (stride == 1 || stride == 2);
}

// Whether a tensor is a map that the operators for inference take: float32, or bfloat16 in NCHW16c.
bool is_map(const Tensor& x) {
  return x.is_cpu() && (x.dtype() == DataType::FLOAT32 || (x.dtype() == DataType::BFLOAT16 && is_nchw16c(x.shape())));
}

// `in` is the shape of x as [N, C, H, W].
large_kernel::Shape checked_shape(const Tensor& x, const Dims& in, const Tensor& weight, int stride) {
  PD_CHECK(is_map(x) && weight.is_cpu() && weight.dtype() == DataType::FLOAT32,
           "large_kernel_conv needs a float32 input and weight on the CPU");
  const Dims w = weight.shape();
  PD_CHECK(shapes_fit(in, w, stride),
           "large_kernel_conv needs a non-empty input [N, C, H, W], a weight [C, 1, K, K] with odd K up to ",
           kMaxKernel, ", and stride 1 or 2");
  return {(int)in[0], (int)in[1], (int)in[2], (int)in[3], (int)w[2], stride};
}

// Paddle Inference passes the results of oneDNN operators in oneDNN's own blocked layout.
Tensor without_onednn_layout(const Tensor& x) {
  if (x.layout() != phi::DataLayout::ONEDNN) return x;
  PD_CHECK(phi::funcs::TransDataLayoutFromOneDNN,
           "large_kernel_conv: the input has a oneDNN layout, which this Paddle cannot convert");
  // Allocated by Paddle: its tensors in 2.6 are larger than its headers declare.
  const Tensor out = paddle::experimental::empty({1}, x.dtype(), phi::CPUPlace());
  phi::funcs::TransDataLayoutFromOneDNN(phi::DataLayout::ONEDNN, phi::DataLayout::NCHW,
                                        *std::static_pointer_cast<phi::DenseTensor>(x.impl()),
                                        static_cast<phi::DenseTensor*>(out.impl().get()), phi::CPUPlace(), false);
  return out;
}

const float* values(const Tensor& t) { return static_cast<const float*>(t.data()); }

float* mutable_values(Tensor& t) { return static_cast<float*>(t.data()); }

template <class T>
large_kernel::FeatureMap<T> feature_map(T* data, const Dims& dims, DataType dtype = DataType::FLOAT32) {
  const Dims plain = nchw_shape(dims);
  return {data, (int)plain[1], plain[2] * plain[3], is_nchw16c(dims), dtype == DataType::BFLOAT16};
}

// The values of a tensor [count].
const float* channel_values(const Tensor& t, std::int64_t count, const char* name) {
  PD_CHECK(t.is_cpu() && t.dtype() == DataType::FLOAT32, "large_kernel: ", name, " must be float32 on the CPU");
  PD_CHECK(t.numel() == count, "large_kernel: ", name, " has ", t.numel(), " values for ", count, " channels");
  return values(t);
}

Tensor depthwise_forward(const Tensor& input, const Tensor& weight, const Tensor* bias, int stride) {
  const Tensor x = without_onednn_layout(input);
  const large_kernel::Shape s = checked_shape(x, x.shape(), weight, stride);
  PD_CHECK(!bias || bias->shape().size() == 1, "large_kernel_conv needs a bias [C]");
  Tensor y = paddle::experimental::empty({s.batch, s.channels, s.out_height(), s.out_width()}, x.dtype(), x.place());
  large_kernel::forward(feature_map(values(x), x.shape()), values(weight),
                        {nullptr, bias ? channel_values(*bias, s.channels, "bias") : nullptr}, s,
                        feature_map(mutable_values(y), y.shape()));
  return y;
}

// The output channels of a weight of `fused_conv`, packed or not.
std::int64_t out_channels(const std::vector<int64_t>& weight) {
  return weight.size() == 3 ? weight[0] * weight[2] : weight[0];
}

using OptionalTensor = paddle::optional<Tensor>;
using OptionalTensors = paddle::optional<std::vector<Tensor>>;

// A batch norm with running statistics, folded into scale and shift. `norm` holds weight, bias, mean and variance.
struct FoldedNorm {
  std::vector<float> scale, shift;

  FoldedNorm(const OptionalTensors& norm, float epsilon, std::int64_t channels) {
    if (!norm || norm->empty()) return;
    PD_CHECK(norm->size() == 4, "fused_conv: a norm is weight, bias, mean and variance, not ", norm->size(),
             " tensors");
    const float *weight = channel_values((*norm)[0], channels, "norm weight"),
                *bias = channel_values((*norm)[1], channels, "norm bias");
    const float *mean = channel_values((*norm)[2], channels, "norm mean"),
                *variance = channel_values((*norm)[3], channels, "norm variance");
    for (std::int64_t c = 0; c < channels; c++) {
      scale.push_back(weight[c] / std::sqrt(variance[c] + epsilon));
      shift.push_back(bias[c] - mean[c] * scale[c]);
    }
  }
  const float* scale_data() const { return scale.empty() ? nullptr : scale.data(); }
  const float* shift_data() const { return shift.empty() ? nullptr : shift.data(); }
};

// What a weight in int8 is used with: x is rounded to in_scale * x + in_shift, from 0 to 255, and sums are multiplied by
// out_scale.
struct Quantisation {
  const float *in_scale, *in_shift;
  std::vector<float> out_scale;

  Quantisation(const OptionalTensors& in, const OptionalTensors& out, std::int64_t in_channels,
               std::int64_t out_channels) {
    PD_CHECK(in && in->size() == 2 && out && out->size() == 1,
             "fused_conv: an int8 weight needs scale and shift of the input, and the scale of the sums");
    in_scale = channel_values((*in)[0], in_channels, "input scale");
    in_shift = channel_values((*in)[1], in_channels, "input shift");
    const float* const scale = channel_values((*out)[0], out_channels, "output scale");
    out_scale.assign(scale, scale + out_channels);
  }
};

// The dtype of a convolution's result. Maps in NCHW16c stay in bfloat16 from the first convolution with such a weight on.
DataType result_dtype(DataType x, DataType weight, bool nchw16c) {
  return nchw16c && (x == DataType::BFLOAT16 || weight == DataType::BFLOAT16) ? DataType::BFLOAT16 : DataType::FLOAT32;
}

large_kernel::Activation parse_activation(const std::string& name) {
  if (name == "relu") return large_kernel::Activation::kRelu;
  if (name == "gelu") return large_kernel::Activation::kGelu;
  PD_CHECK(name.empty(), "large_kernel: unknown activation ", name, ": expected relu or gelu");
  return large_kernel::Activation::kNone;
}

// Calls f with the weight of a dense convolution in the form that conv_gemm takes.
template <class F>
void with_weights(const Tensor& weight, bool packed, F f) {
  using namespace large_kernel;
  if (!packed) return f(PlainWeights{values(weight)});
  switch (weight.dtype()) {
    case DataType::BFLOAT16: return f(PackedWeights<Bfloat16Product>{values(weight)});
    case DataType::INT8: return f(PackedWeights<Int8Product>{values(weight)});
    default: return f(PackedWeights<Float32Product>{values(weight)});
  }
}

// The rows, in elements, of a packed weight of `terms` terms per output channel.
int packed_elements(DataType dtype, int terms) {
  using namespace large_kernel;
  if (dtype == DataType::BFLOAT16) return packed_rows<Bfloat16Product>(terms) * Bfloat16Product::kPerWord;
  if (dtype == DataType::INT8) return packed_rows<Int8Product>(terms) * Int8Product::kPerWord;
  return terms;
}

// activation(out_norm(conv(in_norm(x)) + bias)) + residual, each part but the convolution optional. A dense convolution
// also takes a packed weight [C_out / 16, rows, 16] of float32, bfloat16 or int8, see `packed_elements`; in words of
// several elements, which are terms of one channel. int8 needs a `Quantisation` in place of the norms, and its bias is
// added after the scale. With `blocked` the result is NCHW16c; the input may have either layout, the residual that of the
// result.
std::vector<Tensor> FusedConv(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& residual, const OptionalTensors& in_norm,
                              const OptionalTensors& out_norm, int kernel, int stride, const std::string& activation,
                              float in_epsilon, float out_epsilon, bool nchw16c, bool depthwise) {
  const Tensor x = without_onednn_layout(input);
  const Dims in = nchw_shape(x.shape()), w = weight.shape();
  PD_CHECK(in.size() == 4 && (w.size() == 4 || (w.size() == 3 && w[2] == large_kernel::kChannelBlock)),
           "fused_conv needs input [N, C, H, W] or NCHW16c, and weight [C_out, C_in, K, K] or packed");
  PD_CHECK(kernel % 2 == 1 && (stride == 1 || stride == 2), "fused_conv takes odd kernels and stride 1 or 2");
  PD_CHECK(x.numel() > 0 && weight.numel() > 0, "fused_conv needs a non-empty input and weight");
  const bool packed = w.size() == 3, is_dense = !depthwise, is_int8 = weight.dtype() == DataType::INT8;
  PD_CHECK(packed ? is_dense && w[1] == packed_elements(weight.dtype(), in[1] * kernel * kernel)
                  : w[1] == (is_dense ? in[1] : 1) && w[2] == kernel && w[3] == kernel,
           "fused_conv: a weight of ", w[1], " rows for ", in[1], " channels and a ", kernel, "x", kernel, " kernel");
  const bool is_pointwise = is_dense && kernel == 1 && stride == 1;
  PD_CHECK((is_dense || !residual) && (is_pointwise || !in_norm || in_norm->empty()) && (is_pointwise || !is_int8),
           "fused_conv: only dense convolutions take a residual, only dense 1x1 ones at stride 1 an input norm or int8");
  PD_CHECK(is_map(x) && weight.is_cpu() &&
               (weight.dtype() == DataType::FLOAT32 || (packed && (is_int8 || weight.dtype() == DataType::BFLOAT16))),
           "fused_conv needs a float32 input, or a bfloat16 one in NCHW16c, and a weight in float32, or a packed one in "
           "bfloat16 or int8, on the CPU");
  const std::int64_t channels = out_channels(w);
  PD_CHECK(!nchw16c || channels % large_kernel::kChannelBlock == 0, "fused_conv: ", channels,
           " channels are not a multiple of 16, as NCHW16c needs");
  const FoldedNorm before(is_int8 ? OptionalTensors() : in_norm, in_epsilon, in[1]);
  FoldedNorm after(is_int8 ? OptionalTensors() : out_norm, out_epsilon, channels);
  const float *in_scale = before.scale_data(), *in_shift = before.shift_data();
  if (bias) {
    const float* b = channel_values(*bias, channels, "bias");
    after.shift.resize(channels);
    for (std::int64_t c = 0; c < channels; c++) after.shift[c] += b[c] * (after.scale.empty() ? 1.f : after.scale[c]);
  }
  if (is_int8) {
    Quantisation quantisation(in_norm, out_norm, in[1], channels);
    in_scale = quantisation.in_scale, in_shift = quantisation.in_shift;
    after.scale = std::move(quantisation.out_scale);
  }
  const large_kernel::Epilogue epilogue = {after.scale_data(), after.shift_data(), parse_activation(activation)};
  Dims out = output_shape(in, stride);
  out[1] = channels;
  if (nchw16c) out = nchw16c_shape(out);
  Tensor y = paddle::experimental::empty(out, result_dtype(x.dtype(), weight.dtype(), nchw16c), x.place());
  const auto from = feature_map(values(x), x.shape(), x.dtype());
  const auto to = feature_map(mutable_values(y), out, y.dtype());
  if (!is_dense) {
    large_kernel::forward(from, values(weight), epilogue, checked_shape(x, in, weight, stride), to);
    return {y};
  }
  const Tensor added = residual ? without_onednn_layout(*residual) : Tensor();
  PD_CHECK(!residual || (added.shape() == out && added.dtype() == y.dtype()),
           "fused_conv needs a residual of the shape and dtype of the result");
  const large_kernel::Shape s = {(int)in[0], (int)in[1], (int)in[2], (int)in[3], kernel, stride};
  with_weights(weight, packed, [&](auto weights) {
    large_kernel::conv_gemm(from, weights, in_scale, in_shift, epilogue, residual ? values(added) : nullptr, s, to);
  });
  return {y};
}

enum Part { kBias = 1, kInNorm = 2, kOutNorm = 4, kBlocked = 8, kDepthwise = 16, kInt8 = 32 };

// How many tensors a convolution of FusedConvs takes as in_norm and as out_norm. For int8 they are a `Quantisation`.
std::size_t in_norm_size(int parts) { return parts & kInNorm ? (parts & kInt8 ? 2 : 4) : 0; }
std::size_t out_norm_size(int parts) { return parts & kOutNorm ? (parts & kInt8 ? 1 : 4) : 0; }

// The positions of the weights of FusedConvs in `parameters`.
std::vector<std::size_t> weight_positions(const std::vector<int>& parts, std::size_t parameters) {
  std::vector<std::size_t> positions;
  std::size_t next = 0;
  for (int of_one : parts) {
    positions.push_back(next);
    next += 1 + !!(of_one & kBias) + in_norm_size(of_one) + out_norm_size(of_one);
  }
  PD_CHECK(!parts.empty() && next == parameters, "fused_convs: ", parameters, " parameters where it takes ", next);
  return positions;
}

// A sequence of FusedConv. Each attribute has one element per convolution, `epsilons` two. `parameters` holds for each
// convolution its weight and, according to `parts`, the bias, in_norm and out_norm. Residual 0 is the input x, i > 0
// the result of the i-th convolution, a negative index none.
std::vector<Tensor> FusedConvs(const Tensor& x, const std::vector<Tensor>& parameters, const std::vector<int>& kernels,
                               const std::vector<int>& strides, const std::vector<int>& parts,
                               const std::vector<int>& residuals, const std::vector<std::string>& activations,
                               const std::vector<float>& epsilons) {
  const std::size_t count = kernels.size();
  PD_CHECK(count > 0 && strides.size() == count && parts.size() == count && residuals.size() == count &&
               activations.size() == count && epsilons.size() == 2 * count,
           "fused_convs needs one attribute of each kind per convolution");
  std::vector<Tensor> values = {x};
  std::vector<std::size_t> needed(count + 1);  // the last convolution that reads each map
  for (std::size_t i = 0; i < count; i++) {
    PD_CHECK(residuals[i] <= (int)i, "fused_convs: a residual has to be computed before it is added");
    needed[i] = i;
    if (residuals[i] >= 0) needed[residuals[i]] = i;
  }
  const std::vector<std::size_t> positions = weight_positions(parts, parameters.size());
  std::size_t next;
  auto take = [&](std::size_t n) {
    next += n;
    return std::vector<Tensor>(parameters.begin() + (next - n), parameters.begin() + next);
  };
  auto norm = [&](std::size_t n) { return n ? OptionalTensors(take(n)) : OptionalTensors(); };
  for (std::size_t i = 0; i < count; i++) {
    next = positions[i];
    const Tensor weight = take(1)[0];
    const auto bias = parts[i] & kBias ? OptionalTensor(take(1)[0]) : OptionalTensor();
    const auto before = norm(in_norm_size(parts[i])), after = norm(out_norm_size(parts[i]));
    const auto residual = residuals[i] < 0 ? OptionalTensor() : OptionalTensor(values[residuals[i]]);
    values.push_back(FusedConv(values[i], weight, bias, residual, before, after, kernels[i], strides[i], activations[i],
                               epsilons[2 * i], epsilons[2 * i + 1], parts[i] & kBlocked, parts[i] & kDepthwise)[0]);
    for (std::size_t j = 0; j <= i; j++) {
      if (needed[j] == i) values[j] = Tensor();
    }
  }
  return {values.back()};
}

// Memory for a gradient; zeros if it is not wanted.
Tensor gradient_like(const Tensor& like, bool wanted) {
  return wanted ? paddle::experimental::empty_like(like)
                : paddle::experimental::full(like.shape(), 0, like.dtype(), like.place());
}

// Gradients that are not requested are zeros.
std::vector<Tensor> depthwise_backward(const Tensor& x, const Tensor& weight, const Tensor* bias, const Tensor& dy,
                                       int stride, bool input_grad, bool weight_grad) {
  const large_kernel::Shape s = checked_shape(x, x.shape(), weight, stride);
  PD_CHECK(dy.is_cpu() && dy.dtype() == DataType::FLOAT32, "large_kernel_conv needs float32 gradients on the CPU");
  std::vector<Tensor> grads = {gradient_like(x, input_grad), gradient_like(weight, weight_grad)};
  if (bias) grads.push_back(gradient_like(*bias, weight_grad));
  large_kernel::backward(values(x), values(weight), values(dy), s, input_grad ? mutable_values(grads[0]) : nullptr,
                         weight_grad ? mutable_values(grads[1]) : nullptr,
                         weight_grad && bias ? mutable_values(grads[2]) : nullptr);
  return grads;
}

std::vector<Tensor> Forward(const Tensor& x, const Tensor& weight, int stride, bool, bool) {
  return {depthwise_forward(x, weight, nullptr, stride)};
}

std::vector<Tensor> ForwardBias(const Tensor& x, const Tensor& weight, const Tensor& bias, int stride, bool, bool) {
  return {depthwise_forward(x, weight, &bias, stride)};
}

std::vector<Tensor> Backward(const Tensor& x, const Tensor& weight, const Tensor& dy, int stride, bool input_grad,
                             bool weight_grad) {
  return depthwise_backward(x, weight, nullptr, dy, stride, input_grad, weight_grad);
}

std::vector<Tensor> BackwardBias(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& dy,
                                 int stride, bool input_grad, bool weight_grad) {
  return depthwise_backward(x, weight, &bias, dy, stride, input_grad, weight_grad);
}

// The channels and pixels of a 1x1 convolution in training.
struct PointwiseShape {
  int batch, in_channels, out_channels;
  std::int64_t pixels;

  PointwiseShape(const Tensor& x, const Tensor& weight) {
    const Dims in = x.shape(), w = weight.shape();
    PD_CHECK(in.size() == 4 && x.numel() > 0 && w.size() == 4 && w[1] == in[1] && w[2] == 1 && w[3] == 1,
             "pointwise_bf16 needs a non-empty input [N, C, H, W] and a weight [C_out, C, 1, 1]");
    PD_CHECK(x.is_cpu() && weight.is_cpu() && x.dtype() == DataType::FLOAT32 && weight.dtype() == DataType::FLOAT32,
             "pointwise_bf16 needs a float32 input and weight on the CPU");
    batch = (int)in[0], in_channels = (int)in[1], out_channels = (int)w[0], pixels = in[2] * in[3];
  }
};

Dims pointwise_result(Dims x, const Dims& weight) {
  x[1] = weight[0];
  return x;
}

std::vector<Tensor> PointwiseBf16(const Tensor& x, const Tensor& weight, bool, bool) {
  const PointwiseShape s(x, weight);
  Tensor y = paddle::experimental::empty(pointwise_result(x.shape(), weight.shape()), x.dtype(), x.place());
  large_kernel::pointwise_forward(values(x), values(weight), s.batch, s.in_channels, s.out_channels, s.pixels,
                                  mutable_values(y));
  return {y};
}

// Gradients that are not requested are zeros.
std::vector<Tensor> PointwiseBf16Grad(const Tensor& x, const Tensor& weight, const Tensor& dy, bool input_grad,
                                      bool weight_grad) {
  const PointwiseShape s(x, weight);
  PD_CHECK(dy.is_cpu() && dy.dtype() == DataType::FLOAT32 && dy.shape() == pointwise_result(x.shape(), weight.shape()),
           "pointwise_bf16 needs float32 gradients of the result's shape on the CPU");
  std::vector<Tensor> grads = {gradient_like(x, input_grad), gradient_like(weight, weight_grad)};
  if (input_grad) {
    large_kernel::pointwise_input_gradient(values(weight), values(dy), s.batch, s.in_channels, s.out_channels, s.pixels,
                                           mutable_values(grads[0]));
  }
  if (weight_grad) {
    large_kernel::pointwise_weight_gradient(values(x), values(dy), s.batch, s.in_channels, s.out_channels, s.pixels,
                                            mutable_values(grads[1]));
  }
  return grads;
}

std::vector<Dims> PointwiseInferShape(const Dims& x, const Dims& weight, bool, bool) {
  return {pointwise_result(x, weight)};
}

large_kernel::BatchNormShape checked_norm_shape(const Tensor& x, std::initializer_list<const Tensor*> of_channels) {
  const Dims dims = x.shape();
  PD_CHECK(dims.size() == 4 && x.numel() > 0, "batch_norm_act needs a non-empty input [N, C, H, W]");
  auto fits = [](const Tensor& t) { return t.is_cpu() && t.dtype() == DataType::FLOAT32; };
  bool good = fits(x);
  for (const Tensor* t : of_channels) good = good && fits(*t) && t->numel() == dims[1];
  PD_CHECK(good, "batch_norm_act needs a float32 input on the CPU, and float32 weight, bias and statistics [C]");
  return {(int)dims[0], (int)dims[1], dims[2] * dims[3]};
}

// Like Paddle's own batch norm, this updates the running statistics in place.
std::vector<Tensor> BatchNormAct(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& running_mean,
                                 const Tensor& running_variance, float momentum, float epsilon,
                                 const std::string& activation) {
  const large_kernel::BatchNormShape s = checked_norm_shape(x, {&weight, &bias, &running_mean, &running_variance});
  Tensor y = paddle::experimental::empty_like(x), mean = paddle::experimental::empty_like(weight),
         variance = paddle::experimental::empty_like(weight);
  large_kernel::batch_norm_forward(values(x), values(weight), values(bias), epsilon, parse_activation(activation), s,
                                   mutable_values(y), mutable_values(mean), mutable_values(variance), momentum,
                                   const_cast<float*>(values(running_mean)),
                                   const_cast<float*>(values(running_variance)));
  return {y, mean, variance};
}

std::vector<Tensor> BatchNormActGrad(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
                                     const Tensor& variance, const Tensor& dy, float, float epsilon,
                                     const std::string& activation) {
  const large_kernel::BatchNormShape s = checked_norm_shape(x, {&weight, &bias, &mean, &variance});
  Tensor dx = paddle::experimental::empty_like(x), dweight = paddle::experimental::empty_like(weight),
         dbias = paddle::experimental::empty_like(bias);
  large_kernel::batch_norm_backward(values(x), values(weight), values(bias), values(mean), values(variance), values(dy),
                                    epsilon, parse_activation(activation), s, mutable_values(dx),
                                    mutable_values(dweight), mutable_values(dbias));
  return {dx, dweight, dbias};
}

std::vector<Dims> NormShapes(const Dims& x, const Dims& weight, const Dims&, const Dims&, const Dims&, float, float,
                             const std::string&) {
  return {x, weight, weight};
}
std::vector<DataType> NormDtypes(const DataType& x, const DataType& weight, const DataType&, const DataType&,
                                 const DataType&) {
  return {x, weight, weight};
}

std::vector<Dims> InferShape(const Dims& x, const Dims&, int stride, bool, bool) { return {output_shape(x, stride)}; }
std::vector<Dims> InferShapeBias(const Dims& x, const Dims&, const Dims&, int stride, bool, bool) {
  return {output_shape(x, stride)};
}
std::vector<DataType> InferDtype(const DataType& x, const DataType&) { return {x}; }

using OptionalDims = paddle::optional<Dims>;
using OptionalDimsList = paddle::optional<std::vector<Dims>>;
std::vector<Dims> FusedShape(const Dims& x, const Dims& weight, const OptionalDims&, const OptionalDims&,
                             const OptionalDimsList&, const OptionalDimsList&, int, int stride, const std::string&,
                             float, float, bool nchw16c, bool) {
  Dims y = output_shape(nchw_shape(x), stride);
  y[1] = out_channels(weight);
  return {nchw16c ? nchw16c_shape(y) : y};
}
std::vector<DataType> FusedDtype(const DataType& x, const DataType& weight, const paddle::optional<DataType>&,
                                 const paddle::optional<DataType>&, const paddle::optional<std::vector<DataType>>&,
                                 const paddle::optional<std::vector<DataType>>&, int, int, const std::string&, float,
                                 float, bool nchw16c, bool) {
  return {result_dtype(x, weight, nchw16c)};
}
std::vector<Dims> FusedConvsShape(const Dims& x, const std::vector<Dims>& parameters, const std::vector<int>&,
                                  const std::vector<int>& strides, const std::vector<int>& parts,
                                  const std::vector<int>&, const std::vector<std::string>&, const std::vector<float>&) {
  Dims y = nchw_shape(x);
  for (int stride : strides) y = output_shape(y, stride);
  y[1] = out_channels(parameters[weight_positions(parts, parameters.size()).back()]);
  return {parts.back() & kBlocked ? nchw16c_shape(y) : y};
}
std::vector<DataType> FusedConvsDtype(const DataType& x, const std::vector<DataType>& parameters,
                                      const std::vector<int>&, const std::vector<int>&, const std::vector<int>& parts,
                                      const std::vector<int>&, const std::vector<std::string>&,
                                      const std::vector<float>&) {
  DataType y = x;
  const std::vector<std::size_t> weights = weight_positions(parts, parameters.size());
  for (std::size_t i = 0; i < parts.size(); i++) y = result_dtype(y, parameters[weights[i]], parts[i] & kBlocked);
  return {y};
}
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

PD_BUILD_OP(fused_conv)
    .Inputs({"X", "Filter", paddle::Optional("Bias"), paddle::Optional("Residual"),
             paddle::Optional(paddle::Vec("InNorm")), paddle::Optional(paddle::Vec("OutNorm"))})
    .Outputs({"Out"})
    .Attrs({"kernel: int", "stride: int", "activation: std::string", "in_epsilon: float", "out_epsilon: float",
            "blocked: bool", "depthwise: bool"})
    .SetKernelFn(PD_KERNEL(FusedConv))
    .SetInferShapeFn(PD_INFER_SHAPE(FusedShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(FusedDtype));

PD_BUILD_OP(fused_convs)
    .Inputs({"X", paddle::Vec("Parameters")})
    .Outputs({"Out"})
    .Attrs({"kernels: std::vector<int>", "strides: std::vector<int>", "parts: std::vector<int>",
            "residuals: std::vector<int>", "activations: std::vector<std::string>", "epsilons: std::vector<float>"})
    .SetKernelFn(PD_KERNEL(FusedConvs))
    .SetInferShapeFn(PD_INFER_SHAPE(FusedConvsShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(FusedConvsDtype));

PD_BUILD_OP(pointwise_bf16)
    .Inputs({"X", "Filter"})
    .Outputs({"Out"})
    .Attrs({"input_grad: bool", "weight_grad: bool"})
    .SetKernelFn(PD_KERNEL(PointwiseBf16))
    .SetInferShapeFn(PD_INFER_SHAPE(PointwiseInferShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(InferDtype));

PD_BUILD_GRAD_OP(pointwise_bf16)
    .Inputs({"X", "Filter", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Filter")})
    .Attrs({"input_grad: bool", "weight_grad: bool"})
    .SetKernelFn(PD_KERNEL(PointwiseBf16Grad));

PD_BUILD_OP(batch_norm_act)
    .Inputs({"X", "Weight", "Bias", "RunningMean", "RunningVariance"})
    .Outputs({"Out", "Mean", "Variance"})
    .Attrs({"momentum: float", "epsilon: float", "activation: std::string"})
    .SetKernelFn(PD_KERNEL(BatchNormAct))
    .SetInferShapeFn(PD_INFER_SHAPE(NormShapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(NormDtypes));

PD_BUILD_GRAD_OP(batch_norm_act)
    .Inputs({"X", "Weight", "Bias", "Mean", "Variance", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Weight"), paddle::Grad("Bias")})
    .Attrs({"momentum: float", "epsilon: float", "activation: std::string"})
    .SetKernelFn(PD_KERNEL(BatchNormActGrad));

// The instructions with which this library multiplies on this machine, for `build.instructions`; "" for several of
// another kind.
extern "C" __attribute__((visibility("default"))) const char* large_kernel_bf16_instructions() {
  return large_kernel::has_amx() ? "AMX" : large_kernel::Bfloat16Product::kInstructions;
}
extern "C" __attribute__((visibility("default"))) const char* large_kernel_int8_instructions() {
  return large_kernel::has_amx() ? "AMX" : large_kernel::Int8Product::kInstructions;
}

#if __has_include(<Python.h>)
static bool fits(const Tensor& x, const Tensor& weight, const Tensor* bias, int stride) {
  return shapes_fit(x.shape(), weight.shape(), stride) && (!bias || bias->shape() == Dims{x.shape()[1]});
}

PyMODINIT_FUNC PyInit_large_kernel_direct() { return python_entry::make_module<depthwise_forward, fits>(); }
#endif
