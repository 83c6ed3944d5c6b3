// The Python module siren._cpu. Everything is checked here or in siren/engine.py before a pointer is used.
#include "bind.h"

#include <mutex>

#include "engine.h"

using namespace siren;
using namespace siren::cpu;

namespace {

void expect_codes(const int64_t* codes, py::ssize_t count, const ModelConfig& config) {
  for (py::ssize_t i = 0; i < count; ++i)
    if (codes[i] < 0 || codes[i] >= config.codes) throw std::invalid_argument("a code is outside the codebook");
}

ModelConfig config_of(const py::dict& values) {
  ModelConfig c;
  const auto number = [&](const char* name) { return values[name].cast<int>(); };
  c.dim = number("dim");
  c.heads = number("heads");
  c.kv_heads = number("kv_heads");
  c.backbone_blocks = number("backbone_blocks");
  c.decoder_blocks = number("decoder_blocks");
  c.hidden = number("hidden");
  c.prompt_dim = number("prompt_dim");
  c.codebooks = number("codebooks");
  c.experts = number("experts");
  c.codes = number("codes");
  c.max_frames = number("max_frames");
  c.max_prompt = number("max_prompt");
  c.norm_eps = values["norm_eps"].cast<float>();
  c.conditioning = static_cast<Conditioning>(number("conditioning"));
  c.learned_start = values["learned_start"].cast<bool>();
  for (const int size : {c.dim, c.heads, c.kv_heads, c.backbone_blocks, c.hidden, c.prompt_dim, c.codebooks, c.experts, c.codes,
                         c.max_frames, c.max_prompt})
    if (size <= 0) throw std::invalid_argument("a size in the configuration is not above 0");
  if (c.decoder_blocks < 0 || c.dim % c.heads || c.heads % c.kv_heads || c.codebooks % c.experts)
    throw std::invalid_argument("the configuration's sizes do not divide");
  return c;
}

// A session for Python. The lock is held for one frame at a time, never while waiting for the GIL: threads that step one
// session take turns, and a callback or another thread may read it between frames.
class PySession {
 private:
  template <class F>
  auto locked(F body) {
    py::gil_scoped_release release;
    std::lock_guard<std::mutex> lock(turn_);
    return body();
  }

  // [frame][sequence][codebook] -> [sequence, codebook, frame]
  template <class Values>
  auto turned(Values values_of) {
    size_t sequences = 0;
    const size_t codebooks = session_.engine().config().codebooks;
    const auto values = locked([&] {
      sequences = session_.sequences();
      return values_of();
    });
    const size_t each = sequences * codebooks, frames = values.size() / each;
    using T = typename std::decay_t<decltype(values)>::value_type;
    py::array_t<T> out({sequences, codebooks, frames});
    T* data = out.mutable_data();
    for (size_t t = 0; t < frames; ++t)
      for (size_t i = 0; i < each; ++i) data[i * frames + t] = values[t * each + i];
    return out;
  }

 public:
  template <class... Args>
  explicit PySession(Args&&... args) : session_(std::forward<Args>(args)...) {}

  // `frames` frames, asking Python after each whether to go on. forced [sequences, codebooks, frames] or None; returns
  // logits [sequences, codebooks, frames, codes] when forced, else None.
  py::object step(int frames, const py::object& on_frame, const py::object& forced) {
    const ModelConfig& c = session_.engine().config();
    if (frames < 1 || frames > c.max_frames) throw std::invalid_argument("frames must be from 1 to max_seq_len");
    const size_t sequences = batch(), width = c.codes, each = sequences * c.codebooks;
    if (frame() + frames > c.max_frames) throw std::invalid_argument("the session would exceed max_seq_len frames");
    std::vector<int64_t> wanted, codes;  // a copy: the caller's array may change between frames
    py::array_t<float> logits;
    std::vector<float> row_logits;
    const bool given = !forced.is_none();
    if (given) {
      const auto array = forced.cast<Array<int64_t>>();
      const int64_t* data = expect(array, "codes", {static_cast<py::ssize_t>(sequences), c.codebooks, frames});
      wanted.assign(data, data + array.size());
      expect_codes(wanted.data(), array.size(), c);
      logits = py::array_t<float>({sequences, static_cast<size_t>(c.codebooks), static_cast<size_t>(frames), width});
      codes.resize(each);
      row_logits.resize(each * width);
    }
    for (int done = 0; done < frames; ++done) {
      for (size_t i = 0; i < codes.size(); ++i) codes[i] = wanted[i * frames + done];
      locked([&] {
        if (static_cast<size_t>(session_.sequences()) != sequences)
          throw std::invalid_argument("select was called while the session was stepping");
        session_.step(given ? codes.data() : nullptr, given ? row_logits.data() : nullptr);
      });
      for (size_t i = 0; i < codes.size(); ++i)
        std::copy_n(row_logits.data() + i * width, width, logits.mutable_data() + (i * frames + done) * width);
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (!on_frame.is_none()) on_frame(done + 1, frames);
    }
    return given ? py::object(logits) : py::object(py::none());
  }

  void select(const std::vector<int>& indices, const std::vector<uint64_t>& seeds) {
    if (indices.empty()) throw std::invalid_argument("select needs at least one index");
    if (!seeds.empty() && seeds.size() != indices.size()) throw std::invalid_argument("select needs one seed for each index");
    locked([&] {
      for (const int index : indices)
        if (index < 0 || index >= session_.sequences()) throw std::invalid_argument("select: index out of range");
      session_.select(indices, seeds);
    });
  }

  py::array_t<int64_t> codes() { return turned([this]() -> const std::vector<int64_t>& { return session_.codes(); }); }
  py::array_t<float> logprobs() { return turned([this]() -> const std::vector<float>& { return session_.logprobs(); }); }
  int batch() { return locked([this] { return session_.sequences(); }); }
  int64_t frame() { return locked([this] { return session_.frames(); }); }
  size_t cache_bytes() { return locked([this] { return session_.cache_bytes(); }); }

 private:
  Session session_;
  std::mutex turn_;
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Siren's CPU engine. Use it through siren.Sampler.";
  py::register_exception<BadLogits>(m, "BadLogits", PyExc_RuntimeError);
  bind_ops(m);
  m.def("instruction_path", [] { return std::string(pick_kernels().name); }, "The path an engine made now would take.");

  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine")
      .def(py::init([](const py::dict& config, const std::string& format, int threads) {
        if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must be from 1 to 1024");
        return std::make_shared<Engine>(config_of(config), format_of(format), threads);
      }))
      .def("load",
           [](Engine& engine, int expert, const std::string& name, const Array<float>& values) {
             if (values.ndim() != 2) throw std::invalid_argument(name + " must have two dimensions");
             const float* data = values.data();
             const size_t rows = values.shape(0), cols = values.shape(1);
             py::gil_scoped_release release;
             engine.weights.load(expert, name, data, rows, cols, engine.pool);
           },
           py::arg("expert"), py::arg("name"), py::arg("values").noconvert())
      .def("set_positions", [](Engine& engine, const Array<float>& rows) { engine.set_positions(rows.data(), rows.size()); },
           py::arg("rows").noconvert())
      .def("check_complete", &Engine::check_complete)
      .def("start",
           [](const std::shared_ptr<Engine>& engine, const Array<float>& prompts, const Array<uint8_t>& mask,
              const std::vector<uint64_t>& seeds, float temperature, int top_k, double top_p, float guidance) {
             const ModelConfig& c = engine->config();
             engine->check_complete();
             if (prompts.ndim() != 3 || prompts.shape(0) < 1 || prompts.shape(1) < 1 || prompts.shape(1) > c.max_prompt)
               throw std::invalid_argument("prompts has the wrong shape");
             const int sequences = static_cast<int>(prompts.shape(0)), tokens = static_cast<int>(prompts.shape(1));
             const float* values = expect(prompts, "prompts", {sequences, tokens, c.prompt_dim});
             const uint8_t* used = expect(mask, "mask", {sequences, tokens});
             for (int s = 0; s < sequences; ++s) {
               bool any = false;
               for (int p = 0; p < tokens; ++p) any |= used[static_cast<size_t>(s) * tokens + p] != 0;
               if (!any) throw std::invalid_argument("a mask row has no token");
             }
             if (seeds.size() != static_cast<size_t>(sequences)) throw std::invalid_argument("one seed for each sequence");
             const SamplingSettings settings = settings_of(temperature, top_k, top_p, guidance);
             py::gil_scoped_release release;
             return std::make_shared<PySession>(engine, values, used, sequences, tokens, seeds, settings);
           },
           py::arg("prompts").noconvert(), py::arg("mask").noconvert(), py::arg("seeds"), py::arg("temperature"),
           py::arg("top_k"), py::arg("top_p"), py::arg("guidance"))
      .def("residual",
           [](const Engine& engine, const Array<float>& h, const Array<float>& start, const std::vector<uint64_t>& seeds,
              const Array<int64_t>& frame, float temperature, int top_k, double top_p) {
             const ModelConfig& c = engine.config();
             engine.check_complete();
             const int sequences = static_cast<int>(seeds.size());
             if (sequences < 1) throw std::invalid_argument("at least one sequence is needed");
             const float* hidden = expect(h, "h", {c.experts, sequences, c.dim});
             const float* begin = expect(start, "start", {c.experts, sequences, c.dim});
             const int64_t* index = expect(frame, "frame", {sequences});
             const SamplingSettings settings = settings_of(temperature, top_k, top_p, 1.0f);
             py::array_t<int64_t> codes({sequences, c.codebooks});
             py::array_t<float> logprobs({sequences, c.codebooks});
             py::array_t<float> inputs({c.experts, sequences, c.dim});
             int64_t* code_data = codes.mutable_data();
             float *logprob_data = logprobs.mutable_data(), *input_data = inputs.mutable_data();
             {
               py::gil_scoped_release release;
               residual_frame(engine, hidden, begin, seeds.data(), index, sequences, settings, code_data, logprob_data, input_data);
             }
             return py::make_tuple(codes, logprobs, inputs);
           },
           py::arg("h").noconvert(), py::arg("start").noconvert(), py::arg("seeds"), py::arg("frame").noconvert(),
           py::arg("temperature"), py::arg("top_k"), py::arg("top_p"))
      .def("describe", [](const Engine& engine) {
        py::dict d;
        d["instructions"] = engine.kernels.name;
        d["threads"] = engine.threads();
        d["weight_bytes"] = engine.weights.bytes();
        d["backbone_bytes"] = engine.weights.backbone_bytes();
        d["decoder_bytes"] = engine.weights.decoder_bytes();
        d["head_bytes"] = engine.weights.head_bytes();
        return d;
      });

  py::class_<PySession, std::shared_ptr<PySession>>(m, "Session")
      .def("step", &PySession::step, py::arg("frames"), py::arg("on_frame"), py::arg("forced"))
      .def("select", &PySession::select, py::arg("indices"), py::arg("seeds"))
      .def_property_readonly("codes", &PySession::codes)
      .def_property_readonly("logprobs", &PySession::logprobs)
      .def_property_readonly("frame", &PySession::frame)
      .def_property_readonly("batch", &PySession::batch)
      .def_property_readonly("cache_bytes", &PySession::cache_bytes);
}
