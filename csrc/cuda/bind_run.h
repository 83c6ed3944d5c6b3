// The Python class Run of both modules: a launch under way. It may be used from several threads.
#pragma once

#include <pybind11/pybind11.h>

namespace siren::cuda {

namespace py = pybind11;

// R has wait, finished, cancel and result; its destructor cancels and waits.
template <class R>
void bind_run(py::module_& m) {
  // A Run that nobody holds any more ends its launch, and lets other threads of Python go on while it waits for that.
  struct Ended {
    void operator()(R* run) const {
      py::gil_scoped_release release;
      delete run;
    }
  };
  py::class_<R, std::unique_ptr<R, Ended>>(m, "Run")
      .def("wait", &R::wait, py::arg("seen"), py::arg("milliseconds"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("finished", py::cpp_function(&R::finished, py::call_guard<py::gil_scoped_release>()))
      .def("cancel", &R::cancel, py::call_guard<py::gil_scoped_release>())
      .def("result", &R::result, py::call_guard<py::gil_scoped_release>());
}

}  // namespace siren::cuda
