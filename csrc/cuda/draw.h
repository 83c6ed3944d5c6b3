// One draw from one row of logits by a whole block: temperature, top-k, top-p and Gumbel-max, as csrc/sampling.h says.
//
// Nothing is sorted. Floats map to integers of the same order, so the k-th largest logit, or the least one that top-p
// still needs, is found bit by bit, each bit with one sum over the row; where several codes share that logit, the number
// of the first that is left out is found in the same way.
#pragma once

#include "layout.h"

namespace siren::cuda {

// Results over the workers, the same in every thread, summed in a fixed order. Two buffers in turn: a barrier each.
struct Reduction {
  const Block& b;
  int turn = 0;

  SIREN_DEVICE double sum(double value) {
    float none = 0;
    int index = 0;
    return sum_and_largest(value, none, index);
  }

  // `value`, `index`: the largest value and the lowest index that has it.
  SIREN_DEVICE double sum_and_largest(double sum, float& value, int& index) {
    const auto take = [&](float other, int at) {
      if (other > value || (other == value && at < index)) {
        value = other;
        index = at;
      }
    };
    for (int mask = 16; mask > 0; mask /= 2) {
      sum += shuffle_xor(sum, mask);
      const float other = shuffle_xor(value, mask);
      take(other, shuffle_xor(index, mask));
    }
    Flags& flags = b.flags();
    if (lane() == 0) {
      flags.sum[turn][warp()] = sum;
      flags.value[turn][warp()] = value;
      flags.index[turn][warp()] = index;
    }
    worker_sync();
    sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      sum += flags.sum[turn][w];
      take(flags.value[turn][w], flags.index[turn][w]);
    }
    turn ^= 1;
    return sum;
  }
};

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
  Reduction& workers;
  const float* scaled;  // logits / temperature
  const float* weight;  // exp(scaled - largest)
  int codes;

  // Sum of `term(v)` over all codes.
  template <class Term>
  SIREN_DEVICE double sum(Term term) const {
    double own = 0;
    for (int v = thread(); v < codes; v += kWorkers) own += term(v);
    return workers.sum(own);
  }

  // The largest key such that the terms of the codes at or above it reach `needed`, and of the codes at it only so many,
  // lowest first, as are needed. `among`: the codes that count.
  template <class Term>
  SIREN_DEVICE Allowed least_reaching(double needed, const Allowed& among, Term term) const {
    uint32_t key = 0;
    for (int bit = 31; bit >= 0; --bit) {
      const uint32_t tried = key | (1u << bit);
      const auto reached = [&](int v) { return order(scaled[v]) >= tried && among(scaled[v], v) ? term(v) : 0.0; };
      if (sum(reached) >= needed) key = tried;
    }
    const double above = sum([&](int v) { return order(scaled[v]) > key && among(scaled[v], v) ? term(v) : 0.0; });
    int index = 0;  // the last one that is needed
    for (int bit = 15; bit >= 0; --bit) {
      const int tried = index | (1 << bit);
      const auto before = [&](int v) {
        return order(scaled[v]) == key && v < tried && among(scaled[v], v) ? term(v) : 0.0;
      };
      if (tried <= codes && above + sum(before) < needed) index = tried;
    }
    return {key, index + 1};
  }
};

SIREN_DEVICE void draw(const Block& b, const Instruction& in) {
  const Arguments& args = b.args;
  constexpr int kTogether = 4;
  const int codes = args.codes_per_codebook;
  const float infinity = __builtin_huge_valf();
  const bool noisy = args.temperature > 0 && !args.forced;
  const bool truncated = noisy && ((args.top_k > 0 && args.top_k < codes) || args.top_p < 1.0);
  const float temperature = args.temperature > 0 ? args.temperature : 1.0f;
  // A thread reads what it wrote itself, but for one code in the end.
  float* const scaled = b.scratch();
  float* const weight = scaled + codes;
  Reduction workers{b};
  for (int sequence = in.first; sequence < in.first + in.count; ++sequence) {
    const int at = in.codebook * args.sequences + sequence;
    const float* logits = args.arena + args.logits + static_cast<int64_t>(at) * codes;
    const float* noise = args.arena + args.noise + static_cast<int64_t>(at) * codes;
    worker_sync();  // the row before has been read
    float largest = -infinity, best = -infinity;
    int index = codes, code = codes;
    double total = 0;
    // Loads first, all under way together.
    for (int first = thread(); first < codes; first += kTogether * kWorkers) {
      float value[kTogether] = {}, noisy_value[kTogether] = {};
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        const int v = first + u * kWorkers;
        if (v < codes) value[u] = load(logits + v);
        if (v < codes && noisy) noisy_value[u] = load(noise + v);
      }
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        const int v = first + u * kWorkers;
        if (v >= codes) break;
        scaled[v] = value[u] / temperature;
        weight[v] = noisy_value[u];
      }
    }
    for (int v = thread(); v < codes; v += kWorkers) {
      const float value = scaled[v];
      if (value != value) total += 1;
      if (value > largest) {
        largest = value;
        index = v;
      }
    }
    total = workers.sum_and_largest(total, largest, index);
    const bool sound = total == 0 && largest > -infinity && largest < infinity;
    float logprob = __builtin_nanf("");
    if (sound) {
      total = 0;
      for (int v = thread(); v < codes; v += kWorkers) {
        const float score = scaled[v] + weight[v];  // until here `weight` holds the noise
        weight[v] = expf(scaled[v] - largest);
        total += weight[v];
        if (score > best) {
          best = score;
          code = v;
        }
      }
      total = workers.sum_and_largest(total, best, code);
      if (truncated) {
        const Row row{workers, scaled, weight, codes};
        Allowed allowed{0, codes};
        if (args.top_k > 0 && args.top_k < codes)
          allowed = row.least_reaching(args.top_k, allowed, [](int) { return 1.0; });
        if (args.top_p < 1.0) {
          const auto mass = [&](int v) { return static_cast<double>(weight[v]); };
          const double all = row.sum([&](int v) { return allowed(scaled[v], v) ? mass(v) : 0.0; });
          allowed = row.least_reaching(args.top_p * all, allowed, mass);
        }
        best = -infinity;
        code = codes;
        for (int v = thread(); v < codes; v += kWorkers) {
          const float score = scaled[v] + load(noise + v);
          if (allowed(scaled[v], v) && score > best) {
            best = score;
            code = v;
          }
        }
        workers.sum_and_largest(0, best, code);
      }
      if (args.forced) code = args.forced[(b.frame * args.codebooks + in.codebook) * args.sequences + sequence];
      logprob = scaled[code] - (largest + static_cast<float>(log(total)));
    } else {
      code = 0;
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
