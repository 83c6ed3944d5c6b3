// What a fiber is to the processor: registers and a stack, and the memory that stacks are in.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(SIREN_UCONTEXT) || !(defined(__x86_64__) || defined(__aarch64__))
#include <ucontext.h>
#define SIREN_USE_UCONTEXT 1
#endif

namespace siren::fibers {

#ifdef SIREN_USE_UCONTEXT
using Context = ucontext_t;
#else
struct Context {
  void* stack;  // where the registers lie
};
#endif

// Memory is touched, and so taken, only as deep as a fiber goes. The odd lines beside 64 KB keep the tops of the stacks
// from all falling into the same sets of the caches.
constexpr size_t kStackBytes = 64 * 1024 + 13 * 64;

// Keeps the running fiber's registers in `from` and goes on with `to`; returns when somebody switches to `from`.
void switch_context(Context& from, Context& to);

// The next switch to it calls `entry`, which must not return, on the kStackBytes from `stack` on.
void make_context(Context& context, uint8_t* stack, void (*entry)());

// Memory of zeros, or of an earlier grid: the last one is kept for the next, because to have its pages given anew would
// cost more than a short grid, and tests run thousands of those. `bytes` may grow.
void* take_memory(size_t& bytes);
void give_memory(void* memory, size_t bytes);

}  // namespace siren::fibers
