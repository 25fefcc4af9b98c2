// A direct entry from Python to the depthwise operator, which bypasses Paddle's dispatch of custom operators: a check
// that covers all arguments in one call, also for the batch norm, and for calls without gradients the operator itself. Paddle's dispatch takes
// longer than a small layer, above all after a large map has evicted its code from the caches.
#pragma once
#if __has_include(<Python.h>)
#include <cstdlib>
#include <string_view>

#include "paddle/phi/core/dense_tensor.h"
#include "paddle/utils/pybind.h"

namespace paddle::pybind {
// Weak, so that the operators can still be loaded if a Paddle does not export these.
__attribute__((weak)) bool PyCheckTensor(PyObject*);
__attribute__((weak)) Tensor& CastPyArg2Tensor(PyObject*, Py_ssize_t);
__attribute__((weak)) PyObject* ToPyObject(const Tensor&, bool);
}  // namespace paddle::pybind

namespace python_entry {

using paddle::Tensor;

// Whether LARGE_KERNEL_CONV_IMPL permits the operator; conv.py handles its other values. os.environ writes through to
// getenv.
inline bool is_chosen() {
  const char* name = std::getenv("LARGE_KERNEL_CONV_IMPL");
  const std::string_view text = name ? name : "";
  return text.empty() || text == "auto" || text == "custom";
}

// Whether a Python object is a contiguous float32 tensor on the CPU.
inline bool is_plain(PyObject* object) {
  if (!paddle::pybind::PyCheckTensor(object)) return false;
  const Tensor& t = paddle::pybind::CastPyArg2Tensor(object, 0);
  return t.is_dense_tensor() && t.initialized() && t.is_cpu() && t.dtype() == paddle::DataType::FLOAT32 &&
         static_cast<const phi::DenseTensor&>(*t.impl()).meta().is_contiguous();
}

struct ReleasedGil {
  PyThreadState* const state = PyEval_SaveThread();
  ~ReleasedGil() { PyEval_RestoreThread(state); }
};

typedef Tensor Forward(const Tensor& x, const Tensor& weight, const Tensor* bias, int stride);
typedef bool Fits(const Tensor& x, const Tensor& weight, const Tensor* bias, int stride);

// x, weight, bias or None, stride. The tensors are copied because another thread may replace those of the Python
// objects while the GIL is released.
struct Arguments {
  Tensor x, weight, held_bias;
  const Tensor* bias = nullptr;
  int stride = 0;

  // Whether the operator takes these arguments as they are. If not, conv.py checks them in detail.
  template <Fits fits>
  bool read(PyObject* const* from, Py_ssize_t count) {
    const bool has_bias = count == 4 && from[2] != Py_None;
    if (count != 4 || !is_chosen() || !is_plain(from[0]) || !is_plain(from[1]) || (has_bias && !is_plain(from[2])) ||
        !PyLong_CheckExact(from[3])) {
      return false;
    }
    int overflow;
    const long number = PyLong_AsLongAndOverflow(from[3], &overflow);
    if (number != 1 && number != 2) return false;
    x = paddle::pybind::CastPyArg2Tensor(from[0], 0);
    weight = paddle::pybind::CastPyArg2Tensor(from[1], 1);
    if (has_bias) held_bias = paddle::pybind::CastPyArg2Tensor(from[2], 2), bias = &held_bias;
    stride = (int)number;
    return fits(x, weight, bias, stride);
  }
};

// accepts(x, weight, bias, stride): whether `forward` and the operator take these arguments.
template <Fits fits>
PyObject* accepts(PyObject*, PyObject* const* from, Py_ssize_t count) {
  Arguments a;
  return PyBool_FromLong(a.read<fits>(from, count));
}

// accepts_norm(x, weight, bias, mean, variance): whether `batch_norm_act` takes these arguments.
inline PyObject* accepts_norm(PyObject*, PyObject* const* from, Py_ssize_t count) {
  bool good = count == 5 && is_chosen();
  for (Py_ssize_t i = 0; good && i < count; i++) good = is_plain(from[i]);
  if (good) {
    const auto dims = paddle::pybind::CastPyArg2Tensor(from[0], 0).dims();
    good = dims.size() == 4 && dims[0] * dims[2] * dims[3] > 1 && dims[1] > 0;
    for (Py_ssize_t i = 1; good && i < count; i++) {
      good = paddle::pybind::CastPyArg2Tensor(from[i], i).numel() == dims[1];
    }
  }
  return PyBool_FromLong(good);
}

// forward(x, weight, bias, stride): the result, with stop_gradient set, or None if `accepts` would return False.
template <Forward run, Fits fits>
PyObject* forward(PyObject*, PyObject* const* from, Py_ssize_t count) {
  Arguments a;
  if (!a.read<fits>(from, count)) Py_RETURN_NONE;
  try {
    Tensor y;
    {
      ReleasedGil released;
      y = run(a.x, a.weight, a.bias, a.stride);
    }
    return paddle::pybind::ToPyObject(y, false);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

template <Forward run, Fits fits>
PyObject* make_module() {
  if (!paddle::pybind::PyCheckTensor || !paddle::pybind::CastPyArg2Tensor ||
      !static_cast<PyObject* (*)(const Tensor&, bool)>(paddle::pybind::ToPyObject)) {
    PyErr_SetString(PyExc_ImportError, "this Paddle does not export its conversion of tensors");
    return nullptr;
  }
  auto fast = [](auto* function) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)); };
  static PyMethodDef methods[] = {{"accepts", fast(accepts<fits>), METH_FASTCALL, nullptr},
                                  {"accepts_norm", fast(accepts_norm), METH_FASTCALL, nullptr},
                                  {"forward", fast(forward<run, fits>), METH_FASTCALL, nullptr},
                                  {}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "large_kernel_direct", nullptr, -1, methods};
  return PyModule_Create(&module);
}

}  // namespace python_entry
#endif
