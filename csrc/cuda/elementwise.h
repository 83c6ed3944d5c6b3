// The operations without a matrix: noise, the first inputs, the embedding sums, the backbones' last norm.
#pragma once

#include "../philox.h"
#include "entry.h"

namespace siren::cuda {

// Gumbel values as csrc/sampling.h defines them; the logarithms in double, where u below 1 stays below 1.
SIREN_DEVICE void noise(const Block& b, const Instruction& in) {
  const Arguments& args = b.args;
  if (args.temperature == 0 || args.forced) return;
  const int fours = args.codes_per_codebook / 4;
  for (int item = in.first + thread(); item < in.first + in.count; item += kWorkers) {
    const int row = item / fours, codebook = row / args.sequences, sequence = row % args.sequences;
    const Philox4 random = philox4x32(args.seeds[sequence], args.noise_frames[sequence] + static_cast<uint32_t>(b.frame),
                                      static_cast<uint32_t>(codebook), static_cast<uint32_t>(item % fours), 0);
    Four value;
    for (int i = 0; i < 4; ++i) {
      const double u = (static_cast<double>(random.word[i] >> 8) + 0.5) * (1.0 / 16777216.0);
      value.v[i] = static_cast<float>(-log(-log(u)));
    }
    store4(args.arena + args.noise + 4 * static_cast<int64_t>(item), value);
  }
}

SIREN_DEVICE float sum_entry(const Block& b, const Parts& entry, int column) {
  const Parts rows[1] = {entry};
  float sum[1][1];
  sum_entries(rows, b.args.dim, column, sum);
  return sum[0][0];
}

SIREN_DEVICE void enter(const Block& b, const Instruction& in) {
  const int dim = b.args.dim;
  const bool backbone = in.source == static_cast<int>(Entry::backbone);
  for (int item = in.first + thread(); item < in.first + in.count; item += kWorkers) {
    const Parts entry = backbone ? backbone_entry(b, in.expert, item / dim) : decoder_entry(b, in, item / dim);
    b.args.arena[in.output + item] = sum_entry(b, entry, item % dim);
  }
}

// The sums before codebook `in.codebook`. Those that `accumulate` makes go to the buffer that nobody reads meanwhile.
SIREN_DEVICE void sum_codes(const Block& b, const Instruction& in) {
  const Arguments& args = b.args;
  for (int item = in.first + thread(); item < in.first + in.count; item += kWorkers) {
    const int row = item / args.dim;
    const Parts entry = codes_before(b, row / args.sequences, in.codebook, row % args.sequences);
    args.arena[in.output + item] = sum_entry(b, entry, item % args.dim);
  }
}

SIREN_DEVICE void norm(const Block& b, const Instruction& in) {
  const Arguments& args = b.args;
  for (int row = in.first; row < in.first + in.count; ++row) {
    const float* from = args.arena + in.input + static_cast<int64_t>(row) * args.dim;
    float squares = 0;
    for (int c = thread(); c < args.dim; c += kWorkers) {
      const float value = load(from + c);
      squares += value * value;
    }
    for (int mask = 16; mask > 0; mask /= 2) squares += shuffle_xor(squares, mask);
    worker_sync();  // the row before has been read
    if (lane() == 0) b.squares()[warp()] = squares;
    worker_sync();
    squares = 0;
    for (int w = 0; w < kWarps; ++w) squares += b.squares()[w];
    const float factor = 1.0f / sqrtf(squares / static_cast<float>(args.dim) + args.eps);
    for (int c = thread(); c < args.dim; c += kWorkers)
      args.arena[in.output + row * args.dim + c] = load(from + c) * factor * load(args.vectors + in.norm + c);
  }
}

}  // namespace siren::cuda
