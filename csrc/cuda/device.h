// The primitives on a GPU. Hopper and later copy in bulk (cp.async.bulk); Ampere falls back to cp.async, 16 bytes a lane.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace siren::cuda {

#define SIREN_DEVICE __device__ __forceinline__

SIREN_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
SIREN_DEVICE int block() { return static_cast<int>(blockIdx.x); }

SIREN_DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(128) uint8_t siren_shared[];
  return siren_shared;
}

SIREN_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Global memory, through L2: the L1 of an SM does not see what other SMs write.
struct alignas(16) Four {
  float v[4];
};

struct alignas(16) Words {
  uint32_t v[4];
};

struct alignas(8) Pair {
  uint32_t v[2];
};

// The loads stay in order and on their side of a barrier, but not behind a store of one's own: between a store and a
// load of the same place there must be a barrier.
SIREN_DEVICE Four load4(const float* from) {
  const float4 all = __ldcg(reinterpret_cast<const float4*>(from));
  return {{all.x, all.y, all.z, all.w}};
}

SIREN_DEVICE void store4(float* to, const Four& value) {
  __stcg(reinterpret_cast<float4*>(to), make_float4(value.v[0], value.v[1], value.v[2], value.v[3]));
}

SIREN_DEVICE Words load_words(const void* from) {
  const uint4 all = __ldcg(reinterpret_cast<const uint4*>(from));
  return {{all.x, all.y, all.z, all.w}};
}

SIREN_DEVICE Pair load_pair(const void* from) {
  const uint2 both = __ldcg(reinterpret_cast<const uint2*>(from));
  return {{both.x, both.y}};
}

SIREN_DEVICE float load(const float* from) { return __ldcg(from); }
SIREN_DEVICE int32_t load(const int32_t* from) { return __ldcg(from); }
SIREN_DEVICE uint16_t load(const uint16_t* from) { return __ldcg(from); }

SIREN_DEVICE uint32_t load_acquire(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

SIREN_DEVICE void store_release(uint32_t* to, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

SIREN_DEVICE int32_t load_relaxed(const int32_t* from) {
  int32_t value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

SIREN_DEVICE bool set_first(int32_t* flag, int32_t value) { return atomicCAS(flag, 0, value) == 0; }

SIREN_DEVICE int32_t load_host(const int32_t* from) {
  int32_t value;
  asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

SIREN_DEVICE void store_host(int32_t* to, int32_t value) {
  asm volatile("st.release.sys.global.s32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

SIREN_DEVICE void worker_sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }
SIREN_DEVICE void block_sync() { __syncthreads(); }
SIREN_DEVICE void warp_sync() { __syncwarp(); }

SIREN_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
SIREN_DEVICE double shuffle_xor(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
SIREN_DEVICE int shuffle_xor(int value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
SIREN_DEVICE int shuffle(int value, int source) { return __shfl_sync(0xffffffffu, value, source); }

SIREN_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

SIREN_DEVICE void mbarrier_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

SIREN_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(shared_address(barrier))
               : "memory");
}

SIREN_DEVICE bool mbarrier_try(uint64_t* barrier, int parity) {
  uint32_t done;
#if __CUDA_ARCH__ >= 900
  constexpr uint32_t kAtMost = 1000;  // nanoseconds that the thread may sleep: the caller counts and looks at the clock
  asm volatile(
      "{\n .reg .pred over;\n mbarrier.try_wait.parity.shared.b64 over, [%1], %2, %3;\n selp.u32 %0, 1, 0, over;\n}"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity), "r"(kAtMost)
               : "memory");
#else
  asm volatile("{\n .reg .pred over;\n mbarrier.test_wait.parity.shared.b64 over, [%1], %2;\n selp.u32 %0, 1, 0, over;\n}"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
#endif
  return done != 0;
}

// A stage is full when its copy has arrived. In bulk, one lane announces the bytes and the copy engine completes them;
// with cp.async each lane arrives once its own copies have landed.
#if __CUDA_ARCH__ >= 900
SIREN_DEVICE int copy_arrivals() { return 1; }

SIREN_DEVICE void mbarrier_expect(uint64_t* barrier, int bytes) {
  if (threadIdx.x % 32 == 0)
    asm volatile("{\n .reg .b64 state;\n mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n}" ::"r"(
                     shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}

SIREN_DEVICE void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
  if (threadIdx.x % 32 == 0)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
#else
SIREN_DEVICE int copy_arrivals() { return 32; }

SIREN_DEVICE void mbarrier_expect(uint64_t*, int) {}

SIREN_DEVICE void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
  for (int at = 16 * (threadIdx.x % 32); at < bytes; at += 512)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared) + at),
                 "l"(static_cast<const uint8_t*>(global) + at)
                 : "memory");
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
#endif

// Into L2, ahead of the reads: a hint. `bytes` a multiple of 16; called by all lanes of a warp.
SIREN_DEVICE void prefetch(const void* global, int bytes) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x % 32 == 0 && bytes > 0)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
#else
  for (int at = 128 * (threadIdx.x % 32); at < bytes; at += 128 * 32)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const uint8_t*>(global) + at));
#endif
}

SIREN_DEVICE void relax() {}

SIREN_DEVICE void mma(float c[4], const uint32_t a[4], const uint32_t b[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

SIREN_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

SIREN_DEVICE uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t sum;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

// Two int8 in bits 0-7 and 16-23. 0x4300 is 128 in bf16, whose last place is then 1: the low seven bits land in the
// mantissa, and 128, or 256 where the sign bit says so, is taken off again. Exact.
SIREN_DEVICE uint32_t widen_int8(uint32_t pair) {
  const uint32_t value = (pair & 0x007f007fu) | 0x43004300u, offset = (pair & 0x00800080u) | 0x43004300u;
  return fma_bf16x2(value, 0x3f803f80u, offset ^ 0x80008000u);
}

// Two e4m3: its exponent and mantissa moved to bf16's are 2^-120 of the value, subnormals too. Exact.
SIREN_DEVICE uint32_t widen_fp8(uint32_t pair) {
  const uint32_t value = ((pair & 0x00800080u) << 8) | ((pair & 0x007f007fu) << 4);
  return fma_bf16x2(value, 0x7b807b80u, 0x80008000u);
}

// After so long a wait counts as a deadlock: waits should last microseconds, more where a tool watches the GPU.
SIREN_DEVICE uint64_t patience() { return 20000000000ull; }

SIREN_DEVICE uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

}  // namespace siren::cuda
