// What the persistent kernel is told: instructions, one list for each multiprocessor (SM), and the launch's arguments.
// siren/program.py writes both. The kernel decides nothing: which SM does what, after what, and where is all in here.
#pragma once

#include <cstdint>

namespace siren::cuda {

constexpr int kWarps = 8;                  // that compute; one more streams the weights
constexpr int kWorkers = 32 * kWarps;
constexpr int kThreads = kWorkers + 32;
constexpr int kTileRows = 8;               // outputs of a tile of weights
constexpr int kStepColumns = 32;           // columns of a fragment: [kTileRows][kStepColumns] weights, row by row
constexpr int kFragment = kTileRows * kStepColumns;
constexpr int kBlockTiles = 4;             // tiles whose sums are kept in registers together
constexpr int kStageFragments = 32;        // of a stage of the ring in shared memory
constexpr int kMaxRows = 64;               // of activations in a pass over weights
constexpr int kPad = 32;                   // columns added to a staged row, so that rows start in different banks

enum class Format : int32_t { bf16 = 0, int8 = 1, fp8 = 2 };
enum class Conditioning : int32_t { none = 0, residual = 1, accumulated = 2 };

enum class Kind : int32_t {
  noise = 0,       // Gumbel values of the frame; share: groups of four codes of [codebook][sequence][code / 4]
  enter = 1,       // what a backbone or a residual decoder reads first; share: elements of the output
  accumulate = 2,  // the embedding sums after one more code; share: elements of [expert][sequence][dim]
  matmul = 3,      // share: tiles of 8 outputs
  attention = 4,   // to the prompt or to earlier frames; share: (row, head) pairs
  norm = 5,        // h, the backbone's outputs; share: rows
  draw = 6,        // share: sequences
  sums = 7,        // the embedding sums of the whole frame; share: elements of [expert][sequence][dim]
};

// Where a matmul's activations come from.
enum class Source : int32_t {
  rows = 0,             // rows of the arena at `input`
  short_attention = 1,  // attention among the positions of the residual decoder, from queries at `input`
  backbone_entry = 2,   // what `enter` writes, worked out again
  decoder_entry = 3,
};

// Where its outputs go.
enum class Target : int32_t {
  query = 0,    // y = Wx + b
  cache = 1,    // queries, keys and values of a backbone's block: to `output` and to the caches
  add = 2,      // y += Wx (+ b) (+ position)
  swiglu = 3,   // y = silu(gate) * value; weight row 2i is gate i, row 2i + 1 value i
  scratch = 4,  // queries, keys and values of a residual decoder's block: to `output` and to dkv
  logits = 5,   // guided where rows > sequences
};

enum class Keys : int32_t { prompt = 0, frames = 1 };        // `source` of an attention
enum class Shift : int32_t { none = 0, frame = 1, position = 2 };  // the position vector that `add` adds, if any
enum class Entry : int32_t { backbone = 0, decoder = 1 };    // `source` of an enter

struct Instruction {
  int32_t kind;
  int32_t operation;    // its number in the frame's list
  int32_t publish;      // this SM's progress after it: the number of its next operation, at the end their count; -1: none
  int32_t wait_first;   // SMs from here ...
  int32_t wait_count;   // ... so many (0: no wait) must have published ...
  int32_t wait_value;   // ... frame * operations + this
  int32_t expert;
  int32_t block;
  int32_t codebook;     // of the frame
  int32_t position;     // of the first row, in a residual decoder
  int32_t rows;         // of activations
  int32_t first;        // this SM's share
  int32_t count;
  int32_t columns;      // of the activations and the weights
  int32_t source;
  int32_t target;
  int32_t norm;         // offset of the norm's weight in `vectors`; -1: no norm
  int32_t bias;         // the same; -1: none
  int32_t scale;        // of the first output of the whole matrix; unused for bf16
  int32_t input;        // offsets in the arena
  int32_t output;
  int32_t chunk;        // columns of activations that are in shared memory at a time
  int32_t fragment;     // where this SM's tiles start on the tape, in fragments
  int32_t shift;
  int32_t reserved[8];
};
static_assert(sizeof(Instruction) == 128, "siren/program.py writes 32 numbers an instruction");

// What the host and the kernel tell each other, in the host's memory; and what the blocks share on the device.
enum HostWord : int32_t {
  kFramesDone,  // set when the next frame begins
  kCancel,      // by the host: end after the frame that you are in
  kGaveUp,      // a wait took too long: where
  kGaveUpSm,
  kGaveUpOperation,
  kGaveUpFrame,
  kFramesRun,   // set at the end
  kHostWords,
};
enum ControlWord : int32_t { kFrameLimit, kAbort, kControlWords };

// Where everything lies in a block's shared memory, in bytes; layout.h works it out.
struct Layout {
  int ring;          // stages of weights
  int staged;        // activations of a matmul; scratch of the other operations
  int partial;       // sums of the warps of a matmul: [2][kWarps][kBlockTiles][8 rows][8 outputs]
  int sums;          // of all warps: [groups of 8 rows][kBlockTiles][8 rows][8 outputs]
  int squares;       // [kMaxRows][kWarps]: sums of squares of the staged rows; then first in a row its norm's factor
  int full, empty;   // mbarriers of the stages
  int instructions;  // this and the next
  int flags;
  int bytes;
};

// Every number a launch needs. Names as the Python side knows them; R rows, B sequences, K experts, m codes an expert,
// J codebooks of V codes, d dim.
struct Arguments {
  const Instruction* instructions;
  const int32_t* starts;          // [sms + 1]: SM s runs instructions [starts[s], starts[s + 1])
  const uint8_t* tape;
  const float* vectors;
  const uint16_t* tables;         // bf16 [K][J][V][d]
  const float* sos;               // [K][d]
  const float* positions;         // [frames or positions of a decoder][d]
  float* arena;
  uint16_t* keys;                 // bf16 [K][backbone_blocks][R][kv_heads][capacity][head_dim]
  uint16_t* values;
  const uint16_t* prompt_keys;    // bf16 [K][backbone_blocks][prompts][heads][prompt_capacity][head_dim]
  const uint16_t* prompt_values;
  const int32_t* prompt_index;    // [R]
  const int32_t* prompt_length;   // [prompts]
  const uint64_t* seeds;          // [B]
  const uint32_t* noise_frames;   // [B]: the number that the first frame has for the noise
  const int32_t* forced;          // [frames][J][B] or null
  int32_t* codes_out;             // [frames][J][B]
  float* logprobs_out;            // [frames][J][B]; NaN: the logits could not be drawn from
  uint32_t* progress;             // [sms], first_operation at the start
  int32_t* control;               // [kControlWords], the limit `frames` at the start
  int32_t* host;                  // [kHostWords], zero at the start
  uint64_t* trace;                // null, or nanoseconds [instructions][2] of the last frame: waited for, done

  int64_t h, start, total, logits, noise, codes, dkv, dx;  // offsets in the arena

  int32_t sms, operations, frames;
  int32_t first_operation, last_operation;  // only those from first to before last run
  int32_t first_frame;                      // the session's number of the launch's first frame
  int32_t sequences, rows, dim, heads, kv_heads, head_dim, hidden;
  int32_t backbone_blocks, decoder_blocks, codebooks, experts, codes_per_codebook;
  int32_t capacity, prompts, prompt_capacity;
  int32_t conditioning, format;
  int32_t stages;        // of the ring
  int32_t staged_bytes;  // of shared memory for activations
  int32_t spin_limit;    // polls after which a wait counts as a deadlock
  float temperature, guidance, eps;
  int32_t top_k;
  double top_p;
  Layout layout;         // set where the kernel is launched, as are stages, progress, control and host
};

}  // namespace siren::cuda
