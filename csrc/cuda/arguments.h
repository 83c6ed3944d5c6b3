// A launch's Arguments from a Python dict that names them. Used by the emulator's and the GPU's module.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <type_traits>

#include "program.h"

namespace siren::cuda {

namespace py = pybind11;

// Pointers are Python ints, 0 for null. KeyError for a name that is missing or unknown, ValueError for a value that is
// no number or does not fit. `progress`, `control`, `host` and `layout` are the launch's, and not in the dict.
inline Arguments arguments_of(const py::dict& values) {
  Arguments args{};
  size_t known = 0;
  py::list names;
  const auto read = [&](const char* name, auto& field) {
    using Field = std::decay_t<decltype(field)>;
    names.append(name);
    if (!values.contains(name)) throw py::key_error(std::string("arguments lacks ") + name);
    ++known;
    try {
      if constexpr (std::is_pointer_v<Field>)
        field = reinterpret_cast<Field>(values[name].cast<uintptr_t>());
      else
        field = values[name].cast<Field>();
    } catch (const py::cast_error&) {
      throw py::value_error("arguments: " + std::string(name) + " cannot be " + std::string(py::repr(values[name])));
    }
  };
#define SIREN_READ(name) read(#name, args.name)
  SIREN_READ(instructions);
  SIREN_READ(starts);
  SIREN_READ(tape);
  SIREN_READ(vectors);
  SIREN_READ(tables);
  SIREN_READ(sos);
  SIREN_READ(positions);
  SIREN_READ(arena);
  SIREN_READ(keys);
  SIREN_READ(values);
  SIREN_READ(prompt_keys);
  SIREN_READ(prompt_values);
  SIREN_READ(prompt_index);
  SIREN_READ(prompt_length);
  SIREN_READ(seeds);
  SIREN_READ(noise_frames);
  SIREN_READ(forced);
  SIREN_READ(codes_out);
  SIREN_READ(logprobs_out);
  SIREN_READ(trace);
  SIREN_READ(h);
  SIREN_READ(start);
  SIREN_READ(total);
  SIREN_READ(logits);
  SIREN_READ(noise);
  SIREN_READ(codes);
  SIREN_READ(dkv);
  SIREN_READ(dx);
  SIREN_READ(sms);
  SIREN_READ(operations);
  SIREN_READ(frames);
  SIREN_READ(first_operation);
  SIREN_READ(last_operation);
  SIREN_READ(first_frame);
  SIREN_READ(sequences);
  SIREN_READ(rows);
  SIREN_READ(dim);
  SIREN_READ(heads);
  SIREN_READ(kv_heads);
  SIREN_READ(head_dim);
  SIREN_READ(hidden);
  SIREN_READ(backbone_blocks);
  SIREN_READ(decoder_blocks);
  SIREN_READ(codebooks);
  SIREN_READ(experts);
  SIREN_READ(codes_per_codebook);
  SIREN_READ(capacity);
  SIREN_READ(prompts);
  SIREN_READ(prompt_capacity);
  SIREN_READ(conditioning);
  SIREN_READ(format);
  SIREN_READ(stages);
  SIREN_READ(staged_bytes);
  SIREN_READ(spin_limit);
  SIREN_READ(temperature);
  SIREN_READ(guidance);
  SIREN_READ(eps);
  SIREN_READ(top_k);
  SIREN_READ(top_p);
#undef SIREN_READ
  static_assert(sizeof(Arguments) == 376 + sizeof(Layout), "a field was added to Arguments: read it here");
  if (known != values.size()) {
    for (const auto& item : values)
      if (!names.contains(item.first)) throw py::key_error("arguments: unknown " + std::string(py::str(item.first)));
  }
  return args;
}

}  // namespace siren::cuda
