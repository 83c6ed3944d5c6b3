// The persistent kernel's launches, for a caller that knows no CUDA: bind_cuda.cpp calls these, launch.cu has them.
// Errors of CUDA are std::runtime_error with CUDA's own words.
#pragma once

#include <string>

#include "program.h"

namespace siren::cuda {

struct Properties {
  int sms;           // multiprocessors
  int shared_bytes;  // of shared memory that one block may ask for
  int major, minor;  // compute capability
  std::string name;
};

Properties properties(int device);

// A launch under way, with the memory that is its own: progress, control and the host's words.
struct Launch;

// Starts the kernel on `stream` (a cudaStream_t) of `device` and returns at once. The arguments' progress, control and
// host are not read. `stages` is not read either: the ring gets as many as fit.
Launch* launch(const Arguments& arguments, void* stream, int device);

// Whether the kernel has ended, also in an error. Never blocks, never throws.
bool finished(Launch* launch);

// Frames that are complete: their codes may be read. Never blocks, never throws.
int frames_done(Launch* launch);

// Asks the kernel to end after the frame that it is in. Never blocks, never throws.
void cancel(Launch* launch);

// Waits for the end and frees everything, also when it throws: std::runtime_error after an error of CUDA or when the
// kernel gave up on a wait ("operation N on SM s of frame f waited for too long"). A cancelled launch is no error.
void finish(Launch* launch);

}  // namespace siren::cuda
