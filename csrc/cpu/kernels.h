// What the engine asks of an instruction path, and the layouts both sides agree on.
//
// Packed weights. Rows are the outputs. 32 rows form a block; inside a block the columns follow one another, and all
// lanes of a vector belong to different rows, so no sum across lanes is needed, and on one instruction path every output
// is summed over the columns in the same order whatever the batch and the number of threads:
//   f32   [block][column][32] float
//   bf16  [block][column / 2][32][2] bf16
//   i8    [block][column / 2][32][2] int8, one float scale a row
// Columns are padded with zeros to a multiple of 64, rows to a multiple of 32. A 4-bit format would be one more case of
// Format, of pack() and of matmul.
//
// Activations as matmul reads them ("prepared"), one row:
//   f32   float[depth]; also for bf16 weights on paths without a bf16 dot product
//   bf16  bf16[depth], rounded to nearest even
//   i8    int16[depth], then float[depth / 64]: 16-bit fixed point with one scale for 64 columns, so that int8 products
//         are summed exactly in int32 (64 * 127 * 32767 < 2^31). Its rounding is 2^-16 of the largest of 64 values.
#pragma once

#include <cstddef>
#include <cstdint>

namespace siren::cpu {

enum class Format : int { f32 = 0, bf16 = 1, i8 = 2 };

constexpr int kRowBlock = 32;    // rows of a block of packed weights
constexpr int kDepthUnit = 64;   // columns are padded to this; also the columns that share one activation scale
constexpr int kTimeBlock = 16;   // positions of a block of cached keys
constexpr int kPage = 64;        // frames of a page of the KV cache

// Always inlined, so that no instruction path's copy of them can be linked into another.
#define SIREN_INLINE __attribute__((always_inline)) inline

SIREN_INLINE constexpr int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }
SIREN_INLINE size_t weight_size(Format format) { return format == Format::f32 ? 4 : format == Format::bf16 ? 2 : 1; }
SIREN_INLINE size_t prepared_bytes(int depth) { return static_cast<size_t>(depth) * 4; }  // enough for every format

struct Matrix {
  Format format = Format::f32;
  int rows = 0, cols = 0;        // as in the checkpoint
  int blocks = 0, depth = 0;     // blocks of 32 packed rows, padded columns
  bool paired = false;           // 16 gate rows, then 16 value rows, in each block
  uint8_t* data = nullptr;
  float* scale = nullptr;        // [blocks * 32], i8 only
  float* bias = nullptr;         // [blocks * 32] or null

  SIREN_INLINE size_t block_bytes() const { return static_cast<size_t>(kRowBlock) * depth * weight_size(format); }
  SIREN_INLINE size_t bytes() const { return block_bytes() * blocks; }
};

enum class Epilogue : int {
  store,   // y = Wx + b
  add,     // y += Wx + b
  swiglu,  // y = silu(gate) * value, 16 outputs a block of a paired matrix
};

struct MatmulArgs {
  const Matrix* w;
  const uint8_t* x;  // prepared rows
  size_t x_stride;   // bytes
  int batch;
  float* y;
  size_t y_stride;   // floats, at least the padded number of outputs
  int block_begin, block_end;
  Epilogue epilogue;
};

// Attention of one query head over cached keys and values of one key-value head.
// A chunk holds `page` positions: keys [page / 16][width / 2][16][2] (bf16) or [page / 16][width][16] (f32), then
// values [page][width]; width is head_dim rounded up to 16, padded with zeros.
struct AttendArgs {
  const float* q;
  const uint8_t* const* chunks;
  size_t chunk_offset;   // bytes from a chunk's start to this head's keys
  int page, positions;
  int head_dim;
  Format format;         // f32 or bf16
  float* scores;         // scratch, positions rounded up to page
  float* out;            // [head_dim]
};

struct Kernels {
  const char* name;
  bool bf16_dot;  // bf16 weights read bf16 activations
  void (*matmul)(const MatmulArgs&);
  void (*prepare)(Format format, const float* x, int n, int depth, uint8_t* out);
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* out);
  void (*attend)(const AttendArgs&);
  void (*add_row)(float* sum, const uint8_t* row, Format format, int n);
  uint64_t (*read)(const uint8_t* data, size_t bytes);  // touches every byte and little else: the bandwidth to compare with
};

SIREN_INLINE size_t chunk_bytes(Format kv, int page, int head_dim) {
  return static_cast<size_t>(2) * page * round_up(head_dim, 16) * weight_size(kv);
}

// Writes one position's key and value [head_dim] into a chunk.
void write_kv(Format kv, uint8_t* chunk, int page, int position, int head_dim, const float* k, const float* v);

uint16_t to_bf16(float value);

// Packs these blocks of `rows` x `cols` floats (row-major), rounded to bf16 or int8 as the matrix says. Padding is left
// as it is: zero, in memory fresh from the system.
void pack(const Matrix& matrix, const float* source, int block_begin, int block_end);

// The path named by SIREN_CPU_ISA, else the best this CPU has. Throws std::invalid_argument when it cannot run here.
const Kernels& pick_kernels();

}  // namespace siren::cpu
