// Runs a kernel's threads on the host, each as a fiber: a stack and the registers that a call keeps. A fiber runs until
// it waits (a barrier, a warp's collective, a poll) and the scheduler goes on with another, in an order drawn from a
// seed: a kernel that lacks a wait computes something else under some seed. One scheduler runs in one thread of the
// host; several may run at once in several threads. host.h has the primitives that kernels call.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <string>
#include <vector>

#include "context.h"
#include "program.h"

namespace siren::fibers {

using cuda::kThreads;
using cuda::kWorkers;
constexpr int kBlockWarps = kThreads / 32;

struct Warp {
  int block, number;          // in the grid, in the block
  uint32_t ready = 0;         // lanes to run when the warp has its turn
  uint32_t polling = 0;       // lanes that run again after the next store that others may see
  uint32_t arrived = 0;       // lanes in the collective that is open
  bool queued = false;        // for a turn
  uint64_t asleep_until = 0;  // a round; till then it has no turn
  const char* collective = nullptr;
  void* slots[32];            // what each lane brought to the collective
};

struct Block {
  int live = kThreads;
  int at_workers = 0, at_block = 0;  // threads in worker_sync and in block_sync
  int copies = 0;                    // that are pending
  uint8_t* shared;
};

// The uint64_t in shared memory holds the number of one of these.
struct Mbarrier {
  int block;
  int arrivals;  // of a phase
  int missing;   // of this one
  int64_t bytes = 0;  // expected and not copied yet; below 0 when a copy was faster than the expectation
  uint32_t phase = 0;
  uint32_t waiting[kBlockWarps] = {};  // lanes
};

struct Copy {
  void* shared;
  const void* global;
  int bytes;
  uint32_t barrier;  // number of the mbarrier that counts the bytes
};

struct alignas(64) Fiber {
  Context context;
  Warp* warp;
  int lane;
  int thread;  // in the block
  int block;
  Mbarrier* tried = nullptr;       // just found incomplete: what the next poll() waits for
  const char* waits_in = nullptr;  // for the report of a deadlock; null: runnable or ended
};

class Scheduler {
 public:
  // A grid of `blocks` of kThreads. seed 0: every warp in turn; else random. A grid in which only polls are left, and
  // `idle_limit` of each have changed nothing, is a deadlock.
  Scheduler(int blocks, int shared_bytes, uint64_t seed, int64_t idle_limit);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Runs `kernel` in every thread of the grid; once. Throws std::runtime_error after a deadlock or a misuse of a
  // primitive, and whatever the kernel throws. Fibers that are left over are dropped where they stand: a kernel must
  // own nothing.
  void run(std::function<void()> kernel);

  // From any thread: run() returns at the next occasion, with the kernel unfinished.
  void stop() { stopped_.store(true, std::memory_order_relaxed); }

  int64_t switches() const { return switches_; }

  // What follows is for the primitives, called in a fiber.

  // Goes on in a later round.
  void yield();
  // Sometimes yields: before a store that others wait for.
  void hesitate();
  // After a poll that found nothing: goes on after a store (or a completed mbarrier, if that was polled).
  void poll();
  void worker_sync();
  void block_sync();
  // All 32 lanes of a warp: the last one to come calls compute(slots), the others wait for it. `slot` is a lane's own,
  // and lives until it returns.
  void collective(const char* name, void* slot, void (*compute)(void* const* slots));
  void stored() { ++stores_; }

  void mbarrier_init(uint64_t* word, int arrivals);
  void mbarrier_arrive(uint64_t* word, int bytes);
  bool mbarrier_try(uint64_t* word, int parity);
  void copy(void* shared, const void* global, int bytes, uint64_t* barrier);

  uint8_t* shared_memory(int block) { return blocks_[block].shared; }

 private:
  static void enter();
  Fiber* next();
  bool start_round();
  void leave(const char* waits_in);
  void wake(Warp& warp, uint32_t lanes);
  void wake_block(int block, int warps);
  Mbarrier& mbarrier_of(const uint64_t* word);
  void settle(Mbarrier& barrier);
  void finish_copy();
  void sleep_somebody();
  [[noreturn]] void deadlock() const;
  uint32_t random(uint32_t below);

  std::function<void()> kernel_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<Block> blocks_;
  int shared_bytes_;
  void* memory_ = nullptr;
  size_t memory_bytes_ = 0;
  uint8_t* stacks_ = nullptr;
  Context outside_;

  std::vector<Warp*> round_, next_round_;  // warps that have a turn in this round, and in the next
  size_t turn_ = 0;                        // of this round
  Warp* warp_ = nullptr;                   // whose turn it is
  uint32_t lanes_ = 0;                     // of it, that are still to run, rotated by
  uint32_t rotation_ = 0;
  std::vector<Warp*> polling_;
  uint64_t rounds_ = 0;
  int64_t idle_ = 0, idle_limit_;

  std::vector<Copy> copies_;
  std::deque<Mbarrier> mbarriers_;
  uint64_t stores_ = 0, stores_seen_ = 0;
  uint64_t random_;
  int64_t live_;
  int64_t switches_ = 0;
  std::exception_ptr error_;
  std::atomic<bool> stopped_{false};
};

inline thread_local Scheduler* current_scheduler = nullptr;
inline thread_local Fiber* current_fiber = nullptr;

// "block 0, thread 5: " and the message, as a std::runtime_error.
[[noreturn]] void misuse(const std::string& message);

}  // namespace siren::fibers
