// Everything that differs between a GPU and the host: device.h has it in CUDA and PTX, host.h as fibers of a CPU thread.
// The kernel above is one source for both.
#pragma once

#ifdef __CUDACC__
#include "device.h"
#else
#include "host.h"
#endif

namespace siren::cuda {

SIREN_DEVICE int lane() { return thread() % 32; }
SIREN_DEVICE int warp() { return thread() / 32; }

SIREN_DEVICE float widen_bf16(uint16_t bits) {
  union {
    uint32_t bits;
    float value;
  } both;
  both.bits = static_cast<uint32_t>(bits) << 16;
  return both.value;
}

SIREN_DEVICE float low_bf16(uint32_t pair) { return widen_bf16(static_cast<uint16_t>(pair)); }
SIREN_DEVICE float high_bf16(uint32_t pair) { return widen_bf16(static_cast<uint16_t>(pair >> 16)); }

}  // namespace siren::cuda
