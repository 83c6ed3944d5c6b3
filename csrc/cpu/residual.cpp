// Residual decoders of one frame: for each expert positions 0 and 1 in one pass over the weights, a draw, then one
// position and one draw at a time. Experts follow one another because each needs the codes before its own.
#include <cstring>

#include "engine.h"
#include "split.h"

namespace siren::cpu {

BadLogits::BadLogits(int sequence, int64_t frame, int codebook)
    : std::runtime_error("sequence " + std::to_string(sequence) + ", frame " + std::to_string(frame) + ", codebook " +
                         std::to_string(codebook) + ": the logits hold NaN, +inf or no finite value") {}

Residual::Residual(const Engine& engine, int sequences, bool guided, const SamplingSettings& settings)
    : engine_(engine), sequences_(sequences), rows_(guided ? 2 * sequences : sequences), settings_(settings) {
  const ModelConfig& config = engine.config();
  if (settings.temperature > 0)
    noise_ = Buffer(sizeof(float) * sequences * config.codebooks * config.codes);
  scratch_.assign(engine.threads(), DrawScratch(config.codes));
  mixed_.assign(engine.threads(), std::vector<float>(config.codes));
  scores_.assign(engine.threads(), std::vector<float>(round_up(config.positions(), kPage)));
  bad_codebook_.assign(sequences, -1);
  bad_frame_.assign(sequences, 0);
}

void Residual::check() const {
  int worst = -1;
  for (int s = 0; s < sequences_; ++s)
    if (bad_codebook_[s] >= 0 && (worst < 0 || bad_codebook_[s] < bad_codebook_[worst])) worst = s;
  if (worst >= 0) throw BadLogits(worst, bad_frame_[worst], bad_codebook_[worst]);
}

void Residual::run(const Frame& frame, Workspace& work, int thread) {
  const ModelConfig& config = engine_.config();
  const int threads = engine_.threads(), codebooks = config.codebooks, m = config.codes_per_expert();
  const Kernels& k = engine_.kernels;
  split(sequences_, threads, thread, [&](int s) { bad_codebook_[s] = -1; });
  if (settings_.temperature > 0 && !frame.forced)
    split(sequences_ * codebooks, threads, thread, [&](int item) {
      const int s = item / codebooks, j = item % codebooks;
      gumbel_noise(frame.seeds[s], static_cast<uint32_t>(frame.index[s]), j, config.codes,
                   noise_.floats() + static_cast<size_t>(item) * config.codes);
    });

  for (int e = 0; e < config.experts; ++e) {
    const ExpertWeights& expert = engine_.weights.experts[e];
    for (int i = 0; i < m; ++i) {
      const int codebook = e * m + i;
      const Matrix& head = expert.heads[i];
      if (config.decoder_blocks == 0) {
        split(rows_, threads, thread, [&](int r) {
          k.prepare(head.format, frame.h + (static_cast<size_t>(e) * rows_ + r) * work.dim_stride, config.dim, head.depth,
                    work.dprepared.data() + r * work.prepared_stride);
        });
      } else {
        // Position 0 rides along with position 1. Rows of the pass: [position][row].
        const int first = i == 0 ? 0 : i + 1, count = i == 0 ? 2 : 1;
        split(count * rows_, threads, thread, [&](int item) {
          const int position = first + item / rows_, r = item % rows_;
          float* x = work.dx.floats() + static_cast<size_t>(item) * work.dim_stride;
          if (position == 0) {
            std::memcpy(x, frame.h + (static_cast<size_t>(e) * rows_ + r) * work.dim_stride, config.dim * sizeof(float));
            return;
          }
          std::memcpy(x, frame.start[e * rows_ + r], config.dim * sizeof(float));
          const int s = r % sequences_;
          if (config.conditioning == Conditioning::accumulated) {
            const float* sum = frame.sums + (static_cast<size_t>(e) * sequences_ + s) * work.dim_stride;
            for (int d = 0; d < config.dim; ++d) x[d] += sum[d];
          } else if (config.conditioning == Conditioning::residual && codebook > 0) {
            const int64_t code = frame.codes[static_cast<size_t>(s) * codebooks + codebook - 1];
            k.add_row(x, expert.tables[codebook - 1] + code * config.dim * weight_size(engine_.weights.table_format),
                      engine_.weights.table_format, config.dim);
          }
        });
        for (int layer = 0; layer < config.decoder_blocks; ++layer) block(work, e, layer, first, count, thread);
        // Of the two positions of the first pass only position 1 went through the last block to its end.
        float* last = work.dx.floats() + static_cast<size_t>(count - 1) * rows_ * work.dim_stride;
        split(rows_, threads, thread, [&](int r) {
          float* x = last + static_cast<size_t>(r) * work.dim_stride;
          k.rms_norm(x, expert.decoder_norm, config.norm_eps, config.dim, x);
          k.prepare(head.format, x, config.dim, head.depth, work.dprepared.data() + r * work.prepared_stride);
        });
      }
      engine_.pool.barrier(thread);
      const int begin = head.blocks * thread / threads, end = head.blocks * (thread + 1) / threads;
      k.matmul({&head, work.dprepared.data(), work.prepared_stride, rows_, work.logits.floats(),
                static_cast<size_t>(head.blocks) * kRowBlock, begin, end, Epilogue::store});
      engine_.pool.barrier(thread);
      finish(frame, work, e, i, thread);
      engine_.pool.barrier(thread);
    }
  }
}

// One block on `count` positions from `position` on.
void Residual::block(Workspace& work, int e, int layer, int position, int count, int thread) {
  const ModelConfig& config = engine_.config();
  const Kernels& k = engine_.kernels;
  Pool& pool = engine_.pool;
  const int threads = engine_.threads(), head_dim = config.head_dim(), group = config.heads / config.kv_heads;
  const BlockWeights& w = engine_.weights.experts[e].decoder[layer];
  const bool last = layer + 1 == config.decoder_blocks;
  const int page = round_up(config.positions(), kTimeBlock);
  const size_t chunk = chunk_bytes(Format::f32, page, head_dim);
  float* const x = work.dx.floats();
  uint8_t* const prepared = work.dprepared.data();
  const auto row = [&](Buffer& buffer, int stride, int item) { return buffer.floats() + static_cast<size_t>(item) * stride; };
  const auto multiply = [&](const Matrix& m, int first, int rows, float* y, int stride, Epilogue epilogue) {
    k.matmul({&m, prepared + first * work.prepared_stride, work.prepared_stride, rows, y + static_cast<size_t>(first) * stride,
              static_cast<size_t>(stride), m.blocks * thread / threads, m.blocks * (thread + 1) / threads, epilogue});
  };

  split(count * rows_, threads, thread, [&](int item) {
    float* own = row(work.dx, work.dim_stride, item);
    const float* add = engine_.position(position + item / rows_);
    for (int d = 0; d < config.dim; ++d) own[d] += add[d];
    float* normed = row(work.da, work.dim_stride, item);
    k.rms_norm(own, w.self_norm, config.norm_eps, config.dim, normed);
    k.prepare(w.qkv.format, normed, config.dim, w.qkv.depth, prepared + item * work.prepared_stride);
  });
  pool.barrier(thread);
  multiply(w.qkv, 0, count * rows_, work.dy.floats(), work.wide_stride, Epilogue::store);
  pool.barrier(thread);
  // By row, not by position: position 1 attends to position 0, which the same thread has just written.
  const int first_needed = last ? count - 1 : 0;
  split(rows_, threads, thread, [&](int r) {
    uint8_t* cache = work.dkv.data() + (static_cast<size_t>(layer) * rows_ + r) * work.dkv_row_bytes;
    for (int p = 0; p < count; ++p) {
      const int item = p * rows_ + r;
      const float* q = row(work.dy, work.wide_stride, item);
      const float* key = q + config.heads * head_dim;
      const float* value = key + config.kv_heads * head_dim;
      for (int g = 0; g < config.kv_heads; ++g)
        write_kv(Format::f32, cache + g * chunk, page, position + p, head_dim, key + g * head_dim, value + g * head_dim);
      if (p < first_needed) continue;
      float* out = row(work.da, work.dim_stride, item);
      const uint8_t* chunks[1] = {cache};
      for (int h = 0; h < config.heads; ++h)
        k.attend({q + h * head_dim, chunks, h / group * chunk, page, position + p + 1, head_dim, Format::f32,
                  scores_[thread].data(), out + h * head_dim});
      k.prepare(w.output.format, out, config.dim, w.output.depth, prepared + item * work.prepared_stride);
    }
  });
  pool.barrier(thread);
  const int from = first_needed * rows_, rows = (count - first_needed) * rows_;
  multiply(w.output, from, rows, x, work.dim_stride, Epilogue::add);
  pool.barrier(thread);
  split(rows, threads, thread, [&](int i) {
    float* normed = row(work.da, work.dim_stride, from + i);
    k.rms_norm(row(work.dx, work.dim_stride, from + i), w.ffn_norm, config.norm_eps, config.dim, normed);
    k.prepare(w.gate_value.format, normed, config.dim, w.gate_value.depth, prepared + (from + i) * work.prepared_stride);
  });
  pool.barrier(thread);
  multiply(w.gate_value, from, rows, work.dhidden.floats(), work.hidden_stride, Epilogue::swiglu);
  pool.barrier(thread);
  split(rows, threads, thread, [&](int i) {
    k.prepare(w.down.format, row(work.dhidden, work.hidden_stride, from + i), config.hidden, w.down.depth,
              prepared + (from + i) * work.prepared_stride);
  });
  pool.barrier(thread);
  multiply(w.down, from, rows, x, work.dim_stride, Epilogue::add);
  pool.barrier(thread);
}

// Draws code i of expert e for every sequence and adds its embeddings to the sums of all experts.
void Residual::finish(const Frame& frame, Workspace& work, int e, int i, int thread) {
  const ModelConfig& config = engine_.config();
  const Kernels& k = engine_.kernels;
  const int codebook = e * config.codes_per_expert() + i;
  const size_t stride = static_cast<size_t>(round_up(config.codes, kRowBlock));
  const Format tables = engine_.weights.table_format;
  split(sequences_, engine_.threads(), thread, [&](int s) {
    const size_t at = static_cast<size_t>(s) * config.codebooks + codebook;
    const float* logits = work.logits.floats() + s * stride;
    if (rows_ != sequences_) {
      const float* without = work.logits.floats() + (sequences_ + s) * stride;
      float* mixed = mixed_[thread].data();
      for (int v = 0; v < config.codes; ++v) mixed[v] = without[v] + settings_.guidance * (logits[v] - without[v]);
      logits = mixed;
    }
    if (frame.logits) std::memcpy(frame.logits + at * config.codes, logits, config.codes * sizeof(float));
    const Draw drawn = draw(logits, config.codes, noise_.data() ? noise_.floats() + at * config.codes : nullptr, settings_,
                            frame.forced ? static_cast<int>(frame.forced[at]) : -1, scratch_[thread]);
    if (drawn.code < 0 && bad_codebook_[s] < 0) {
      bad_codebook_[s] = codebook;
      bad_frame_[s] = frame.index[s];
    }
    const int code = drawn.code < 0 ? 0 : drawn.code;  // the frame is finished, then thrown away
    frame.codes[at] = code;
    frame.logprobs[at] = drawn.logprob;
    for (int other = 0; other < config.experts; ++other)
      k.add_row(frame.sums + (static_cast<size_t>(other) * sequences_ + s) * work.dim_stride,
                engine_.weights.experts[other].tables[codebook] + static_cast<size_t>(code) * config.dim * weight_size(tables),
                tables, config.dim);
  });
}

void residual_frame(const Engine& engine, const float* h, const float* start, const uint64_t* seeds, const int64_t* index,
                    int sequences, const SamplingSettings& settings, int64_t* codes, float* logprobs, float* inputs) {
  const ModelConfig& config = engine.config();
  Workspace work(engine, sequences);
  Residual residual(engine, sequences, false, settings);
  const size_t rows = static_cast<size_t>(config.experts) * sequences;
  Buffer padded(rows * work.dim_stride * sizeof(float)), sums(rows * work.dim_stride * sizeof(float));
  std::vector<const float*> starts(rows);
  for (size_t r = 0; r < rows; ++r) {
    std::memcpy(padded.floats() + r * work.dim_stride, h + r * config.dim, config.dim * sizeof(float));
    starts[r] = start + r * config.dim;
  }
  const Frame frame{padded.floats(), starts.data(), seeds, index, nullptr, sums.floats(), codes, logprobs, nullptr};
  run_on(engine.pool, [&](int thread) { residual.run(frame, work, thread); });
  residual.check();
  for (size_t r = 0; r < rows; ++r)
    std::memcpy(inputs + r * config.dim, sums.floats() + r * work.dim_stride, config.dim * sizeof(float));
}

}  // namespace siren::cpu
