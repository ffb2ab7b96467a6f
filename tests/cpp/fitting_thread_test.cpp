// Threads are started until one fits, and those that do not fit are gone afterwards; a system's own
// where there is no memory for them, or where an item ends one.
#include "fitting_thread.h"

#include <thread>
#include <vector>

#include "check.h"
#include "no_memory.h"
#include "system_support.h"

using namespace torch_spheres;
using namespace torch_spheres::testing;

namespace {

std::atomic<int> asked{0};
std::atomic<int> bodies{0};

bool every_third() { return asked.fetch_add(1) % 3 == 2; }
bool never() {
  ++asked;
  return false;
}
void count() { ++bodies; }

/// So many bodies, on threads that were asked; returns how often one was.
int run(bool (*fits)(), int count_of_bodies) {
  asked = 0;
  bodies = 0;
  std::vector<std::thread> started;
  {
    FittingThreads threads(fits);
    for (int i = 0; i < count_of_bodies; ++i) started.push_back(threads.start(&count));
  }  // those that do not fit end here, before the others have to
  for (std::thread& thread : started) thread.join();
  CHECK_EQ(bodies.load(), count_of_bodies);
  return asked.load();
}

}  // namespace

TEST(any_thread_fits_where_nothing_is_asked) { CHECK_EQ(run(nullptr, 5), 0); }

TEST(each_body_runs_on_a_thread_that_fits) { CHECK_EQ(run(&every_third, 20), 60); }

TEST(in_the_end_threads_are_taken_as_they_are) {
  CHECK_EQ(run(&never, 1), 32);
  CHECK_EQ(run(&never, 20), 256);  // in all
}

TEST(a_thread_that_fits_outlives_what_started_it) {
  for (int i = 0; i < rounds(50); ++i) {
    std::atomic<bool> go{false};
    std::thread thread;
    {
      FittingThreads threads(&every_third);
      thread = threads.start([&go] {
        while (!go.load()) std::this_thread::yield();
      });
    }
    go = true;
    thread.join();
  }
}

TEST(a_start_without_memory_leaves_no_thread_and_may_be_tried_again) {
  System system(2, 2);
  int failed = 0;
  for (bool started = false; !started;) {
    allocations_left = failed;
    try {
      system.start();
      started = true;
    } catch (const std::bad_alloc&) {
      ++failed;
    }
    allocations_left = -1;
    CHECK_EQ(system.running(), started);
  }
  CHECK(failed >= system.topology().total());  // each thread needs some
  auto work = std::make_shared<CountingWork>();
  finish(submit(system, work, 100));
  check_all_once(*work, 100);
}

// glibc unwinds with GCC's library, which crashes among frames of LLVM's.
#if !defined(_LIBCPP_VERSION)
TEST(a_thread_that_an_item_ends_is_not_waited_for) {
  System system(2, 2);
  system.start();
  auto work =
      std::make_shared<CountingWork>(1, [](SphereId, std::int64_t) { pthread_exit(nullptr); });
  const auto batch = submit(system, work, 1);
  while (work->most_running.load() == 0) std::this_thread::yield();
  stop(system);
}
#endif
