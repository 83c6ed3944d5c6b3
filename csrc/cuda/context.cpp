#include "context.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace siren::fibers {

#ifdef SIREN_USE_UCONTEXT

void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

void make_context(Context& context, uint8_t* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#else

// Pushes what a called function must keep, swaps the stacks, and pops the same of the other fiber.
extern "C" void switch_stacks(void** from, void* to) __asm__("siren_switch_stacks");

#if defined(__x86_64__)
__asm__(
    ".text\n"
    ".p2align 4\n"
    "siren_switch_stacks:\n"
    "  pushq %rbp\n"
    "  pushq %rbx\n"
    "  pushq %r12\n"
    "  pushq %r13\n"
    "  pushq %r14\n"
    "  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n"
    "  popq %r14\n"
    "  popq %r13\n"
    "  popq %r12\n"
    "  popq %rbx\n"
    "  popq %rbp\n"
    "  ret\n");
constexpr int kFrameWords = 8;  // six registers, where to go on, and the return address of that
constexpr int kEntryWord = 6;
#else
__asm__(
    ".text\n"
    ".p2align 4\n"
    "siren_switch_stacks:\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n"
    "  stp x21, x22, [sp, #16]\n"
    "  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n"
    "  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n"
    "  stp d10, d11, [sp, #112]\n"
    "  stp d12, d13, [sp, #128]\n"
    "  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n"
    "  str x9, [x0]\n"
    "  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n"
    "  ldp x21, x22, [sp, #16]\n"
    "  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n"
    "  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n"
    "  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n"
    "  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  ret\n");
constexpr int kFrameWords = 20;
constexpr int kEntryWord = 11;  // x30
#endif

void switch_context(Context& from, Context& to) { switch_stacks(&from.stack, to.stack); }

void make_context(Context& context, uint8_t* stack, void (*entry)()) {
  uintptr_t top = reinterpret_cast<uintptr_t>(stack) + kStackBytes;
  void** frame = reinterpret_cast<void**>(top - top % 16) - kFrameWords;
  std::fill(frame, frame + kFrameWords, nullptr);
  frame[kEntryWord] = reinterpret_cast<void*>(entry);
  context.stack = frame;
}

#endif

namespace {

constexpr size_t kMostKept = size_t{512} << 20;
std::mutex kept_lock;
void* kept_memory = nullptr;
size_t kept_bytes = 0;

}  // namespace

// Fibers that were left in the middle of a function leave marks on their stacks.
static void forget_marks([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(memory, bytes);
#endif
}

void* take_memory(size_t& bytes) {
  {
    std::lock_guard<std::mutex> guard(kept_lock);
    if (kept_memory && kept_bytes >= bytes) {
      bytes = std::exchange(kept_bytes, 0);
      forget_marks(kept_memory, bytes);
      return std::exchange(kept_memory, nullptr);
    }
  }
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for a grid of " + std::to_string(bytes) + " bytes");
  forget_marks(memory, bytes);
  return memory;
}

void give_memory(void* memory, size_t bytes) {
  if (bytes <= kMostKept) {
    std::lock_guard<std::mutex> guard(kept_lock);
    std::swap(memory, kept_memory);
    std::swap(bytes, kept_bytes);
  }
  if (memory) munmap(memory, bytes);
}

}  // namespace siren::fibers
