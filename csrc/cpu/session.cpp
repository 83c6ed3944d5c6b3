// A batch of sequences: prompts once, then frame after frame through the six backbones and the residual decoders.
#include <algorithm>
#include <cstring>

#include "engine.h"
#include "split.h"

namespace siren::cpu {
namespace {

constexpr int kPromptRows = 64;  // prompt tokens that go through the weights together

}  // namespace

Session::Session(std::shared_ptr<const Engine> engine, const float* prompts, const uint8_t* mask, int sequences, int tokens,
                 std::vector<uint64_t> seeds, const SamplingSettings& settings)
    : engine_(std::move(engine)),
      sequences_(sequences),
      guided_(settings.guidance != 1.0f),
      rows_(guided_ ? 2 * sequences : sequences),
      settings_(settings),
      seeds_(std::move(seeds)) {
  const size_t width = engine_->config().prompt_dim;
  // Only the tokens count, and equal prompts are prepared once.
  std::vector<std::vector<float>> distinct;
  std::vector<int> which;
  const auto find = [&](std::vector<float> own) {
    const auto same = [&own](const std::vector<float>& other) {
      return other.size() == own.size() && std::memcmp(other.data(), own.data(), own.size() * sizeof(float)) == 0;
    };
    const auto found = std::find_if(distinct.begin(), distinct.end(), same);
    which.push_back(static_cast<int>(found - distinct.begin()));
    if (found == distinct.end()) distinct.push_back(std::move(own));
  };
  for (int s = 0; s < sequences; ++s) {
    std::vector<float> own;
    for (int p = 0; p < tokens; ++p) {
      const size_t at = static_cast<size_t>(s) * tokens + p;
      if (mask[at]) own.insert(own.end(), prompts + at * width, prompts + (at + 1) * width);
    }
    find(std::move(own));
  }
  if (guided_)
    for (int s = 0; s < sequences; ++s) find(std::vector<float>(width, 0.0f));  // the null prompt: one zero token

  std::vector<std::shared_ptr<Prompt>> prepared;
  prefill(distinct, prepared);
  for (const int index : which) prompts_.push_back(prepared[index]);
  pages_.resize(rows_);
  adopt(allocate(rows_, sequences_));
  const int longest = std::max(engine_->config().max_frames, engine_->config().max_prompt);
  scores_.assign(engine_->threads(), std::vector<float>(round_up(longest, kPage)));
}

Session::Buffers Session::allocate(int rows, int sequences) const {
  Buffers buffers;
  buffers.work = std::make_unique<Workspace>(*engine_, rows);
  buffers.residual = std::make_unique<Residual>(*engine_, sequences, guided_, settings_);
  const size_t bytes = static_cast<size_t>(engine_->config().experts) * sequences * buffers.work->dim_stride * sizeof(float);
  buffers.sums = Buffer(bytes);
  buffers.next_sums = Buffer(bytes);
  return buffers;
}

void Session::adopt(Buffers buffers) {
  work_ = std::move(buffers.work);
  residual_ = std::move(buffers.residual);
  sums_ = std::move(buffers.sums);
  next_sums_ = std::move(buffers.next_sums);
}

size_t Session::chunk_offset(int layer, int expert, int kv_head) const {
  const ModelConfig& c = engine_->config();
  return (static_cast<size_t>(layer) * c.experts + expert) * c.kv_heads * chunk_bytes(engine_->weights.table_format, kPage, c.head_dim()) +
         kv_head * chunk_bytes(engine_->weights.table_format, kPage, c.head_dim());
}

size_t Session::cache_bytes() const {
  std::vector<const Buffer*> seen;
  size_t bytes = 0;
  for (const auto& row : pages_)
    for (const Page& page : row)
      if (std::find(seen.begin(), seen.end(), page.get()) == seen.end()) {
        seen.push_back(page.get());
        bytes += page->bytes();
      }
  return bytes;
}

void Session::prefill(const std::vector<std::vector<float>>& tokens, std::vector<std::shared_ptr<Prompt>>& prompts) {
  const ModelConfig& c = engine_->config();
  const Kernels& k = engine_->kernels;
  Pool& pool = engine_->pool;
  const Weights& weights = engine_->weights;
  const Format kv = weights.table_format;
  const int width = c.prompt_dim, head_dim = c.head_dim(), threads = pool.threads();
  const bool summarised = c.decoder_blocks > 0 && !c.learned_start;

  struct Token {
    int prompt, position;
  };
  std::vector<Token> list;
  std::vector<std::vector<float>> means;
  for (const std::vector<float>& own : tokens) {
    auto prompt = std::make_shared<Prompt>();
    prompt->tokens = static_cast<int>(own.size() / width);
    prompt->page = round_up(prompt->tokens, kTimeBlock);
    prompt->keys_values = Buffer(static_cast<size_t>(c.backbone_blocks) * c.experts * c.heads * chunk_bytes(kv, prompt->page, head_dim));
    if (summarised) prompt->start.resize(static_cast<size_t>(c.experts) * c.dim);
    std::vector<float> mean(width, 0.0f);
    for (int p = 0; p < prompt->tokens; ++p) {
      list.push_back({static_cast<int>(prompts.size()), p});
      for (int d = 0; d < width; ++d) mean[d] += own[static_cast<size_t>(p) * width + d];
    }
    for (float& value : mean) value /= static_cast<float>(prompt->tokens);
    means.push_back(std::move(mean));
    prompts.push_back(std::move(prompt));
  }

  const int depth = round_up(width, kDepthUnit);
  const size_t stride = prepared_bytes(depth);
  const int out_stride = round_up(2 * c.dim, kRowBlock);
  Buffer prepared(kPromptRows * stride);
  Buffer out(static_cast<size_t>(c.experts) * kPromptRows * out_stride * sizeof(float));
  const auto multiply = [&](const Matrix& m, int expert, int rows, int thread) {
    k.matmul({&m, prepared.data(), stride, rows, out.floats() + static_cast<size_t>(expert) * kPromptRows * out_stride,
              static_cast<size_t>(out_stride), m.blocks * thread / threads, m.blocks * (thread + 1) / threads, Epilogue::store});
  };
  for (size_t first = 0; first < list.size(); first += kPromptRows) {
    const int rows = static_cast<int>(std::min<size_t>(kPromptRows, list.size() - first));
    run_on(pool, [&](int thread) {
      split(rows, threads, thread, [&](int r) {
        const Token& token = list[first + r];
        k.prepare(weights.format, tokens[token.prompt].data() + static_cast<size_t>(token.position) * width, width, depth,
                  prepared.data() + r * stride);
      });
      pool.barrier(thread);
      for (int layer = 0; layer < c.backbone_blocks; ++layer) {
        for (int e = 0; e < c.experts; ++e) multiply(weights.experts[e].backbone[layer].cross_key_value, e, rows, thread);
        pool.barrier(thread);
        split(c.experts * rows, threads, thread, [&](int item) {
          const int e = item / rows, r = item % rows;
          const Token& token = list[first + r];
          Prompt& prompt = *prompts[token.prompt];
          const size_t chunk = chunk_bytes(kv, prompt.page, head_dim);
          const float* key = out.floats() + (static_cast<size_t>(e) * kPromptRows + r) * out_stride;
          uint8_t* base = prompt.keys_values.data() + (static_cast<size_t>(layer) * c.experts + e) * c.heads * chunk;
          for (int h = 0; h < c.heads; ++h)
            write_kv(kv, base + h * chunk, prompt.page, token.position, head_dim, key + h * head_dim, key + c.dim + h * head_dim);
        });
        pool.barrier(thread);
      }
    });
  }
  if (!summarised) return;
  for (size_t first = 0; first < means.size(); first += kPromptRows) {
    const int rows = static_cast<int>(std::min<size_t>(kPromptRows, means.size() - first));
    run_on(pool, [&](int thread) {
      split(rows, threads, thread, [&](int r) {
        k.prepare(weights.format, means[first + r].data(), width, depth, prepared.data() + r * stride);
      });
      pool.barrier(thread);
      for (int e = 0; e < c.experts; ++e) multiply(weights.experts[e].prompt_summary, e, rows, thread);
      pool.barrier(thread);
      split(c.experts * rows, threads, thread, [&](int item) {
        const int e = item / rows, r = item % rows;
        std::memcpy(prompts[first + r]->start.data() + static_cast<size_t>(e) * c.dim,
                    out.floats() + (static_cast<size_t>(e) * kPromptRows + r) * out_stride, c.dim * sizeof(float));
      });
    });
  }
}

// Room for one more frame in every row, in a page that no other row shares.
void Session::extend_cache() {
  const ModelConfig& c = engine_->config();
  const size_t bytes = static_cast<size_t>(c.backbone_blocks) * c.experts * c.kv_heads *
                       chunk_bytes(engine_->weights.table_format, kPage, c.head_dim());
  for (std::vector<Page>& row : pages_) {
    if (frames_ % kPage == 0) {
      row.resize(frames_ / kPage);  // a step that failed may have left one more
      row.push_back(std::make_shared<Buffer>(bytes));
    } else if (row.back().use_count() > 1) {
      auto copy = std::make_shared<Buffer>(bytes);
      std::memcpy(copy->data(), row.back()->data(), bytes);
      row.back() = std::move(copy);
    }
  }
  page_data_.resize(pages_.size());
  for (size_t r = 0; r < pages_.size(); ++r) {
    page_data_[r].clear();
    for (const Page& page : pages_[r]) page_data_[r].push_back(page->data());
  }
}

void Session::attend_prompt(int layer, int item, float* scores) {
  const ModelConfig& c = engine_->config();
  const int e = item / (rows_ * c.heads), r = item / c.heads % rows_, h = item % c.heads;
  const size_t at = static_cast<size_t>(e) * rows_ + r;
  const Prompt& prompt = *prompts_[r];
  const Format kv = engine_->weights.table_format;
  const uint8_t* chunks[1] = {prompt.keys_values.data()};
  const size_t offset = ((static_cast<size_t>(layer) * c.experts + e) * c.heads + h) * chunk_bytes(kv, prompt.page, c.head_dim());
  engine_->kernels.attend({work_->y.floats() + at * work_->wide_stride + h * c.head_dim(), chunks, offset, prompt.page,
                           prompt.tokens, c.head_dim(), kv, scores, work_->a.floats() + at * work_->dim_stride + h * c.head_dim()});
}

void Session::attend_frames(int layer, int item, float* scores) {
  const ModelConfig& c = engine_->config();
  const int e = item / (rows_ * c.kv_heads), r = item / c.kv_heads % rows_, g = item % c.kv_heads;
  const int head_dim = c.head_dim(), group = c.heads / c.kv_heads;
  const size_t at = static_cast<size_t>(e) * rows_ + r;
  const Format kv = engine_->weights.table_format;
  const float* q = work_->y.floats() + at * work_->wide_stride;
  const float* key = q + (c.heads + g) * head_dim;
  const size_t offset = chunk_offset(layer, e, g);
  write_kv(kv, pages_[r].back()->data() + offset, kPage, static_cast<int>(frames_ % kPage), head_dim, key, key + c.kv_heads * head_dim);
  for (int h = g * group; h < (g + 1) * group; ++h)
    engine_->kernels.attend({q + h * head_dim, page_data_[r].data(), offset, kPage, static_cast<int>(frames_) + 1, head_dim, kv, scores,
                             work_->a.floats() + at * work_->dim_stride + h * head_dim});
}

// All experts go through a block together: they do not depend on one another, so a phase has six times the rows to share
// and the weights of a phase lie side by side.
void Session::backbone(int thread) {
  const ModelConfig& c = engine_->config();
  const Kernels& k = engine_->kernels;
  Pool& pool = engine_->pool;
  Workspace& work = *work_;
  const Weights& weights = engine_->weights;
  const int threads = pool.threads(), items = c.experts * rows_;
  float* const scores = scores_[thread].data();
  const auto row = [](Buffer& buffer, int stride, int item) { return buffer.floats() + static_cast<size_t>(item) * stride; };
  const auto prepared = [&](int item) { return work.prepared.data() + item * work.prepared_stride; };
  const auto multiply = [&](Matrix BlockWeights::*which, int layer, Buffer& y, int stride, Epilogue epilogue) {
    for (int e = 0; e < c.experts; ++e) {
      const Matrix& m = weights.experts[e].backbone[layer].*which;
      k.matmul({&m, prepared(e * rows_), work.prepared_stride, rows_, row(y, stride, e * rows_), static_cast<size_t>(stride),
                m.blocks * thread / threads, m.blocks * (thread + 1) / threads, epilogue});
    }
    pool.barrier(thread);
  };
  const auto normalise = [&](float* BlockWeights::*norm, int layer, const float* add) {
    split(items, threads, thread, [&](int item) {
      float* own = row(work.x, work.dim_stride, item);
      if (add)
        for (int d = 0; d < c.dim; ++d) own[d] += add[d];
      float* normed = row(work.a, work.dim_stride, item);
      k.rms_norm(own, weights.experts[item / rows_].backbone[layer].*norm, c.norm_eps, c.dim, normed);
      k.prepare(weights.format, normed, c.dim, round_up(c.dim, kDepthUnit), prepared(item));
    });
    pool.barrier(thread);
  };
  const auto prepare = [&](Buffer& from, int stride, int n) {
    split(items, threads, thread, [&](int item) {
      k.prepare(weights.format, row(from, stride, item), n, round_up(n, kDepthUnit), prepared(item));
    });
    pool.barrier(thread);
  };

  split(items, threads, thread, [&](int item) {
    const int e = item / rows_, s = item % rows_ % sequences_;
    const float* input = frames_ == 0 ? weights.experts[e].sos : sums_.floats() + (static_cast<size_t>(e) * sequences_ + s) * work.dim_stride;
    std::memcpy(row(work.x, work.dim_stride, item), input, c.dim * sizeof(float));
  });
  for (int layer = 0; layer < c.backbone_blocks; ++layer) {
    normalise(&BlockWeights::cross_norm, layer, engine_->position(static_cast<int>(frames_)));
    multiply(&BlockWeights::cross_query, layer, work.y, work.wide_stride, Epilogue::store);
    split(items * c.heads, threads, thread, [&](int item) { attend_prompt(layer, item, scores); });
    pool.barrier(thread);
    prepare(work.a, work.dim_stride, c.dim);
    multiply(&BlockWeights::cross_output, layer, work.x, work.dim_stride, Epilogue::add);
    normalise(&BlockWeights::self_norm, layer, nullptr);
    multiply(&BlockWeights::qkv, layer, work.y, work.wide_stride, Epilogue::store);
    split(items * c.kv_heads, threads, thread, [&](int item) { attend_frames(layer, item, scores); });
    pool.barrier(thread);
    prepare(work.a, work.dim_stride, c.dim);
    multiply(&BlockWeights::output, layer, work.x, work.dim_stride, Epilogue::add);
    normalise(&BlockWeights::ffn_norm, layer, nullptr);
    multiply(&BlockWeights::gate_value, layer, work.hidden, work.hidden_stride, Epilogue::swiglu);
    prepare(work.hidden, work.hidden_stride, c.hidden);
    multiply(&BlockWeights::down, layer, work.x, work.dim_stride, Epilogue::add);
  }
  split(items, threads, thread, [&](int item) {
    float* own = row(work.x, work.dim_stride, item);
    k.rms_norm(own, weights.experts[item / rows_].backbone_norm, c.norm_eps, c.dim, own);
  });
  pool.barrier(thread);
}

void Session::step(const int64_t* forced, float* logits) {
  const ModelConfig& c = engine_->config();
  if (frames_ >= c.max_frames) throw std::invalid_argument("the session has reached max_seq_len frames");
  extend_cache();
  std::memset(next_sums_.data(), 0, next_sums_.bytes());
  const size_t count = static_cast<size_t>(sequences_) * c.codebooks;
  std::vector<int64_t> codes(count);
  std::vector<float> logprobs(count);
  const std::vector<int64_t> index(sequences_, frames_);
  std::vector<const float*> starts;
  if (c.decoder_blocks > 0)
    for (int e = 0; e < c.experts; ++e)
      for (int r = 0; r < rows_; ++r)
        starts.push_back(c.learned_start ? engine_->weights.experts[e].start : prompts_[r]->start.data() + static_cast<size_t>(e) * c.dim);
  const Frame frame{work_->x.floats(), starts.data(), seeds_.data(), index.data(), forced, next_sums_.floats(),
                    codes.data(), logprobs.data(), logits};
  run_on(engine_->pool, [&](int thread) {
    backbone(thread);
    residual_->run(frame, *work_, thread);
  });
  residual_->check();
  std::swap(sums_, next_sums_);
  codes_.insert(codes_.end(), codes.begin(), codes.end());
  logprobs_.insert(logprobs_.end(), logprobs.begin(), logprobs.end());
  ++frames_;
}

void Session::select(const std::vector<int>& indices, const std::vector<uint64_t>& seeds) {
  const int kept = static_cast<int>(indices.size()), codebooks = engine_->config().codebooks;
  const int rows = guided_ ? 2 * kept : kept, stride = work_->dim_stride;
  // Everything that may run out of memory comes before the first change.
  Buffers buffers = allocate(rows, kept);
  std::vector<uint64_t> new_seeds = seeds;
  std::vector<std::shared_ptr<Prompt>> new_prompts;
  std::vector<std::vector<Page>> new_pages;
  for (int half = 0; half < (guided_ ? 2 : 1); ++half)
    for (const int index : indices) {
      new_prompts.push_back(prompts_[half * sequences_ + index]);
      new_pages.push_back(pages_[half * sequences_ + index]);
    }
  if (seeds.empty())
    for (const int index : indices) new_seeds.push_back(seeds_[index]);
  for (int e = 0; e < engine_->config().experts; ++e)
    for (int s = 0; s < kept; ++s)
      std::memcpy(buffers.sums.floats() + (static_cast<size_t>(e) * kept + s) * stride,
                  sums_.floats() + (static_cast<size_t>(e) * sequences_ + indices[s]) * stride, stride * sizeof(float));
  std::vector<int64_t> new_codes;
  std::vector<float> new_logprobs;
  for (int64_t t = 0; t < frames_; ++t)
    for (const int index : indices) {
      const size_t at = (static_cast<size_t>(t) * sequences_ + index) * codebooks;
      new_codes.insert(new_codes.end(), codes_.begin() + at, codes_.begin() + at + codebooks);
      new_logprobs.insert(new_logprobs.end(), logprobs_.begin() + at, logprobs_.begin() + at + codebooks);
    }
  seeds_.swap(new_seeds);
  prompts_.swap(new_prompts);
  pages_.swap(new_pages);
  codes_.swap(new_codes);
  logprobs_.swap(new_logprobs);
  sequences_ = kept;
  rows_ = rows;
  adopt(std::move(buffers));
}

}  // namespace siren::cpu
