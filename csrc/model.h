// Sizes and switches of a model, as plain data. Filled by the Python package from its SirenConfig.
#pragma once

namespace siren {

enum class Conditioning : int { none = 0, residual = 1, accumulated = 2 };

struct ModelConfig {
  int dim = 0, heads = 0, kv_heads = 0;
  int backbone_blocks = 0, decoder_blocks = 0;
  int hidden = 0;      // width of the SwiGLU
  int prompt_dim = 0;
  int codebooks = 0;   // of a frame
  int experts = 0;
  int codes = 0;       // entries of a codebook
  int max_frames = 0, max_prompt = 0;
  float norm_eps = 0;
  Conditioning conditioning = Conditioning::accumulated;
  bool learned_start = false;

  int head_dim() const { return dim / heads; }
  int codes_per_expert() const { return codebooks / experts; }
  int positions() const { return codes_per_expert() + 1; }  // of a residual decoder
};

}  // namespace siren
