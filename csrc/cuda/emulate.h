// The persistent kernel on the host: the same source, its threads run as fibers. Slow and exact; for tests, and for
// machines without a GPU.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "fibers.h"
#include "program.h"

namespace siren::cuda {

constexpr int kEmulatedShared = 232448;  // bytes a block may have: an H100's

// One launch, in a thread of its own.
class Emulation {
 public:
  // seed: of the order in which threads go on; 0: in turn. `stages` 0: as many as fit. std::invalid_argument names what
  // is out of range.
  Emulation(const Arguments& arguments, uint64_t seed);
  ~Emulation();
  Emulation(const Emulation&) = delete;
  Emulation& operator=(const Emulation&) = delete;

  // Frames done; returns once that is more than `seen`, the launch has ended, or the time is over.
  int wait(int seen, int milliseconds);
  bool finished();
  // The kernel ends after the frame that it is in.
  void cancel();
  // Waits for the end. std::runtime_error: the kernel gave up on a wait, a deadlock, or a primitive that was misused.
  void result();

 private:
  int frames_done() const;  // with the lock held

  Arguments args_;
  std::vector<uint32_t> progress_;
  int32_t control_[kControlWords];
  int32_t host_[kHostWords] = {};
  std::unique_ptr<fibers::Scheduler> scheduler_;
  std::mutex lock_;
  std::condition_variable ended_;
  bool finished_ = false;
  std::exception_ptr error_;
  std::thread thread_;
};

}  // namespace siren::cuda
