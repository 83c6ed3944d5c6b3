// Activations of a matmul on their way into shared memory: each value as the sum of two bf16, which keeps 16 bits of it.
//
// A norm's weight is multiplied in here; its 1 / sqrt(mean of squares) is a factor of the whole row, applied to the
// outputs, so that rows need not be read twice. Every SM does this for itself.
#pragma once

#include "entry.h"

namespace siren::cuda {

SIREN_DEVICE int row_stride(const Instruction& in) { return in.chunk + kPad; }

// Values of a row from `column` on to both halves; column counts from the chunk's start.
SIREN_DEVICE void put_pair(const Block& b, const Instruction& in, int row, int column, float first, float second) {
  const int stride = row_stride(in);
  uint32_t* high = reinterpret_cast<uint32_t*>(b.staged() + row * stride + column);
  uint32_t* low = reinterpret_cast<uint32_t*>(b.staged() + (in.rows + row) * stride + column);
  const uint32_t pair = pack_bf16(first, second);
  *high = pair;
  *low = pack_bf16(first - low_bf16(pair), second - high_bf16(pair));
}

// Columns [column, column + width) of all rows. `add`: the sums of squares count too, and start here if `fresh`.
template <bool kEntry>
SIREN_DEVICE void stage_rows(const Block& b, const Instruction& in, int column, int width, bool add, bool fresh) {
  constexpr int kTogether = kEntry ? 1 : 4;  // rows whose loads are under way at the same time
  const int rows = in.rows;
  const float* norm = in.norm >= 0 ? b.args.vectors + in.norm + column : nullptr;
  const float* input = b.args.arena + in.input + column;
  for (int first = 0; first < rows; first += kTogether) {
    float squares[kTogether] = {};
    for (int c = 4 * thread(); c < width; c += 4 * kWorkers) {
      float values[kTogether][4] = {};
      if (kEntry) {
        Parts entries[kTogether] = {};
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if (first + i >= rows) break;
          const bool backbone = in.source == static_cast<int>(Source::backbone_entry);
          entries[i] = backbone ? backbone_entry(b, in.expert, first + i) : decoder_entry(b, in, first + i);
        }
        sum_entries(entries, b.args.dim, column + c, values);
      } else {
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
          if (first + i < rows) load_floats<4>(values[i], input + (first + i) * in.columns + c);
      }
      Four weight = {{1, 1, 1, 1}};
      if (norm) weight = load4(norm + c);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (first + i >= rows) break;
        const float* v = values[i];
#pragma unroll
        for (int e = 0; e < 4; ++e) squares[i] += v[e] * v[e];
        put_pair(b, in, first + i, c, v[0] * weight.v[0], v[1] * weight.v[1]);
        put_pair(b, in, first + i, c + 2, v[2] * weight.v[2], v[3] * weight.v[3]);
      }
    }
    if (!norm || !add) continue;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i >= rows) break;
      for (int mask = 16; mask > 0; mask /= 2) squares[i] += shuffle_xor(squares[i], mask);
      float* sum = b.squares() + (first + i) * kWarps + warp();
      if (lane() == 0) *sum = fresh ? squares[i] : *sum + squares[i];
    }
  }
}

// Attention among the positions of a residual decoder, at most codes per expert + 1: worked out by every SM rather than
// exchanged. As in attention.h lanes take 8 columns each, and as many of them as a head has share a row and a head; the
// softmax is summed up on the way.
SIREN_DEVICE void stage_attention(const Block& b, const Instruction& in, int column, int width) {
  constexpr int kTogether = 2;  // positions whose loads are under way at the same time
  const Arguments& args = b.args;
  const int head_dim = args.head_dim, kv = args.kv_heads * head_dim, group = args.heads / args.kv_heads;
  const int first_head = column / head_dim, heads = (column + width - 1) / head_dim - first_head + 1;
  const int positions = args.codebooks / args.experts + 1, items = in.rows * heads;
  const int lanes = lanes_per_head(head_dim), together = 32 / lanes, part = lane() % lanes;
  const int longest = in.position + (in.rows - 1) / args.rows;
  const float factor = 1.0f / sqrtf(static_cast<float>(head_dim));
  for (int first_item = warp() * together; first_item < items; first_item += kWarps * together) {
    const int item = first_item + lane() / lanes;
    const bool used = 8 * part < head_dim && item < items;
    const int row = used ? item / heads : 0, head = first_head + (used ? item % heads : 0), r = row % args.rows;
    const int last = in.position + row / args.rows;
    Eight q = {};
    if (used) q = load8(args.arena + in.input + static_cast<int64_t>(row) * args.dim + head * head_dim + 8 * part);
    Eight sum = {};
    float largest = 0, total = 0;
    for (int first = 0; first <= longest; first += kTogether) {
      Eight key[kTogether] = {}, value[kTogether] = {};
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        if (!used || first + u > last) continue;
        const int64_t at = (static_cast<int64_t>(in.block) * positions + first + u) * args.rows + r;
        const float* from = args.arena + args.dkv + at * 2 * kv + head / group * head_dim + 8 * part;
        key[u] = load8(from);
        value[u] = load8(from + kv);
      }
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        float score = 0;
#pragma unroll
        for (int e = 0; e < 8; ++e) score += q.v[e] * key[u].v[e];
        for (int mask = lanes / 2; mask > 0; mask /= 2) score += shuffle_xor(score, mask);
        if (!used || first + u > last) continue;
        score *= factor;
        const float now = total == 0 || score > largest ? score : largest;
        const float keep = total == 0 ? 0 : expf(largest - now), weight = expf(score - now);
        total = total * keep + weight;
#pragma unroll
        for (int e = 0; e < 8; ++e) sum.v[e] = sum.v[e] * keep + weight * value[u].v[e];
        largest = now;
      }
    }
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      const int c = head * head_dim + 8 * part + e - column;
      if (used && c >= 0 && c < width) put_pair(b, in, row, c, sum.v[e] / total, sum.v[e + 1] / total);
    }
  }
}

SIREN_DEVICE void stage(const Block& b, const Instruction& in, int column, int width, bool first_block) {
  switch (static_cast<Source>(in.source)) {
    case Source::rows: stage_rows<false>(b, in, column, width, first_block, column == 0); break;
    case Source::short_attention: stage_attention(b, in, column, width); break;
    default: stage_rows<true>(b, in, column, width, first_block, column == 0);
  }
}

}  // namespace siren::cuda
