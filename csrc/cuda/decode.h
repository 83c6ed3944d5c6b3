// The persistent kernel: every block runs its SM's instructions, frame after frame, until the clip is done.
//
// Eight warps work, one streams weights (ring.h). Blocks meet through `progress`: after an instruction others may wait
// for, a block publishes how far it is with a release; whoever needs that polls with acquires. Numbers only grow, so
// nothing is ever reset, and a wait is for one range of SMs and one number. After a frame the block of SM 0 looks for the
// host's wish to stop before it publishes; the others read its answer behind the frame's first wait, so all stop alike.
#pragma once

#include "attention.h"
#include "draw.h"
#include "elementwise.h"
#include "matmul.h"

namespace siren::cuda {

SIREN_DEVICE void wait_for_blocks(const Block& b, const Instruction& in) {
  const int32_t target = b.frame * b.args.operations + in.wait_value;
  for (int s = thread(); s < in.wait_count; s += kWorkers)
    work_when(b, in.operation, [&] {
      return static_cast<int32_t>(load_acquire(b.args.progress + in.wait_first + s)) - target >= 0;
    });
}

SIREN_DEVICE void execute(const Block& b, const Instruction& in, Ring& ring) {
  switch (static_cast<Kind>(in.kind)) {
    case Kind::noise: noise(b, in); break;
    case Kind::enter: enter(b, in); break;
    case Kind::accumulate: sum_codes(b, in); break;
    case Kind::matmul: matmul(b, in, ring); break;
    case Kind::attention: attention(b, in); break;
    case Kind::norm: norm(b, in); break;
    case Kind::draw: draw(b, in); break;
    case Kind::sums: sum_codes(b, in); break;
  }
}

// What the working warps do, from the launch's beginning to its end.
SIREN_DEVICE void work(Block b) {
  const Arguments& args = b.args;
  Ring ring{b};
  const Flags& flags = b.flags();
  const auto slot = [&](int i) { return reinterpret_cast<Instruction*>(b.shared + args.layout.instructions) + i % 2; };
  const auto fetch = [&](int i) {
    reinterpret_cast<int32_t*>(slot(i))[lane()] = load(reinterpret_cast<const int32_t*>(args.instructions + i) + lane());
  };
  for (b.frame = 0; b.frame < args.frames; ++b.frame) {
    if (flags.begin < flags.end && warp() == 0) fetch(flags.begin);
    worker_sync();
    for (int i = flags.begin; i < flags.end; ++i) {
      const Instruction& in = *slot(i);
      if (warp() == kWarps - 1 && i + 1 < flags.end) fetch(i + 1);  // this warp has few SMs to wait for, or none
      if (in.operation >= args.first_operation && in.operation < args.last_operation) {
        if (in.wait_count > 0) {
          wait_for_blocks(b, in);
          worker_sync();
          if (!flags.alive) return;
        }
        if (i == flags.begin && b.frame > 0) {
          if (block() == 0 && thread() == 0) store_host(args.host + kFramesDone, b.frame);
          if (b.frame >= load_relaxed(args.control + kFrameLimit)) {
            b.flags().stop = 1;
            if (block() == 0 && thread() == 0) store_host(args.host + kFramesRun, b.frame);
            return;
          }
        }
        if (args.trace && thread() == 0) args.trace[2 * i] = nanoseconds();
        int32_t cancelled = 0;  // asked for early, as the answer comes from the host
        if (block() == 0 && thread() == 0 && i + 1 == flags.end) cancelled = load_host(args.host + kCancel);
        execute(b, in, ring);
        worker_sync();
        if (!flags.alive) return;
        if (args.trace && thread() == 0) args.trace[2 * i + 1] = nanoseconds();
        if (thread() == 0 && in.publish >= 0) {
          if (cancelled) args.control[kFrameLimit] = b.frame + 1;
          store_release(args.progress + block(), static_cast<uint32_t>(b.frame * args.operations + in.publish));
        }
      }
      worker_sync();
    }
  }
  if (block() == 0 && thread() == 0) store_host(args.host + kFramesRun, args.frames);
}

SIREN_DEVICE void decode(const Arguments& args) {
  const Block b{args, shared_memory(), 0};
  if (thread() == 0) {
    b.flags().alive = 1;
    b.flags().stop = 0;
    b.flags().begin = load(args.starts + block());
    b.flags().end = load(args.starts + block() + 1);
    init_ring(b);
  }
  mbarrier_fence();
  block_sync();
  if (warp() == kWarps)
    stream(b);
  else
    work(b);
}

}  // namespace siren::cuda
