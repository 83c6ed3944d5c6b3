// The decode engine: weights, and sessions that advance a batch of sequences frame by frame.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../sampling.h"
#include "pool.h"
#include "weights.h"

namespace siren::cpu {

// Logits that cannot be drawn from.
struct BadLogits : std::runtime_error {
  BadLogits(int sequence, int64_t frame, int codebook);
};

class Engine {
 public:
  Engine(const ModelConfig& config, Format format, int threads);

  Weights weights;
  const Kernels& kernels;
  Pool& pool;

  // positions[t] is added to the input of every block at position t: [max(max_frames, positions of a decoder), dim].
  void set_positions(const float* rows, size_t count);
  // Throws std::invalid_argument unless every tensor has been loaded.
  void check_complete() const;

  const ModelConfig& config() const { return weights.config; }
  const float* position(int t) const { return positions_.floats() + static_cast<size_t>(t) * config().dim; }
  int threads() const { return pool.threads(); }

 private:
  Buffer positions_;
};

// A prompt, ready to be attended to: keys and values of every backbone block, and the start of every residual decoder.
struct Prompt {
  int tokens = 0, page = 0;  // page: tokens rounded up to a block of positions
  Buffer keys_values;        // [block][expert][head] chunks
  std::vector<float> start;  // [expert][dim]; empty when the start is learned or there is no residual decoder
};

// One page of the KV cache of one row, all blocks and experts: [block][expert][kv head] chunks of kPage frames.
using Page = std::shared_ptr<Buffer>;

// Activations of a batch, allocated once.
struct Workspace {
  Workspace(const Engine& engine, int rows);

  int dim_stride, wide_stride, hidden_stride;  // floats
  size_t prepared_stride;                      // bytes
  // Backbone: [expert][row]
  Buffer x, y, a, hidden, prepared;
  // Residual decoder: rows of two positions
  Buffer dx, dy, da, dhidden, dprepared, dkv, logits;
  size_t dkv_row_bytes;  // of one row and block, all kv heads
};

// What the residual decoders of a frame read and write; arrays are per sequence unless said otherwise.
struct Frame {
  const float* h;            // [expert][row][dim_stride] backbone outputs
  const float* const* start; // [expert * rows + row] -> [dim], or null without residual decoders
  const uint64_t* seeds;
  const int64_t* index;      // frame number of each sequence, for the noise
  const int64_t* forced;     // [sequence][codebook] or null: take these codes instead of drawing
  float* sums;               // [expert][sequence][dim_stride], zero at entry: sums of the drawn codes' embeddings
  int64_t* codes;            // [sequence][codebook]
  float* logprobs;           // [sequence][codebook]
  float* logits;             // [sequence][codebook][codes] or null
};

// The residual decoders and draws of one frame (paper, eq. 5), for sessions and for ResidualSampler.
class Residual {
 public:
  Residual(const Engine& engine, int sequences, bool guided, const SamplingSettings& settings);
  void run(const Frame& frame, Workspace& work, int thread);
  void check() const;  // throws BadLogits if a draw of the last frame failed

 private:
  void block(Workspace& work, int expert, int layer, int position, int count, int thread);
  void finish(const Frame& frame, Workspace& work, int expert, int position, int thread);

  const Engine& engine_;
  const int sequences_, rows_;
  const SamplingSettings settings_;
  Buffer noise_;  // [sequence][codebook][codes]
  std::vector<DrawScratch> scratch_;            // per thread
  std::vector<std::vector<float>> mixed_;       // per thread: guided logits
  std::vector<std::vector<float>> scores_;      // per thread
  std::vector<int> bad_codebook_;               // per sequence, -1: none
  std::vector<int64_t> bad_frame_;
};

class Session {
 public:
  // prompts: [sequences][tokens][prompt_dim]; mask: [sequences][tokens], non-zero for a token, at least one a row.
  Session(std::shared_ptr<const Engine> engine, const float* prompts, const uint8_t* mask, int sequences, int tokens,
          std::vector<uint64_t> seeds, const SamplingSettings& settings);

  // One more frame. forced [sequence][codebook] and logits [sequence][codebook][codes] may be null. On an error the
  // session stays as it was.
  void step(const int64_t* forced, float* logits);
  // Keeps these sequences, in this order; an index may repeat. seeds: one for each, or empty to keep those they have.
  void select(const std::vector<int>& indices, const std::vector<uint64_t>& seeds);

  int sequences() const { return sequences_; }
  int64_t frames() const { return frames_; }
  const std::vector<int64_t>& codes() const { return codes_; }      // [frame][sequence][codebook]
  const std::vector<float>& logprobs() const { return logprobs_; }  // the same
  const Engine& engine() const { return *engine_; }
  size_t cache_bytes() const;

 private:
  // What depends on the number of rows.
  struct Buffers {
    std::unique_ptr<Workspace> work;
    std::unique_ptr<Residual> residual;
    Buffer sums, next_sums;
  };
  Buffers allocate(int rows, int sequences) const;
  void adopt(Buffers buffers);
  void prefill(const std::vector<std::vector<float>>& tokens, std::vector<std::shared_ptr<Prompt>>& prompts);
  void extend_cache();
  void backbone(int thread);
  void attend_prompt(int layer, int item, float* scores);
  void attend_frames(int layer, int item, float* scores);
  size_t chunk_offset(int layer, int expert, int kv_head) const;

  std::shared_ptr<const Engine> engine_;
  int sequences_;
  const bool guided_;
  int rows_;  // sequences, then as many again for the null prompt when guided
  SamplingSettings settings_;
  std::vector<uint64_t> seeds_;
  std::vector<std::shared_ptr<Prompt>> prompts_;        // per row
  std::vector<std::vector<Page>> pages_;                // per row
  std::vector<std::vector<const uint8_t*>> page_data_;  // their addresses, for the frame under way
  std::unique_ptr<Workspace> work_;
  std::unique_ptr<Residual> residual_;
  Buffer sums_, next_sums_;                             // [expert][sequence][dim_stride]
  std::vector<std::vector<float>> scores_;              // per thread
  int64_t frames_ = 0;
  std::vector<int64_t> codes_;
  std::vector<float> logprobs_;
};

// sums, codes and logprobs of one frame from backbone outputs of the caller's own; see Frame.
// h, start [expert][sequence][dim], inputs the same; index [sequence].
void residual_frame(const Engine& engine, const float* h, const float* start, const uint64_t* seeds, const int64_t* index,
                    int sequences, const SamplingSettings& settings, int64_t* codes, float* logprobs, float* inputs);

}  // namespace siren::cpu
