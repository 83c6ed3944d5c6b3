// The Python module siren._cuda: what launch.h declares.
#include <algorithm>
#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>

#include "arguments.h"
#include "bind_run.h"
#include "launch.h"

using namespace siren::cuda;

namespace {

constexpr auto kPause = std::chrono::microseconds(50);  // between two looks at the frames that are done

class Run {
 public:
  explicit Run(Launch* started) : launch_(started) {}
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  ~Run() {
    cancel();
    end();
  }

  int wait(int seen, int milliseconds) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(std::max(milliseconds, 0));
    for (;;) {
      {
        std::lock_guard<std::mutex> guard(lock_);
        if (!launch_) return frames_;
        const bool over = siren::cuda::finished(launch_);  // before the frames: then those are the last
        frames_ = frames_done(launch_);
        if (over || frames_ > seen || std::chrono::steady_clock::now() >= until) return frames_;
      }
      std::this_thread::sleep_for(kPause);
    }
  }

  bool finished() {
    std::lock_guard<std::mutex> guard(lock_);
    return !launch_ || siren::cuda::finished(launch_);
  }

  void cancel() {
    std::lock_guard<std::mutex> guard(lock_);
    if (launch_) siren::cuda::cancel(launch_);
  }

  void result() {
    while (!finished()) std::this_thread::sleep_for(kPause);  // without the lock: others may wait, or cancel
    end();
    std::lock_guard<std::mutex> guard(lock_);
    if (error_) throw std::runtime_error(*error_);
  }

 private:
  void end() {
    std::lock_guard<std::mutex> guard(lock_);
    if (!launch_) return;
    try {
      while (!siren::cuda::finished(launch_)) std::this_thread::sleep_for(kPause);
      frames_ = frames_done(launch_);
      finish(std::exchange(launch_, nullptr));
    } catch (const std::exception& error) {
      error_ = error.what();
    }
  }

  std::mutex lock_;
  Launch* launch_;
  int frames_ = 0;
  std::optional<std::string> error_;
};

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The persistent CUDA kernel. Use it through siren.cuda_engine.";
  bind_run<Run>(m);
  m.def(
      "launch",
      [](const py::dict& arguments, uintptr_t stream, int device) {
        const Arguments args = arguments_of(arguments);
        py::gil_scoped_release release;
        return new Run(launch(args, reinterpret_cast<void*>(stream), device));
      },
      py::arg("arguments"), py::arg("stream"), py::arg("device"),
      "Starts the kernel on a stream (a cudaStream_t as an int; 0: the default). The memory must outlive the Run.");
  m.def(
      "properties",
      [](int device) {
        const Properties found = properties(device);
        py::dict values;
        values["sms"] = found.sms;
        values["shared_bytes"] = found.shared_bytes;
        values["capability"] = py::make_tuple(found.major, found.minor);
        values["name"] = found.name;
        return values;
      },
      py::arg("device"));
}
