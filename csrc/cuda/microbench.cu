// What the present GPU gives the persistent kernel, as JSON on stdout: how long an exchange between SMs takes, how fast
// a ring in shared memory is filled from memory and from L2, and the rate of a plain copy to compare with.
//
//     nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -o microbench csrc/cuda/microbench.cu
//     ./microbench [gigabytes to stream: 3]
//
// Every wait is bounded: a pattern that hangs is reported as stuck, and the rest goes on. Exit code 1 for an error of
// CUDA's, 3 if something was stuck or was read wrongly.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "primitives.h"
#include "program.h"

namespace siren::cuda {

constexpr int kMostStages = 64;
constexpr int kRingAt = 2 * kMostStages * 8;  // the barriers come before the ring
constexpr int kWarmRounds = 50;
constexpr int kVector = 4 * kWorkers;  // floats that an exchange with data hands round: a row of activations

// How an SM learns that the others of its group are there.
enum class How {
  acquire_warp,   // a flag for each SM; one warp polls, a lane its flags one after another, every load an acquire
  relaxed_warp,   // the same with relaxed loads, which overlap, and one fence at the end
  acquire_block,  // a thread polls one flag; a barrier of the block before the store and after the wait
  counter,        // one atomic counter for the group, polled by one lane
  data,           // acquire_block around a vector that every SM writes a part of and then reads whole
};

struct Exchange {
  uint32_t* flags;
  float* vectors;   // [2][groups][kVector]
  uint64_t* spent;  // [sms]: nanoseconds of the rounds that count
  int32_t* stuck;   // 1: a wait was given up, 2: something older than what was waited for was read
  int sms, group, stride, rounds, spin_limit;
};

SIREN_DEVICE bool all_lanes(bool value) { return __all_sync(0xffffffffu, value) != 0; }
SIREN_DEVICE bool any_thread(bool value) { return __syncthreads_or(value) != 0; }
SIREN_DEVICE bool reached(uint32_t flag, uint32_t value) { return static_cast<int32_t>(flag - value) >= 0; }

SIREN_DEVICE bool wait_acquire(const uint32_t* flag, uint32_t value, int limit) {
  for (int spins = 0; spins < limit; ++spins) {
    if (reached(load_acquire(flag), value)) return true;
    relax();
  }
  return false;
}

// By all lanes of a warp.
SIREN_DEVICE bool wait_relaxed(const uint32_t* flags, int stride, int count, uint32_t value, int limit) {
  for (int spins = 0; spins < limit; ++spins) {
    bool there = true;
    for (int at = lane(); at < count; at += 32)
      there &= reached(load_relaxed(reinterpret_cast<const int32_t*>(flags + at * stride)), value);
    if (all_lanes(there)) {
      __threadfence();
      return true;
    }
    relax();
  }
  return false;
}

// The rounds of one SM's block of kWorkers threads; one warp of them where no barrier of the block is part of it.
template <How how>
SIREN_DEVICE void exchange(const Exchange& args) {
  constexpr bool blockwide = how == How::acquire_block || how == How::data;
  if (!blockwide && warp() != 0) return;
  const int group = block() / args.group, groups = (args.sms + args.group - 1) / args.group;
  const int first = group * args.group, own = block() - first;
  const int count = args.sms - first < args.group ? args.sms - first : args.group;
  uint32_t* flags = args.flags + first * args.stride;
  uint64_t begin = 0;
  for (int round = 1; round <= args.rounds; ++round) {
    if (round == kWarmRounds + 1) begin = nanoseconds();
    const float number = static_cast<float>(round);
    float* vector = args.vectors + ((round & 1) * groups + group) * kVector;
    if constexpr (how == How::data) {
      for (int at = own * kWorkers / count + thread(); at < (own + 1) * kWorkers / count; at += kWorkers)
        store4(vector + 4 * at, {{number, number, number, number}});
    }
    if constexpr (blockwide) worker_sync();
    bool there = true;
    if constexpr (how == How::counter) {
      if (thread() == 0) {
        __threadfence();
        atomicAdd(flags, 1u);
        there = wait_acquire(flags, static_cast<uint32_t>(round * count), args.spin_limit);
      }
      there = all_lanes(there);
    } else {
      if (thread() == 0) store_release(flags + own * args.stride, round);
      if constexpr (how == How::relaxed_warp) {
        there = wait_relaxed(flags, args.stride, count, round, args.spin_limit);
      } else {
        for (int at = thread(); at < count && there; at += blockwide ? kWorkers : 32)
          there = wait_acquire(flags + at * args.stride, round, args.spin_limit);
        there = blockwide ? !any_thread(!there) : all_lanes(there);
      }
    }
    if (!there) {
      set_first(args.stuck, 1);
      return;
    }
    if constexpr (how == How::data) {
      const Four read = load4(vector + 4 * thread());
      for (float value : read.v)
        if (value != number) set_first(args.stuck, 2);
    }
  }
  if (thread() == 0) args.spent[block()] = nanoseconds() - begin;
}

struct Stream {
  const uint8_t* data;
  int64_t share;  // bytes of an SM, one SM's after another's
  uint32_t* sum;  // of all words, where they are read
  int32_t* stuck;
  int passes, stages, stage_bytes, piece_bytes, spin_limit;
};

// By all lanes of a warp.
SIREN_DEVICE bool wait_barrier(uint64_t* barrier, int parity, const Stream& args) {
  bool over = false;
  for (int spins = 0; spins < args.spin_limit && !over; ++spins) {
    over = mbarrier_try(barrier, parity);
    if (!over) relax();
  }
  over = all_lanes(over);
  if (!over) set_first(args.stuck, 1);
  return over;
}

// One SM's block of kThreads threads: a warp fills the ring, the others let its stages go, after reading them or not.
template <bool reading>
SIREN_DEVICE void stream(const Stream& args) {
  uint64_t* full = reinterpret_cast<uint64_t*>(shared_memory());
  uint64_t* empty = full + kMostStages;
  uint8_t* ring = shared_memory() + kRingAt;
  const int pieces = args.stage_bytes / args.piece_bytes;
  if (thread() == 0) {
    for (int s = 0; s < args.stages; ++s) {
      // In bulk one arrival announces the bytes of all pieces; otherwise every piece arrives for itself.
      mbarrier_init(full + s, copy_arrivals() == 1 ? 1 : copy_arrivals() * pieces);
      mbarrier_init(empty + s, kWarps);
    }
    mbarrier_fence();
  }
  block_sync();
  const int64_t each = args.share / args.stage_bytes, total = each * args.passes;
  const uint8_t* from = args.data + block() * args.share;
  int stage = 0, parity = 0;
  int64_t at = 0;  // the stage of this pass
  uint32_t sum = 0;
  for (int64_t i = 0; i < total; ++i) {
    uint8_t* place = ring + stage * args.stage_bytes;
    if (warp() == kWarps) {
      if (i >= args.stages && !wait_barrier(empty + stage, parity ^ 1, args)) return;
      mbarrier_expect(full + stage, args.stage_bytes);
      for (int piece = 0; piece < pieces; ++piece) {
        const int64_t skipped = piece * args.piece_bytes;
        copy_bulk(place + skipped, from + at * args.stage_bytes + skipped, args.piece_bytes, full + stage);
      }
      warp_sync();
    } else {
      if (!wait_barrier(full + stage, parity, args)) return;
      if constexpr (reading) {
        const Words* words = reinterpret_cast<const Words*>(place);
        for (int w = thread(); w < args.stage_bytes / 16; w += kWorkers) {
          const Words four = words[w];
          sum += four.v[0] + four.v[1] + four.v[2] + four.v[3];
        }
      }
      warp_sync();
      if (lane() == 0) mbarrier_arrive(empty + stage);
    }
    if (++at == each) at = 0;
    if (++stage == args.stages) stage = 0, parity ^= 1;
  }
  if constexpr (reading) {
    if (warp() < kWarps) atomicAdd(args.sum, sum);
  }
}

template <How how>
__global__ void __launch_bounds__(kWorkers, 1) exchange_kernel(const Exchange args) {
  exchange<how>(args);
}

template <bool reading>
__global__ void __launch_bounds__(kThreads, 1) stream_kernel(const Stream args) {
  stream<reading>(args);
}

__global__ void fill_kernel(uint32_t* words, int64_t count) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x)
    words[i] = static_cast<uint32_t>(i * 2654435761u) ^ static_cast<uint32_t>(i >> 7);
}

__global__ void sum_kernel(const uint32_t* words, int64_t count, uint32_t* sum) {
  uint32_t own = 0;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x)
    own += words[i];
  atomicAdd(sum, own);
}

// The smallest step of the clock that the exchanges are timed with, seen over many of its steps.
__global__ void clock_kernel(uint64_t* step) {
  uint64_t smallest = ~uint64_t{0}, before = nanoseconds();
  for (int i = 0; i < 20000; ++i) {
    const uint64_t now = nanoseconds();
    if (now != before && now - before < smallest) smallest = now - before;
    before = now;
  }
  *step = smallest;
}

}  // namespace siren::cuda

using namespace siren::cuda;

namespace {

constexpr int kRepetitions = 7;
constexpr int kRounds = 1000 + kWarmRounds;
constexpr int kSpinLimit = 1 << 20;  // about a second of polling memory

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "error: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check(call, #call)

struct Summary {
  double median, low, high;
};

Summary summary(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return {values[values.size() / 2], values.front(), values.back()};
}

template <class T>
T* allocate(size_t count) {
  void* memory = nullptr;
  CHECK(cudaMalloc(&memory, count * sizeof(T)));
  CHECK(cudaMemset(memory, 0, count * sizeof(T)));
  return static_cast<T*>(memory);
}

template <class T>
T fetched(const T* value) {
  T copy;
  CHECK(cudaMemcpy(&copy, value, sizeof(T), cudaMemcpyDeviceToHost));
  return copy;
}

// Milliseconds of what `call` launches, after a launch that does not count.
template <class Call>
Summary timed(Call call) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<double> times;
  for (int i = 0; i <= kRepetitions; ++i) {
    CHECK(cudaEventRecord(begin));
    call();
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i) times.push_back(ms);
  }
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  return summary(times);
}

struct Gpu {
  int sms, shared_bytes;
  int32_t* stuck;
  bool green = true;
  std::string comma{};  // before the next row of the list that is being printed

  void row(const std::string& text) {
    std::printf("%s\n  {%s}", comma.c_str(), text.c_str());
    std::fflush(stdout);
    comma = ",";
  }

  // What was stuck since the last call: "" or ', "fault": "..."'.
  std::string fault() {
    const int32_t found = fetched(stuck);
    CHECK(cudaMemset(stuck, 0, sizeof(int32_t)));
    if (found == 0) return "";
    green = false;
    return std::string(", \"fault\": \"") + (found == 1 ? "a wait was given up" : "a stale value was read") + "\"";
  }
};

template <class... Values>
std::string format(const char* text, Values... values) {
  char line[512];
  std::snprintf(line, sizeof line, text, values...);
  return line;
}

template <How how>
void exchanges(Gpu& gpu, const char* name) {
  std::vector<int> groups;
  for (int parts : {6, 3, 2, 1})  // on a GPU with 132 SMs: 22, 44, 66, 132
    if (gpu.sms >= parts) groups.push_back((gpu.sms + parts - 1) / parts);
  void* kernel = reinterpret_cast<void*>(exchange_kernel<how>);
  // More than half of an SM's shared memory, so that no two blocks are on one SM: as the persistent kernel has it.
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, gpu.shared_bytes));
  for (int stride : {1, 32}) {  // flags side by side, and a cache line each
    for (int group : groups) {
      Exchange args{};
      args.flags = allocate<uint32_t>(static_cast<size_t>(gpu.sms) * stride);
      args.vectors = allocate<float>(static_cast<size_t>(2) * gpu.sms * kVector);
      args.spent = allocate<uint64_t>(gpu.sms);
      args.stuck = gpu.stuck;
      args.sms = gpu.sms, args.group = group, args.stride = stride, args.rounds = kRounds, args.spin_limit = kSpinLimit;
      std::vector<double> times;
      std::string fault;
      for (int i = 0; i <= kRepetitions && fault.empty(); ++i) {
        CHECK(cudaMemset(args.flags, 0, sizeof(uint32_t) * gpu.sms * stride));
        void* words[] = {&args};
        CHECK(cudaLaunchCooperativeKernel(kernel, dim3(gpu.sms), dim3(kWorkers), words, gpu.shared_bytes, nullptr));
        CHECK(cudaDeviceSynchronize());
        std::vector<uint64_t> spent(gpu.sms);
        CHECK(cudaMemcpy(spent.data(), args.spent, sizeof(uint64_t) * gpu.sms, cudaMemcpyDeviceToHost));
        if (i) times.push_back(*std::max_element(spent.begin(), spent.end()) / double(kRounds - kWarmRounds));
        fault = gpu.fault();
      }
      const std::string where = format("\"how\": \"%s\", \"sms\": %d, \"flag_bytes\": %d", name, group, 4 * stride);
      if (fault.empty()) {
        const Summary ns = summary(times);
        gpu.row(where + format(", \"ns\": %.1f, \"ns_low\": %.1f, \"ns_high\": %.1f", ns.median, ns.low, ns.high));
      } else {
        gpu.row(where + fault);
      }
      CHECK(cudaFree(args.flags));
      CHECK(cudaFree(args.vectors));
      CHECK(cudaFree(args.spent));
    }
  }
}

template <bool reading>
Summary launch(const Gpu& gpu, const Stream& args) {
  CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(stream_kernel<reading>),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, gpu.shared_bytes));
  return timed([&] {
    stream_kernel<reading><<<gpu.sms, kThreads, gpu.shared_bytes>>>(args);
    CHECK(cudaGetLastError());
  });
}

Stream ring(const Gpu& gpu, const uint8_t* data, int64_t share, uint32_t* sum, int kb, int stage_kb, int piece_kb) {
  Stream args{};
  args.data = data, args.share = share, args.sum = sum, args.stuck = gpu.stuck, args.spin_limit = kSpinLimit;
  args.passes = 1, args.stages = kb / stage_kb, args.stage_bytes = stage_kb << 10, args.piece_bytes = piece_kb << 10;
  return args;
}

bool fits(const Gpu& gpu, int ring_kb) { return kRingAt + (ring_kb << 10) <= gpu.shared_bytes; }

}  // namespace

int main(int count, char** words) {
  const double gigabytes = count > 1 ? std::atof(words[1]) : 3;
  if (!(gigabytes >= 0.1 && gigabytes <= 100)) {
    std::fprintf(stderr, "error: gigabytes must be from 0.1 to 100, not %s\n", words[1]);
    return 1;
  }
  cudaDeviceProp device{};
  CHECK(cudaGetDeviceProperties(&device, 0));
  int cooperative = 0, shared_bytes = 0;
  CHECK(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, 0));
  CHECK(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  if (!cooperative) {
    std::fprintf(stderr, "error: %s has no cooperative launch\n", device.name);
    return 1;
  }
  Gpu gpu{device.multiProcessorCount, shared_bytes, allocate<int32_t>(1)};
  uint64_t* step = allocate<uint64_t>(1);
  clock_kernel<<<1, 1>>>(step);
  CHECK(cudaGetLastError());
  std::printf("{\"gpu\": \"%s\", \"capability\": \"%d.%d\", \"sms\": %d, \"shared_bytes\": %d, \"l2_bytes\": %d,\n",
              device.name, device.major, device.minor, gpu.sms, gpu.shared_bytes, device.l2CacheSize);
  std::printf(" \"clock_step_ns\": %llu,\n", static_cast<unsigned long long>(fetched(step)));

  const int64_t share = ((static_cast<int64_t>(gigabytes * 1e9) / gpu.sms) >> 14) << 14, bytes = share * gpu.sms;
  uint8_t *data = allocate<uint8_t>(bytes), *copy = allocate<uint8_t>(bytes);
  fill_kernel<<<8 * gpu.sms, 256>>>(reinterpret_cast<uint32_t*>(data), bytes / 4);
  CHECK(cudaGetLastError());
  const Summary copied = timed([&] { CHECK(cudaMemcpyAsync(copy, data, bytes, cudaMemcpyDeviceToDevice)); });
  const double rate = 2 * bytes / copied.median / 1e6;  // GB/s, read and written
  std::printf(" \"copy_gb_per_s\": %.1f, \"copy_gb_per_s_low\": %.1f, \"copy_gb_per_s_high\": %.1f,\n", rate,
              2 * bytes / copied.high / 1e6, 2 * bytes / copied.low / 1e6);
  CHECK(cudaFree(copy));

  uint32_t* sum = allocate<uint32_t>(2);
  sum_kernel<<<8 * gpu.sms, 256>>>(reinterpret_cast<const uint32_t*>(data), bytes / 4, sum + 1);
  CHECK(cudaGetLastError());
  const uint32_t expected = fetched(sum + 1);
  std::printf(" \"stream\": [");
  struct Shape {
    int stage_kb, piece_kb;
    bool reading;
  };
  for (Shape shape : {Shape{16, 16, false}, Shape{16, 4, false}, Shape{8, 8, false}, Shape{16, 16, true}}) {
    for (int kb : {32, 64, 96, 128, 160, 192}) {
      if (!fits(gpu, kb)) continue;
      const Stream args = ring(gpu, data, share, sum, kb, shape.stage_kb, shape.piece_kb);
      CHECK(cudaMemset(sum, 0, sizeof(uint32_t)));
      const Summary ms = shape.reading ? launch<true>(gpu, args) : launch<false>(gpu, args);
      std::string fault = gpu.fault();
      if (fault.empty() && shape.reading && fetched(sum) != expected * (kRepetitions + 1)) {
        fault = ", \"fault\": \"the sum of what was read is wrong\"";
        gpu.green = false;
      }
      const double gb = bytes / ms.median / 1e6;
      gpu.row(format("\"ring_kb\": %d, \"stage_kb\": %d, \"piece_kb\": %d, \"reading\": %s, \"gb_per_s\": %.1f, "
                     "\"gb_per_s_low\": %.1f, \"gb_per_s_high\": %.1f, \"of_copy\": %.3f",
                     kb, shape.stage_kb, shape.piece_kb, shape.reading ? "true" : "false", gb, bytes / ms.high / 1e6,
                     bytes / ms.low / 1e6, gb / rate) +
              fault);
    }
  }

  std::printf("],\n \"reread\": [");
  gpu.comma = "";
  for (int megabytes : {16, 32, 50, 64}) {
    for (int kb : {64, 128, 192}) {
      const int64_t part = ((int64_t{megabytes} * 1000000 / gpu.sms + (1 << 13)) >> 14) << 14;
      if (!fits(gpu, kb) || part == 0 || part * gpu.sms > bytes) continue;
      Stream args = ring(gpu, data, part, sum, kb, 16, 16);
      const Summary once = launch<false>(gpu, args);
      args.passes = 9;
      const Summary often = launch<false>(gpu, args);
      gpu.row(format("\"mb\": %.1f, \"ring_kb\": %d, \"gb_per_s\": %.1f, \"one_pass_us\": %.1f, "
                     "\"nine_passes_us\": %.1f",
                     part * gpu.sms / 1e6, kb, 8 * part * gpu.sms / (often.median - once.median) / 1e6,
                     1e3 * once.median, 1e3 * often.median) +
              gpu.fault());
    }
  }

  std::printf("],\n \"exchange\": [");
  gpu.comma = "";
  exchanges<How::acquire_warp>(gpu, "acquire_warp");
  exchanges<How::relaxed_warp>(gpu, "relaxed_warp");
  exchanges<How::acquire_block>(gpu, "acquire_block");
  exchanges<How::counter>(gpu, "counter");
  exchanges<How::data>(gpu, "data");
  std::printf("]}\n");
  return gpu.green ? 0 : 3;
}
