#include "pool.h"

#include <map>

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

namespace siren::cpu {
namespace {

// Spins first: waking a sleeping thread costs more than a phase of the frame. Yields after a while, for the case of more
// threads than cores.
template <class Ready>
void wait_until(Ready ready) {
  for (int i = 0; !ready(); ++i) {
    if (i < 4096) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    } else {
      sched_yield();
    }
  }
}

}  // namespace

Pool& Pool::get(int threads) {
  static std::mutex mutex;
  static auto* pools = new std::map<int, Pool*>();
  std::lock_guard<std::mutex> lock(mutex);
  Pool*& pool = (*pools)[threads];
  if (!pool) pool = new Pool(threads);
  return *pool;
}

Pool::Pool(int threads) : threads_(threads), arrived_(threads), finished_(threads) {}

void Pool::start_workers() {
  if (process_ != getpid()) {
    for (std::thread& worker : workers_) worker.detach();  // of the process that forked this one
    workers_.clear();
    sleep_ = new Sleep;  // after a fork the old one still counts waiters that are gone, so it is left alone
    for (Flag& flag : arrived_) flag.epoch.store(0);
    process_ = getpid();
  }
  // Throws std::system_error when the system gives no more threads; the next call goes on from those that started.
  while (static_cast<int>(workers_.size()) + 1 < threads_) {
    const int thread = static_cast<int>(workers_.size()) + 1;
    workers_.emplace_back(&Pool::work, this, thread, job_.load());
    pin(workers_.back(), thread);
  }
}

// Each worker to a core of its own, if the pool takes all that this process may use; the caller stays where the scheduler
// puts it. Smaller pools are left alone: those of several processes would end up on the same few cores.
void Pool::pin(std::thread& worker, int thread) const {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) != threads_) return;
  int seen = 0;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (!CPU_ISSET(core, &allowed) || seen++ != thread) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    pthread_setaffinity_np(worker.native_handle(), sizeof one, &one);
  }
#else
  (void)worker;
  (void)thread;
#endif
}

void Pool::work(int thread, uint32_t seen) {
  Sleep& sleep = *sleep_;
  for (;;) {
    for (int i = 0; job_.load() == seen; ++i) {
      if (i < 20000) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        continue;
      }
      std::unique_lock<std::mutex> lock(sleep.mutex);
      sleep.sleepers.fetch_add(1);
      sleep.wake.wait(lock, [&] { return job_.load() != seen; });
      sleep.sleepers.fetch_sub(1);
    }
    seen = job_.load();
    function_(context_, thread);
    finished_[thread].epoch.store(seen, std::memory_order_release);
  }
}

void Pool::run(void (*function)(void*, int), void* context) {
  if (threads_ == 1) return function(context, 0);
  std::lock_guard<std::mutex> turn(turn_);
  start_workers();
  function_ = function;
  context_ = context;
  const uint32_t job = job_.fetch_add(1) + 1;
  if (sleep_->sleepers.load() > 0) {
    std::lock_guard<std::mutex> lock(sleep_->mutex);
    sleep_->wake.notify_all();
  }
  function(context, 0);
  for (int thread = 1; thread < threads_; ++thread)
    wait_until([&] { return finished_[thread].epoch.load(std::memory_order_acquire) == job; });
}

void Pool::barrier(int thread) {
  if (threads_ == 1) return;
  const uint32_t epoch = arrived_[thread].epoch.load(std::memory_order_relaxed) + 1;
  arrived_[thread].epoch.store(epoch, std::memory_order_release);
  for (int other = 0; other < threads_; ++other)
    wait_until([&] {
      // Another thread may already be one barrier further.
      return static_cast<int32_t>(arrived_[other].epoch.load(std::memory_order_acquire) - epoch) >= 0;
    });
}

}  // namespace siren::cpu
