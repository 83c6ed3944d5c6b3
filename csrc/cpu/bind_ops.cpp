#include "bind.h"
#include "split.h"
#include "weights.h"

namespace siren::cpu {
namespace {

// One packed matrix and the instruction path of its making.
class PackedMatrix {
 public:
  PackedMatrix(const Array<float>& values, const std::string& format, bool paired, int threads)
      : kernels_(pick_kernels()), pool_(Pool::get(threads)) {
    if (values.ndim() != 2 || values.shape(0) < 1 || values.shape(1) < 1) throw std::invalid_argument("weights must be [rows, cols]");
    matrix_.format = format_of(format);
    matrix_.rows = static_cast<int>(values.shape(0));
    matrix_.cols = static_cast<int>(values.shape(1));
    matrix_.paired = paired;
    if (paired && matrix_.rows % 2) throw std::invalid_argument("a paired matrix needs an even number of rows");
    matrix_.depth = round_up(matrix_.cols, kDepthUnit);
    const int unit = paired ? kRowBlock / 2 : kRowBlock;
    matrix_.blocks = ((paired ? matrix_.rows / 2 : matrix_.rows) + unit - 1) / unit;
    data_ = Buffer(matrix_.bytes());
    scale_ = Buffer(matrix_.blocks * kRowBlock * sizeof(float));
    matrix_.data = data_.data();
    matrix_.scale = scale_.floats();
    pack(matrix_, values.data(), 0, matrix_.blocks);
  }

  // x [batch, cols] -> y [batch, rows]; a paired matrix gives silu(gate) * value [batch, rows / 2].
  py::array_t<float> matmul(const Array<float>& x) const {
    if (x.ndim() != 2 || x.shape(0) < 1 || x.shape(1) != matrix_.cols) throw std::invalid_argument("x must be [batch, cols]");
    const int batch = static_cast<int>(x.shape(0)), outputs = matrix_.paired ? matrix_.rows / 2 : matrix_.rows;
    const size_t x_stride = prepared_bytes(matrix_.depth);
    const size_t y_stride = static_cast<size_t>(matrix_.blocks) * (matrix_.paired ? kRowBlock / 2 : kRowBlock);
    Buffer prepared(batch * x_stride), out(batch * y_stride * sizeof(float));
    const float* values = x.data();
    py::array_t<float> y({batch, outputs});
    float* result = y.mutable_data();
    {
      py::gil_scoped_release release;
      const int threads = pool_.threads();
      run_on(pool_, [&](int thread) {
        split(batch, threads, thread, [&](int b) {
          kernels_.prepare(matrix_.format, values + static_cast<size_t>(b) * matrix_.cols, matrix_.cols, matrix_.depth,
                           prepared.data() + b * x_stride);
        });
        pool_.barrier(thread);
        kernels_.matmul({&matrix_, prepared.data(), x_stride, batch, out.floats(), y_stride, matrix_.blocks * thread / threads,
                         matrix_.blocks * (thread + 1) / threads, matrix_.paired ? Epilogue::swiglu : Epilogue::store});
      });
      for (int b = 0; b < batch; ++b) std::copy_n(out.floats() + b * y_stride, outputs, result + static_cast<size_t>(b) * outputs);
    }
    return y;
  }

  size_t bytes() const { return matrix_.bytes(); }

 private:
  const Kernels& kernels_;
  Pool& pool_;
  Matrix matrix_;
  Buffer data_, scale_;
};

py::tuple draw_rows(const Array<float>& logits, const std::vector<uint64_t>& seeds, uint32_t frame, uint32_t codebook,
                    float temperature, int top_k, double top_p) {
  if (logits.ndim() != 2 || logits.shape(1) < 1 || static_cast<size_t>(logits.shape(0)) != seeds.size())
    throw std::invalid_argument("logits must be [seeds, codes]");
  const SamplingSettings settings = settings_of(temperature, top_k, top_p, 1.0f);
  const int n = static_cast<int>(logits.shape(1));
  py::array_t<int64_t> codes(seeds.size());
  py::array_t<float> logprobs(seeds.size());
  std::vector<float> noise(n);
  DrawScratch scratch(n);
  for (size_t s = 0; s < seeds.size(); ++s) {
    gumbel_noise(seeds[s], frame, codebook, n, noise.data());
    const Draw drawn = draw(logits.data() + s * n, n, noise.data(), settings, -1, scratch);
    codes.mutable_data()[s] = drawn.code;
    logprobs.mutable_data()[s] = drawn.logprob;
  }
  return py::make_tuple(codes, logprobs);
}

// Memory that is read through once a call, to measure the machine's bandwidth in the run that uses it.
class ReadTest {
 public:
  ReadTest(size_t bytes, int threads) : kernels_(pick_kernels()), pool_(Pool::get(threads)), data_(bytes) {
    std::fill_n(data_.data(), data_.bytes(), uint8_t{1});
  }
  uint64_t run() const {
    py::gil_scoped_release release;
    std::vector<uint64_t> results(pool_.threads());
    run_on(pool_, [&](int thread) {
      const size_t share = data_.bytes() / pool_.threads() / 64 * 64;
      results[thread] = kernels_.read(data_.data() + share * thread, share);
    });
    uint64_t all = 0;
    for (const uint64_t result : results) all ^= result;
    return all;
  }
  size_t bytes() const { return data_.bytes(); }

 private:
  const Kernels& kernels_;
  Pool& pool_;
  Buffer data_;
};

}  // namespace

void bind_ops(py::module_& m) {
  py::class_<PackedMatrix>(m, "PackedMatrix")
      .def(py::init<const Array<float>&, const std::string&, bool, int>(), py::arg("values").noconvert(), py::arg("weights"),
           py::arg("paired") = false, py::arg("threads") = 1)
      .def("matmul", &PackedMatrix::matmul, py::arg("x").noconvert())
      .def_property_readonly("bytes", &PackedMatrix::bytes);
  py::class_<ReadTest>(m, "ReadTest")
      .def(py::init<size_t, int>(), py::arg("size"), py::arg("threads"))
      .def("run", &ReadTest::run)
      .def_property_readonly("bytes", &ReadTest::bytes);
  m.def("draw", &draw_rows, py::arg("logits").noconvert(), py::arg("seeds"), py::arg("frame"), py::arg("codebook"),
        py::arg("temperature"), py::arg("top_k"), py::arg("top_p"));
  m.def("gumbel_noise", [](uint64_t seed, uint32_t frame, uint32_t codebook, int n) {
    if (n < 1) throw std::invalid_argument("n must be at least 1");
    py::array_t<float> noise(n);
    gumbel_noise(seed, frame, codebook, n, noise.mutable_data());
    return noise;
  });
}

}  // namespace siren::cpu
