// The primitives on the host, where fibers.h runs the threads. What a GPU answers with a fault, a hang or silence is an
// exception here.
#pragma once

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "fibers.h"

namespace siren::cuda {

#define SIREN_DEVICE inline

inline int thread() { return fibers::current_fiber->thread; }
inline int block() { return fibers::current_fiber->block; }
inline uint8_t* shared_memory() { return fibers::current_scheduler->shared_memory(block()); }

struct alignas(16) Four {
  float v[4];
};

struct alignas(16) Words {
  uint32_t v[4];
};

template <class T>
inline T load_aligned(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T))
    fibers::misuse("a load of " + std::to_string(sizeof(T)) + " bytes from an address that is not aligned to them");
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline Four load4(const float* from) { return load_aligned<Four>(from); }
struct alignas(8) Pair {
  uint32_t v[2];
};

inline Words load_words(const void* from) { return load_aligned<Words>(from); }
inline Pair load_pair(const void* from) { return load_aligned<Pair>(from); }
inline float load(const float* from) { return load_aligned<float>(from); }
inline int32_t load(const int32_t* from) { return load_aligned<int32_t>(from); }
inline uint16_t load(const uint16_t* from) { return load_aligned<uint16_t>(from); }

inline void store4(float* to, const Four& value) {
  if (reinterpret_cast<uintptr_t>(to) % 16)
    fibers::misuse("a store of 16 bytes to an address that is not aligned to them");
  std::memcpy(to, &value, sizeof value);
}

// All fibers of a scheduler share a thread of the host; other threads only read and write the host's words.
inline uint32_t load_acquire(const uint32_t* from) {
  fibers::current_fiber->tried = nullptr;
  return __atomic_load_n(from, __ATOMIC_ACQUIRE);
}

inline void store_release(uint32_t* to, uint32_t value) {
  fibers::current_scheduler->hesitate();
  __atomic_store_n(to, value, __ATOMIC_RELEASE);
  fibers::current_scheduler->stored();
}

inline int32_t load_host(const int32_t* from) {
  fibers::current_fiber->tried = nullptr;
  return __atomic_load_n(from, __ATOMIC_ACQUIRE);
}

inline void store_host(int32_t* to, int32_t value) {
  fibers::current_scheduler->hesitate();
  __atomic_store_n(to, value, __ATOMIC_RELEASE);
  fibers::current_scheduler->stored();
}

inline int32_t load_relaxed(const int32_t* from) { return load_host(from); }

inline bool set_first(int32_t* flag, int32_t value) {
  if (*flag != 0) return false;  // no other fiber runs between this and the store
  *flag = value;
  fibers::current_scheduler->stored();
  return true;
}

inline void worker_sync() { fibers::current_scheduler->worker_sync(); }
inline void block_sync() { fibers::current_scheduler->block_sync(); }
inline void warp_sync() {
  fibers::current_scheduler->collective("warp_sync", nullptr, [](void* const*) {});
}

template <class T>
struct Exchange {
  T value;
  int source;  // lane
  T received;
};

template <class T>
inline T exchange(const char* name, T value, int source) {
  if (source < 0 || source > 31) fibers::misuse(std::string(name) + " with lane " + std::to_string(source));
  Exchange<T> own{value, source, T()};
  fibers::current_scheduler->collective(name, &own, [](void* const* slots) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* to = static_cast<Exchange<T>*>(slots[lane]);
      to->received = static_cast<Exchange<T>*>(slots[to->source])->value;
    }
  });
  return own.received;
}

inline float shuffle_xor(float value, int mask) {
  return exchange("shuffle_xor of float", value, thread() % 32 ^ mask);
}
inline double shuffle_xor(double value, int mask) {
  return exchange("shuffle_xor of double", value, thread() % 32 ^ mask);
}
inline int shuffle_xor(int value, int mask) { return exchange("shuffle_xor of int", value, thread() % 32 ^ mask); }
inline int shuffle(int value, int source) { return exchange("shuffle", value, source & 31); }

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  fibers::current_scheduler->mbarrier_init(barrier, arrivals);
}
inline void mbarrier_fence() {}
inline void mbarrier_arrive(uint64_t* barrier) {
  fibers::current_scheduler->hesitate();
  fibers::current_scheduler->mbarrier_arrive(barrier, 0);
}
inline bool mbarrier_try(uint64_t* barrier, int parity) {
  return fibers::current_scheduler->mbarrier_try(barrier, parity);
}

struct BulkCopy {
  void* shared;
  const void* global;
  int bytes;
  uint64_t* barrier;
};

inline const BulkCopy& same_in_all_lanes(void* const* slots) {
  const auto& first = *static_cast<const BulkCopy*>(slots[0]);
  for (int lane = 1; lane < 32; ++lane) {
    const auto& other = *static_cast<const BulkCopy*>(slots[lane]);
    if (other.shared != first.shared || other.global != first.global || other.bytes != first.bytes ||
        other.barrier != first.barrier)
      fibers::misuse("the lanes of a warp want different copies");
  }
  return first;
}

inline void mbarrier_expect(uint64_t* barrier, int bytes) {
  BulkCopy own{nullptr, nullptr, bytes, barrier};
  fibers::current_scheduler->collective("mbarrier_expect", &own, [](void* const* slots) {
    const BulkCopy& all = same_in_all_lanes(slots);
    fibers::current_scheduler->mbarrier_arrive(all.barrier, all.bytes);
  });
}

inline void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
  BulkCopy own{shared, global, bytes, barrier};
  fibers::current_scheduler->collective("copy_bulk", &own, [](void* const* slots) {
    const BulkCopy& all = same_in_all_lanes(slots);
    fibers::current_scheduler->copy(all.shared, all.global, all.bytes, all.barrier);
  });
}

inline int copy_arrivals() { return 1; }
inline void prefetch(const void*, int) {}
inline void relax() { fibers::current_scheduler->poll(); }

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// NaN becomes 0x7fff, as on a GPU.
inline uint32_t bf16_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint32_t pack_bf16(float low, float high) { return bf16_of(low) | bf16_of(high) << 16; }

struct Fragments {
  float* c;            // rows g and g + 8 of columns 2t and 2t + 1, where g is lane / 4 and t is lane % 4
  const uint32_t* a;   // rows g, g + 8 of columns 2t, 2t + 1, then of columns 2t + 8, 2t + 9
  const uint32_t* b;   // column g of rows 2t, 2t + 1, then of rows 2t + 8, 2t + 9
};

// c[16][8] += a[16][16] b[16][8]. A product of two bf16 is exact in float; each of the 16 sums rounds, in order.
inline void multiply(void* const* slots) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const Fragments*>(slots[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i)
      for (int half = 0; half < 2; ++half)
        a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = float_of(half ? own.a[i] & 0xffff0000u : own.a[i] << 16);
    for (int i = 0; i < 2; ++i)
      for (int half = 0; half < 2; ++half)
        b[2 * t + i * 8 + half][g] = float_of(half ? own.b[i] & 0xffff0000u : own.b[i] << 16);
    for (int i = 0; i < 4; ++i) c[g + i / 2 * 8][2 * t + i % 2] = own.c[i];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const Fragments*>(slots[lane]);
    for (int i = 0; i < 4; ++i) own.c[i] = c[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
  }
}

inline void mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
  Fragments own{c, a, b};
  fibers::current_scheduler->collective("mma", &own, &multiply);
}

// Bits 0-7 and 16-23 hold the two; the other bits are somebody else's.
inline uint32_t widen_int8(uint32_t pair) {
  return pack_bf16(static_cast<float>(static_cast<int8_t>(pair)), static_cast<float>(static_cast<int8_t>(pair >> 16)));
}

// e4m3 has no infinity, and one NaN.
inline float float_of_fp8(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return NAN;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                   : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return bits & 0x80 ? -size : size;
}

inline uint32_t widen_fp8(uint32_t pair) {
  return pack_bf16(float_of_fp8(static_cast<uint8_t>(pair)), float_of_fp8(static_cast<uint8_t>(pair >> 16)));
}

inline uint64_t patience() { return ~uint64_t{0}; }  // only polls count: a debugger may stop the clock

inline uint64_t nanoseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

}  // namespace siren::cuda
