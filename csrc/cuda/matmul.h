// y = W x for a few rows x: this SM's tiles of W from the ring, x from shared memory, sums in registers.
//
// Tensor cores take 16 rows of activations against a tile of 8 outputs. An activation is the sum of two bf16: of up to 8
// rows both halves go in together, of more rows one half after the other, into the same sums. Within 32 columns lane t of
// a quad holds columns 8t to 8t + 7 of both operands, which is another order of summation than the instruction's own
// names for them, but the same for both. The warps share the steps of 32 columns; their sums are added in the order of
// the warps, so a run gives the same bits as the one before.
#pragma once

#include "ring.h"
#include "stage.h"

namespace siren::cuda {

// 8 columns of a tile's row, as four pairs of bf16.
SIREN_DEVICE void load_weights(Format format, const uint8_t* fragment, uint32_t pairs[4]) {
  if (format == Format::bf16) {
    const Words words = *reinterpret_cast<const Words*>(fragment + 16 * lane());
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = words.v[i];
    return;
  }
  const uint32_t* words = reinterpret_cast<const uint32_t*>(fragment + 8 * lane());
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t four = words[i];  // columns 0, 2, 1, 3
    const uint32_t even = four & 0x00ff00ffu, odd = (four >> 8) & 0x00ff00ffu;
    pairs[2 * i] = format == Format::int8 ? widen_int8(even) : widen_fp8(even);
    pairs[2 * i + 1] = format == Format::int8 ? widen_int8(odd) : widen_fp8(odd);
  }
}

// What is added to an output's sum. Read before the barrier behind which the sums are known: a trip to memory that no
// warp waits for.
SIREN_DEVICE float load_addend(const Block& b, const Instruction& in, int row, int n) {
  const Arguments& args = b.args;
  float addend = in.bias >= 0 ? load(args.vectors + in.bias + n) : 0;
  if (in.target != static_cast<int>(Target::add)) return addend;
  addend += load(args.arena + in.output + row * args.dim + n);
  const int position = in.shift == static_cast<int>(Shift::frame) ? b.time() : in.position + row / args.rows;
  if (in.shift != static_cast<int>(Shift::none))
    addend += load(args.positions + static_cast<int64_t>(position) * args.dim + n);
  return addend;
}

// Where an output goes. `n`: of the whole matrix; `neighbour`: the output n + 1, for the even n of swiglu.
SIREN_DEVICE void put_output(const Block& b, const Instruction& in, int row, int n, float value, float neighbour) {
  const Arguments& args = b.args;
  const int kv = args.kv_heads * args.head_dim;
  float* const output = args.arena + in.output;
  switch (static_cast<Target>(in.target)) {
    case Target::query:
    case Target::add:
      output[row * args.dim + n] = value;
      break;
    case Target::cache:
      if (n < args.dim) {
        output[row * args.dim + n] = value;
      } else {
        const int e = (n - args.dim) % kv;
        int64_t at = (static_cast<int64_t>(in.expert) * args.backbone_blocks + in.block) * args.rows + row;
        at = (at * args.kv_heads + e / args.head_dim) * args.capacity + b.time();
        uint16_t* cache = n - args.dim < kv ? args.keys : args.values;
        cache[at * args.head_dim + e % args.head_dim] = static_cast<uint16_t>(pack_bf16(value, 0));
      }
      break;
    case Target::scratch:
      if (n < args.dim) {
        output[row * args.dim + n] = value;
      } else {
        const int positions = args.codebooks / args.experts + 1, position = in.position + row / args.rows;
        const int64_t at = (static_cast<int64_t>(in.block) * positions + position) * args.rows + row % args.rows;
        args.arena[args.dkv + at * 2 * kv + n - args.dim] = value;
      }
      break;
    case Target::swiglu:
      if (n % 2 == 0) output[row * args.hidden + n / 2] = value / (1.0f + expf(-value)) * neighbour;
      break;
    case Target::logits:
      output[row * args.codes_per_codebook + n] = value;
      break;
  }
}

// An output with guidance: the rows with the prompt come first, then as many without it. Their sums are in `sums`.
SIREN_DEVICE void put_guided(const Block& b, const Instruction& in, int tile, int tiles) {
  const Arguments& args = b.args;
  const auto sum = [&](int row, int t, int e) { return b.sums()[(row / 8 * kBlockTiles + t) * 64 + row % 8 * 8 + e]; };
  for (int item = thread(); item < args.sequences * 8 * tiles; item += kWorkers) {
    const int e = item % 8, t = item / 8 % tiles, row = item / (8 * tiles), n = (in.first + tile + t) * kTileRows + e;
    const float with = sum(row, t, e), without = sum(row + args.sequences, t, e);
    args.arena[in.output + row * args.codes_per_codebook + n] = without + args.guidance * (with - without);
  }
}

// The sums of a group of 8 rows over the warps, a worker for each, to where they belong after the `last` columns.
SIREN_DEVICE void add_warps(const Block& b, const Instruction& in, const float* partial, int tile, int tiles, int group,
                            bool fresh, bool last) {
  const int t = thread() / 64, e = thread() % 8, row = 8 * group + thread() / 8 % 8;
  const int n = (in.first + tile + t) * kTileRows + e;
  const bool used = t < tiles && row < in.rows;
  const float addend = used && last ? load_addend(b, in, row, n) : 0;
  worker_sync();
  float* const own = b.sums() + group * kBlockTiles * 64 + thread();
  float sum = fresh ? 0 : *own;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += partial[w * kBlockTiles * 64 + thread()];
  if (!last) {
    *own = sum;
    return;
  }
  if (used && b.args.format != static_cast<int>(Format::bf16)) sum *= load(b.args.vectors + in.scale + n);
  if (used && in.norm >= 0) sum *= b.squares()[row * kWarps];
  if (in.target == static_cast<int>(Target::logits) && in.rows > b.args.sequences) {
    *own = sum;
    return;
  }
  const float neighbour = shuffle_xor(sum, 1);
  if (used) put_output(b, in, row, n, sum + addend, neighbour);
}

SIREN_DEVICE void matmul(const Block& b, const Instruction& in, Ring& ring) {
  static_assert(kWorkers == kBlockTiles * 64, "a worker for each sum of a group of rows");
  constexpr int kSlabs = kMaxRows / 16;
  const int rows = in.rows;
  const int stride = row_stride(in), slabs = (rows + 15) / 16, g = lane() / 4;
  const bool stacked = rows <= 8, guided = in.target == static_cast<int>(Target::logits) && rows > b.args.sequences;
  const Format format = static_cast<Format>(b.args.format);
  const int bytes = fragment_bytes(b.args.format);
  int turn = 0;  // of the two buffers of the warps' sums: one barrier a group is enough
  for (int tile = 0; tile < in.count; tile += kBlockTiles) {
    const int tiles = least(kBlockTiles, in.count - tile), most_steps = piece_steps(tiles, in.chunk);
    for (int column = 0; column < in.columns; column += in.chunk) {
      const int width = least(in.chunk, in.columns - column);
      if (tile == 0 || in.chunk < in.columns) {
        if (tile > 0 || column > 0) worker_sync();  // nobody reads what was staged before
        stage(b, in, column, width, tile == 0);
        worker_sync();
      }
      float sums[kBlockTiles][kSlabs][4] = {};
      for (int first = 0; first < width / kStepColumns; first += most_steps) {
        const int steps = least(most_steps, width / kStepColumns - first);
        work_when(b, in.operation, [&] { return mbarrier_try(ring.full(), ring.round & 1); });
        for (int step = warp(); step < steps; step += kWarps) {
          uint32_t weights[kBlockTiles][4];
#pragma unroll
          for (int t = 0; t < kBlockTiles; ++t)
            if (t < tiles) load_weights(format, ring.memory() + (step * tiles + t) * bytes, weights[t]);
          const uint16_t* const at = b.staged() + (first + step) * kStepColumns + 8 * (lane() % 4);
          const auto load_row = [&](int row, bool used) {
            Words none = {};
            return used ? *reinterpret_cast<const Words*>(at + row * stride) : none;
          };
#pragma unroll
          for (int slab = 0; slab < kSlabs; ++slab) {
            if (slab >= slabs) break;
            const int upper = 16 * slab + g, lower = stacked ? rows + g : upper + 8;
            const bool use_upper = upper < rows, use_lower = stacked ? use_upper : lower < rows;
#pragma unroll 1
            for (int part = 0; part < (stacked ? 1 : 2); ++part) {
              const Words up = load_row(upper + part * rows, use_upper), low = load_row(lower + part * rows, use_lower);
#pragma unroll
              for (int half = 0; half < 4; half += 2) {
                const uint32_t x[4] = {up.v[half], low.v[half], up.v[half + 1], low.v[half + 1]};
#pragma unroll
                for (int t = 0; t < kBlockTiles; ++t)
                  if (t < tiles) mma(sums[t][slab], x, weights[t] + half);
              }
            }
          }
        }
        warp_sync();
        if (lane() == 0) mbarrier_arrive(ring.empty());
        ring.advance();
      }
      const bool last = column + in.chunk >= in.columns;
      if (tile == 0 && last && in.norm >= 0)
        for (int row = thread(); row < rows; row += kWorkers) {
          float* squares = b.squares() + row * kWarps;
          float sum = 0;
          for (int w = 0; w < kWarps; ++w) sum += squares[w];
          squares[0] = 1.0f / sqrtf(sum / static_cast<float>(in.columns) + b.args.eps);
        }
#pragma unroll
      for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll 1
        for (int group = 2 * slab; group < 2 * slab + 2 && 8 * group < rows; ++group) {
          const bool lower = group % 2 != 0;
          float* const partial = b.partial() + turn * kWarps * kBlockTiles * 64;
          float* const to = partial + warp() * kBlockTiles * 64 + 8 * g + 2 * (lane() % 4);
#pragma unroll
          for (int t = 0; t < kBlockTiles; ++t) {
            const float* sum = sums[t][slab];
            to[64 * t] = stacked ? sum[0] + sum[2] : lower ? sum[2] : sum[0];
            to[64 * t + 1] = stacked ? sum[1] + sum[3] : lower ? sum[3] : sum[1];
          }
          turn ^= 1;
          add_warps(b, in, partial, tile, tiles, group, column == 0, last);
        }
      }
    }
    if (guided) {
      worker_sync();
      put_guided(b, in, tile, tiles);
    }
  }
}

}  // namespace siren::cuda
