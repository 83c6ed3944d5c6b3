// The ring of weights in shared memory. One warp streams this SM's tape into it, through instructions, frames and waits
// alike: weights depend on nothing. The workers take the pieces in the same order.
#pragma once

#include "layout.h"

namespace siren::cuda {

// Steps of 32 columns in a piece of a block of `tiles` tiles: what fills a stage, and not more than is staged at a time.
SIREN_DEVICE int piece_steps(int tiles, int chunk) {
  return least(kStageFragments / kBlockTiles * (kBlockTiles / tiles), chunk / kStepColumns);
}

// A place in the order of pieces, which the streaming warp and every worker keep for themselves.
struct Ring {
  const Block& b;
  int stage = 0, round = 0;  // of the next piece

  SIREN_DEVICE uint64_t* full() const { return reinterpret_cast<uint64_t*>(b.shared + b.args.layout.full) + stage; }
  SIREN_DEVICE uint64_t* empty() const { return reinterpret_cast<uint64_t*>(b.shared + b.args.layout.empty) + stage; }
  SIREN_DEVICE uint8_t* memory() const { return b.shared + b.args.layout.ring + stage * kStageFragments * fragment_bytes(b.args.format); }
  SIREN_DEVICE void advance() {
    if (++stage == b.args.stages) {
      stage = 0;
      ++round;
    }
  }
};

SIREN_DEVICE void init_ring(const Block& b) {
  for (Ring ring{b}; ring.round == 0; ring.advance()) {
    mbarrier_init(ring.full(), copy_arrivals());
    mbarrier_init(ring.empty(), kWarps);
  }
}

// The keys and values that an attention will read, except the frame's own, which are not written yet.
SIREN_DEVICE void prefetch_frames(const Block& b, const Instruction& in) {
  const Arguments& args = b.args;
  const int bytes = 2 * b.time() * args.head_dim;
  for (int item = in.first; item < in.first + in.count; ++item) {
    const int row = item / args.heads, head = item % args.heads / (args.heads / args.kv_heads);
    const int64_t cache = ((static_cast<int64_t>(in.expert) * args.backbone_blocks + in.block) * args.rows + row) * args.kv_heads + head;
    const int64_t at = cache * args.capacity * args.head_dim;
    for (int line = 128 * lane(); line < bytes; line += 128 * 32) {
      prefetch(reinterpret_cast<const uint8_t*>(args.keys + at) + line, 128);
      prefetch(reinterpret_cast<const uint8_t*>(args.values + at) + line, 128);
    }
  }
}

// What the streaming warp does, from the launch's beginning to its end.
SIREN_DEVICE void stream(Block b) {
  const Arguments& args = b.args;
  Ring ring{b};
  const int bytes = fragment_bytes(args.format);
  const int begin = load(args.starts + block()), end = load(args.starts + block() + 1);
  bool going = true;
  int next = begin < end ? args.instructions[begin].kind : 0;
  for (b.frame = 0; b.frame < args.frames && going; ++b.frame) {
    for (int i = begin; i < end && going; ++i) {
      const Instruction& in = args.instructions[i];
      const int kind = next;
      next = args.instructions[i + 1 < end ? i + 1 : begin].kind;  // brings the whole of it near
      if (in.operation < args.first_operation || in.operation >= args.last_operation) continue;
      if (kind == static_cast<int>(Kind::attention) && in.source == static_cast<int>(Keys::frames)) prefetch_frames(b, in);
      if (kind != static_cast<int>(Kind::matmul)) continue;
      const uint8_t* from = args.tape + static_cast<int64_t>(in.fragment) * bytes;
      for (int tile = 0; tile < in.count && going; tile += kBlockTiles) {
        const int tiles = least(kBlockTiles, in.count - tile), most_steps = piece_steps(tiles, in.chunk);
        for (int column = 0; column < in.columns && going; column += in.chunk) {
          const int steps = least(in.chunk, in.columns - column) / kStepColumns;
          for (int step = 0; step < steps && going; step += most_steps) {
            const int size = least(most_steps, steps - step) * tiles * bytes;
            const auto freed = [&] { return b.flags().stop || mbarrier_try(ring.empty(), (ring.round - 1) & 1); };
            const bool waited = ring.round == 0 || wait_until(b, in.operation, freed);
            going = shuffle(waited && b.flags().alive && !b.flags().stop, 0) != 0;
            if (!going) break;
            mbarrier_expect(ring.full(), size);
            copy_bulk(ring.memory(), from, size, ring.full());
            from += size;
            ring.advance();
          }
        }
      }
    }
  }
  // Shared memory is the block's until every copy has landed: the last round of each stage that was filled.
  for (int s = 0; s < args.stages; ++s) {
    const Ring last{b, s, s < ring.stage ? ring.round : ring.round - 1};
    for (int spins = 0; last.round >= 0 && spins < args.spin_limit && !mbarrier_try(last.full(), last.round & 1); ++spins) relax();
  }
}

}  // namespace siren::cuda
