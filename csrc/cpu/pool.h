// Threads that run one function together, with a barrier inside it that costs a fraction of a microsecond.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace siren::cpu {

class Pool {
 public:
  // One pool for each number of threads in a process: engines with the same number take turns, frame by frame, instead of
  // fighting for cores.
  // It lives as long as the process: workers cannot be joined while Python is being taken down.
  static Pool& get(int threads);

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Calls function(context, thread) for thread 0 (the caller) to threads - 1 and returns when all have ended. The function
  // must not throw. Callers on several threads wait for one another. A process forked while a call is under way cannot
  // use the pool; one forked between calls can.
  void run(void (*function)(void*, int), void* context);

  // Inside run(): returns when every thread has arrived.
  void barrier(int thread);

 private:
  struct alignas(64) Flag {
    std::atomic<uint32_t> epoch{0};
  };

  explicit Pool(int threads);
  void start_workers();
  void pin(std::thread& worker, int thread) const;
  void work(int thread, uint32_t seen);

  const int threads_;
  int process_ = 0;  // that started the workers; a fork leaves them behind
  std::mutex turn_;
  void (*function_)(void*, int) = nullptr;
  void* context_ = nullptr;
  std::atomic<uint32_t> job_{0};
  struct Sleep {
    std::atomic<int> sleepers{0};
    std::mutex mutex;
    std::condition_variable wake;
  };
  Sleep* sleep_ = nullptr;  // of this process
  std::vector<Flag> arrived_, finished_;
  std::vector<std::thread> workers_;
};

}  // namespace siren::cpu
