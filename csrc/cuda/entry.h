// What a backbone or a residual decoder reads first: the embeddings of codes already drawn, summed (paper, eq. 5).
#pragma once

#include "layout.h"

namespace siren::cuda {

// The parts of one row's sum, each null if it has none: an embedding's row follows from a code that is still to be read.
struct Parts {
  const float* total;     // of the codes but the latest
  const int32_t* code;    // the latest
  const uint16_t* table;  // its embeddings, bf16 [codes][dim]
  const float* base;
  const float* position;
};

// N neighbouring columns, 1 or 4.
template <int N>
SIREN_DEVICE void load_floats(float* to, const float* from) {
  if (N == 4) {
    const Four four = load4(from);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = four.v[i];
  } else {
    to[0] = load(from);
  }
}

template <int N>
SIREN_DEVICE void load_bf16(float* to, const uint16_t* from) {
  if (N == 4) {
    const Pair pair = load_pair(from);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = i % 2 ? high_bf16(pair.v[i / 2]) : low_bf16(pair.v[i / 2]);
  } else {
    to[0] = widen_bf16(load(from));
  }
}

// The sums of some rows. All loads of a kind are under way before the first is needed: one after another they would cost
// a trip to memory each.
template <int N, int Rows>
SIREN_DEVICE void sum_entries(const Parts (&rows)[Rows], int dim, int column, float (&sums)[Rows][N]) {
  int32_t code[Rows] = {};
  float embedding[Rows][N] = {}, base[Rows][N] = {}, position[Rows][N] = {};
#pragma unroll
  for (int r = 0; r < Rows; ++r)
    if (rows[r].code) code[r] = load(rows[r].code);
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
#pragma unroll
    for (int i = 0; i < N; ++i) sums[r][i] = 0;
    if (rows[r].total) load_floats<N>(sums[r], rows[r].total + column);
    if (rows[r].base) load_floats<N>(base[r], rows[r].base + column);
    if (rows[r].position) load_floats<N>(position[r], rows[r].position + column);
  }
#pragma unroll
  for (int r = 0; r < Rows; ++r)
    if (rows[r].code) load_bf16<N>(embedding[r], rows[r].table + static_cast<int64_t>(code[r]) * dim + column);
#pragma unroll
  for (int r = 0; r < Rows; ++r)
#pragma unroll
    for (int i = 0; i < N; ++i) sums[r][i] = sums[r][i] + embedding[r][i] + base[r][i] + position[r][i];
}

// The sum over codebooks before `codebook`. `latest`: only the last of them.
SIREN_DEVICE Parts codes_before(const Block& b, int expert, int codebook, int sequence, bool latest = false) {
  const Arguments& args = b.args;
  Parts entry = {};
  if (codebook >= 2 && !latest) {
    const int64_t row = (static_cast<int64_t>(codebook & 1) * args.experts + expert) * args.sequences + sequence;
    entry.total = args.arena + args.total + row * args.dim;
  }
  if (codebook >= 1) {
    const int64_t table = static_cast<int64_t>(expert) * args.codebooks + codebook - 1;
    entry.code = reinterpret_cast<const int32_t*>(args.arena + args.codes) + (codebook - 1) * args.sequences + sequence;
    entry.table = args.tables + table * args.codes_per_codebook * args.dim;
  }
  return entry;
}

SIREN_DEVICE Parts backbone_entry(const Block& b, int expert, int row) {
  const Arguments& args = b.args;
  Parts entry = {};
  if (b.time() == 0)
    entry.base = args.sos + expert * args.dim;
  else
    entry = codes_before(b, expert, args.codebooks, row % args.sequences);
  entry.position = args.positions + static_cast<int64_t>(b.time()) * args.dim;
  return entry;
}

// Row of a pass that starts at `position`; the rows of position 0 hold the backbone's output.
SIREN_DEVICE Parts decoder_entry(const Block& b, const Instruction& in, int row) {
  const Arguments& args = b.args;
  const int position = in.position + row / args.rows, r = row % args.rows;
  const int64_t own = (static_cast<int64_t>(in.expert) * args.rows + r) * args.dim;
  const auto conditioning = static_cast<Conditioning>(args.conditioning);
  Parts entry = {};
  if (position > 0 && conditioning != Conditioning::none)
    entry = codes_before(b, in.expert, in.codebook, r % args.sequences, conditioning == Conditioning::residual);
  entry.base = args.arena + (position == 0 ? args.h : args.start) + own;
  entry.position = args.positions + position * args.dim;
  return entry;
}

}  // namespace siren::cuda
