// Attention of one query to cached keys: a block takes a (row, head) pair at a time. Its warps share the positions, groups
// of lanes take a key each, and every group keeps a softmax of its own, merged at the end in a fixed order.
#pragma once

#include "layout.h"

namespace siren::cuda {

// A softmax's largest score, sum of weights and weighted sum of values, so far.
struct Softmax {
  float largest, total, sum[8];

  SIREN_DEVICE void rescale(float now) {
    const float keep = total > 0 ? expf(largest - now) : 0.0f;
    total *= keep;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] *= keep;
    largest = now;
  }
};

SIREN_DEVICE void attention(const Block& b, const Instruction& in) {
  constexpr int kTogether = 4;  // keys whose loads are under way at the same time
  const Arguments& args = b.args;
  const bool prompt = in.source == static_cast<int>(Keys::prompt);
  const int head_dim = args.head_dim;
  const int lanes = lanes_per_head(head_dim), together = 32 / lanes, part = lane() % lanes, mine = lane() / lanes;
  const bool used = 8 * part < head_dim;
  const float factor = 1.0f / sqrtf(static_cast<float>(head_dim));
  for (int i = 0; i < in.count; ++i) {
    const int row = (in.first + i) / args.heads, head = (in.first + i) % args.heads;
    int64_t cache = static_cast<int64_t>(in.expert) * args.backbone_blocks + in.block;
    int count;
    if (prompt) {
      const int which = load(args.prompt_index + row);
      cache = ((cache * args.prompts + which) * args.heads + head) * args.prompt_capacity;
      count = load(args.prompt_length + which);
    } else {
      cache = ((cache * args.rows + row) * args.kv_heads + head / (args.heads / args.kv_heads)) * args.capacity;
      count = b.time() + 1;
    }
    const uint16_t* const keys = (prompt ? args.prompt_keys : args.keys) + cache * head_dim + 8 * part;
    const uint16_t* const values = (prompt ? args.prompt_values : args.values) + cache * head_dim + 8 * part;
    const int64_t at = static_cast<int64_t>(row) * args.dim + head * head_dim;

    Eight q = {};
    if (used) q = load8(args.arena + in.input + at + 8 * part);
    Softmax soft = {};
    for (int first = warp() * together; first < count; first += kTogether * kWarps * together) {
      Words key[kTogether] = {}, value[kTogether] = {};
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        const int p = first + u * kWarps * together + mine;
        if (!used || p >= count) continue;
        key[u] = load_words(keys + static_cast<int64_t>(p) * head_dim);
        value[u] = load_words(values + static_cast<int64_t>(p) * head_dim);
      }
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        float score = 0;
#pragma unroll
        for (int w = 0; w < 4; ++w)
          score += q.v[2 * w] * low_bf16(key[u].v[w]) + q.v[2 * w + 1] * high_bf16(key[u].v[w]);
        for (int mask = lanes / 2; mask > 0; mask /= 2) score += shuffle_xor(score, mask);
        if (first + u * kWarps * together + mine >= count) continue;
        score *= factor;
        if (soft.total == 0 || score > soft.largest) soft.rescale(score);
        const float weight = expf(score - soft.largest);
        soft.total += weight;
        for (int w = 0; w < 4; ++w) {
          soft.sum[2 * w] += weight * low_bf16(value[u].v[w]);
          soft.sum[2 * w + 1] += weight * high_bf16(value[u].v[w]);
        }
      }
    }
    for (int mask = lanes; mask < 32; mask *= 2) {
      Softmax other;
      other.largest = shuffle_xor(soft.largest, mask);
      other.total = shuffle_xor(soft.total, mask);
      for (int e = 0; e < 8; ++e) other.sum[e] = shuffle_xor(soft.sum[e], mask);
      const bool one = soft.total > 0, two = other.total > 0;
      if (!two) continue;
      const float now = !one || other.largest > soft.largest ? other.largest : soft.largest;
      soft.rescale(now);
      other.rescale(now);
      soft.total += other.total;
      for (int e = 0; e < 8; ++e) soft.sum[e] += other.sum[e];
    }
    // Two buffers in turn: the next item's parts do not wait for this one's to be read.
    const int width = head_dim + 2;
    float* const parts = b.scratch() + i % 2 * kWarps * width;
    if (mine == 0 && used) {
      float* own = parts + warp() * width;
      for (int e = 0; e < 8; ++e) own[8 * part + e] = soft.sum[e];
      if (part == 0) {
        own[head_dim] = soft.largest;
        own[head_dim + 1] = soft.total;
      }
    }
    worker_sync();
    for (int e = thread(); e < head_dim; e += kWorkers) {
      float largest = 0, total = 0, sum = 0;
      for (int w = 0; w < kWarps; ++w) {
        const float* own = parts + w * width;
        if (own[head_dim + 1] > 0 && (total == 0 || own[head_dim] > largest)) {
          const float keep = total > 0 ? expf(largest - own[head_dim]) : 0.0f;
          largest = own[head_dim];
          total *= keep;
          sum *= keep;
        }
        const float weight = own[head_dim + 1] > 0 ? expf(own[head_dim] - largest) : 0.0f;
        total += weight * own[head_dim + 1];
        sum += weight * own[e];
      }
      args.arena[in.output + at + e] = sum / total;
    }
  }
}

}  // namespace siren::cuda
