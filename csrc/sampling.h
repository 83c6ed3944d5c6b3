// One draw from one row of logits: temperature, top-k, top-p and Gumbel-max with counter-based noise.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "philox.h"

namespace siren {

struct SamplingSettings {
  float temperature = 1.0f;  // 0: greedy, the lowest index wins a tie
  int top_k = 0;             // 0: all
  double top_p = 1.0;
  float guidance = 1.0f;
};

struct Draw {
  int code;       // -1: the row holds NaN, +inf or nothing finite
  float logprob;  // log-softmax of logits / temperature, untruncated; of logits when greedy
};

// noise[v] for one (sequence, frame, codebook). The uniform is exact in double; in float 2^24 - 0.5 would round up and
// give u = 1, an infinite Gumbel value.
inline void gumbel_noise(uint64_t seed, uint32_t frame, uint32_t codebook, int n, float* noise) {
  for (int v = 0; v < n; v += 4) {
    const Philox4 random = philox4x32(seed, frame, codebook, static_cast<uint32_t>(v / 4), 0);
    for (int i = 0; i < 4 && v + i < n; ++i) {
      const double u = (static_cast<double>(random.word[i] >> 8) + 0.5) * 0x1p-24;
      noise[v + i] = static_cast<float>(-std::log(-std::log(u)));
    }
  }
}

// Marks what top-k, then top-p, allow. `order` is scratch. Scaled logits, descending; the lower index wins a tie.
inline void truncate(const float* scaled, int n, int top_k, double top_p, std::vector<int>& order,
                     std::vector<uint8_t>& allowed) {
  for (int v = 0; v < n; ++v) order[v] = v;
  const auto above = [scaled](int a, int b) { return scaled[a] > scaled[b] || (scaled[a] == scaled[b] && a < b); };
  int keep = top_k > 0 ? std::min(top_k, n) : n;
  std::partial_sort(order.begin(), order.begin() + keep, order.end(), above);
  if (top_p < 1.0) {
    double total = 0;
    for (int i = 0; i < keep; ++i) total += std::exp(static_cast<double>(scaled[order[i]] - scaled[order[0]]));
    double reached = 0;
    int i = 0;
    while (i < keep && reached < top_p * total) {
      reached += std::exp(static_cast<double>(scaled[order[i]] - scaled[order[0]]));
      ++i;
    }
    keep = std::max(i, 1);
  }
  std::fill(allowed.begin(), allowed.end(), uint8_t{0});
  for (int i = 0; i < keep; ++i) allowed[order[i]] = 1;
}

struct DrawScratch {
  explicit DrawScratch(int codes) : scaled(codes), order(codes), allowed(codes) {}
  std::vector<float> scaled;
  std::vector<int> order;
  std::vector<uint8_t> allowed;
};

// forced >= 0: that code is taken and only its log-probability is computed. noise may be null when greedy or forced.
inline Draw draw(const float* logits, int n, const float* noise, const SamplingSettings& settings, int forced,
                 DrawScratch& scratch) {
  float* scaled = scratch.scaled.data();
  const float temperature = settings.temperature > 0 ? settings.temperature : 1.0f;
  float largest = -std::numeric_limits<float>::infinity();
  for (int v = 0; v < n; ++v) {
    if (std::isnan(logits[v])) return {-1, 0};
    scaled[v] = logits[v] / temperature;
    largest = std::max(largest, scaled[v]);
  }
  if (!std::isfinite(largest)) return {-1, 0};
  double total = 0;
  for (int v = 0; v < n; ++v) total += std::exp(scaled[v] - largest);
  const float log_total = largest + static_cast<float>(std::log(total));

  int code = forced;
  if (forced < 0) {
    const bool greedy = settings.temperature == 0;
    const bool truncated = !greedy && (settings.top_k > 0 || settings.top_p < 1.0);
    if (truncated) truncate(scaled, n, settings.top_k, settings.top_p, scratch.order, scratch.allowed);
    float best = -std::numeric_limits<float>::infinity();
    for (int v = 0; v < n; ++v) {
      if (truncated && !scratch.allowed[v]) continue;
      const float score = greedy ? scaled[v] : scaled[v] + noise[v];
      if (score > best) {
        best = score;
        code = v;
      }
    }
  }
  return {code, scaled[code] - log_total};
}

}  // namespace siren
