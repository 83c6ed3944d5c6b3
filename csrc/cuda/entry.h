// What a backbone or a residual decoder reads first: the embeddings of codes already drawn, summed (paper, eq. 5).
#pragma once

#include "layout.h"

namespace siren::cuda {

// N neighbouring columns, 1 or 4, of rows in global memory.
template <int N>
SIREN_DEVICE void add_floats(float* sum, const float* row) {
  if (N == 4) {
    const Four four = load4(row);
    for (int i = 0; i < N; ++i) sum[i] += four.v[i];
  } else {
    for (int i = 0; i < N; ++i) sum[i] += load(row + i);
  }
}

template <int N>
SIREN_DEVICE void add_code(const Block& b, float* sum, int expert, int codebook, int sequence, int column) {
  const Arguments& args = b.args;
  const int32_t code = load(reinterpret_cast<const int32_t*>(args.arena + args.codes) + codebook * args.sequences + sequence);
  const int64_t row = (static_cast<int64_t>(expert) * args.codebooks + codebook) * args.codes_per_codebook + code;
  for (int i = 0; i < N; ++i) sum[i] += widen_bf16(load(args.tables + row * args.dim + column + i));
}

// The sum over codebooks before `codebook`, of which the latest is still a code and the others are in `total`.
template <int N>
SIREN_DEVICE void add_codes(const Block& b, float* sum, int expert, int codebook, int sequence, int column) {
  const Arguments& args = b.args;
  if (codebook >= 2) {
    const int64_t row = (static_cast<int64_t>(codebook & 1) * args.experts + expert) * args.sequences + sequence;
    add_floats<N>(sum, args.arena + args.total + row * args.dim + column);
  }
  if (codebook >= 1) add_code<N>(b, sum, expert, codebook - 1, sequence, column);
}

template <int N>
SIREN_DEVICE void backbone_entry(const Block& b, float* sum, int expert, int row, int column) {
  const Arguments& args = b.args;
  for (int i = 0; i < N; ++i) sum[i] = 0;
  if (b.time() == 0)
    add_floats<N>(sum, args.sos + expert * args.dim + column);
  else
    add_codes<N>(b, sum, expert, args.codebooks, row % args.sequences, column);
  add_floats<N>(sum, args.positions + static_cast<int64_t>(b.time()) * args.dim + column);
}

// Row of a pass that starts at `position`; the rows of position 0 hold the backbone's output.
template <int N>
SIREN_DEVICE void decoder_entry(const Block& b, float* sum, const Instruction& in, int row, int column) {
  const Arguments& args = b.args;
  const int position = in.position + row / args.rows, r = row % args.rows;
  const int64_t own = (static_cast<int64_t>(in.expert) * args.rows + r) * args.dim + column;
  for (int i = 0; i < N; ++i) sum[i] = 0;
  if (position == 0) {
    add_floats<N>(sum, args.arena + args.h + own);
  } else {
    const int sequence = r % args.sequences;
    const auto conditioning = static_cast<Conditioning>(args.conditioning);
    if (conditioning == Conditioning::accumulated) add_codes<N>(b, sum, in.expert, in.codebook, sequence, column);
    if (conditioning == Conditioning::residual && in.codebook > 0)
      add_code<N>(b, sum, in.expert, in.codebook - 1, sequence, column);
    add_floats<N>(sum, args.arena + args.start + own);
  }
  add_floats<N>(sum, args.positions + position * args.dim + column);
}

}  // namespace siren::cuda
