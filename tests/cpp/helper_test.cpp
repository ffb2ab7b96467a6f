#include "helper.h"

#include <optional>

#include "system_support.h"

using namespace torch_spheres;
using namespace torch_spheres::testing;

namespace {

/// The same work for all threads of a test; how many of its items ran at once is what counts.
std::shared_ptr<CountingWork> counting() {
  return std::make_shared<CountingWork>(1, [](SphereId, std::int64_t item) {
    if (item % 7 == 0) std::this_thread::yield();
  });
}

/// Submits and helps as tree_sum() does; false if it took for ever.
bool submit_and_help(System& system, const std::shared_ptr<Work>& work, std::int64_t items) {
  const auto batch = submit(system, work, items);
  Helper helper(system);
  for (int i = 0; i < 6000; ++i) {
    if (helper.wait_for(*batch, Milliseconds(10))) return true;
  }
  return false;
}

}  // namespace

TEST(a_helper_with_the_only_permit_runs_everything_for_the_root) {
  for (int levels = 2; levels <= 4; ++levels) {
    System system(levels, 1);
    system.start();
    auto work = std::make_shared<CountingWork>(
        8, [](SphereId sphere, std::int64_t) { CHECK_EQ(sphere, 0); });
    Helper helper(system);
    CHECK(helper.helps());
    const auto batch = submit(system, work, 500);
    CHECK(helper.wait_for(*batch, kPatience));
    CHECK(!helper.helps());  // its permit is for others again
    CHECK(!batch->failed());
    check_all_once(*work, 500);
    const SphereStats root = system.stats(0);
    CHECK_EQ(root.items_run, 500u);
    CHECK_EQ(root.items_stolen, 500u);
    std::uint64_t given = 0;
    for (SphereId id = 0; id < system.topology().total(); ++id)
      given += system.stats(id).items_given;
    CHECK_EQ(given, root.items_stolen);
    auto more = std::make_shared<CountingWork>();
    finish(submit(system, more, 100));  // by the spheres
    check_all_once(*more, 100);
  }
}

TEST(without_a_free_permit_a_helper_only_waits) {
  System system(2, 1);
  system.start();
  Gate gate;
  auto blocker = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t) { gate.pass(); });
  const auto blocked = submit(system, blocker, 1);
  while (blocker->running.load() == 0) std::this_thread::yield();
  auto work = std::make_shared<CountingWork>();
  const auto batch = submit(system, work, 50);
  Helper helper(system);
  CHECK(!helper.helps());
  CHECK(!helper.wait_for(*batch, Milliseconds(20)));
  CHECK_EQ(work->count.load(), 0);
  gate.open();
  CHECK(helper.wait_for(*batch, kPatience));
  check_all_once(*work, 50);
  CHECK_EQ(system.stats(0).items_run, 0u);
}

TEST(one_helper_at_a_time) {
  System system(2, 4);
  system.start();
  Helper first(system);
  CHECK(first.helps());
  CHECK(!Helper(system).helps());
}

TEST(a_helper_looks_up_when_its_time_is_over) {
  System system(2, 1);
  system.start();
  std::atomic<bool> slow{true};
  auto work = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t) {
    if (slow.load()) std::this_thread::sleep_for(Milliseconds(5));
  });
  Helper helper(system);
  const auto batch = submit(system, work, 5000);  // 25 seconds, if it did not look up
  CHECK(!helper.wait_for(*batch, Milliseconds(20)));
  // Its time may be over before it has begun, on a busy machine; as long as kPatience, at most.
  for (int i = 0; i < 3000 && work->count.load() == 0; ++i) {
    CHECK(!helper.wait_for(*batch, Milliseconds(20)));
  }
  CHECK(work->count.load() > 0);
  CHECK(work->count.load() < 5000);
  CHECK(helper.helps());
  slow.store(false);
  CHECK(helper.wait_for(*batch, kPatience));
  check_all_once(*work, 5000);
}

TEST(an_error_in_the_helpers_hands_is_the_batchs) {
  System system(2, 1);
  system.start();
  auto work = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t item) {
    if (item == 77) throw std::runtime_error("bad");
  });
  Helper helper(system);
  const auto batch = submit(system, work, 100);
  CHECK(helper.wait_for(*batch, kPatience));
  CHECK(batch->failed());
  CHECK_EQ(work->count.load() + batch->cancelled(), 100);
}

TEST(helpers_and_spheres_run_every_item_once_and_keep_the_limit) {
  for (const auto& [levels, concurrency] : shapes()) {
    System system(levels, concurrency);
    system.start();
    auto work = counting();
    const int turns = rounds(levels == 4 ? 1 : 6);
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int c = 0; c < 3; ++c) {
      callers.emplace_back([&, turns] {
        for (int turn = 0; turn < turns; ++turn) wrong += !submit_and_help(system, work, 200);
      });
    }
    for (std::thread& caller : callers) caller.join();
    CHECK_EQ(wrong.load(), 0);
    CHECK_EQ(work->count.load(), 600 * turns);
    CHECK_EQ(work->sum.load(), std::int64_t{3} * turns * 199 * 100);
    CHECK(work->most_running.load() <= system.concurrency());
  }
}

TEST(barriers_and_epochs_among_helpers) {
  for (int levels = 1; levels <= 3; ++levels) {
    System system(levels, 2);
    system.start();
    std::atomic<bool> over{false};
    std::atomic<int> wrong{0};
    std::atomic<std::int64_t> expected{0};
    auto work = counting();
    std::vector<std::thread> callers;
    for (int c = 0; c < 2; ++c) {
      callers.emplace_back([&] {
        while (!over.load()) {
          wrong += !submit_and_help(system, work, 30);
          expected += 30;
        }
      });
    }
    Meeting met = Meeting::kReleased;
    for (int round = 0; round < rounds(30) && met == Meeting::kReleased; ++round) {
      met = meet(system, round % (levels + 1) - 1);
    }
    over.store(true);
    for (std::thread& caller : callers) caller.join();
    CHECK(met == Meeting::kReleased);
    CHECK_EQ(wrong.load(), 0);
    CHECK_EQ(work->count.load(), expected.load());
  }
}

TEST(a_root_that_is_called_comes_before_the_next_helper) {
  System system(2, 2);
  system.start();
  for (int round = 0; round < rounds(20); ++round) {
    std::optional<Helper> first(system);
    while (!first->helps()) first.emplace(system);  // the root is leaving the last meeting
    std::uint32_t meeting = 0;
    while (meeting == 0) meeting = round % 2 ? system.try_open_epoch() : system.try_open_barrier(0);
    // The root is called, finds the helper there, and sleeps.
    std::this_thread::sleep_for(std::chrono::microseconds(round * 50));
    while (system.stats(0).state != State::kIdle) std::this_thread::yield();
    first.reset();  // wakes the root, which takes longer than to ask again
    Helper second(system);
    CHECK(!second.helps() ||
          system.wait_meeting_for(meeting, Milliseconds(0)) != Meeting::kPending);
    CHECK(system.wait_meeting_for(meeting, kPatience) == Meeting::kReleased);
  }
}

TEST(the_root_comes_to_no_barrier_before_its_helper_is_done) {
  for (int levels = 2; levels <= 3; ++levels) {
    for (const bool epoch : {false, true}) {
      System system(levels, 1);
      system.start();
      Gate gate;
      auto work = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t) { gate.pass(); });
      std::atomic<bool> helped{false};
      std::atomic<bool> begun{false};
      std::thread caller([&] {
        Helper helper(system);
        const auto batch = submit(system, work, 1);
        begun.store(true);
        helped.store(helper.wait_for(*batch, kPatience));
      });
      while (!begun.load() || work->running.load() == 0) std::this_thread::yield();
      const std::uint32_t meeting = epoch ? system.try_open_epoch() : system.try_open_barrier(0);
      CHECK(meeting != 0);
      CHECK(system.wait_meeting_for(meeting, Milliseconds(20)) == Meeting::kPending);
      gate.open();
      CHECK(system.wait_meeting_for(meeting, kPatience) == Meeting::kReleased);
      caller.join();
      CHECK(helped.load());
    }
  }
}

TEST(stop_waits_for_the_helper_and_leaves_all_permits) {
  for (const int concurrency : {1, 3}) {
    System system(2, concurrency);
    for (int round = 0; round < rounds(20); ++round) {
      system.start();
      auto work = counting();
      std::atomic<std::int64_t> accounted{0};
      std::atomic<std::int64_t> accepted{0};
      std::vector<std::thread> callers;
      for (int c = 0; c < 2; ++c) {
        callers.emplace_back([&] {
          try {
            for (;;) {
              const auto batch = submit(system, work, 40);
              accepted += 40;
              Helper helper(system);
              while (!helper.wait_for(*batch, Milliseconds(1))) {
              }
              accounted += batch->cancelled();
            }
          } catch (const std::runtime_error&) {
          }
        });
      }
      std::this_thread::sleep_for(std::chrono::microseconds(round * 7 % 300));
      stop(system);
      CHECK_EQ(work->running.load(), 0);  // also in the helper
      for (std::thread& caller : callers) caller.join();
      CHECK_EQ(accounted.load() + work->count.load(), accepted.load());
      CHECK(work->most_running.load() <= concurrency);
    }
    // All permits are back: that many items can wait for each other.
    system.start();
    std::atomic<int> together{0};
    auto work = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t) {
      ++together;
      while (together.load() < concurrency) std::this_thread::yield();
    });
    finish(submit(system, work, concurrency));
    CHECK_EQ(work->most_running.load(), concurrency);
  }
}
