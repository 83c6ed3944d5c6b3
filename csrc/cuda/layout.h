// Where everything lies in a block's shared memory, and what a block knows while it runs.
#pragma once

#include "primitives.h"
#include "program.h"

namespace siren::cuda {

#ifdef __CUDACC__
#define SIREN_CUDA_BOTH __host__ __device__ inline
#else
#define SIREN_CUDA_BOTH inline
#endif

SIREN_CUDA_BOTH int fragment_bytes(int format) {
  return format == static_cast<int>(Format::bf16) ? 2 * kFragment : kFragment;
}

// Said by one thread, read by all of the block.
struct Flags {
  volatile int alive;    // 0: a worker's wait took too long, here or on another SM
  volatile int stop;     // the frame after the last one: nothing more to stream
  int begin, end;        // this SM's instructions; here because registers are scarce
  double sum[2][kWarps];   // results of the warps in a reduction, in two buffers used in turn
  float value[2][kWarps];
  int index[2][kWarps];
};

SIREN_CUDA_BOTH int most(int a, int b) { return a > b ? a : b; }
SIREN_CUDA_BOTH int least(int a, int b) { return a < b ? a : b; }

SIREN_CUDA_BOTH Layout shared_layout(const Arguments& args) {
  Layout l;
  l.ring = 0;
  l.staged = args.stages * kStageFragments * fragment_bytes(args.format);
  // Scratch: a draw's scaled logits and weights; the warps' parts of an attention, for two items.
  const int draw = 8 * args.codes_per_codebook, attention = 8 * kWarps * (args.head_dim + 2);
  l.partial = l.staged + (most(args.staged_bytes, most(draw, attention)) + 127) / 128 * 128;
  l.sums = l.partial + 2 * 4 * kWarps * kBlockTiles * 64;
  l.squares = l.sums + 4 * kMaxRows / 8 * kBlockTiles * 64;
  l.full = l.squares + 4 * kMaxRows * kWarps;
  l.empty = l.full + 8 * args.stages;
  l.instructions = (l.empty + 8 * args.stages + 127) / 128 * 128;
  l.flags = l.instructions + 2 * static_cast<int>(sizeof(Instruction));
  l.bytes = l.flags + static_cast<int>(sizeof(Flags));
  return l;
}

// Stages of the ring that fit; less than 2 means that the activations leave no room.
SIREN_CUDA_BOTH int ring_stages(Arguments args, int shared_limit) {
  args.stages = 0;
  const int left = shared_limit - shared_layout(args).bytes - 128;  // alignment of what follows the barriers
  return least(32, left / (kStageFragments * fragment_bytes(args.format) + 16));
}

// What a block's threads pass around.
struct Block {
  const Arguments& args;
  uint8_t* const shared;
  int frame;  // of the launch

  SIREN_DEVICE Flags& flags() const { return *reinterpret_cast<Flags*>(shared + args.layout.flags); }
  SIREN_DEVICE uint16_t* staged() const { return reinterpret_cast<uint16_t*>(shared + args.layout.staged); }
  SIREN_DEVICE float* scratch() const { return reinterpret_cast<float*>(shared + args.layout.staged); }
  SIREN_DEVICE float* partial() const { return reinterpret_cast<float*>(shared + args.layout.partial); }
  SIREN_DEVICE float* sums() const { return reinterpret_cast<float*>(shared + args.layout.sums); }
  SIREN_DEVICE float* squares() const { return reinterpret_cast<float*>(shared + args.layout.squares); }
  SIREN_DEVICE int time() const { return args.first_frame + frame; }  // frames of the session before this one
};

// Lanes that share a head's columns, 8 each: a power of two, so that shuffles can add them up.
SIREN_DEVICE int lanes_per_head(int head_dim) {
  int lanes = 1;
  while (8 * lanes < head_dim) lanes *= 2;
  return lanes;
}

struct Eight {
  float v[8];
};

SIREN_DEVICE Eight load8(const float* from) {
  const Four low = load4(from), high = load4(from + 4);
  return {{low.v[0], low.v[1], low.v[2], low.v[3], high.v[0], high.v[1], high.v[2], high.v[3]}};
}

// How long a wait has lasted, looked at on every 64th poll: polls are what a test can limit, time what a user can wait.
struct Wait {
  int polls = 0;
  uint64_t since = 0;

  SIREN_DEVICE bool due() { return ++polls % 64 == 0; }
  SIREN_DEVICE bool over(const Arguments& args) {
    const uint64_t now = nanoseconds();
    if (since == 0) since = now;
    return polls >= args.spin_limit || now - since > patience();
  }
};

// Polls until `ready`. If that takes too long the launch is over, for every SM, with an error.
template <class Ready>
SIREN_DEVICE bool wait_until(const Block& b, int operation, Ready ready) {
  for (Wait wait; !ready();) {
    relax();
    if (!wait.due()) continue;
    if (b.flags().alive && load_relaxed(b.args.control + kAbort) == 0 && !wait.over(b.args)) continue;
    if (b.flags().alive && set_first(b.args.control + kAbort, 1)) {
      store_host(b.args.host + kGaveUpSm, block());
      store_host(b.args.host + kGaveUpOperation, operation);
      store_host(b.args.host + kGaveUpFrame, b.frame);
      store_host(b.args.host + kGaveUp, 1);
    }
    return false;
  }
  return true;
}

// The workers' form. They look at `alive` right behind a barrier, with another one before the next wait, so that all
// see the same; the streaming warp must not change it meanwhile.
template <class Ready>
SIREN_DEVICE void work_when(const Block& b, int operation, Ready ready) {
  if (!wait_until(b, operation, ready)) b.flags().alive = 0;
}

}  // namespace siren::cuda
