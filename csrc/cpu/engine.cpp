#include "engine.h"

#include <algorithm>
#include <cstring>

namespace siren::cpu {

Engine::Engine(const ModelConfig& config, Format format, int threads)
    : weights(config, format), kernels(pick_kernels()), pool(Pool::get(threads)) {
  const int count = std::max(config.max_frames, config.positions());
  positions_ = Buffer(static_cast<size_t>(count) * config.dim * sizeof(float));
}

void Engine::set_positions(const float* rows, size_t count) {
  if (count * sizeof(float) != positions_.bytes()) throw std::invalid_argument("positions have the wrong size");
  std::memcpy(positions_.data(), rows, positions_.bytes());
}

void Engine::check_complete() const {
  const std::vector<std::string> missing = weights.missing();
  if (missing.empty()) return;
  throw std::invalid_argument(missing.front() + " is missing" +
                              (missing.size() > 1 ? ", and " + std::to_string(missing.size() - 1) + " more" : ""));
}

Workspace::Workspace(const Engine& engine, int rows) {
  const ModelConfig& c = engine.config();
  const int qkv = (c.heads + 2 * c.kv_heads) * c.head_dim();
  dim_stride = round_up(c.dim, kRowBlock);
  wide_stride = round_up(std::max(qkv, c.dim), kRowBlock);
  hidden_stride = round_up(c.hidden, kRowBlock / 2);
  prepared_stride = prepared_bytes(round_up(std::max(c.dim, c.hidden), kDepthUnit));
  const auto floats = [](size_t n, size_t stride) { return Buffer(n * stride * sizeof(float)); };
  const size_t all = static_cast<size_t>(c.experts) * rows, pair = static_cast<size_t>(2) * rows;
  x = floats(all, dim_stride);
  a = floats(all, dim_stride);
  y = floats(all, wide_stride);
  hidden = floats(all, hidden_stride);
  prepared = Buffer(all * prepared_stride);
  dx = floats(pair, dim_stride);
  da = floats(pair, dim_stride);
  dy = floats(pair, wide_stride);
  dhidden = floats(pair, hidden_stride);
  dprepared = Buffer(pair * prepared_stride);
  dkv_row_bytes = c.kv_heads * chunk_bytes(Format::f32, round_up(c.positions(), kTimeBlock), c.head_dim());
  dkv = Buffer(static_cast<size_t>(c.decoder_blocks) * rows * dkv_row_bytes);
  logits = floats(rows, round_up(c.codes, kRowBlock));
#if defined(SIREN_POISON)
  // NaN everywhere: whatever reads an activation before it is written shows up in the codes.
  for (Buffer* buffer : {&x, &a, &y, &hidden, &prepared, &dx, &da, &dy, &dhidden, &dprepared, &dkv, &logits})
    if (buffer->data()) std::memset(buffer->data(), 0xff, buffer->bytes());
#endif
}

}  // namespace siren::cpu
