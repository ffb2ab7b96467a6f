// oneTBB's side of bench_runtime.py: empty items, each a call through an opaque function pointer.
//
//     tbb_peer CONCURRENCY
//     > VARIANT ITEMS REPEATS PAUSE_US        one request a line on stdin
//     < NS NS NS ...                          the time of each repeat, one line on stdout
//
// At the start every variant is checked to call each item exactly once; then it prints "ready".
// PAUSE_US is slept before each repeat, outside its time.

#include <oneapi/tbb/blocked_range.h>
#include <oneapi/tbb/global_control.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/parallel_for_each.h>
#include <oneapi/tbb/partitioner.h>
#include <oneapi/tbb/task_group.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <map>
#include <numeric>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {

using Item = void (*)(void* context, std::int64_t item);

struct Job {
  Item item;
  void* context;
  std::int64_t count;
  const std::vector<std::int64_t>& numbers;  // 0, 1, ... for variants that want iterators
};

using Variant = std::function<void(const Job&)>;
using Range = tbb::blocked_range<std::int64_t>;

void do_nothing(void*, std::int64_t) {}

// Volatile: the compiler cannot know what it points to, so the call stays a call.
Item volatile g_item = &do_nothing;

void task_group(const Job& job) {
  tbb::task_group group;
  for (std::int64_t i = 0; i < job.count; ++i) {
    group.run([&job, i] { job.item(job.context, i); });
  }
  group.wait();
}

void parallel_for_each(const Job& job) {
  tbb::parallel_for_each(job.numbers.begin(), job.numbers.begin() + job.count,
                         [&job](std::int64_t i) { job.item(job.context, i); });
}

template <class Partitioner>
Variant parallel_for(std::size_t grain) {
  return [grain](const Job& job) {
    tbb::parallel_for(
        Range(0, job.count, grain),
        [&job](const Range& range) {
          // Locals: what the call might change need not be read again for every item.
          const Item item = job.item;
          void* const context = job.context;
          for (std::int64_t i = range.begin(), end = range.end(); i < end; ++i) item(context, i);
        },
        Partitioner());
  };
}

const std::map<std::string, Variant> kVariants = {
    {"task_group", task_group},
    {"parallel_for_each", parallel_for_each},
    {"simple_1", parallel_for<tbb::simple_partitioner>(1)},
    {"simple_64", parallel_for<tbb::simple_partitioner>(64)},
    {"auto", parallel_for<tbb::auto_partitioner>(1)},
    {"static", parallel_for<tbb::static_partitioner>(1)},
};

struct Tally {
  std::atomic<std::int64_t> count{0};
  std::atomic<std::int64_t> sum{0};
};

void tally(void* context, std::int64_t item) {
  auto& counts = *static_cast<Tally*>(context);
  counts.count.fetch_add(1, std::memory_order_relaxed);
  counts.sum.fetch_add(item, std::memory_order_relaxed);
}

std::vector<std::int64_t> counting(std::int64_t count) {
  std::vector<std::int64_t> numbers(static_cast<std::size_t>(count));
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

void check() {
  constexpr std::int64_t kItems = 1000;
  const std::vector<std::int64_t> numbers = counting(kItems);
  for (const auto& [name, variant] : kVariants) {
    Tally counts;
    variant({&tally, &counts, kItems, numbers});
    if (counts.count != kItems || counts.sum != kItems * (kItems - 1) / 2) {
      std::cerr << name << " ran " << counts.count << " items instead of " << kItems << '\n';
      std::exit(1);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  using Clock = std::chrono::steady_clock;
  const int concurrency = argc == 2 ? std::atoi(argv[1]) : 0;
  if (concurrency < 1) {
    std::cerr << "usage: tbb_peer CONCURRENCY\n";
    return 2;
  }
  const tbb::global_control limit(tbb::global_control::max_allowed_parallelism,
                                  static_cast<std::size_t>(concurrency));
  check();
  std::cout << "ready" << std::endl;

  std::vector<std::int64_t> numbers;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream request(line);
    std::string name;
    std::int64_t items = 0;
    int repeats = 0;
    int pause_us = 0;
    if (!(request >> name >> items >> repeats >> pause_us) || kVariants.count(name) == 0) {
      std::cerr << "bad request: " << line << '\n';
      return 2;
    }
    if (numbers.size() < static_cast<std::size_t>(items)) numbers = counting(items);
    const Variant& variant = kVariants.at(name);
    const Job job{g_item, nullptr, items, numbers};
    for (int i = 0; i < repeats; ++i) {
      if (pause_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(pause_us));
      const auto start = Clock::now();
      variant(job);
      std::cout << (i > 0 ? " " : "") << std::chrono::nanoseconds(Clock::now() - start).count();
    }
    std::cout << std::endl;
  }
}
