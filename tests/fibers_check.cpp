// Small kernels for csrc/cuda/fibers.cpp and host.h. tests/test_fibers.py compiles this and runs it with several seeds:
//   fibers_check NAME SEED
// It prints "ok", or what went wrong and returns 1.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda/primitives.h"

using namespace siren::cuda;
using siren::fibers::Scheduler;

namespace {

#define CHECK(condition) \
  if (!(condition)) throw std::runtime_error("line " + std::to_string(__LINE__) + ": " #condition)

constexpr int kShared = 65536;

void run(int blocks, uint64_t seed, const std::function<void()>& kernel, int64_t idle_limit = 1000) {
  Scheduler(blocks, kShared, seed, idle_limit).run(kernel);
}

// What `kernel` is refused with, which must hold `words`.
void refused(int blocks, uint64_t seed, const std::string& words, const std::function<void()>& kernel) {
  try {
    run(blocks, seed, kernel);
  } catch (const std::runtime_error& error) {
    if (std::string(error.what()).find(words) == std::string::npos)
      throw std::runtime_error("\"" + words + "\" is not in: " + error.what());
    return;
  }
  throw std::runtime_error("nothing was said of: " + words);
}

// Nobody passes a barrier before all have come, many times over; shared memory starts out as NaN and is a block's own.
void barriers(uint64_t seed) {
  run(3, seed, [] {
    auto* counts = reinterpret_cast<int*>(shared_memory());
    CHECK(counts[thread()] == -1);
    CHECK(reinterpret_cast<uintptr_t>(counts) % 128 == 0);
    block_sync();
    counts[thread()] = 0;
    block_sync();
    for (int round = 1; round <= 20; ++round) {
      counts[thread()] = round;
      if (thread() < kWorkers) {
        worker_sync();
        for (int other = 0; other < kWorkers; ++other) CHECK(counts[other] == round);
        worker_sync();
      }
    }
    block_sync();
    for (int other = 0; other < kThreads; ++other) CHECK(counts[other] == 20);
  });
}

void shuffles(uint64_t seed) {
  run(2, seed, [] {
    for (int mask = 0; mask < 32; ++mask) {
      const int other = thread() - lane() + (lane() ^ mask);
      CHECK(shuffle_xor(thread() * 3, mask) == other * 3);
      CHECK(shuffle_xor(thread() + 0.5f, mask) == other + 0.5f);
      CHECK(shuffle_xor(thread() + 1e-9, mask) == other + 1e-9);
      CHECK(shuffle(thread() * 7, mask) == (thread() - lane() + mask) * 7);
      warp_sync();
    }
    double sum = thread();
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    CHECK(sum == 32 * (thread() - lane()) + 31 * 16);
  });
}

// Fragments are filled as the PTX manual lays them out, with values that bf16 has exactly; the sums are bit for bit
// those of a plain loop over k.
void products(uint64_t seed) {
  std::mt19937 random(static_cast<unsigned>(seed));
  std::normal_distribution<float> normal;
  float a[16][16], b[16][8], c[16][8], wanted[16][8], got[16][8];
  for (auto& row : a)
    for (float& value : row) value = low_bf16(pack_bf16(normal(random), 0));
  for (auto& row : b)
    for (float& value : row) value = low_bf16(pack_bf16(normal(random), 0));
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      wanted[m][n] = c[m][n] = normal(random);
      for (int k = 0; k < 16; ++k) wanted[m][n] += a[m][k] * b[k][n];
    }
  run(1, seed, [&] {
    const int g = lane() / 4, t = lane() % 4;
    const auto pair = [](const float (&row)[16], int k) { return pack_bf16(row[k], row[k + 1]); };
    const uint32_t left[4] = {pair(a[g], 2 * t), pair(a[g + 8], 2 * t), pair(a[g], 2 * t + 8),
                              pair(a[g + 8], 2 * t + 8)};
    const uint32_t right[2] = {pack_bf16(b[2 * t][g], b[2 * t + 1][g]), pack_bf16(b[2 * t + 8][g], b[2 * t + 9][g])};
    float sums[4] = {c[g][2 * t], c[g][2 * t + 1], c[g + 8][2 * t], c[g + 8][2 * t + 1]};
    mma(sums, left, right);
    if (warp() != 0) return;
    got[g][2 * t] = sums[0];
    got[g][2 * t + 1] = sums[1];
    got[g + 8][2 * t] = sums[2];
    got[g + 8][2 * t + 1] = sums[3];
  });
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) CHECK(got[m][n] == wanted[m][n]);
}

// A warp streams 100 pieces through a ring of three stages, and eight warps read them in order.
void ring(uint64_t seed) {
  constexpr int kStages = 3, kPieces = 100, kBytes = 1024;
  std::vector<Words> tape(2 * kPieces * kBytes / sizeof(Words));
  auto* words = reinterpret_cast<uint32_t*>(tape.data());
  for (size_t i = 0; i < 4 * tape.size(); ++i) words[i] = static_cast<uint32_t>(i * 2654435761u);
  run(2, seed, [&] {
    auto* full = reinterpret_cast<uint64_t*>(shared_memory());
    uint64_t* empty = full + kStages;
    uint8_t* data = shared_memory() + 128;
    if (thread() == 0) {
      for (int s = 0; s < kStages; ++s) {
        mbarrier_init(full + s, copy_arrivals());
        mbarrier_init(empty + s, kWarps);
      }
      mbarrier_fence();
    }
    block_sync();
    const uint8_t* from = reinterpret_cast<const uint8_t*>(words) + block() * kPieces * kBytes;
    for (int piece = 0; piece < kPieces; ++piece) {
      const int stage = piece % kStages, round = piece / kStages;
      uint8_t* at = data + stage * kBytes;
      if (warp() == kWarps) {
        while (!mbarrier_try(empty + stage, (round - 1) & 1)) relax();
        warp_sync();
        mbarrier_expect(full + stage, kBytes);
        copy_bulk(at, from + piece * kBytes, kBytes / 2, full + stage);
        copy_bulk(at + kBytes / 2, from + piece * kBytes + kBytes / 2, kBytes / 2, full + stage);
      } else {
        while (!mbarrier_try(full + stage, round & 1)) relax();
        for (int i = lane(); i < kBytes / 4; i += 32)
          CHECK(reinterpret_cast<uint32_t*>(at)[i] == reinterpret_cast<const uint32_t*>(from + piece * kBytes)[i]);
        warp_sync();
        if (lane() == 0) mbarrier_arrive(empty + stage);
      }
    }
  });
}

// Blocks add up what the others published, phase by phase; each phase needs all of the one before.
// `wait` false leaves the wait out: then some seed must compute something else.
bool exchange_is_right(uint64_t seed, bool wait) {
  constexpr int kBlocks = 5, kPhases = 12;
  std::vector<uint32_t> progress(kBlocks), values(2 * kBlocks, 1);
  run(kBlocks, seed, [&] {
    for (uint32_t phase = 0; phase < kPhases; ++phase) {
      if (wait && thread() < kBlocks)
        while (load_acquire(&progress[thread()]) < phase) relax();
      block_sync();
      if (thread() == 0) {
        uint32_t sum = static_cast<uint32_t>(block());
        for (int other = 0; other < kBlocks; ++other) sum += values[phase % 2 * kBlocks + other];
        values[(phase + 1) % 2 * kBlocks + block()] = sum;
      }
      block_sync();
      if (thread() == 0) store_release(&progress[block()], phase + 1);
    }
  });
  std::vector<uint32_t> now(kBlocks, 1);
  for (int phase = 0; phase < kPhases; ++phase) {
    std::vector<uint32_t> next(kBlocks);
    for (int b = 0; b < kBlocks; ++b) {
      next[b] = static_cast<uint32_t>(b);
      for (const uint32_t value : now) next[b] += value;
    }
    now = next;
  }
  bool right = true;
  for (int b = 0; b < kBlocks; ++b) right &= values[kPhases % 2 * kBlocks + b] == now[b];
  return right;
}

void exchange(uint64_t seed) { CHECK(exchange_is_right(seed, true)); }
void missing_wait(uint64_t seed) { CHECK(!exchange_is_right(seed, false)); }

void deadlocks(uint64_t seed) {
  refused(2, seed, "deadlock: 255 threads wait: 31 of block 1, warp 0 in worker_sync", [] {
    if (thread() < kWorkers && !(block() == 1 && thread() == 5) && block() == 1) worker_sync();
  });
  refused(1, seed, "deadlock: 31 threads wait: 31 of block 0, warp 3 in mma", [] {
    float c[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    if (thread() != 100) mma(c, a, b);
  });
  uint32_t never = 0;
  refused(1, seed, "in a poll", [&] {
    while (load_acquire(&never) == 0) relax();
  });
  refused(1, seed, "in a poll of an mbarrier", [] {
    auto* barrier = reinterpret_cast<uint64_t*>(shared_memory());
    if (thread() == 0) mbarrier_init(barrier, 2);
    block_sync();
    if (thread() == 7) mbarrier_arrive(barrier);
    while (!mbarrier_try(barrier, 0)) relax();
  });
  // A kernel that counts its polls ends by itself.
  int given_up = 0;
  run(2, seed, [&] {
    for (int spins = 0; spins < 500 && load_acquire(&never) == 0; ++spins) relax();
    ++given_up;
  });
  CHECK(given_up == 2 * kThreads);
}

void misuses(uint64_t seed) {
  alignas(128) static uint8_t source[256];
  const auto with_barrier = [](void (*body)(uint64_t*)) {
    return [body] {
      auto* barrier = reinterpret_cast<uint64_t*>(shared_memory());
      if (thread() == 0) mbarrier_init(barrier, 1);
      block_sync();
      if (warp() == kWarps) body(barrier);
    };
  };
  refused(1, seed, "worker_sync is for the first 256 threads", [] { worker_sync(); });
  refused(1, seed, "while other lanes of the warp are in", [] { lane() < 5 ? warp_sync() : (void)shuffle(1, 2); });
  refused(1, seed, "shuffle_xor of int with lane", [] { shuffle_xor(1, 32); });
  refused(1, seed, "a bulk copy of 24 bytes",
          with_barrier([](uint64_t* b) { copy_bulk(shared_memory() + 128, source, 24, b); }));
  refused(1, seed, "not aligned",
          with_barrier([](uint64_t* b) { copy_bulk(shared_memory() + 128, source + 8, 32, b); }));
  refused(1, seed, "outside the block's shared memory",
          with_barrier([](uint64_t* b) { copy_bulk(shared_memory() + kShared - 16, source, 32, b); }));
  refused(1, seed, "want different copies",
          with_barrier([](uint64_t* b) { copy_bulk(shared_memory() + 128 + 16 * lane(), source, 16, b); }));
  refused(1, seed, "not an mbarrier", with_barrier([](uint64_t* b) { mbarrier_arrive(b + 1); }));
  refused(8, seed, "with copies into its shared memory under way", with_barrier([](uint64_t* b) {
            mbarrier_expect(b, 256 * 100);
            for (int i = 0; i < 100; ++i) copy_bulk(shared_memory() + 128 + 256 * i, source, 256, b);
          }));
  refused(1, seed, "an arrival too many", with_barrier([](uint64_t* b) {
            mbarrier_expect(b, 16);  // the phase lasts until 16 bytes have come
            mbarrier_arrive(b);
          }));
  refused(1, seed, "a load of 16 bytes", [] { load4(reinterpret_cast<const float*>(source + 4)); });
  refused(1, seed, "the stack", [] {
    volatile char large[65536];
    for (int i = 65535; i >= 0; i -= 64) large[i] = 1;
    warp_sync();
    static_cast<void>(large[0]);
  });
  refused(1, seed, "from the kernel", [] {
    if (thread() == 77) throw std::runtime_error("from the kernel");
    block_sync();
  });
}

// Two grids in two threads, and one after the other in the same.
void threads(uint64_t seed) {
  std::string first, second;
  const auto work = [seed](std::string* said) {
    try {
      ring(seed);
      exchange(seed);
    } catch (const std::exception& error) {
      *said = error.what();
    }
  };
  std::thread one(work, &first), two(work, &second);
  one.join();
  two.join();
  CHECK(first.empty());
  CHECK(second.empty());
}

// Another thread stops a grid that would go on for ever.
void stop(uint64_t seed) {
  uint32_t counter = 0;
  Scheduler scheduler(1, kShared, seed, 1000);
  std::thread one([&] {
    scheduler.run([&] {
      for (;;) {
        store_release(&counter, counter + 1);
        warp_sync();
      }
    });
  });
  scheduler.stop();
  one.join();
}

void widening(uint64_t) {
  for (int byte = 0; byte < 256; ++byte) {
    const uint32_t other = (byte * 37u + 11u) & 255;
    const uint32_t pair = byte | other << 16 | 0xa500c300u;
    CHECK(low_bf16(widen_int8(pair)) == static_cast<int8_t>(byte));
    CHECK(high_bf16(widen_int8(pair)) == static_cast<int8_t>(other));
    const auto value = [](uint32_t bits) -> double {
      const int exponent = bits >> 3 & 15;
      const double mantissa = (bits & 7) / 8.0;
      const double size = exponent ? std::pow(2.0, exponent - 7) * (1 + mantissa) : std::pow(2.0, -6) * mantissa;
      return bits & 128 ? -size : size;
    };
    const uint32_t wide = widen_fp8(pair);
    for (const auto& [bits, got] : {std::pair<uint32_t, float>(byte, low_bf16(wide)), {other, high_bf16(wide)}}) {
      if ((bits & 127) == 127) {
        CHECK(std::isnan(got));
      } else {
        CHECK(got == value(bits));
        CHECK(std::signbit(got) == (bits >> 7 == 1));
      }
    }
  }
  CHECK(pack_bf16(1.0f, -2.0f) == 0xc0003f80u);
  CHECK(pack_bf16(1.00390625f, 1.01171875f) == 0x3f823f80u);  // ties go to the even one
  CHECK(pack_bf16(NAN, 3.4e38f) == 0x7f807fffu);
}

// Not a test: nanoseconds of a switch, and microseconds of a grid that does nothing.
void cost(uint64_t seed) {
  for (const int blocks : {1, 13, 132}) {
    const uint64_t begin = nanoseconds();
    for (int i = 0; i < 10; ++i) run(blocks, seed, [] { block_sync(); });
    std::printf("%d blocks: %.0f us for a grid\n", blocks, static_cast<double>(nanoseconds() - begin) / 1e4);
  }
  for (const int blocks : {1, 8, 132}) {
    Scheduler scheduler(blocks, kShared, seed, 1000);
    const uint64_t begin = nanoseconds();
    scheduler.run([blocks] {
      int sum = thread();
      for (int i = 0; i < 40000 / blocks; ++i) {
        sum += shuffle_xor(sum, 1 + i % 31);
        if (i % 16 == 0 && thread() < kWorkers) worker_sync();
      }
      if (sum == 12345) std::printf(" ");
    });
    std::printf("%d blocks: %.1f ns a switch, of %lld\n", blocks,
                static_cast<double>(nanoseconds() - begin) / static_cast<double>(scheduler.switches()),
                static_cast<long long>(scheduler.switches()));
  }
}

}  // namespace

int main(int count, char** words) {
  const std::map<std::string, void (*)(uint64_t)> checks = {
      {"barriers", barriers}, {"shuffles", shuffles},   {"products", products}, {"ring", ring},
      {"exchange", exchange}, {"deadlocks", deadlocks}, {"misuses", misuses},   {"threads", threads},
      {"widening", widening}, {"stop", stop},           {"cost", cost},         {"missing_wait", missing_wait}};
  if (count != 3 || !checks.count(words[1])) {
    std::printf("fibers_check NAME SEED\n");
    return 2;
  }
  try {
    checks.at(words[1])(std::strtoull(words[2], nullptr, 10));
  } catch (const std::exception& error) {
    std::printf("%s, seed %s: %s\n", words[1], words[2], error.what());
    return 1;
  }
  std::printf("ok\n");
  return 0;
}
