#include "fibers.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace siren::fibers {

namespace {

constexpr size_t kSpareBytes = 1024;           // of a stack that must still be free when its fiber waits
constexpr uint64_t kMbarrierMark = 0x5ba221e4ull << 32;
constexpr int64_t kMostBytes = (1 << 20) - 1;  // that a phase of an mbarrier can expect

std::string place(const Fiber& fiber) {
  return "block " + std::to_string(fiber.block) + ", thread " + std::to_string(fiber.thread);
}

bool inside(const void* pointer, int bytes, const uint8_t* shared, int shared_bytes) {
  const auto* at = static_cast<const uint8_t*>(pointer);
  return at >= shared && at + bytes <= shared + shared_bytes;
}

}  // namespace

void misuse(const std::string& message) {
  throw std::runtime_error(place(*current_fiber) + ": " + message);
}

Scheduler::Scheduler(int blocks, int shared_bytes, uint64_t seed, int64_t idle_limit)
    : fibers_(static_cast<size_t>(blocks) * kThreads),
      warps_(static_cast<size_t>(blocks) * kBlockWarps),
      blocks_(blocks),
      shared_bytes_((shared_bytes + 127) / 128 * 128),
      idle_limit_(idle_limit),
      random_(seed * 0x9e3779b97f4a7c15ull),  // 0 only for 0: the factor is odd
      live_(static_cast<int64_t>(blocks) * kThreads) {
  const size_t shared_total = static_cast<size_t>(blocks) * shared_bytes_;
  // The first stack may run over a little before that is seen.
  memory_bytes_ = shared_total + (fibers_.size() + 1) * kStackBytes;
  memory_ = take_memory(memory_bytes_);
  auto* shared = static_cast<uint8_t*>(memory_);
  std::memset(shared, 0xFF, shared_total);  // whoever reads what nobody wrote reads NaN
  stacks_ = shared + shared_total + kStackBytes;

  for (int b = 0; b < blocks; ++b) blocks_[b].shared = shared + static_cast<size_t>(b) * shared_bytes_;
  for (size_t w = 0; w < warps_.size(); ++w) {
    warps_[w].block = static_cast<int>(w / kBlockWarps);
    warps_[w].number = static_cast<int>(w % kBlockWarps);
  }
  for (size_t f = 0; f < fibers_.size(); ++f) {
    Fiber& fiber = fibers_[f];
    fiber.warp = &warps_[f / 32];
    fiber.lane = static_cast<int>(f % 32);
    fiber.thread = static_cast<int>(f % kThreads);
    fiber.block = static_cast<int>(f / kThreads);
    make_context(fiber.context, stacks_ + f * kStackBytes, &Scheduler::enter);
  }
}

Scheduler::~Scheduler() { give_memory(memory_, memory_bytes_); }

void Scheduler::run(std::function<void()> kernel) {
  kernel_ = std::move(kernel);
  for (Warp& warp : warps_) wake(warp, 0xffffffffu);
  Scheduler* const before = std::exchange(current_scheduler, this);
  if (Fiber* first = next()) {
    current_fiber = first;
    ++switches_;
    switch_context(outside_, first->context);
  }
  current_fiber = nullptr;
  current_scheduler = before;
  if (error_) std::rethrow_exception(error_);
}

// Where a fiber begins. It ends in a switch to another, and nobody comes back to it.
void Scheduler::enter() {
  Scheduler& scheduler = *current_scheduler;
  Fiber& fiber = *current_fiber;
  Fiber* next = nullptr;
  try {
    scheduler.kernel_();
    Block& block = scheduler.blocks_[fiber.block];
    --block.live;
    --scheduler.live_;
    if (block.live == 0 && block.copies > 0) misuse("the block ends with copies into its shared memory under way");
    next = scheduler.next();
  } catch (...) {
    scheduler.error_ = std::current_exception();
  }
  current_fiber = next;
  switch_context(fiber.context, next ? next->context : scheduler.outside_);
}

// xorshift64*
uint32_t Scheduler::random(uint32_t below) {
  random_ ^= random_ >> 12;
  random_ ^= random_ << 25;
  random_ ^= random_ >> 27;
  const uint64_t high = (random_ * 0x2545f4914f6cdd1dull) >> 32;
  return static_cast<uint32_t>(high * below >> 32);
}

void Scheduler::wake(Warp& warp, uint32_t lanes) {
  warp.ready |= lanes;
  if (!warp.queued && warp.ready) {
    warp.queued = true;
    next_round_.push_back(&warp);
  }
}

void Scheduler::wake_block(int block, int warps) {
  Warp* first = &warps_[static_cast<size_t>(block) * kBlockWarps];
  for (Warp* warp = first; warp < first + warps; ++warp) wake(*warp, 0xffffffffu);
}

// The fiber to go on with, or null: all have ended, or somebody called stop().
Fiber* Scheduler::next() {
  while (lanes_ == 0) {
    if (turn_ == round_.size() && !start_round()) return nullptr;
    if (turn_ == round_.size()) continue;
    if (random_) std::swap(round_[turn_], round_[turn_ + random(static_cast<uint32_t>(round_.size() - turn_))]);
    warp_ = round_[turn_++];
    if (warp_->asleep_until > rounds_) {
      next_round_.push_back(warp_);
      continue;
    }
    warp_->queued = false;
    rotation_ = random_ ? random(32) : 0;
    lanes_ = std::exchange(warp_->ready, 0u);
    lanes_ = lanes_ >> rotation_ | lanes_ << (-rotation_ & 31);
  }
  const int lane = (__builtin_ctz(lanes_) + rotation_) & 31;
  lanes_ &= lanes_ - 1;
  return &fibers_[(warp_ - warps_.data()) * 32 + lane];
}

bool Scheduler::start_round() {
  if (live_ == 0 || stopped_.load(std::memory_order_relaxed)) return false;
  ++rounds_;
  if (random_) sleep_somebody();
  if (!copies_.empty() && (random_ ? random(4) == 0 : rounds_ % 4 == 0))
    for (size_t n = 1 + copies_.size() / 16; n > 0; --n) finish_copy();
  if (stores_ != stores_seen_) {
    stores_seen_ = stores_;
    idle_ = 0;
    for (Warp* warp : std::exchange(polling_, {})) wake(*warp, std::exchange(warp->polling, 0u));
  }
  if (next_round_.empty() && !copies_.empty()) finish_copy();
  if (next_round_.empty() && copies_.empty()) {
    // Polls are all that is left. A kernel may count them, and give up.
    bool any = false;
    for (Warp* warp : std::exchange(polling_, {})) {
      wake(*warp, std::exchange(warp->polling, 0u));
      any = true;
    }
    for (Mbarrier& barrier : mbarriers_)
      for (int w = 0; w < kBlockWarps; ++w) {
        any |= barrier.waiting[w] != 0;
        wake(warps_[static_cast<size_t>(barrier.block) * kBlockWarps + w], std::exchange(barrier.waiting[w], 0u));
      }
    if (!any || ++idle_ > idle_limit_) deadlock();
  }
  round_.clear();
  std::swap(round_, next_round_);
  turn_ = 0;
  return true;
}

// Now and then a warp or a whole block falls far behind the others, as on a GPU whose memory is busy.
void Scheduler::sleep_somebody() {
  if (random(8)) return;
  const uint64_t until = rounds_ + (1u << random(9));
  if (random(2)) {
    warps_[random(static_cast<uint32_t>(warps_.size()))].asleep_until = until;
  } else {
    Warp* first = &warps_[static_cast<size_t>(random(static_cast<uint32_t>(blocks_.size()))) * kBlockWarps];
    for (Warp* warp = first; warp < first + kBlockWarps; ++warp) warp->asleep_until = until;
  }
}

// The calling fiber waits; whoever wakes it has it on a list. Returns when it has its turn again.
void Scheduler::leave(const char* waits_in) {
  Fiber& fiber = *current_fiber;
#ifndef SIREN_USE_UCONTEXT
  const uint8_t* stack = stacks_ + (&fiber - fibers_.data()) * kStackBytes;
  if (static_cast<const uint8_t*>(__builtin_frame_address(0)) < stack + kSpareBytes) misuse("the stack is too small");
#endif
  fiber.waits_in = waits_in;
  Fiber* following = next();
  if (following != &fiber) {
    ++switches_;
    current_fiber = following;
    switch_context(fiber.context, following ? following->context : outside_);
  }
  fiber.waits_in = nullptr;
}

void Scheduler::yield() {
  Fiber& fiber = *current_fiber;
  wake(*fiber.warp, 1u << fiber.lane);
  leave("yield");
}

void Scheduler::hesitate() {
  if (random_ && random(8) == 0) yield();
}

void Scheduler::poll() {
  Fiber& fiber = *current_fiber;
  const uint32_t bit = 1u << fiber.lane;
  if (Mbarrier* tried = std::exchange(fiber.tried, nullptr)) {
    tried->waiting[fiber.warp->number] |= bit;
    leave("a poll of an mbarrier");
    return;
  }
  if (stores_ != stores_seen_) {  // perhaps since the caller looked
    wake(*fiber.warp, bit);
  } else {
    if (fiber.warp->polling == 0) polling_.push_back(fiber.warp);
    fiber.warp->polling |= bit;
  }
  leave("a poll");
}

void Scheduler::worker_sync() {
  Fiber& fiber = *current_fiber;
  if (fiber.thread >= kWorkers) misuse("worker_sync is for the first " + std::to_string(kWorkers) + " threads");
  Block& block = blocks_[fiber.block];
  if (++block.at_workers == kWorkers) {
    block.at_workers = 0;
    wake_block(fiber.block, kWorkers / 32);
  }
  leave("worker_sync");
}

void Scheduler::block_sync() {
  Fiber& fiber = *current_fiber;
  Block& block = blocks_[fiber.block];
  if (++block.at_block == kThreads) {
    block.at_block = 0;
    wake_block(fiber.block, kBlockWarps);
  }
  leave("block_sync");
}

void Scheduler::collective(const char* name, void* slot, void (*compute)(void* const* slots)) {
  Fiber& fiber = *current_fiber;
  Warp& warp = *fiber.warp;
  const uint32_t bit = 1u << fiber.lane;
  if (warp.arrived == 0) warp.collective = name;
  if (std::strcmp(warp.collective, name) != 0)
    misuse(std::string("in ") + name + " while other lanes of the warp are in " + warp.collective);
  warp.slots[fiber.lane] = slot;
  warp.arrived |= bit;
  if (warp.arrived == 0xffffffffu) {
    compute(warp.slots);
    warp.arrived = 0;
    wake(warp, 0xffffffffu & ~bit);
    return;
  }
  leave(name);
}

Mbarrier& Scheduler::mbarrier_of(const uint64_t* word) {
  const uint64_t number = *word ^ kMbarrierMark;
  if (number >= mbarriers_.size()) misuse("not an mbarrier: never initialised, or written over");
  return mbarriers_[number];
}

void Scheduler::mbarrier_init(uint64_t* word, int arrivals) {
  const int block = current_fiber->block;
  if (!inside(word, 8, blocks_[block].shared, shared_bytes_)) misuse("an mbarrier outside the block's shared memory");
  if (reinterpret_cast<uintptr_t>(word) % 8) misuse("an mbarrier that is not aligned to 8 bytes");
  if (arrivals < 1 || arrivals > kMostBytes) misuse("an mbarrier for " + std::to_string(arrivals) + " arrivals");
  *word = kMbarrierMark ^ mbarriers_.size();
  mbarriers_.push_back({block, arrivals, arrivals});
}

// Ends the phase if nothing is missing.
void Scheduler::settle(Mbarrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.arrivals;
  ++barrier.phase;
  for (int w = 0; w < kBlockWarps; ++w)
    wake(warps_[static_cast<size_t>(barrier.block) * kBlockWarps + w], std::exchange(barrier.waiting[w], 0u));
  idle_ = 0;
}

void Scheduler::mbarrier_arrive(uint64_t* word, int bytes) {
  Mbarrier& barrier = mbarrier_of(word);
  if (barrier.missing == 0) misuse("an arrival too many at an mbarrier");
  if (bytes < 0 || barrier.bytes + bytes > kMostBytes)
    misuse("an mbarrier that expects " + std::to_string(bytes) + " bytes more");
  barrier.bytes += bytes;
  --barrier.missing;
  settle(barrier);
}

bool Scheduler::mbarrier_try(uint64_t* word, int parity) {
  Mbarrier& barrier = mbarrier_of(word);
  const bool over = static_cast<int>(barrier.phase & 1) != parity;
  current_fiber->tried = over ? nullptr : &barrier;
  return over;
}

void Scheduler::copy(void* shared, const void* global, int bytes, uint64_t* word) {
  Block& block = blocks_[current_fiber->block];
  mbarrier_of(word);
  if (bytes <= 0 || bytes % 16) misuse("a bulk copy of " + std::to_string(bytes) + " bytes: not a multiple of 16");
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    misuse("a bulk copy from or to an address that is not aligned to 16 bytes");
  if (!inside(shared, bytes, block.shared, shared_bytes_)) misuse("a bulk copy outside the block's shared memory");
  std::memset(shared, 0xFF, bytes);
  copies_.push_back({shared, global, bytes, static_cast<uint32_t>(*word)});
  ++block.copies;
}

void Scheduler::finish_copy() {
  const size_t i = random_ ? random(static_cast<uint32_t>(copies_.size())) : 0;
  const Copy copy = copies_[i];
  if (random_) {
    copies_[i] = copies_.back();
    copies_.pop_back();
  } else {
    copies_.erase(copies_.begin());
  }
  std::memcpy(copy.shared, copy.global, copy.bytes);
  Mbarrier& barrier = mbarriers_[copy.barrier];
  --blocks_[barrier.block].copies;
  barrier.bytes -= copy.bytes;
  settle(barrier);
}

void Scheduler::deadlock() const {
  std::map<std::tuple<int, int, std::string>, int> waiting;  // block, warp, where: lanes
  int64_t lanes = 0;
  for (const Fiber& fiber : fibers_)
    if (fiber.waits_in) {
      ++waiting[{fiber.block, fiber.thread / 32, fiber.waits_in}];
      ++lanes;
    }
  std::string text = "deadlock: " + std::to_string(lanes) + " threads wait";
  int listed = 0;
  for (const auto& [where, count] : waiting) {
    if (++listed > 8) {
      text += ", ...";
      break;
    }
    const auto& [block, warp, name] = where;
    text += (listed == 1 ? ": " : "; ") + std::to_string(count) + " of block " + std::to_string(block) + ", warp " +
            std::to_string(warp) + " in " + name;
  }
  throw std::runtime_error(text);
}

}  // namespace siren::fibers
