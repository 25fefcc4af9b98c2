// The kernels over a table of shapes, in buffers of exactly the tensors' size, against plain loops in double precision.
// Built by the tests with and without sanitizers and for several instruction sets. Exits with 1 on a wrong value.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "depthwise.h"
#include "pointwise.h"

using dwconv::Shape;

namespace {

template <class T>
struct Buffer {
  explicit Buffer(std::size_t n) : size(n), data(new T[n]) {}
  std::size_t size;
  std::unique_ptr<T[]> data;
  double at(std::size_t i) const { return dwconv::to_float(&data[i]); }
  void draw(std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < size; i++) {
      const float value = normal(random);
      dwconv::store_part(&data[i], dwconv::splat(value), 1);
    }
  }
};

struct Reference {
  explicit Reference(std::size_t n) : sum(n), magnitude(n) {}
  std::vector<double> sum, magnitude;
  void add(std::size_t i, double product) { sum[i] += product, magnitude[i] += std::fabs(product); }
};

// Worst error in units of float32's epsilon times the sum of magnitudes, after half a unit of T's own rounding.
template <class T>
double worst(const Buffer<T>& got, const Reference& want, double rounding) {
  double result = 0;
  for (std::size_t i = 0; i < got.size; i++) {
    const double smallest = rounding > 0 ? 0x1p-25 : 0;  // half a unit of a subnormal float16
    const double error = std::fabs(got.at(i) - want.sum[i]) - rounding * std::fabs(want.sum[i]) - smallest;
    if (!(error <= 1e-30)) result = std::isnan(error) ? INFINITY : std::max(result, error / (want.magnitude[i] + 1e-30));
  }
  return result / std::ldexp(1.0, -23);
}

template <class T>
bool run(const Shape& s, double rounding, std::mt19937& random) {
  const std::size_t in = (std::size_t)s.height * s.width, out = (std::size_t)s.out_height() * s.out_width();
  const std::size_t planes = (std::size_t)s.batch * s.channels, area = (std::size_t)s.kernel * s.kernel;
  Buffer<T> x(planes * in), weight(s.channels * area), bias(s.channels), y(planes * out), dy(planes * out);
  Buffer<T> dx(planes * in), dweight(s.channels * area), dbias(s.channels);
  x.draw(random), weight.draw(random), bias.draw(random), dy.draw(random);
  std::vector<float> shift(s.channels);
  for (int c = 0; c < s.channels; c++) shift[c] = bias.at(c);
  dwconv::forward(x.data.get(), weight.data.get(), {nullptr, shift.data()}, s, y.data.get());
  dwconv::backward(x.data.get(), weight.data.get(), dy.data.get(), s, dx.data.get(), dweight.data.get(), dbias.data.get());

  Reference ry(y.size), rdx(dx.size), rdweight(dweight.size), rdbias(dbias.size);
  for (std::size_t plane = 0; plane < planes; plane++) {
    const std::size_t c = plane % s.channels;
    for (std::size_t i = 0; i < out; i++) {
      ry.add(plane * out + i, bias.at(c));
      rdbias.add(c, dy.at(plane * out + i));
    }
    dwconv::for_each_tap(s, [&](std::size_t o, std::size_t i, std::size_t tap) {
      o += plane * out, i += plane * in, tap += c * area;
      ry.add(o, x.at(i) * weight.at(tap));
      rdx.add(i, dy.at(o) * weight.at(tap));
      rdweight.add(tap, dy.at(o) * x.at(i));
    });
  }
  const double errors[] = {worst(y, ry, rounding), worst(dx, rdx, rounding), worst(dweight, rdweight, rounding),
                           worst(dbias, rdbias, rounding)};
  for (double error : errors) {
    if (error > 8) {
      std::printf("[%d, %d, %d, %d] k%d s%d: errors %g %g %g %g\n", s.batch, s.channels, s.height, s.width, s.kernel,
                  s.stride, errors[0], errors[1], errors[2], errors[3]);
      return false;
    }
  }
  return true;
}

template <class T>
bool run_pointwise(const dwconv::PointwiseShape& s, double rounding, std::mt19937& random) {
  const std::size_t in = (std::size_t)s.in_channels * s.pixels, out = (std::size_t)s.out_channels * s.pixels;
  Buffer<T> x(s.batch * in), weight((std::size_t)s.out_channels * s.in_channels), added(s.batch * out), y(s.batch * out);
  Buffer<float> in_scale(s.in_channels), in_shift(s.in_channels), scale(s.out_channels), shift(s.out_channels);
  x.draw(random), weight.draw(random), added.draw(random);
  in_scale.draw(random), in_shift.draw(random), scale.draw(random), shift.draw(random);
  dwconv::pointwise(x.data.get(), weight.data.get(), in_scale.data.get(), in_shift.data.get(),
                    {scale.data.get(), shift.data.get()}, added.data.get(), s, y.data.get());
  Reference want(y.size);
  for (int image = 0; image < s.batch; image++) {
    for (int o = 0; o < s.out_channels; o++) {
      for (int p = 0; p < s.pixels; p++) {
        const std::size_t i = image * out + (std::size_t)o * s.pixels + p;
        want.add(i, shift.at(o)), want.add(i, added.at(i));
        for (int k = 0; k < s.in_channels; k++) {
          const double w = weight.at((std::size_t)o * s.in_channels + k) * scale.at(o);
          want.add(i, w * in_shift.at(k)), want.add(i, w * in_scale.at(k) * x.at(image * in + (std::size_t)k * s.pixels + p));
        }
      }
    }
  }
  const double error = worst(y, want, rounding);
  if (error > 8) std::printf("1x1 [%d, %d -> %d, %d]: error %g\n", s.batch, s.in_channels, s.out_channels, s.pixels, error);
  return error <= 8;
}

}  // namespace

int main(int argc, char** argv) {
  const int shapes = argc > 1 ? std::atoi(argv[1]) : 8;  // of each kernel and stride
  std::mt19937 random(1);
  const int channels[] = {1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33}, kernels[] = {1, 3, 5, 7, 9, 13, 21, 31, 63};
  int bad = 0, count = 0;
  auto pick = [&](int n) { return (int)(random() % n); };
  for (int kernel : kernels) {
    for (int stride = 1; stride <= 2; stride++) {
      for (int i = 0; i < shapes; i++, count++) {
        const int limit = kernel > 13 ? 24 : 40;
        const Shape s = {1 + pick(3), channels[pick(11)], i == 0 ? 1 : 1 + pick(limit), i == 1 ? 1 : 1 + pick(limit),
                         kernel, stride};
        bad += !run<float>(s, 0, random);
        if (i % 3 == 0) bad += !run<dwconv::bfloat16>(s, 1.0 / 256, random);
        if (i % 3 == 1) bad += !run<dwconv::float16>(s, 1.0 / 2048, random);
      }
    }
  }
  for (const Shape& s : {Shape{1, 16, 56, 56, 31, 1}, Shape{2, 20, 28, 28, 29, 1}, Shape{1, 3, 112, 112, 3, 2}}) {
    bad += !run<float>(s, 0, random), count++;
  }
  const int depths[] = {1, 3, 8, 16, 17, 70, 511, 512, 513, 1030};
  for (int depth : depths) {
    for (int i = 0; i < shapes; i++, count++) {
      const dwconv::PointwiseShape s = {1 + pick(3), depth, i == 0 ? 1 : 1 + pick(120), i == 1 ? 1 : 1 + pick(i == 2 ? 600 : 60)};
      bad += !run_pointwise<float>(s, 0, random);
      if (i % 3 == 0) bad += !run_pointwise<dwconv::bfloat16>(s, 1.0 / 256, random);
      if (i % 3 == 1) bad += !run_pointwise<dwconv::float16>(s, 1.0 / 2048, random);
    }
  }
  std::printf("%d shapes, %d failures, %d lanes\n", count, bad, dwconv::kLanes);
  return bad ? 1 : 0;
}
