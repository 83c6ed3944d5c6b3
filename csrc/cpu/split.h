// Sharing items between threads: contiguous ranges, the same for the same counts.
#pragma once

#include "pool.h"

namespace siren::cpu {

// body(thread) on every thread of the pool.
template <class F>
void run_on(Pool& pool, F body) {
  pool.run([](void* context, int thread) { (*static_cast<F*>(context))(thread); }, &body);
}

template <class F>
void split(int items, int threads, int thread, F each) {
  const int begin = static_cast<int>(static_cast<long long>(items) * thread / threads);
  const int end = static_cast<int>(static_cast<long long>(items) * (thread + 1) / threads);
  for (int item = begin; item < end; ++item) each(item);
}

}  // namespace siren::cpu
