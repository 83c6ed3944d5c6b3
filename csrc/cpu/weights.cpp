#include "weights.h"

#include <cstring>
#include <functional>
#include <new>
#include <stdexcept>

#include <sys/mman.h>

#include "split.h"

namespace siren::cpu {

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (bytes >= size_t{8} << 20) madvise(p, bytes, MADV_HUGEPAGE);  // advice only; refused on some systems
#endif
  data_ = static_cast<uint8_t*>(p);
}

Buffer::~Buffer() {
  if (data_) munmap(data_, bytes_);
}

namespace {

bool all_finite(const float* values, size_t count) {
  uint32_t bad = 0;
  for (size_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, 4);
    bad |= (bits & 0x7f800000u) == 0x7f800000u;  // written so that compilers vectorise it
  }
  return bad == 0;
}

void store_row(uint8_t* out, const float* values, size_t count, Format format) {
  if (format == Format::f32) {
    std::memcpy(out, values, count * sizeof(float));
    return;
  }
  for (size_t i = 0; i < count; ++i) {
    const uint16_t value = to_bf16(values[i]);
    std::memcpy(out + i * 2, &value, 2);
  }
}

}  // namespace

Weights::Weights(const ModelConfig& model, Format weight_format)
    : config(model), format(weight_format), table_format(weight_format == Format::f32 ? Format::f32 : Format::bf16) {
  experts.resize(config.experts);
  for (ExpertWeights& expert : experts) {
    expert.backbone.resize(config.backbone_blocks);
    expert.decoder.resize(config.decoder_blocks);
    expert.heads.resize(config.codes_per_expert());
    expert.tables.resize(config.codebooks);
  }
  plan();
}

// Two passes over the same list: the first adds up sizes, the second hands out addresses.
void Weights::plan() {
  const int dim = config.dim, qkv_rows = (config.heads + 2 * config.kv_heads) * config.head_dim();
  size_t tape = 0, small = 0;
  bool placing = false;

  const auto take_small = [&](size_t floats) {
    float* p = placing ? small_.floats() + small : nullptr;
    small += (floats + 15) / 16 * 16;
    return p;
  };
  const auto matrix = [&](int expert, const std::string& name, Matrix& m, int rows, int cols, bool bias, bool paired = false) {
    m.format = format;
    m.rows = rows;
    m.cols = cols;
    m.paired = paired;
    m.depth = round_up(cols, kDepthUnit);
    m.blocks = paired ? (rows / 2 + kRowBlock / 2 - 1) / (kRowBlock / 2) : (rows + kRowBlock - 1) / kRowBlock;
    m.data = placing ? tape_.data() + tape : nullptr;
    tape += m.bytes();
    if (format == Format::i8) m.scale = take_small(static_cast<size_t>(m.blocks) * kRowBlock);
    if (bias) m.bias = take_small(static_cast<size_t>(m.blocks) * kRowBlock);
    if (!placing) return;
    Slot slot;
    slot.matrix = &m;
    slot.rows = rows;
    slot.cols = cols;
    slots_[{expert, name + ".weight"}] = slot;
    if (bias) {
      slot.bias = true;
      slot.rows = 1;
      slot.cols = rows;
      slots_[{expert, name + ".bias"}] = slot;
    }
  };
  const auto vector = [&](int expert, const std::string& name, float*& p, int n) {
    p = take_small(n);
    if (!placing) return;
    Slot slot;
    slot.vector = p;
    slot.rows = 1;
    slot.cols = n;
    slots_[{expert, name}] = slot;
  };

  const auto lay_out = [&] {
    tape = small = 0;
    const auto each_expert = [&](const std::function<void(int, ExpertWeights&)>& place) {
      for (int e = 0; e < config.experts; ++e) place(e, experts[e]);
    };
    for (int l = 0; l < config.backbone_blocks; ++l) {
      const std::string block = "spatial_blocks." + std::to_string(l) + ".";
      each_expert([&](int e, ExpertWeights& w) { matrix(e, block + "cross_attention.query", w.backbone[l].cross_query, dim, dim, true); });
      each_expert([&](int e, ExpertWeights& w) { matrix(e, block + "cross_attention.output", w.backbone[l].cross_output, dim, dim, true); });
      each_expert([&](int e, ExpertWeights& w) { matrix(e, block + "self_attention.qkv", w.backbone[l].qkv, qkv_rows, dim, false); });
      each_expert([&](int e, ExpertWeights& w) { matrix(e, block + "self_attention.output", w.backbone[l].output, dim, dim, false); });
      each_expert([&](int e, ExpertWeights& w) { matrix(e, block + "feed_forward.gate_value", w.backbone[l].gate_value, 2 * config.hidden, dim, false, true); });
      each_expert([&](int e, ExpertWeights& w) { matrix(e, block + "feed_forward.down", w.backbone[l].down, dim, config.hidden, false); });
    }
    backbone_bytes_ = tape;
    head_bytes_ = 0;
    for (int e = 0; e < config.experts; ++e) {
      for (int l = 0; l < config.decoder_blocks; ++l) {
        const std::string block = "factorized_blocks." + std::to_string(l) + ".";
        BlockWeights& w = experts[e].decoder[l];
        matrix(e, block + "attention.qkv", w.qkv, qkv_rows, dim, false);
        matrix(e, block + "attention.output", w.output, dim, dim, false);
        matrix(e, block + "feed_forward.gate_value", w.gate_value, 2 * config.hidden, dim, false, true);
        matrix(e, block + "feed_forward.down", w.down, dim, config.hidden, false);
      }
      const size_t before = tape;
      for (int i = 0; i < config.codes_per_expert(); ++i)
        matrix(e, "heads." + std::to_string(i), experts[e].heads[i], config.codes, dim, false);
      head_bytes_ += tape - before;
    }
    decoder_bytes_ = tape - backbone_bytes_ - head_bytes_;

    for (int e = 0; e < config.experts; ++e) {
      ExpertWeights& w = experts[e];
      for (int l = 0; l < config.backbone_blocks; ++l) {
        const std::string block = "spatial_blocks." + std::to_string(l) + ".";
        matrix(e, block + "cross_attention.key_value", w.backbone[l].cross_key_value, 2 * dim, config.prompt_dim, true);
        vector(e, block + "cross_norm.weight", w.backbone[l].cross_norm, dim);
        vector(e, block + "self_norm.weight", w.backbone[l].self_norm, dim);
        vector(e, block + "ffn_norm.weight", w.backbone[l].ffn_norm, dim);
      }
      for (int l = 0; l < config.decoder_blocks; ++l) {
        const std::string block = "factorized_blocks." + std::to_string(l) + ".";
        vector(e, block + "attention_norm.weight", w.decoder[l].self_norm, dim);
        vector(e, block + "ffn_norm.weight", w.decoder[l].ffn_norm, dim);
      }
      vector(e, "spatial_norm.weight", w.backbone_norm, dim);
      vector(e, "sos", w.sos, dim);
      if (config.decoder_blocks > 0) {
        vector(e, "factorized_norm.weight", w.decoder_norm, dim);
        if (config.learned_start) vector(e, "start", w.start, dim);
        else matrix(e, "prompt_summary", w.prompt_summary, dim, config.prompt_dim, true);
      }
      for (int j = 0; j < config.codebooks; ++j) {
        const size_t bytes = static_cast<size_t>(config.codes) * dim * weight_size(table_format);
        w.tables[j] = placing ? tape_.data() + tape : nullptr;
        tape += (bytes + 63) / 64 * 64;
        if (!placing) continue;
        Slot slot;
        slot.table = w.tables[j];
        slot.rows = config.codes;
        slot.cols = dim;
        slots_[{e, "codebooks.layers." + std::to_string(j) + ".table"}] = slot;
      }
    }
  };
  lay_out();
  tape_ = Buffer(tape);
  small_ = Buffer(small * sizeof(float));
  placing = true;
  lay_out();
}

void Weights::load(int expert, const std::string& name, const float* source, size_t rows, size_t cols, Pool& pool) {
  const std::string where = "expert " + std::to_string(expert) + ": " + name;
  const auto found = slots_.find({expert, name});
  if (found == slots_.end()) throw std::invalid_argument(where + " is not a tensor of this model");
  Slot& slot = found->second;
  if (rows != slot.rows || cols != slot.cols)
    throw std::invalid_argument(where + " has shape [" + std::to_string(rows) + ", " + std::to_string(cols) + "], not [" +
                                std::to_string(slot.rows) + ", " + std::to_string(slot.cols) + "]");
  if (!all_finite(source, rows * cols)) throw std::invalid_argument(where + " holds a value that is not finite");
  if (slot.vector || slot.bias) {
    std::memcpy(slot.vector ? slot.vector : slot.matrix->bias, source, rows * cols * sizeof(float));
  } else {
    run_on(pool, [&](int thread) {
      if (slot.table) {
        split(static_cast<int>(rows), pool.threads(), thread, [&](int row) {
          store_row(slot.table + row * cols * weight_size(table_format), source + row * cols, cols, table_format);
        });
      } else {
        const int blocks = slot.matrix->blocks;
        pack(*slot.matrix, source, blocks * thread / pool.threads(), blocks * (thread + 1) / pool.threads());
      }
    });
  }
  slot.loaded = true;
}

std::vector<std::string> Weights::missing() const {
  std::vector<std::string> names;
  for (const auto& [key, slot] : slots_)
    if (!slot.loaded) names.push_back("expert " + std::to_string(key.first) + ": " + key.second);
  return names;
}

}  // namespace siren::cpu
