// The depthwise operator as a function of Python, for calls that want no gradients. Paddle's way to a custom operator takes 10 us,
// and 40 to 70 where a large map has driven its code out of the caches; this one 3 and 6.
#pragma once
#if __has_include(<Python.h>)
#include <cstdlib>
#include <string_view>

#include "paddle/phi/core/dense_tensor.h"
#include "paddle/utils/pybind.h"

namespace paddle::pybind {
// Weak, so that the operators can still be loaded where a Paddle does not export these.
__attribute__((weak)) bool PyCheckTensor(PyObject*);
__attribute__((weak)) Tensor& CastPyArg2Tensor(PyObject*, Py_ssize_t);
__attribute__((weak)) PyObject* ToPyObject(const Tensor&, bool);
}  // namespace paddle::pybind

namespace direct {

using paddle::Tensor;

// Whether LARGE_KERNEL_CONV_IMPL leaves the choice to us; what else it may say is conv.py's concern. os.environ writes through.
inline bool is_chosen() {
  const char* name = std::getenv("LARGE_KERNEL_CONV_IMPL");
  const std::string_view text = name ? name : "";
  return text.empty() || text == "auto" || text == "custom";
}

// Whether the values of a Python object are float32 in the memory of the CPU, one after another.
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

// forward(x, weight, bias or None, stride) with `run`, which throws at what it cannot compute: the result, or None for all
// that needs a closer look, which conv.py takes.
template <Tensor run(const Tensor& x, const Tensor& weight, const Tensor* bias, int stride)>
PyObject* forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  const bool has_bias = count == 4 && arguments[2] != Py_None;
  if (count != 4 || !PyLong_CheckExact(arguments[3]) || !is_chosen() || !is_plain(arguments[0]) || !is_plain(arguments[1]) ||
      (has_bias && !is_plain(arguments[2]))) {
    Py_RETURN_NONE;
  }
  try {
    // Copies: while the lock is released, another thread may give the objects other tensors.
    const Tensor x = paddle::pybind::CastPyArg2Tensor(arguments[0], 0), weight = paddle::pybind::CastPyArg2Tensor(arguments[1], 1);
    const Tensor bias = has_bias ? paddle::pybind::CastPyArg2Tensor(arguments[2], 2) : Tensor();
    const long stride = PyLong_AsLong(arguments[3]);
    if (stride != 1 && stride != 2) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    Tensor y;
    {
      ReleasedGil released;
      y = run(x, weight, has_bias ? &bias : nullptr, stride);
    }
    return paddle::pybind::ToPyObject(y, false);
  } catch (const std::exception&) {
    Py_RETURN_NONE;
  }
}

template <Tensor run(const Tensor&, const Tensor&, const Tensor*, int)>
PyObject* make_module() {
  if (!paddle::pybind::PyCheckTensor || !paddle::pybind::CastPyArg2Tensor ||
      !static_cast<PyObject* (*)(const Tensor&, bool)>(paddle::pybind::ToPyObject)) {
    PyErr_SetString(PyExc_ImportError, "this Paddle does not export its conversion of tensors");
    return nullptr;
  }
  static PyMethodDef methods[] = {
      {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(forward<run>)), METH_FASTCALL, nullptr}, {}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "large_kernel_direct", nullptr, -1, methods};
  return PyModule_Create(&module);
}

}  // namespace direct
#endif
