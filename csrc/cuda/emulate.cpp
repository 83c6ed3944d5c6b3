#include "emulate.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>

#include "decode.h"

namespace siren::cuda {

namespace {

void expect(bool right, const std::string& what) {
  if (!right) throw std::invalid_argument("the emulator's arguments: " + what);
}

// What would make the emulation itself, rather than the kernel, go wrong. program.py is trusted with the rest.
void check(Arguments& args) {
  const auto range = [](const char* name, int64_t value, int64_t low, int64_t high) {
    expect(value >= low && value <= high, std::string(name) + " must be from " + std::to_string(low) + " to " +
                                              std::to_string(high) + ", not " + std::to_string(value));
  };
  constexpr int64_t kMost = INT32_MAX;
  range("sms", args.sms, 1, 1024);
  range("rows", args.rows, 1, kMaxRows);
  range("sequences", args.sequences, 1, args.rows);
  range("operations", args.operations, 1, kMost);
  range("frames", args.frames, 1, kMost);
  range("last_operation", args.last_operation, 0, args.operations);
  range("first_operation", args.first_operation, 0, args.last_operation);
  expect((args.first_operation == 0 && args.last_operation == args.operations) || args.frames == 1,
         "a part of the operations can run for one frame only");
  range("first_frame", args.first_frame, 0, kMost - args.frames);
  range("dim", args.dim, 1, kMost);
  range("heads", args.heads, 1, kMost);
  range("kv_heads", args.kv_heads, 1, args.heads);
  range("head_dim", args.head_dim, 1, kMost);
  range("hidden", args.hidden, 1, kMost);
  range("backbone_blocks", args.backbone_blocks, 1, kMost);
  range("decoder_blocks", args.decoder_blocks, 0, kMost);
  range("experts", args.experts, 1, kMost);
  range("codebooks", args.codebooks, args.experts, kMost);
  range("codes_per_codebook", args.codes_per_codebook, 1, kMost);
  range("conditioning", args.conditioning, 0, 2);
  range("format", args.format, 0, 2);
  range("staged_bytes", args.staged_bytes, 0, kEmulatedShared);
  range("spin_limit", args.spin_limit, 1, kMost);
  expect(args.instructions && args.starts && args.arena, "instructions, starts and arena must not be null");
  for (int s = 0; s < args.sms; ++s)
    expect(args.starts[s] >= 0 && args.starts[s] <= args.starts[s + 1], "starts must ascend");
  const int stages = ring_stages(args, kEmulatedShared);
  expect(stages >= 2, "staged_bytes leaves no room for two stages of weights");
  if (args.stages == 0) args.stages = stages;
  range("stages", args.stages, 2, stages);
}

}  // namespace

Emulation::Emulation(const Arguments& arguments, uint64_t seed) : args_(arguments) {
  check(args_);
  progress_.assign(args_.sms, static_cast<uint32_t>(args_.first_operation));
  control_[kFrameLimit] = args_.frames;
  control_[kAbort] = 0;
  args_.progress = progress_.data();
  args_.control = control_;
  args_.host = host_;
  args_.layout = shared_layout(args_);
  // A little later than the kernel's own limit, whose message says more.
  const int64_t idle_limit = std::min(args_.spin_limit, 1000000) + int64_t{1000};
  scheduler_ = std::make_unique<fibers::Scheduler>(args_.sms, args_.layout.bytes, seed, idle_limit);
  thread_ = std::thread([this] {
    std::exception_ptr error;
    try {
      scheduler_->run([this] { decode(args_); });
    } catch (...) {
      error = std::current_exception();
    }
    std::lock_guard<std::mutex> guard(lock_);
    scheduler_.reset();
    error_ = error;
    finished_ = true;
    ended_.notify_all();
  });
}

Emulation::~Emulation() {
  {
    std::lock_guard<std::mutex> guard(lock_);
    if (scheduler_) scheduler_->stop();
  }
  thread_.join();
}

// The kernel counts a frame when the next one begins, so not the last.
int Emulation::frames_done() const {
  if (finished_ && !error_ && !host_[kGaveUp]) return host_[kFramesRun];
  return __atomic_load_n(&host_[kFramesDone], __ATOMIC_ACQUIRE);
}

int Emulation::wait(int seen, int milliseconds) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::milliseconds(std::max(milliseconds, 0));
  std::unique_lock<std::mutex> guard(lock_);
  // The kernel's stores wake nobody, so look once a millisecond.
  while (!finished_ && frames_done() <= seen && Clock::now() < end)
    ended_.wait_until(guard, std::min(end, Clock::now() + std::chrono::milliseconds(1)));
  return frames_done();
}

bool Emulation::finished() {
  std::lock_guard<std::mutex> guard(lock_);
  return finished_;
}

void Emulation::cancel() { __atomic_store_n(&host_[kCancel], 1, __ATOMIC_RELEASE); }

void Emulation::result() {
  std::unique_lock<std::mutex> guard(lock_);
  ended_.wait(guard, [this] { return finished_; });
  if (error_) std::rethrow_exception(error_);
  if (host_[kGaveUp])
    throw std::runtime_error("operation " + std::to_string(host_[kGaveUpOperation]) + " on SM " +
                             std::to_string(host_[kGaveUpSm]) + " of frame " + std::to_string(host_[kGaveUpFrame]) + " waited for too long");
}

}  // namespace siren::cuda
