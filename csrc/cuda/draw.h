// One draw from one row of logits by a whole block: temperature, top-k, top-p and Gumbel-max, as csrc/sampling.h says.
//
// Nothing is sorted. Floats map to integers of the same order, so the k-th largest logit, or the least one that top-p
// still needs, is found bit by bit, each bit with one sum over the row; where several codes share that logit, the number
// of the first that is left out is found in the same way.
#pragma once

#include "layout.h"

namespace siren::cuda {

// Results over the workers, the same in every thread, summed in a fixed order.
SIREN_DEVICE double sum_workers(const Block& b, double value) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  worker_sync();  // results before have been read
  if (lane() == 0) b.flags().sum[warp()] = value;
  worker_sync();
  value = 0;
  for (int w = 0; w < kWarps; ++w) value += b.flags().sum[w];
  return value;
}

// The largest value and the lowest index that has it.
SIREN_DEVICE void largest_worker(const Block& b, float& value, int& index) {
  const auto take = [&](float other, int at) {
    if (other > value || (other == value && at < index)) {
      value = other;
      index = at;
    }
  };
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other = shuffle_xor(value, mask);
    const int at = shuffle_xor(index, mask);
    take(other, at);
  }
  worker_sync();
  if (lane() == 0) {
    b.flags().value[warp()] = value;
    b.flags().index[warp()] = index;
  }
  worker_sync();
  for (int w = 0; w < kWarps; ++w) take(b.flags().value[w], b.flags().index[w]);
}

// Integers in the order of the floats; no NaN.
SIREN_DEVICE uint32_t order(float value) {
  union {
    float value;
    uint32_t bits;
  } both;
  both.value = value + 0.0f;  // -0 and 0 are one
  return both.bits & 0x80000000u ? ~both.bits : both.bits | 0x80000000u;
}

// The codes that may be drawn: those above `key`, and of those at it the ones before `index`.
struct Allowed {
  uint32_t key;
  int index;

  SIREN_DEVICE bool operator()(float scaled, int v) const {
    const uint32_t own = order(scaled);
    return own > key || (own == key && v < index);
  }
};

struct Row {
  const Block& b;
  const float* scaled;  // logits / temperature
  const float* weight;  // exp(scaled - largest)
  int codes;

  // Sum of `term(v)` over all codes.
  template <class Term>
  SIREN_DEVICE double sum(Term term) const {
    double own = 0;
    for (int v = thread(); v < codes; v += kWorkers) own += term(v);
    return sum_workers(b, own);
  }

  // The largest key such that the terms of the codes at or above it reach `needed`, and of the codes at it only so many,
  // lowest first, as are needed. `among`: the codes that count.
  template <class Term>
  SIREN_DEVICE Allowed least_reaching(double needed, const Allowed& among, Term term) const {
    uint32_t key = 0;
    for (int bit = 31; bit >= 0; --bit) {
      const uint32_t tried = key | (1u << bit);
      if (sum([&](int v) { return order(scaled[v]) >= tried && among(scaled[v], v) ? term(v) : 0.0; }) >= needed) key = tried;
    }
    const double above = sum([&](int v) { return order(scaled[v]) > key && among(scaled[v], v) ? term(v) : 0.0; });
    int index = 0;  // the last one that is needed
    for (int bit = 15; bit >= 0; --bit) {
      const int tried = index | (1 << bit);
      const auto before = [&](int v) { return order(scaled[v]) == key && v < tried && among(scaled[v], v) ? term(v) : 0.0; };
      if (tried <= codes && above + sum(before) < needed) index = tried;
    }
    return {key, index + 1};
  }
};

SIREN_DEVICE void draw(const Block& b, const Instruction& in) {
  const Arguments& args = b.args;
  const int codes = args.codes_per_codebook;
  const bool greedy = args.temperature == 0;
  const float temperature = greedy ? 1.0f : args.temperature;
  float* const scaled = b.scratch();
  float* const weight = scaled + codes;
  for (int sequence = in.first; sequence < in.first + in.count; ++sequence) {
    const int at = in.codebook * args.sequences + sequence;
    const float* logits = args.arena + args.logits + static_cast<int64_t>(at) * codes;
    const float* noise = args.arena + args.noise + static_cast<int64_t>(at) * codes;
    const float infinity = __builtin_huge_valf();
    float largest = -infinity;
    int index = codes;
    double bad = 0;
    worker_sync();  // the row before has been read
    for (int v = thread(); v < codes; v += kWorkers) {
      const float logit = load(logits + v);
      if (logit != logit) bad += 1;
      scaled[v] = logit / temperature;
      if (scaled[v] > largest) {
        largest = scaled[v];
        index = v;
      }
    }
    bad = sum_workers(b, bad);
    largest_worker(b, largest, index);
    const bool sound = bad == 0 && largest > -infinity && largest < infinity;
    int code = 0;
    float logprob = __builtin_nanf("");
    if (sound) {
      const Row row{b, scaled, weight, codes};
      for (int v = thread(); v < codes; v += kWorkers) weight[v] = expf(scaled[v] - largest);
      const double total = row.sum([&](int v) { return static_cast<double>(weight[v]); });
      const float log_total = largest + static_cast<float>(log(total));
      if (args.forced) {
        code = args.forced[(b.frame * args.codebooks + in.codebook) * args.sequences + sequence];
      } else if (greedy) {
        code = index;
      } else {
        Allowed allowed{0, codes};
        if (args.top_k > 0 && args.top_k < codes)
          allowed = row.least_reaching(args.top_k, allowed, [](int) { return 1.0; });
        if (args.top_p < 1.0) {
          const auto mass = [&](int v) { return static_cast<double>(weight[v]); };
          const double all = row.sum([&](int v) { return allowed(scaled[v], v) ? mass(v) : 0.0; });
          allowed = row.least_reaching(args.top_p * all, allowed, mass);
        }
        float best = -infinity;
        code = codes;
        for (int v = thread(); v < codes; v += kWorkers) {
          const float score = scaled[v] + load(noise + v);
          if (allowed(scaled[v], v) && score > best) {
            best = score;
            code = v;
          }
        }
        largest_worker(b, best, code);
      }
      logprob = scaled[code] - log_total;
    }
    if (thread() == 0) {
      reinterpret_cast<int32_t*>(args.arena + args.codes)[at] = code;
      const int64_t out = static_cast<int64_t>(b.frame) * args.codebooks * args.sequences + at;
      args.codes_out[out] = code;
      args.logprobs_out[out] = logprob;
    }
  }
}

}  // namespace siren::cuda
