// The inner loops, compiled once for each instruction path (setup.py gives the flags and SIREN_ISA).
//
// GCC's and Clang's vector types keep one source for all of them; only dot products on pairs need intrinsics. Nothing
// here may call a function template or an inline function of a header: the linker would keep one copy for all paths, and
// that copy might hold instructions this CPU lacks.
#include "kernels.h"

#include <math.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace siren::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;     // floats of a vector
constexpr int kBatch = 8; // rows of activations that share one pass over a block
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int kBatch = 2;
#else
constexpr int W = 4;
constexpr int kBatch = 1;
#endif
constexpr int NV = kRowBlock / W;  // vectors of a block's rows

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef int16_t vs __attribute__((vector_size(W * 2)));

#define INLINE static inline __attribute__((always_inline))

template <class V>
INLINE V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
INLINE void store(void* p, V v) {
  memcpy(p, &v, sizeof v);
}
INLINE vf bits_to_float(vu u) {
  vf f;
  memcpy(&f, &u, sizeof f);
  return f;
}
INLINE vf even_bf16(vu pair) { return bits_to_float(pair << 16); }
INLINE vf odd_bf16(vu pair) { return bits_to_float(pair & 0xffff0000u); }
INLINE vf load_bf16(const void* p) { return bits_to_float(__builtin_convertvector(load<vh>(p), vu) << 16); }

// exp, within 2 units in the last place on [-87, 88]; clamped outside.
INLINE vf exp_vec(vf x) {
  const vf low = vf{} - 87.0f, high = vf{} + 88.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const vf half = x < vf{} ? vf{} - 0.5f : vf{} + 0.5f;
  const vi n = __builtin_convertvector(x * 1.44269504088896341f + half, vi);
  const vf nf = __builtin_convertvector(n, vf);
  vf r = x - nf * 0.693359375f;
  r = r + nf * 2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vi power = (n + 127) << 23;
  vf scale;
  memcpy(&scale, &power, sizeof scale);
  return p * scale;
}

INLINE float sum_lanes(vf v) {
  float s = 0;
  for (int i = 0; i < W; ++i) s += v[i];
  return s;
}

// ---- matmul: one block of 32 rows against B rows of activations -----------------------------------------------------

template <int B>
INLINE void dot_f32(const uint8_t* w, const uint8_t* x, size_t x_stride, int depth, vf (&acc)[B][NV]) {
  // Sums of 256 products, then their sum: one running sum over 2816 columns erred up to 3.7 times as much as PyTorch.
  for (int group = 0; group < depth; group += 256) {
    vf sum[B][NV] = {};
    const int end = group + 256 < depth ? group + 256 : depth;
    for (int k = group; k < end; ++k, w += kRowBlock * 4) {
      __builtin_prefetch(w + 2048);
      __builtin_prefetch(w + 2048 + 64);
      vf weight[NV];
      for (int i = 0; i < NV; ++i) weight[i] = load<vf>(w + i * sizeof(vf));
      for (int b = 0; b < B; ++b) {
        float value;
        memcpy(&value, x + b * x_stride + k * 4, 4);
        for (int i = 0; i < NV; ++i) sum[b][i] += weight[i] * value;
      }
    }
    for (int b = 0; b < B; ++b)
      for (int i = 0; i < NV; ++i) acc[b][i] += sum[b][i];
  }
}

template <int B>
INLINE void dot_bf16(const uint8_t* w, const uint8_t* x, size_t x_stride, int depth, vf (&acc)[B][NV]) {
  for (int k = 0; k < depth; k += 2, w += kRowBlock * 4) {
    __builtin_prefetch(w + 2048);
    __builtin_prefetch(w + 2048 + 64);
#if defined(SIREN_BF16_DOT)
    vu weight[NV];
    for (int i = 0; i < NV; ++i) weight[i] = load<vu>(w + i * sizeof(vu));
    for (int b = 0; b < B; ++b) {
      int32_t pair;
      memcpy(&pair, x + b * x_stride + k * 2, 4);
      const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
      for (int i = 0; i < NV; ++i) acc[b][i] = (vf)_mm512_dpbf16_ps((__m512)acc[b][i], (__m512bh)weight[i], value);
    }
#else
    vf even[NV], odd[NV];
    for (int i = 0; i < NV; ++i) {
      const vu pair = load<vu>(w + i * sizeof(vu));
      even[i] = even_bf16(pair);
      odd[i] = odd_bf16(pair);
    }
    for (int b = 0; b < B; ++b) {
      float value[2];
      memcpy(value, x + b * x_stride + k * 4, 8);
      for (int i = 0; i < NV; ++i) acc[b][i] += even[i] * value[0];
      for (int i = 0; i < NV; ++i) acc[b][i] += odd[i] * value[1];
    }
#endif
  }
}

// acc + w[2r] * x[0] + w[2r + 1] * x[1] for W rows r; w points to 2 * W int8.
INLINE vi dot_pairs(vi acc, const uint8_t* w, const uint8_t* x) {
#if defined(__AVX512F__)
  int32_t pair;
  memcpy(&pair, x, 4);
  const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w));
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpwssd_epi32((__m512i)acc, wide, _mm512_set1_epi32(pair));
#else
  return (vi)_mm512_add_epi32((__m512i)acc, _mm512_madd_epi16(wide, _mm512_set1_epi32(pair)));
#endif
#elif defined(__AVX2__)
  int32_t pair;
  memcpy(&pair, x, 4);
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w));
  return (vi)_mm256_add_epi32((__m256i)acc, _mm256_madd_epi16(wide, _mm256_set1_epi32(pair)));
#else
  int16_t value[2];
  memcpy(value, x, 4);
  for (int r = 0; r < W; ++r) acc[r] += static_cast<int8_t>(w[2 * r]) * value[0] + static_cast<int8_t>(w[2 * r + 1]) * value[1];
  return acc;
#endif
}

template <int B>
INLINE void dot_i8(const uint8_t* w, const uint8_t* x, size_t x_stride, int depth, vf (&acc)[B][NV]) {
  for (int group = 0; group < depth; group += kDepthUnit) {
    vi sum[B][NV] = {};
    for (int k = 0; k < kDepthUnit; k += 2, w += kRowBlock * 2) {
      __builtin_prefetch(w + 2048);
      for (int b = 0; b < B; ++b)
        for (int i = 0; i < NV; ++i) sum[b][i] = dot_pairs(sum[b][i], w + i * W * 2, x + b * x_stride + (group + k) * 2);
    }
    for (int b = 0; b < B; ++b) {
      float scale;
      memcpy(&scale, x + b * x_stride + depth * 2 + group / kDepthUnit * 4, 4);
      for (int i = 0; i < NV; ++i) acc[b][i] += __builtin_convertvector(sum[b][i], vf) * scale;
    }
  }
}

template <int B>
void block(const MatmulArgs& args, int index, int first) {
  const Matrix& m = *args.w;
  const uint8_t* w = m.data + m.block_bytes() * index;
  const uint8_t* x = args.x + first * args.x_stride;
  vf acc[B][NV] = {};
  if (m.format == Format::f32) dot_f32<B>(w, x, args.x_stride, m.depth, acc);
  else if (m.format == Format::bf16) dot_bf16<B>(w, x, args.x_stride, m.depth, acc);
  else dot_i8<B>(w, x, args.x_stride, m.depth, acc);

  const size_t row = static_cast<size_t>(index) * kRowBlock;
  for (int b = 0; b < B; ++b) {
    for (int i = 0; i < NV; ++i) {
      if (m.format == Format::i8) acc[b][i] = acc[b][i] * load<vf>(m.scale + row + i * W);
      if (m.bias) acc[b][i] = acc[b][i] + load<vf>(m.bias + row + i * W);
    }
    float* y = args.y + (first + b) * args.y_stride;
    if (args.epilogue == Epilogue::swiglu) {
      for (int i = 0; i < NV / 2; ++i) {
        const vf gate = acc[b][i];
        store(y + row / 2 + i * W, gate / (1.0f + exp_vec(-gate)) * acc[b][i + NV / 2]);
      }
    } else {
      for (int i = 0; i < NV; ++i) {
        const vf before = args.epilogue == Epilogue::add ? load<vf>(y + row + i * W) : vf{};
        store(y + row + i * W, before + acc[b][i]);
      }
    }
  }
}

void matmul(const MatmulArgs& args) {
  for (int index = args.block_begin; index < args.block_end; ++index) {
    int b = 0;
    for (; b + kBatch <= args.batch; b += kBatch) block<kBatch>(args, index, b);
    const int rest = args.batch - b;
    if constexpr (kBatch > 4)
      switch (rest) {
        case 7: block<7>(args, index, b); break;
        case 6: block<6>(args, index, b); break;
        case 5: block<5>(args, index, b); break;
        case 4: block<4>(args, index, b); break;
        case 3: block<3>(args, index, b); break;
        case 2: block<2>(args, index, b); break;
        case 1: block<1>(args, index, b); break;
      }
    else if (rest) block<1>(args, index, b);
  }
}

// ---- activations ----------------------------------------------------------------------------------------------------

#if defined(SIREN_BF16_DOT)
// to_bf16 of pack.cpp, here so that the loop over activations is vectorised.
uint16_t round_bf16(float value) {
  uint32_t u;
  memcpy(&u, &value, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(u >> 16 | 0x40);  // NaN stays NaN
  return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
#endif

void prepare(Format format, const float* x, int n, int depth, uint8_t* out) {
  if (format == Format::i8) {
    int16_t* fixed = reinterpret_cast<int16_t*>(out);
    float* scales = reinterpret_cast<float*>(out + depth * 2);
    for (int group = 0; group < depth; group += kDepthUnit) {
      float padded[kDepthUnit] = {};
      const int count = n - group < kDepthUnit ? n - group : kDepthUnit;
      if (count > 0) memcpy(padded, x + group, count * 4);
      vf top = {};
      bool finite = true;
      for (int i = 0; i < kDepthUnit; i += W) {
        vf v = load<vf>(padded + i);
        v = v < vf{} ? -v : v;
        top = v > top ? v : top;
      }
      float largest = 0;
      for (int i = 0; i < W; ++i) largest = top[i] > largest ? top[i] : largest;
      for (int i = 0; i < kDepthUnit; ++i) finite &= padded[i] - padded[i] == 0;
      const float scale = largest / 32767.0f;
      const float inverse = largest > 1e-30f ? 32767.0f / largest : 0.0f;  // below, the quotient could overflow
      // A NaN or infinity has no fixed-point form; the scale carries it to the output instead.
      scales[group / kDepthUnit] = finite ? scale : NAN;
      for (int i = 0; i < kDepthUnit; i += W) {
        const vf v = finite ? load<vf>(padded + i) * inverse : vf{};
        const vi rounded = __builtin_convertvector(v + (v < vf{} ? vf{} - 0.5f : vf{} + 0.5f), vi);
        store(fixed + group + i, __builtin_convertvector(rounded, vs));
      }
    }
    return;
  }
#if defined(SIREN_BF16_DOT)
  if (format == Format::bf16) {
    uint16_t* rounded = reinterpret_cast<uint16_t*>(out);
    for (int i = 0; i < n; ++i) rounded[i] = round_bf16(x[i]);
    memset(rounded + n, 0, (depth - n) * 2);
    return;
  }
#endif
  memcpy(out, x, n * 4);
  memset(out + n * 4, 0, (depth - n) * 4);
}

void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
  vf squares = {};
  int i = 0;
  for (; i + W <= n; i += W) {
    const vf v = load<vf>(x + i);
    squares += v * v;
  }
  float total = sum_lanes(squares);
  for (; i < n; ++i) total += x[i] * x[i];
  const float factor = 1.0f / sqrtf(total / static_cast<float>(n) + eps);
  for (i = 0; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

// ---- attention ------------------------------------------------------------------------------------------------------

// scores of N * 16 positions that follow one another
template <int N>
INLINE void score(const AttendArgs& args, const uint8_t* keys, float* out) {
  const int width = round_up(args.head_dim, 16);
  constexpr int V = kTimeBlock / W;
  vf acc[N][V] = {};
  if (args.format == Format::bf16) {
    const size_t step = static_cast<size_t>(width) * kTimeBlock * 2;
    for (int d = 0; d < args.head_dim; d += 2) {
      const float q0 = args.q[d], q1 = d + 1 < args.head_dim ? args.q[d + 1] : 0.0f;
      for (int n = 0; n < N; ++n)
        for (int i = 0; i < V; ++i) {
          const vu pair = load<vu>(keys + n * step + (d / 2 * kTimeBlock + i * W) * 4);
          acc[n][i] += even_bf16(pair) * q0;
          acc[n][i] += odd_bf16(pair) * q1;
        }
    }
  } else {
    const size_t step = static_cast<size_t>(width) * kTimeBlock * 4;
    for (int d = 0; d < args.head_dim; ++d)
      for (int n = 0; n < N; ++n)
        for (int i = 0; i < V; ++i) acc[n][i] += load<vf>(keys + n * step + (d * kTimeBlock + i * W) * 4) * args.q[d];
  }
  for (int n = 0; n < N; ++n)
    for (int i = 0; i < V; ++i) store(out + n * kTimeBlock + i * W, acc[n][i]);
}

// out[0, N * W) = sum over positions of probability * value, from column `from` of the values on
template <int N>
INLINE void weigh(const AttendArgs& args, int from, float* out) {
  const int width = round_up(args.head_dim, 16);
  const size_t size = weight_size(args.format);
  vf acc[N] = {};
  for (int start = 0; start < args.positions; start += args.page) {
    const uint8_t* values = args.chunks[start / args.page] + args.chunk_offset + (static_cast<size_t>(args.page) * width + from) * size;
    const int count = args.positions - start < args.page ? args.positions - start : args.page;
    for (int t = 0; t < count; ++t) {
      const float p = args.scores[start + t];
      const uint8_t* row = values + t * width * size;
      for (int i = 0; i < N; ++i)
        acc[i] += (args.format == Format::bf16 ? load_bf16(row + i * W * 2) : load<vf>(row + i * W * 4)) * p;
    }
  }
  for (int i = 0; i < N; ++i) store(out + i * W, acc[i]);
}

void attend(const AttendArgs& args) {
  const int width = round_up(args.head_dim, 16), n = args.positions;
  const size_t block_bytes = static_cast<size_t>(width) * kTimeBlock * weight_size(args.format);
  for (int start = 0; start < n; start += args.page) {
    const uint8_t* keys = args.chunks[start / args.page] + args.chunk_offset;
    const int blocks = ((n - start < args.page ? n - start : args.page) + kTimeBlock - 1) / kTimeBlock;
    int b = 0;
    for (; b + 4 <= blocks; b += 4) score<4>(args, keys + b * block_bytes, args.scores + start + b * kTimeBlock);
    for (; b < blocks; ++b) score<1>(args, keys + b * block_bytes, args.scores + start + b * kTimeBlock);
  }
  float* s = args.scores;
  float largest = s[0];
  for (int t = 1; t < n; ++t) largest = s[t] > largest ? s[t] : largest;
  const float scale = 1.0f / sqrtf(static_cast<float>(args.head_dim));
  const int whole = round_up(n, W);
  for (int t = n; t < whole; ++t) s[t] = -INFINITY;  // exp_vec turns these into about 1e-38, too little to matter
  vf total = {};
  for (int t = 0; t < whole; t += W) {
    vf p = exp_vec((load<vf>(s + t) - largest) * scale);
    if (t + W > n)
      for (int i = 0; i < W; ++i)
        if (t + i >= n) p[i] = 0;
    total += p;
    store(s + t, p);
  }
  const float inverse = 1.0f / sum_lanes(total);
  float out[64];
  for (int from = 0; from < width;) {
    const int step = width - from >= 64 ? 64 : 16;
    if (step == 64) weigh<64 / W>(args, from, out);
    else weigh<16 / W>(args, from, out);
    for (int i = 0; i < step && from + i < args.head_dim; ++i) args.out[from + i] = out[i] * inverse;
    from += step;
  }
}

void add_row(float* sum, const uint8_t* row, Format format, int n) {
  if (format == Format::f32) {
    const float* values = reinterpret_cast<const float*>(row);
    for (int i = 0; i < n; ++i) sum[i] += values[i];
    return;
  }
  int i = 0;
  for (; i + W <= n; i += W) store(sum + i, load<vf>(sum + i) + load_bf16(row + i * 2));
  for (; i < n; ++i) {
    uint16_t half;
    memcpy(&half, row + i * 2, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    memcpy(&value, &bits, 4);
    sum[i] += value;
  }
}

uint64_t read(const uint8_t* data, size_t bytes) {
  vu mixed[4] = {};
  for (size_t at = 0; at + 4 * sizeof(vu) <= bytes; at += 4 * sizeof(vu)) {
    for (size_t line = 0; line < 4 * sizeof(vu); line += 64) __builtin_prefetch(data + at + 2048 + line);
    for (int i = 0; i < 4; ++i) mixed[i] ^= load<vu>(data + at + i * sizeof(vu));
  }
  uint64_t result = 0;
  for (int i = 0; i < W; ++i) result ^= mixed[0][i] ^ mixed[1][i] ^ mixed[2][i] ^ mixed[3][i];
  return result;
}

#define SIREN_STRING_(x) #x
#define SIREN_STRING(x) SIREN_STRING_(x)
#define SIREN_TABLE_(isa) kernels_##isa
#define SIREN_TABLE(isa) SIREN_TABLE_(isa)

#if defined(SIREN_BF16_DOT)
constexpr bool kBf16Dot = true;
#else
constexpr bool kBf16Dot = false;
#endif

}  // namespace

extern const Kernels SIREN_TABLE(SIREN_ISA);
const Kernels SIREN_TABLE(SIREN_ISA) = {SIREN_STRING(SIREN_ISA), kBf16Dot, matmul, prepare, rms_norm, attend, add_row,
                                           read};

}  // namespace siren::cpu
