// Measures what the machine can do at most: multiply-adds from registers, and reading memory. Usage: ceilings <threads>
// Prints "<GFLOP/s> <GB/s>", each the median of half a second: a first burst may be faster than a processor stays.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / 4;
constexpr int kChains = 12;  // enough independent sums to hide the latency of a multiply-add
constexpr long kSteps = 10'000'000;
constexpr size_t kFloats = size_t(64) << 20;  // 256 MiB, beyond every cache

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class Work>
static double seconds(int threads, Work work) {
  std::vector<double> trials(25);
  for (double& trial : trials) {
    std::vector<std::thread> others;
    double start = now();
    for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
    work(0);
    for (auto& other : others) other.join();
    trial = now() - start;
  }
  std::nth_element(trials.begin(), trials.begin() + 12, trials.end());
  return trials[12];
}

static volatile float sink;

static void multiply_adds(int) {
  Vector sums[kChains] = {}, a, b;
  for (int i = 0; i < kLanes; ++i) a[i] = 0.999f, b[i] = 0.001f;
  for (int i = 0; i < kChains; ++i) sums[i] += float(i);  // distinct, or they would be computed once
  for (long step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sums[i] = sums[i] * a + b;
  }
  float total = 0;
  for (auto& sum : sums) total += sum[0];
  sink = total;
}

int main(int argc, char** argv) {
  int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  double flops = 2.0 * kLanes * kChains * kSteps * threads / seconds(threads, multiply_adds);
  std::vector<Vector> memory(kFloats / kLanes, Vector{});
  size_t share = memory.size() / threads;
  double bytes = double(share) * threads * kBytes / seconds(threads, [&](int t) {
                   Vector sums[8] = {};
                   const Vector* own = memory.data() + t * share;
                   for (size_t i = 0; i + 8 <= share; i += 8)
                     for (int j = 0; j < 8; ++j) sums[j] += own[i + j];
                   float total = 0;
                   for (auto& sum : sums) total += sum[0];
                   sink = total;
                 });
  std::printf("%.2f %.2f\n", flops * 1e-9, bytes * 1e-9);
}
