// What the files of the Python module share.
#pragma once

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "../sampling.h"
#include "kernels.h"

namespace py = pybind11;

namespace siren::cpu {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
inline const T* expect(const Array<T>& array, const char* name, const std::vector<py::ssize_t>& shape) {
  bool same = array.ndim() == static_cast<py::ssize_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = array.shape(i) == shape[i];
  if (!same) {
    const auto text = [](const py::ssize_t* sizes, size_t n) {
      std::string list;
      for (size_t i = 0; i < n; ++i) list += (i ? ", " : "") + std::to_string(sizes[i]);
      return "[" + list + "]";
    };
    throw std::invalid_argument(std::string(name) + " must have shape " + text(shape.data(), shape.size()) + ", not " +
                                text(array.shape(), array.ndim()));
  }
  return array.data();
}

inline SamplingSettings settings_of(float temperature, int top_k, double top_p, float guidance) {
  if (!(temperature >= 0) || top_k < 0 || !(top_p > 0) || !std::isfinite(guidance))
    throw std::invalid_argument("sampling settings out of range");
  return {temperature, top_k, top_p, guidance};
}

inline Format format_of(const std::string& name) {
  if (name == "fp32") return Format::f32;
  if (name == "bf16") return Format::bf16;
  if (name == "int8") return Format::i8;
  throw std::invalid_argument("weights must be fp32, bf16 or int8");
}

// Operations on their own, for tests and benchmarks.
void bind_ops(py::module_& m);

}  // namespace siren::cpu
