// Sharing items between threads: contiguous ranges, the same for the same counts.
#pragma once

namespace siren::cpu {

template <class F>
void split(int items, int threads, int thread, F each) {
  const int begin = static_cast<int>(static_cast<long long>(items) * thread / threads);
  const int end = static_cast<int>(static_cast<long long>(items) * (thread + 1) / threads);
  for (int item = begin; item < end; ++item) each(item);
}

}  // namespace siren::cpu
