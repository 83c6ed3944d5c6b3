// Launches of the persistent kernel on a GPU: one block a multiprocessor, all resident or none.
#include <cuda_runtime.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "decode.h"
#include "launch.h"

namespace siren::cuda {
namespace {

__global__ __launch_bounds__(kThreads, 1) void siren_decode(const __grid_constant__ Arguments args) { decode(args); }

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "reading the GPU's properties");
  return value;
}

// The caller's current device is the caller's again afterwards.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "asking for the current GPU");
    check(cudaSetDevice(device), "switching to the GPU");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

}  // namespace

struct Launch {
  int device = 0;
  cudaEvent_t ended = nullptr;
  uint32_t* words = nullptr;  // on the device: progress, then control
  int32_t* host = nullptr;    // pinned, mapped

  ~Launch() {
    if (ended) cudaEventDestroy(ended);
    if (words) cudaFree(words);
    if (host) cudaFreeHost(host);
  }
};

namespace {

// What a launch needs of its own is kept for the next one: freeing it would wait for the GPU. Never destroyed: when a process ends, CUDA may be gone first.
struct Spare {
  std::mutex lock;
  std::vector<std::unique_ptr<Launch>> launches;
};

Spare& spare() {
  static Spare* const all = new Spare;
  return *all;
}

std::unique_ptr<Launch> take(int device) {
  Spare& all = spare();
  const std::lock_guard<std::mutex> guard(all.lock);
  for (auto& launch : all.launches)
    if (launch->device == device) {
      std::swap(launch, all.launches.back());
      std::unique_ptr<Launch> found = std::move(all.launches.back());
      all.launches.pop_back();
      return found;
    }
  auto made = std::make_unique<Launch>();
  made->device = device;
  const size_t words = attribute(cudaDevAttrMultiProcessorCount, device) + kControlWords;
  check(cudaEventCreateWithFlags(&made->ended, cudaEventDisableTiming), "creating an event");
  check(cudaMalloc(reinterpret_cast<void**>(&made->words), words * sizeof(uint32_t)), "allocating memory");
  check(cudaHostAlloc(reinterpret_cast<void**>(&made->host), kHostWords * sizeof(int32_t), cudaHostAllocMapped),
        "allocating pinned memory");
  return made;
}

void keep(std::unique_ptr<Launch> launch) {
  Spare& all = spare();
  const std::lock_guard<std::mutex> guard(all.lock);
  all.launches.push_back(std::move(launch));
}

}  // namespace

Properties properties(int device) {
  cudaDeviceProp found;
  check(cudaGetDeviceProperties(&found, device), "reading the GPU's properties");
  const int shared_bytes = static_cast<int>(found.sharedMemPerBlockOptin);
  return {found.multiProcessorCount, shared_bytes, found.major, found.minor, found.name};
}

Launch* launch(const Arguments& given, void* stream, int device) {
  const OnDevice on(device);
  Arguments args = given;
  if (args.sms > attribute(cudaDevAttrMultiProcessorCount, device))
    throw std::runtime_error("the program is for more multiprocessors than this GPU has");
  const bool whole = args.first_operation == 0 && args.last_operation == args.operations;
  if (!whole && args.frames != 1) throw std::runtime_error("a part of the operations can run for one frame only");
  const int limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  args.stages = ring_stages(args, limit);
  if (args.stages < 2)
    throw std::runtime_error("this GPU's shared memory is too small for so many rows: use a smaller batch");

  std::unique_ptr<Launch> own = take(device);
  const auto on_stream = static_cast<cudaStream_t>(stream);
  std::fill_n(own->host, static_cast<int>(kHostWords), 0);
  std::vector<uint32_t> first(args.sms + kControlWords, static_cast<uint32_t>(args.first_operation));
  first[args.sms + kFrameLimit] = static_cast<uint32_t>(args.frames);
  first[args.sms + kAbort] = 0;
  // Pageable memory is copied out before the call returns, so `first` may go.
  check(cudaMemcpyAsync(own->words, first.data(), first.size() * sizeof(uint32_t), cudaMemcpyHostToDevice, on_stream),
        "copying to the GPU");
  args.progress = own->words;
  args.control = reinterpret_cast<int32_t*>(own->words + args.sms);
  check(cudaHostGetDevicePointer(reinterpret_cast<void**>(&args.host), own->host, 0), "mapping pinned memory");

  const void* kernel = reinterpret_cast<const void*>(&siren_decode);
  args.layout = shared_layout(args);
  const int shared = args.layout.bytes;
  // As much as there is: the attribute is the kernel's, not the launch's, and other threads launch it too.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), "asking for shared memory");
  void* parameters[] = {&args};
  // Cooperative: refused unless every block is resident, so no block waits for one that cannot start.
  check(cudaLaunchCooperativeKernel(kernel, dim3(args.sms), dim3(kThreads), parameters, shared, on_stream),
        "launching the kernel");
  check(cudaEventRecord(own->ended, on_stream), "recording an event");
  return own.release();
}

bool finished(Launch* launch) { return cudaEventQuery(launch->ended) != cudaErrorNotReady; }

int frames_done(Launch* launch) {
  const bool ended = cudaEventQuery(launch->ended) == cudaSuccess && launch->host[kGaveUp] == 0;
  const HostWord word = ended ? kFramesRun : kFramesDone;
  return __atomic_load_n(launch->host + word, __ATOMIC_ACQUIRE);
}

void cancel(Launch* launch) { __atomic_store_n(launch->host + kCancel, 1, __ATOMIC_RELEASE); }

void finish(Launch* launch) {
  const OnDevice on(launch->device);
  std::unique_ptr<Launch> own(launch);
  check(cudaEventSynchronize(own->ended), "running the kernel");
  const int32_t* host = own->host;
  const std::string error = "operation " + std::to_string(host[kGaveUpOperation]) + " on SM " +
                            std::to_string(host[kGaveUpSm]) + " of frame " + std::to_string(host[kGaveUpFrame]) + " waited for too long";
  const bool gave_up = host[kGaveUp] != 0;
  keep(std::move(own));
  if (gave_up) throw std::runtime_error(error);
}

}  // namespace siren::cuda
