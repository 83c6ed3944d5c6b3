// Weights and cached keys and values, into the layouts of kernels.h.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace siren::cpu {

uint16_t to_bf16(float value) {
  uint32_t u;
  std::memcpy(&u, &value, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(u >> 16 | 0x40);
  return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

namespace {

// The checkpoint's row that lane `lane` of block `block` holds, or -1 for padding.
int source_row(const Matrix& m, int block, int lane) {
  if (!m.paired) {
    const int row = block * kRowBlock + lane;
    return row < m.rows ? row : -1;
  }
  const int half = m.rows / 2, row = block * (kRowBlock / 2) + lane % (kRowBlock / 2);
  if (row >= half) return -1;
  return lane < kRowBlock / 2 ? row : half + row;
}

}  // namespace

void pack(const Matrix& m, const float* source, int block_begin, int block_end) {
  for (int block = block_begin; block < block_end; ++block) {
    const float* rows[kRowBlock];
    float scales[kRowBlock];
    for (int lane = 0; lane < kRowBlock; ++lane) {
      const int from = source_row(m, block, lane);
      rows[lane] = from < 0 ? nullptr : source + static_cast<size_t>(from) * m.cols;
      if (m.format != Format::i8) continue;
      scales[lane] = m.scale[block * kRowBlock + lane] = 1.0f;
      if (from < 0) continue;
      float largest = 0;
      for (int k = 0; k < m.cols; ++k) largest = std::max(largest, std::fabs(rows[lane][k]));
      if (largest > 0) scales[lane] = m.scale[block * kRowBlock + lane] = largest / 127.0f;
    }
    // Columns outside, rows inside: the packed side, written in order, is the larger stream.
    uint8_t* out = m.data + m.block_bytes() * block;
    for (int k = 0; k < m.cols; ++k) {
      for (int lane = 0; lane < kRowBlock; ++lane) {
        const float value = rows[lane] ? rows[lane][k] : 0.0f;
        if (m.format == Format::f32) {
          std::memcpy(out + (static_cast<size_t>(k) * kRowBlock + lane) * 4, &value, 4);
          continue;
        }
        const size_t at = (static_cast<size_t>(k / 2) * kRowBlock + lane) * 2 + k % 2;
        if (m.format == Format::bf16) {
          const uint16_t rounded = to_bf16(value);
          std::memcpy(out + at * 2, &rounded, 2);
        } else {
          out[at] = static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(value / scales[lane])));
        }
      }
    }
  }
}

void write_kv(Format kv, uint8_t* chunk, int page, int position, int head_dim, const float* k, const float* v) {
  const int width = round_up(head_dim, 16);
  const size_t size = weight_size(kv);
  uint8_t* keys = chunk + static_cast<size_t>(position / kTimeBlock) * width * kTimeBlock * size;
  uint8_t* values = chunk + (static_cast<size_t>(page) + position) * width * size;
  const int t = position % kTimeBlock;
  for (int d = 0; d < head_dim; ++d) {
    if (kv == Format::f32) {
      std::memcpy(keys + (static_cast<size_t>(d) * kTimeBlock + t) * 4, &k[d], 4);
      std::memcpy(values + static_cast<size_t>(d) * 4, &v[d], 4);
    } else {
      const uint16_t key = to_bf16(k[d]), value = to_bf16(v[d]);
      std::memcpy(keys + ((static_cast<size_t>(d / 2) * kTimeBlock + t) * 2 + d % 2) * 2, &key, 2);
      std::memcpy(values + static_cast<size_t>(d) * 2, &value, 2);
    }
  }
}

}  // namespace siren::cpu
