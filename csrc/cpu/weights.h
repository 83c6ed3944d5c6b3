// All weights of a model in one allocation, in the order in which a frame reads them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "../model.h"
#include "kernels.h"
#include "pool.h"

namespace siren::cpu {

// Zeroed memory, 64-byte aligned, in huge pages where the system has them.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept { std::swap(data_, other.data_), std::swap(bytes_, other.bytes_); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_), std::swap(bytes_, other.bytes_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  uint8_t* data() const { return data_; }
  float* floats() const { return reinterpret_cast<float*>(data_); }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

struct BlockWeights {
  Matrix cross_query, cross_key_value, cross_output;  // backbone only
  Matrix qkv, output, gate_value, down;
  float *cross_norm = nullptr, *self_norm = nullptr, *ffn_norm = nullptr;
};

struct ExpertWeights {
  std::vector<BlockWeights> backbone, decoder;
  std::vector<Matrix> heads;
  Matrix prompt_summary;
  float *backbone_norm = nullptr, *decoder_norm = nullptr, *sos = nullptr, *start = nullptr;
  std::vector<uint8_t*> tables;  // one a codebook: [codes][dim], the folded code embeddings
};

class Weights {
 public:
  Weights(const ModelConfig& config, Format format);

  // `name` as in the checkpoint, but "codebooks.layers.{j}.table" [codes, dim] for a folded embedding table. Throws
  // std::invalid_argument for an unknown name, a wrong number of elements or a value that is not finite.
  void load(int expert, const std::string& name, const float* source, size_t rows, size_t cols, Pool& pool);

  // Names not loaded yet, as "expert 0: sos".
  std::vector<std::string> missing() const;

  const ModelConfig config;
  const Format format;        // of matrices
  const Format table_format;  // of embedding tables and of the KV cache: f32 or bf16
  std::vector<ExpertWeights> experts;

  size_t bytes() const { return tape_.bytes() + small_.bytes(); }
  size_t backbone_bytes() const { return backbone_bytes_; }  // read once a frame
  size_t decoder_bytes() const { return decoder_bytes_; }    // read once for each code of an expert
  size_t head_bytes() const { return head_bytes_; }          // read once a frame

 private:
  struct Slot {
    Matrix* matrix = nullptr;
    bool bias = false;          // the matrix's bias rather than its weights
    float* vector = nullptr;
    uint8_t* table = nullptr;
    size_t rows = 0, cols = 0;
    bool loaded = false;
  };

  void plan();

  std::map<std::pair<int, std::string>, Slot> slots_;
  Buffer tape_, small_;
  size_t backbone_bytes_ = 0, decoder_bytes_ = 0, head_bytes_ = 0;
};

}  // namespace siren::cpu
