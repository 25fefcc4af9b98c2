// Runs the kernels over a table of shapes, in buffers of exactly the tensors' size, and compares them with plain loops
// in double precision. The tests build it with and without sanitizers and for several instruction sets. Exits with 1 on
// a wrong value.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

static bool large_cache;  // code that depends on the size of the cache runs for both sizes
#define LK_LARGE_L1 large_cache

#if !defined(LK_LEAST_WEIGHT)  // in int8
#define LK_LEAST_WEIGHT -128
#endif

#include "batch_norm.h"
#include "conv_gemm.h"
#include "depthwise.h"
#include "pointwise_bf16.h"

using large_kernel::FeatureMap;
using large_kernel::Shape;

namespace {

struct Buffer {
  // aligned like Paddle's tensors
  explicit Buffer(std::size_t n)
      : size(n),
        data(static_cast<float*>(::operator new(n * sizeof(float), std::align_val_t(64)))) {
    std::fill_n(data.get(), n, 0.f);
  }
  struct Delete {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::size_t size;
  std::unique_ptr<float[], Delete> data;
  double at(std::size_t i) const { return data[i]; }
  void draw(std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < size; i++) data[i] = normal(random);
  }
};

double from_bfloat16(large_kernel::Bfloat16 half) {
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A feature map in a buffer of exactly its size.
struct MapBuffer {
  Buffer buffer;
  int batch, channels;
  std::size_t pixels;
  bool blocked;

  MapBuffer(int batch, int channels, std::size_t pixels, bool blocked)
      : buffer(batch * channels * pixels),
        batch(batch),
        channels(channels),
        pixels(pixels),
        blocked(blocked) {}
  // the same values, converted to the other layout if necessary
  MapBuffer(const MapBuffer& other, bool blocked) : MapBuffer(other.batch, other.channels, other.pixels, blocked) {
    for (int image = 0; image < batch; image++) {
      for (int c = 0; c < channels; c++) {
        for (std::size_t p = 0; p < pixels; p++)
          buffer.data[index(image, c, p)] = other.buffer.data[other.index(image, c, p)];
      }
    }
  }
  static std::size_t block_index(const MapBuffer& map, int image, int c, std::size_t p) {
    return ((std::size_t)image * map.channels + c / 16 * 16) * map.pixels + p * 16 + c % 16;
  }
  std::size_t index(int image, int c, std::size_t p) const {
    return blocked ? block_index(*this, image, c, p) : ((std::size_t)image * channels + c) * pixels + p;
  }
  FeatureMap<const float> in() const { return {buffer.data.get(), channels, (std::ptrdiff_t)pixels, blocked}; }
  FeatureMap<float> out() { return {buffer.data.get(), channels, (std::ptrdiff_t)pixels, blocked}; }
};

// A map in bfloat16 and NCHW16c, in a buffer of exactly its size.
struct HalfMap {
  int channels;
  std::size_t pixels;
  std::vector<large_kernel::Bfloat16> values;

  HalfMap() : channels(0), pixels(0) {}
  explicit HalfMap(const MapBuffer& map) : channels(map.channels), pixels(map.pixels), values(map.buffer.size) {
    const MapBuffer blocks(map, true);
    for (std::size_t i = 0; i < values.size(); i++) values[i] = large_kernel::to_bfloat16(blocks.buffer.data[i]);
  }
  FeatureMap<const float> in() const {
    return {reinterpret_cast<const float*>(values.data()), channels, (std::ptrdiff_t)pixels, true, true};
  }
  FeatureMap<float> out() {
    return {reinterpret_cast<float*>(values.data()), channels, (std::ptrdiff_t)pixels, true, true};
  }
};

struct Reference {
  explicit Reference(std::size_t n) : sum(n), magnitude(n) {}
  std::vector<double> sum, magnitude;
  void add(std::size_t i, double product) { sum[i] += product, magnitude[i] += std::fabs(product); }
};

// The worst error, in units of float32's epsilon times the sum of magnitudes.
double worst(const Buffer& got, const Reference& want) {
  double result = 0;
  for (std::size_t i = 0; i < got.size; i++) {
    const double error = std::fabs(got.data[i] - want.sum[i]);
    if (!(error <= 1e-30))
      result = std::isnan(error) ? INFINITY : std::max(result, error / (want.magnitude[i] + 1e-30));
  }
  return result / std::ldexp(1.0, -23);
}

// The same for results in bfloat16, whose own rounding is allowed for.
double worst(const HalfMap& got, const MapBuffer& layout, const Reference& want) {
  double result = 0;
  for (int image = 0; image < layout.batch; image++) {
    for (int c = 0; c < layout.channels; c++) {
      for (std::size_t p = 0; p < layout.pixels; p++) {
        const std::size_t i = layout.index(image, c, p), block = MapBuffer::block_index(layout, image, c, p);
        const double error = std::fabs(from_bfloat16(got.values[block]) - want.sum[i]) - std::ldexp(std::fabs(want.sum[i]), -8);
        if (!(error <= 1e-30))
          result = std::isnan(error) ? INFINITY : std::max(result, error / (want.magnitude[i] + 1e-30));
      }
    }
  }
  return result / std::ldexp(1.0, -23);
}

// `offset` is added to x and dy, so that sums grow with the number of terms.
bool run(const Shape& s, std::mt19937& random, float offset = 0) {
  const std::size_t in = (std::size_t)s.height * s.width, out = (std::size_t)s.out_height() * s.out_width();
  const std::size_t planes = (std::size_t)s.batch * s.channels, area = (std::size_t)s.kernel * s.kernel;
  MapBuffer map(s.batch, s.channels, in, false), result(s.batch, s.channels, out, false);
  Buffer &x = map.buffer, &y = result.buffer;
  Buffer weight(s.channels * area), bias(s.channels), dy(planes * out);
  Buffer dx(planes * in), dweight(s.channels * area), dbias(s.channels);
  x.draw(random), weight.draw(random), bias.draw(random), dy.draw(random);
  for (Buffer* map : {&x, &dy}) {
    for (std::size_t i = 0; offset && i < map->size; i++) map->data[i] = offset + map->data[i] / 8;
  }
  std::vector<float> shift(s.channels);
  for (int c = 0; c < s.channels; c++) shift[c] = bias.at(c);
  large_kernel::forward(map.in(), weight.data.get(), {nullptr, shift.data()}, s, result.out());
  large_kernel::backward(x.data.get(), weight.data.get(), dy.data.get(), s, dx.data.get(), dweight.data.get(),
                         dbias.data.get());

  Reference ry(y.size), rdx(dx.size), rdweight(dweight.size), rdbias(dbias.size);
  for (std::size_t plane = 0; plane < planes; plane++) {
    const std::size_t c = plane % s.channels;
    for (std::size_t i = 0; i < out; i++) {
      ry.add(plane * out + i, bias.at(c));
      rdbias.add(c, dy.at(plane * out + i));
    }
    large_kernel::for_each_tap(s, [&](std::size_t o, std::size_t i, std::size_t tap) {
      o += plane * out, i += plane * in, tap += c * area;
      ry.add(o, x.at(i) * weight.at(tap));
      rdx.add(i, dy.at(o) * weight.at(tap));
      rdweight.add(tap, dy.at(o) * x.at(i));
    });
  }
  const double errors[] = {worst(y, ry), worst(dx, rdx), worst(dweight, rdweight), worst(dbias, rdbias)};
  for (double error : errors) {
    if (error > 8) {
      std::printf("[%d, %d, %d, %d] k%d s%d: errors %g %g %g %g\n", s.batch, s.channels, s.height, s.width, s.kernel,
                  s.stride, errors[0], errors[1], errors[2], errors[3]);
      return false;
    }
  }
  for (int layouts = 1; layouts < 4 && s.channels % 16 == 0; layouts++) {
    const MapBuffer from(map, layouts & 1);
    MapBuffer to(s.batch, s.channels, out, layouts & 2);
    large_kernel::forward(from.in(), weight.data.get(), {nullptr, shift.data()}, s, to.out());
    const double error = worst(MapBuffer(to, false).buffer, ry);
    if (error > 8) {
      std::printf("[%d, %d, %d, %d] k%d s%d, layouts %d: error %g\n", s.batch, s.channels, s.height, s.width, s.kernel,
                  s.stride, layouts, error);
      return false;
    }
  }
  return true;
}

bool run_dense(const Shape& s, int out_channels, std::mt19937& random) {
  const int area = s.kernel * s.kernel, terms = s.channels * area;
  const bool pointwise = area == 1 && s.stride == 1;
  const std::size_t in = (std::size_t)s.height * s.width, out = (std::size_t)s.out_height() * s.out_width();
  MapBuffer x(s.batch, s.channels, in, false), added(s.batch, out_channels, out, false);
  Buffer weight((std::size_t)out_channels * terms);
  Buffer in_scale(s.channels), in_shift(s.channels), scale(out_channels), shift(out_channels);
  x.buffer.draw(random), weight.draw(random), added.buffer.draw(random);
  in_scale.draw(random), in_shift.draw(random), scale.draw(random), shift.draw(random);
  for (int layouts = 0; layouts < 16; layouts++) {
    const bool from_blocks = layouts & 1, to_blocks = layouts & 2, packed = layouts & 4, norm = layouts & 8;
    if ((from_blocks && s.channels % 16) || ((to_blocks || packed) && out_channels % 16) || (norm && !pointwise)) {
      continue;
    }
    const MapBuffer from(x, from_blocks), residual(added, to_blocks);
    MapBuffer to(s.batch, out_channels, out, to_blocks);
    const large_kernel::Epilogue epilogue = {scale.data.get(), shift.data.get()};
    const float *a = norm ? in_scale.data.get() : nullptr, *b = norm ? in_shift.data.get() : nullptr;
    if (packed) {
      Buffer blocks(weight.size);
      for (std::size_t i = 0; i < weight.size; i++) {
        const std::size_t o = i / terms, k = i % terms;
        blocks.data[(o / 16 * terms + k) * 16 + o % 16] = weight.at(i);
      }
      large_kernel::conv_gemm(from.in(), large_kernel::PackedWeights<large_kernel::Float32Product>{blocks.data.get()}, a, b, epilogue,
                              residual.buffer.data.get(), s, to.out());
    } else {
      large_kernel::conv_gemm(from.in(), large_kernel::PlainWeights{weight.data.get()}, a, b, epilogue,
                              residual.buffer.data.get(), s, to.out());
    }
    Reference want(to.buffer.size);
    for (int image = 0; image < s.batch; image++) {
      for (int o = 0; o < out_channels; o++) {
        for (std::size_t p = 0; p < out; p++) {
          want.add(to.index(image, o, p), shift.at(o)),
              want.add(to.index(image, o, p), added.buffer.at(added.index(image, o, p)));
        }
        for (int k = 0; k < s.channels; k++) {
          large_kernel::for_each_tap(s, [&](std::size_t p, std::size_t i, std::size_t tap) {
            const double w = weight.at((std::size_t)o * terms + k * area + tap) * scale.at(o),
                         v = x.buffer.at(x.index(image, k, i));
            want.add(to.index(image, o, p), w * v * (norm ? in_scale.at(k) : 1));
            if (norm) want.add(to.index(image, o, p), w * in_shift.at(k));
          });
        }
      }
    }
    const double error = worst(to.buffer, want);
    if (error > 8) {
      std::printf("dense [%d, %d -> %d, %d, %d] k%d s%d, layouts %d: error %g\n", s.batch, s.channels, out_channels,
                  s.height, s.width, s.kernel, s.stride, layouts, error);
      return false;
    }
  }
  return true;
}

// Depthwise, with maps in bfloat16.
bool run_bfloat16(const Shape& s, std::mt19937& random) {
  const std::size_t in = (std::size_t)s.height * s.width, out = (std::size_t)s.out_height() * s.out_width();
  const std::size_t area = (std::size_t)s.kernel * s.kernel;
  MapBuffer x(s.batch, s.channels, in, false), y(s.batch, s.channels, out, false);
  Buffer weight(s.channels * area);
  x.buffer.draw(random), weight.draw(random);
  for (std::size_t i = 0; i < x.buffer.size; i++) {
    x.buffer.data[i] = from_bfloat16(large_kernel::to_bfloat16(x.buffer.data[i]));
  }
  const HalfMap from(x);
  HalfMap to(y);
  large_kernel::forward(from.in(), weight.data.get(), {}, s, to.out());
  Reference want(y.buffer.size);
  for (int plane = 0; plane < s.batch * s.channels; plane++) {
    large_kernel::for_each_tap(s, [&](std::size_t o, std::size_t i, std::size_t tap) {
      want.add(plane * out + o, x.buffer.at(plane * in + i) * weight.at(plane % s.channels * area + tap));
    });
  }
  const double error = worst(to, y, want);
  if (error > 8) {
    std::printf("bfloat16 [%d, %d, %d, %d] k%d s%d: error %g\n", s.batch, s.channels, s.height, s.width, s.kernel,
                s.stride, error);
  }
  return error <= 8;
}

// A dense convolution in bfloat16 or int8. The values are multiples of 1/8 that float32 represents exactly, also after
// the input norm, so that rounding to P's elements has one right result.
template <class P>
bool run_words(const Shape& s, int out_channels, std::mt19937& random) {
  constexpr bool is_int8 = P::kPerWord == 4;
  const int area = s.kernel * s.kernel, terms = s.channels * area, row_elements = 16 * P::kPerWord;
  const int rows = large_kernel::packed_rows<P>(terms);
  const bool pointwise = area == 1 && s.stride == 1;
  const std::size_t in = (std::size_t)s.height * s.width, out = (std::size_t)s.out_height() * s.out_width();
  auto pick = [&](int least, int most) { return (float)(least + (int)(random() % (most - least + 1))); };
  MapBuffer x(s.batch, s.channels, in, false), added(s.batch, out_channels, out, false);
  Buffer in_scale(s.channels), in_shift(s.channels), scale(out_channels), shift(out_channels);
  for (std::size_t i = 0; i < x.buffer.size; i++) x.buffer.data[i] = pick(-200, 200) / 8;
  for (std::size_t i = 0; i < added.buffer.size; i++) added.buffer.data[i] = pick(-100, 100) / 8;
  for (int c = 0; c < s.channels; c++) in_scale.data[c] = std::ldexp(1.f, (int)pick(-1, 3)), in_shift.data[c] = pick(0, 500) / 8;
  scale.draw(random), shift.draw(random);
  // weight[o][k], and its words [out_channels / 16][rows][16]
  std::vector<double> weight((std::size_t)out_channels * terms);
  Buffer words((std::size_t)out_channels * rows);
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(words.data.get());
  for (int o = 0; o < out_channels; o++) {
    for (int k = 0; k < terms; k++) {
      const float value = is_int8 ? pick(LK_LEAST_WEIGHT, 127) : pick(-1000, 1000) / 64;
      const std::size_t word = ((std::size_t)o / 16 * rows + k / P::kPerWord) * 16 + o % 16, element = word * P::kPerWord + k % P::kPerWord;
      if (is_int8) {
        bytes[element] = (uint8_t)(int8_t)value;
        weight[(std::size_t)o * terms + k] = value;
      } else {
        const large_kernel::Bfloat16 half = large_kernel::to_bfloat16(value);
        std::memcpy(bytes + 2 * element, &half, 2);
        weight[(std::size_t)o * terms + k] = from_bfloat16(half);
      }
    }
  }
  auto rounded = [&](double v) {
    if (is_int8) return std::min(255., std::max(0., std::nearbyint(v)));
    return from_bfloat16(large_kernel::to_bfloat16((float)v));
  };
  for (int forms = 0; forms < 18; forms++) {
    const int from_form = forms % 3, to_form = forms / 3 % 3;  // NCHW, NCHW16c, NCHW16c in bfloat16
    const bool norm = forms >= 9;
    if ((from_form && s.channels % 16) || (norm && !pointwise)) continue;
    const MapBuffer from(x, from_form > 0), residual(added, to_form > 0);
    MapBuffer to(s.batch, out_channels, out, to_form > 0);
    const HalfMap half_from = from_form == 2 ? HalfMap(x) : HalfMap(), half_residual(added);
    HalfMap half_to(to);
    const large_kernel::Epilogue epilogue = {scale.data.get(), shift.data.get()};
    large_kernel::conv_gemm(from_form == 2 ? half_from.in() : from.in(),
                            large_kernel::PackedWeights<P>{words.data.get()},
                            norm ? in_scale.data.get() : nullptr, norm ? in_shift.data.get() : nullptr, epilogue,
                            to_form == 2 ? half_residual.in().data : residual.buffer.data.get(), s,
                            to_form == 2 ? half_to.out() : to.out());
    Reference want(to.buffer.size);
    for (int image = 0; image < s.batch; image++) {
      for (int o = 0; o < out_channels; o++) {
        for (std::size_t p = 0; p < out; p++) {
          const std::size_t i = to.index(image, o, p);
          const float a = added.buffer.data[added.index(image, o, p)];
          want.add(i, shift.at(o)), want.add(i, to_form == 2 ? from_bfloat16(large_kernel::to_bfloat16(a)) : a);
        }
        for (int k = 0; k < s.channels; k++) {
          large_kernel::for_each_tap(s, [&](std::size_t p, std::size_t i, std::size_t tap) {
            const float value = x.buffer.data[x.index(image, k, i)];
            const double v = from_form == 2 ? from_bfloat16(large_kernel::to_bfloat16(value)) : value;
            want.add(to.index(image, o, p), weight[(std::size_t)o * terms + k * area + tap] * scale.at(o) *
                                                rounded(norm ? v * in_scale.at(k) + in_shift.at(k) : v));
          });
        }
      }
    }
    const double error = to_form == 2 ? worst(half_to, to, want) : worst(to.buffer, want);
    if (error > 8) {
      std::printf("dense, %d per word [%d, %d -> %d, %d, %d] k%d s%d, form %d: error %g (rows of %d)\n", P::kPerWord, s.batch,
                  s.channels, out_channels, s.height, s.width, s.kernel, s.stride, forms, error, row_elements);
      return false;
    }
  }
  return true;
}

// A 1x1 convolution in training, with products in bfloat16.
bool run_pointwise_bf16(int batch, int in_channels, int out_channels, int pixels, std::mt19937& random) {
  Buffer x((std::size_t)batch * in_channels * pixels), dy((std::size_t)batch * out_channels * pixels);
  Buffer weight((std::size_t)out_channels * in_channels), y(dy.size), dx(x.size), dweight(weight.size);
  x.draw(random), dy.draw(random), weight.draw(random);
  large_kernel::pointwise_forward(x.data.get(), weight.data.get(), batch, in_channels, out_channels, pixels,
                                  y.data.get());
  large_kernel::pointwise_input_gradient(weight.data.get(), dy.data.get(), batch, in_channels, out_channels, pixels,
                                         dx.data.get());
  large_kernel::pointwise_weight_gradient(x.data.get(), dy.data.get(), batch, in_channels, out_channels, pixels,
                                          dweight.data.get());
  auto half = [](double v) { return from_bfloat16(large_kernel::to_bfloat16((float)v)); };
  Reference ry(y.size), rdx(dx.size), rdweight(dweight.size);
  for (int image = 0; image < batch; image++) {
    for (int o = 0; o < out_channels; o++) {
      for (int c = 0; c < in_channels; c++) {
        const std::size_t at = ((std::size_t)image * in_channels + c) * pixels, w = (std::size_t)o * in_channels + c;
        const std::size_t to = ((std::size_t)image * out_channels + o) * pixels;
        for (int p = 0; p < pixels; p++) {
          ry.add(to + p, half(weight.at(w)) * half(x.at(at + p)));
          rdx.add(at + p, half(weight.at(w)) * half(dy.at(to + p)));
          rdweight.add(w, half(dy.at(to + p)) * half(x.at(at + p)));
        }
      }
    }
  }
  const double errors[] = {worst(y, ry), worst(dx, rdx), worst(dweight, rdweight)};
  for (double error : errors) {
    if (error > 8) {
      std::printf("pointwise in bfloat16 [%d, %d -> %d, %d]: errors %g %g %g\n", batch, in_channels, out_channels, pixels,
                  errors[0], errors[1], errors[2]);
      return false;
    }
  }
  return true;
}

// activation(v) and its derivative.
double activated(large_kernel::Activation a, double v) {
  if (a == large_kernel::Activation::kRelu) return std::max(v, 0.);
  return a == large_kernel::Activation::kGelu ? v * 0.5 * std::erfc(-v * std::sqrt(0.5)) : v;
}

double slope(large_kernel::Activation a, double v) {
  if (a == large_kernel::Activation::kRelu) return v > 0;
  if (a == large_kernel::Activation::kNone) return 1;
  return 0.5 * std::erfc(-v * std::sqrt(0.5)) + v * std::exp(-v * v / 2) / std::sqrt(2 * M_PI);
}

bool run_norm(const large_kernel::BatchNormShape& s, large_kernel::Activation activation, std::mt19937& random) {
  const std::size_t size = (std::size_t)s.batch * s.channels * s.pixels;
  Buffer x(size), dy(size), y(size), dx(size), weight(s.channels), bias(s.channels), mean(s.channels);
  Buffer variance(s.channels), dweight(s.channels), dbias(s.channels);
  x.draw(random), dy.draw(random), weight.draw(random), bias.draw(random);
  for (std::size_t i = 0; i < size; i++) x.data[i] = 2 * x.data[i] + 5;
  const float epsilon = 1e-5f;
  Buffer running_mean(s.channels), running_variance(s.channels);
  std::fill_n(running_mean.data.get(), s.channels, 0.f), std::fill_n(running_variance.data.get(), s.channels, 0.f);
  large_kernel::batch_norm_forward(x.data.get(), weight.data.get(), bias.data.get(), epsilon, activation, s,
                                   y.data.get(), mean.data.get(), variance.data.get(), 0, running_mean.data.get(),
                                   running_variance.data.get());
  large_kernel::batch_norm_backward(x.data.get(), weight.data.get(), bias.data.get(), mean.data.get(),
                                    variance.data.get(), dy.data.get(), epsilon, activation, s, dx.data.get(),
                                    dweight.data.get(), dbias.data.get());
  Reference ry(size), rdx(size), rmean(s.channels), rvariance(s.channels), rdweight(s.channels), rdbias(s.channels);
  auto each = [&](int c, auto f) {
    for (int image = 0; image < s.batch; image++) {
      for (std::ptrdiff_t p = 0; p < s.pixels; p++) f(((std::size_t)image * s.channels + c) * s.pixels + p);
    }
  };
  for (int c = 0; c < s.channels; c++) {
    each(c, [&](std::size_t i) { rmean.add(c, x.at(i) / s.count()); });
    const double m = rmean.sum[c];
    each(c, [&](std::size_t i) { rvariance.add(c, (x.at(i) - m) * (x.at(i) - m) / s.count()); });
    rvariance.magnitude[c] += std::sqrt(rvariance.sum[c]) * std::fabs(m);
    const double inverse = 1 / std::sqrt(rvariance.sum[c] + epsilon), scale = weight.at(c) * inverse;
    double size_g = 0, size_gd = 0;
    auto inner = [&](std::size_t i) { return scale * (x.at(i) - m) + bias.at(c); };
    // how much rounding of the activation's input and derivative may change the gradient of that input
    auto moved = [&](std::size_t i) {
      const bool at_step = activation == large_kernel::Activation::kRelu && std::fabs(inner(i)) < 1e-5;
      return std::fabs(dy.at(i)) * (1 + std::fabs(scale) * (std::fabs(x.at(i)) + std::fabs(m)) + (at_step ? 1e9 : 0));
    };
    each(c, [&](std::size_t i) {
      const double g = dy.at(i) * slope(activation, inner(i)), d = x.at(i) - m;
      ry.sum[i] = activated(activation, inner(i));
      ry.magnitude[i] = std::fabs(scale) * (std::fabs(x.at(i)) + std::fabs(m)) + std::fabs(bias.at(c));
      rdbias.sum[c] += g, rdweight.sum[c] += g * d * inverse;
      size_g += moved(i), size_gd += moved(i) * (std::fabs(d) + std::fabs(m) * 0.5) * inverse;
    });
    rdbias.magnitude[c] = size_g, rdweight.magnitude[c] = size_gd;
    each(c, [&](std::size_t i) {
      const double g = dy.at(i) * slope(activation, inner(i)), d = (x.at(i) - m) * inverse;
      rdx.sum[i] = scale * (g - rdbias.sum[c] / s.count() - d * rdweight.sum[c] / s.count());
      rdx.magnitude[i] = std::fabs(scale) * (moved(i) + size_g / s.count() +
                                             (std::fabs(d) + std::fabs(m) * inverse * 0.5) * size_gd / s.count());
    });
  }
  const double errors[] = {worst(y, ry),
                           worst(mean, rmean),
                           worst(variance, rvariance),
                           worst(dx, rdx),
                           worst(running_mean, rmean),
                           worst(running_variance, rvariance),
                           worst(dweight, rdweight),
                           worst(dbias, rdbias)};
  for (double error : errors) {
    if (error > 8) {
      std::printf("norm [%d, %d, %td], activation %d: error %g\n", s.batch, s.channels, s.pixels, (int)activation,
                  error);
      return false;
    }
  }
  return true;
}

// Whether each task runs exactly once, in chunks of at most `chunk` tasks, if some threads are slower than others.
bool run_shared(int count, int chunk, int threads, int present) {
  const int most = omp_get_max_threads();
  omp_set_num_threads(threads);
  large_kernel::WorkStealingTasks tasks(count, chunk);
  std::vector<int> done(count);
  bool good = true;
#pragma omp parallel num_threads(present)
  tasks.for_each_chunk([&](std::ptrdiff_t begin, std::ptrdiff_t end) {
    if (omp_get_thread_num() == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
    const bool fits = begin >= 0 && begin < end && end <= count && end - begin <= chunk;
#pragma omp critical
    good = good && fits;
    for (std::ptrdiff_t task = begin; fits && task < end; task++) done[task]++;
  });
  omp_set_num_threads(most);
  for (int times : done) good = good && times == 1;
  if (!good)
    std::printf("%d tasks, at most %d at a time, for %d threads, %d present: not each once\n", count, chunk, threads,
                present);
  return good;
}

// The part of the table in bfloat16 and int8.
int run_rounded(int shapes, std::mt19937& random, int& count) {
  auto pick = [&](int n) { return (int)(random() % n); };
  int bad = 0;
  for (int i = 0; i < 2 * shapes; i++, count++) {
    const int large[] = {7, 13, 27, 31}, small[] = {1, 3, 5};
    const bool is_small = i % 3 == 0;
    const Shape s = {1 + pick(3), 16 * (1 + pick(3)), 1 + pick(36), 1 + pick(36), is_small ? small[pick(3)] : large[pick(4)],
                     is_small ? 1 + pick(2) : 1};
    bad += !run_bfloat16(s, random);
  }
  bad += !run_bfloat16({1, 16, 56, 56, 31, 1}, random) + !run_bfloat16({2, 16, 14, 14, 27, 1}, random), count += 2;
  for (int i = 0; i < shapes; i++) {
    const bool window = i % 3 == 2;
    const Shape s = {1 + pick(3), window ? 1 + pick(20) : 16 * (1 + pick(9)) - (i % 3 == 1 ? pick(9) : 0),
                     1 + pick(i % 2 ? 20 : 8), 1 + pick(i % 2 ? 40 : 8), window ? 3 : 1, window ? 1 + pick(2) : 1};
    const int wide = 16 * (1 + pick(7));
#if defined(LK_AMX_MODEL)
    lk_amx_enabled = i % 2 == 0 || pick(2);
#endif
    bad += !run_words<large_kernel::Bfloat16Product>(s, wide, random), count++;
    bad += !run_words<large_kernel::Int8Product>(s, wide, random), count++;
  }
  for (int i = 0; i < shapes; i++, count++) {
#if defined(LK_AMX_MODEL)
    lk_amx_enabled = i % 2;
#endif
    const bool odd = i % 3;
    bad += !run_pointwise_bf16(1 + pick(4), odd ? 1 + pick(70) : 16 * (1 + pick(4)), odd ? 1 + pick(70) : 32,
                               1 + pick(90), random);
  }
  bad += !run_pointwise_bf16(3, 11, 2100, 400, random), count++;  // slices of the weight gradient
  bad += !run_words<large_kernel::Bfloat16Product>({1, 2080, 2, 3, 1, 1}, 16, random), count++;  // several passes
  bad += !run_words<large_kernel::Int8Product>({1, 4160, 2, 3, 1, 1}, 16, random), count++;
  return bad;
}

// Runs the table and returns the number of failed cases; `shapes` of each kernel and stride.
int run_all(int shapes) {
  std::mt19937 random(1 + large_cache);
  const int channels[] = {1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 48}, kernels[] = {1, 3, 5, 7, 9, 13, 21, 31, 63};
  int bad = 0, count = 0;
  auto pick = [&](int n) { return (int)(random() % n); };
  for (int kernel : kernels) {
    for (int stride = 1; stride <= 2; stride++) {
      for (int i = 0; i < shapes; i++, count++) {
        const int limit = kernel > 13 ? 24 : 40;
        const Shape s = {
            1 + pick(3), channels[pick(12)], i == 0 ? 1 : 1 + pick(limit), i == 1 ? 1 : 1 + pick(limit), kernel,
            stride};
        bad += !run(s, random);
      }
    }
  }
  for (const Shape& s : {Shape{1, 16, 56, 56, 31, 1}, Shape{2, 20, 28, 28, 29, 1}, Shape{1, 3, 112, 112, 3, 2},
                         Shape{1, 16, 90, 97, 3, 1}, Shape{1, 32, 151, 64, 5, 2}, Shape{1, 48, 22, 13, 31, 1},
                         Shape{1, 32, 26, 26, 63, 1}, Shape{1, 16, 27, 21, 51, 1},
                         // DFT along the rows, in several strips or tiles
                         Shape{1, 3, 150, 37, 31, 1}, Shape{2, 5, 17, 131, 21, 1}, Shape{1, 1, 20, 45, 63, 1},
                         Shape{1, 17, 21, 50, 63, 1}}) {
    bad += !run(s, random), count++;
  }
  // kernels that (nearly) cover a small map
  for (int i = 0; i < 12 * shapes; i++, count++) {
    const int most = i % 2 ? 8 : 16, height = 5 + pick(most - 4), width = (i % 2 ? 1 : 5) + pick(most - 4);
    const int longest = std::max(height, width), misses = i % 4 == 2 ? pick(longest / 2) : 0;
    const Shape s = {1 + pick(i % 4 == 1 ? 34 : 6),
                     channels[pick(12)],
                     height,
                     width,
                     std::max(7, 2 * (longest - misses + (misses ? 0 : pick(3))) - 1),
                     1};
    bad += !run(s, random);
  }
  // the same, with planes computed in pairs of images or of channels
  for (const Shape& s :
       {Shape{1, 1, 7, 7, 13, 1}, Shape{2, 1, 7, 7, 13, 1}, Shape{5, 1, 6, 5, 13, 1}, Shape{1, 2, 5, 4, 9, 1},
        Shape{1, 15, 7, 7, 15, 1}, Shape{3, 4, 7, 7, 13, 1}, Shape{4, 3, 8, 8, 15, 1}, Shape{7, 3, 5, 5, 9, 1}}) {
    bad += !run(s, random), count++;
  }
  // batches whose sums are much larger than their terms
  for (const Shape& s : {Shape{64, 3, 14, 14, 27, 1}, Shape{70, 5, 7, 7, 13, 1}, Shape{24, 2, 28, 28, 29, 1},
                         Shape{64, 3, 14, 14, 3, 2}, Shape{24, 3, 28, 28, 5, 1}, Shape{24, 16, 28, 28, 5, 1}}) {
    bad += !run(s, random, 1), count++;
  }
  // written with non-temporal stores, in bands of rows and whole planes
  for (const Shape& s : {Shape{2, 84, 112, 112, 3, 2}, Shape{1, 84, 161, 160, 3, 2}, Shape{2, 340, 56, 56, 3, 2}}) {
    bad += !run(s, random), count++;
  }
  // 3x3 on maps around a vector's width
  for (int i = 0; i < 6 * shapes; i++, count++) {
    const Shape s = {1 + pick(3), channels[pick(12)], 1 + pick(9), 10 + pick(40), 3, 1 + pick(2)};
    bad += !run(s, random);
  }
  // several parts of a map, one map shared by several threads, groups of small maps, windows
  for (const Shape& s :
       {Shape{1, 32, 20, 41, 1, 1}, Shape{1, 16, 14, 14, 1, 1}, Shape{3, 48, 7, 7, 1, 1}, Shape{2, 3, 25, 31, 3, 2}}) {
    bad += !run_dense(s, 48, random), count++;
  }
  const int depths[] = {1, 3, 8, 16, 17, 70, 256, 511, 512, 513, 1040}, widths[] = {1, 16, 37, 48, 96, 112};
  for (int depth : depths) {
    for (int i = 0; i < shapes; i++, count++) {
      const bool window = depth < 70 && i % 2;
      const Shape s = {1 + pick(3),
                       depth,
                       i == 0 ? 1 : 1 + pick(i == 2 ? 40 : 8),
                       i == 1 ? 1 : 1 + pick(i == 2 ? 20 : 8),
                       window ? 3 : 1,
                       window ? 1 + pick(2) : 1};
      bad += !run_dense(s, widths[pick(6)], random);
    }
  }
  bad += run_rounded(shapes, random, count);
  for (int tasks : {0, 1, 2, 7, 64, 1000}) {
    for (int threads : {1, 2, 5}) {
      for (int present : {1, 3}) bad += !run_shared(tasks, 1 + pick(20), threads, present), count++;
    }
  }
  for (int i = 0; i < 9 * shapes; i++, count++) {
    bad += !run_norm({1 + pick(4), channels[pick(12)], i < 3 ? 2 + i : 1 + pick(i % 2 ? 80 : 5000)},
                     (large_kernel::Activation)(i % 3), random);
  }
  std::printf("%d shapes, %d failures, %d lanes, %s cache\n", count, bad, large_kernel::kLanes,
              large_cache ? "large" : "small");
  return bad;
}

}  // namespace

// main [shapes of each kind] [rounded: bfloat16 and int8 only]
int main(int argc, char** argv) {
  int bad = 0;
  if (argc > 2) {
    std::mt19937 random(0);
    int count = 0;
    bad = run_rounded(std::atoi(argv[1]), random, count);
    std::printf("%d shapes, %d failures, %d lanes, %s\n", count, bad, large_kernel::kLanes,
                large_kernel::has_amx() ? "AMX" : "no AMX");
    return bad ? 1 : 0;
  }
  for (bool large : {false, true}) {
    large_cache = large;
    bad += run_all(argc > 1 ? std::atoi(argv[1]) : 8);
  }
  return bad ? 1 : 0;
}
