// The ring of weights in shared memory. One warp streams this SM's tape into it, through instructions, frames and waits
// alike: weights depend on nothing. The workers take the pieces in the same order.
#pragma once

#include <cstddef>

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
  SIREN_DEVICE uint8_t* memory() const {
    return b.shared + b.args.layout.ring + stage * kStageFragments * fragment_bytes(b.args.format);
  }
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
SIREN_DEVICE void prefetch_frames(const Block& b, int expert, int block_number, int first, int count) {
  const Arguments& args = b.args;
  for (int item = first; item < first + count; ++item) {
    const int row = item / args.heads, head = item % args.heads / (args.heads / args.kv_heads);
    const int64_t cache = (static_cast<int64_t>(expert) * args.backbone_blocks + block_number) * args.rows + row;
    const int64_t at = (cache * args.kv_heads + head) * args.capacity * args.head_dim;
    prefetch(args.keys + at, 2 * b.time() * args.head_dim);
    prefetch(args.values + at, 2 * b.time() * args.head_dim);
  }
}

// What the streaming warp does, from the launch's beginning to its end. Its lanes hold an instruction's words.
SIREN_DEVICE void stream(Block b) {
  constexpr int kAhead = 4;  // instructions that are brought near before they are read
  const Arguments& args = b.args;
  Ring ring{b};
  const int bytes = fragment_bytes(args.format);
  const int begin = b.flags().begin, end = b.flags().end;
  const auto word = [&](int i) { return load(reinterpret_cast<const int32_t*>(args.instructions + i) + lane()); };
  bool going = begin < end;
  int32_t next = going ? word(begin) : 0;
  for (b.frame = 0; b.frame < args.frames && going; ++b.frame) {
    for (int i = begin; i < end && going; ++i) {
      const int32_t own = next;
      next = word(i + 1 < end ? i + 1 : begin);
      if (i + kAhead < end) prefetch(args.instructions + i + kAhead, sizeof(Instruction));
      const auto field = [&](size_t offset) { return shuffle(own, static_cast<int>(offset / sizeof(int32_t))); };
      const int operation = field(offsetof(Instruction, operation)), kind = field(offsetof(Instruction, kind));
      if (operation < args.first_operation || operation >= args.last_operation) continue;
      const int first = field(offsetof(Instruction, first)), count = field(offsetof(Instruction, count));
      const int source = field(offsetof(Instruction, source));
      if (kind == static_cast<int>(Kind::attention) && source == static_cast<int>(Keys::frames))
        prefetch_frames(b, field(offsetof(Instruction, expert)), field(offsetof(Instruction, block)), first, count);
      if (kind != static_cast<int>(Kind::matmul)) continue;
      const int columns = field(offsetof(Instruction, columns)), chunk = field(offsetof(Instruction, chunk));
      const int norm = field(offsetof(Instruction, norm)), bias = field(offsetof(Instruction, bias));
      const int scale = field(offsetof(Instruction, scale)), outputs = 4 * count * kTileRows;
      if (norm >= 0) prefetch(args.vectors + norm, 4 * columns);
      if (bias >= 0) prefetch(args.vectors + bias + first * kTileRows, outputs);
      if (args.format != static_cast<int>(Format::bf16)) prefetch(args.vectors + scale + first * kTileRows, outputs);
      const uint8_t* from = args.tape + static_cast<int64_t>(field(offsetof(Instruction, fragment))) * bytes;
      for (int tile = 0; tile < count && going; tile += kBlockTiles) {
        const int tiles = least(kBlockTiles, count - tile), most_steps = piece_steps(tiles, chunk);
        for (int column = 0; column < columns && going; column += chunk) {
          const int steps = least(chunk, columns - column) / kStepColumns;
          for (int step = 0; step < steps && going; step += most_steps) {
            const int size = least(most_steps, steps - step) * tiles * bytes;
            const auto freed = [&] { return b.flags().stop || mbarrier_try(ring.empty(), (ring.round - 1) & 1); };
            const bool waited = ring.round == 0 || wait_until(b, operation, freed);
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
    for (Wait wait; last.round >= 0 && !mbarrier_try(last.full(), last.round & 1);) {
      relax();
      if (wait.due() && wait.over(args)) break;
    }
  }
}

}  // namespace siren::cuda
