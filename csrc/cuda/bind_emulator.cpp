// The Python module siren._emulator.
#include <memory>

#include "arguments.h"
#include "bind_run.h"
#include "emulate.h"

using namespace siren::cuda;

PYBIND11_MODULE(_emulator, m) {
  m.doc() = "The persistent CUDA kernel, run on the host. Use it through siren.cuda_engine.";
  bind_run<Emulation>(m);
  m.def(
      "run", [](const py::dict& arguments, uint64_t seed) { return new Emulation(arguments_of(arguments), seed); },
      py::arg("arguments"), py::arg("seed"), "Starts a launch in another thread. The memory must outlive the Run.");
  m.def("limits", [] {
    py::dict limits;
    limits["shared_bytes"] = kEmulatedShared;
    return limits;
  });
}
