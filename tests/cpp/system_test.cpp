#include "system.h"

#include <numeric>

#include "system_support.h"

using namespace torch_spheres;
using namespace torch_spheres::testing;

namespace {

std::uint64_t total(const System& system, std::uint64_t SphereStats::* field) {
  std::uint64_t sum = 0;
  for (SphereId id = 0; id < system.topology().total(); ++id) sum += system.stats(id).*field;
  return sum;
}

}  // namespace

TEST(idle_siblings_steal_the_slow_spheres_items) {
  System system(2, 12);
  system.start();
  Gate gate;
  std::atomic<int> slow{0};
  // Items 0, 12, 24, ... belong to sphere 1.  The first to run blocks whoever runs it, until the
  // others have done all the rest.
  auto work = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t item) {
    if (item % 12 == 0 && slow.fetch_add(1) == 0) gate.pass();
  });
  const auto batch = submit(system, work, 12 * 20);
  while (work->count.load() < 12 * 20 - 1) std::this_thread::sleep_for(Milliseconds(1));
  CHECK(!batch->done());
  gate.open();
  finish(batch);
  check_all_once(*work, 12 * 20);
  CHECK(total(system, &SphereStats::items_stolen) > 0);
  CHECK_EQ(total(system, &SphereStats::items_stolen), total(system, &SphereStats::items_given));
  CHECK_EQ(total(system, &SphereStats::items_run), 240u);
}

TEST(items_in_any_portions_run_at_once_on_as_many_leaves) {
  // Each item goes on only when all of its round run, whatever batches they came in.
  for (const int levels : {2, 3}) {
    System system(levels, 12);
    system.start();
    for (int round = 0; round < 200; ++round) {
      const std::vector<std::int64_t> portions = round % 4 == 0   ? std::vector<std::int64_t>{1, 1}
                                                 : round % 4 == 1 ? std::vector<std::int64_t>(12, 1)
                                                 : round % 4 == 2
                                                     ? std::vector<std::int64_t>{3, 2, 1, 4}
                                                     : std::vector<std::int64_t>{11, 1};
      const std::int64_t all = std::accumulate(portions.begin(), portions.end(), std::int64_t{0});
      std::atomic<std::int64_t> running{0};
      const auto work = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t) {
        ++running;
        const auto end = std::chrono::steady_clock::now() + kPatience;
        while (running < all) {
          CHECK(std::chrono::steady_clock::now() < end);
          std::this_thread::yield();
        }
      });
      std::vector<std::shared_ptr<Batch>> batches;
      for (const std::int64_t items : portions) batches.push_back(submit(system, work, items));
      for (const auto& batch : batches) finish(batch);
      CHECK(work->count == all);
    }
  }
}

TEST(items_of_one_leaf_run_at_once_on_more_leaves_than_its_family_has) {
  // One-item batches: all of them are the first leaf's.
  System system(3, 40);
  system.start();
  for (int round = 0; round < rounds(20); ++round) {
    std::atomic<int> running{0};
    std::atomic<int> late{0};
    const auto work = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t) {
      ++running;
      const auto end = std::chrono::steady_clock::now() + kPatience;
      while (running < 30 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
      late += running < 30;
    });
    std::vector<std::shared_ptr<Batch>> batches;
    for (int i = 0; i < 30; ++i) batches.push_back(submit(system, work, 1));
    for (const auto& batch : batches) finish(batch);
    CHECK_EQ(late.load(), 0);
  }
}

TEST(nobody_is_woken_for_work_but_leaves_that_take_some) {
  System system(3, 8);
  system.start();
  CHECK(meet(system, -1) == Meeting::kReleased);  // all threads are there
  const auto asleep = [&](SphereId id) { return system.stats(id).state == State::kIdle; };
  for (SphereId id = 0; id < system.topology().total(); ++id) {
    while (!asleep(id)) std::this_thread::yield();
  }
  CHECK(system.begin_trace(1000));
  for (int i = 0; i < 20; ++i) finish(submit(system, std::make_shared<CountingWork>(), 1));
  const TraceRecord record = system.end_trace();
  int woken = 0;
  for (const TraceTrack& track : record.tracks) {
    if (track.sphere < 0) continue;
    CHECK(track.events.empty() || system.topology().is_leaf(track.sphere));
    woken += !track.events.empty();
  }
  // The one that spins when the next comes, or the first of those that sleep.
  CHECK(woken >= 1 && woken <= 4);
}

TEST(the_last_item_goes_to_exactly_one_of_owner_and_thieves) {
  System system(2, 12);
  system.start();
  for (int round = 0; round < rounds(300); ++round) {
    auto work = std::make_shared<CountingWork>(round % 2 ? 64 : 1);
    finish(submit(system, work, 1 + round % 13));
    check_all_once(*work, 1 + round % 13);
  }
}

TEST(the_65th_batch_waits_and_is_not_lost) {
  System system(2, 2);
  system.start();
  Gate gate;
  auto blocker = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t) { gate.pass(); });
  std::vector<std::shared_ptr<Batch>> batches;
  std::vector<std::shared_ptr<CountingWork>> works;
  batches.push_back(submit(system, blocker, 2));
  for (std::size_t i = 1; i < kBatchesInFlight; ++i) {
    works.push_back(std::make_shared<CountingWork>());
    batches.push_back(submit(system, works.back(), 5));
  }
  works.push_back(std::make_shared<CountingWork>());
  const auto extra = std::make_shared<Batch>(works.back(), 5);
  CHECK(system.try_submit(extra) == Submitted::kFull);
  CHECK(!system.wait_for_room(Milliseconds(10)));
  gate.open();
  while (system.try_submit(extra) == Submitted::kFull) system.wait_for_room(Milliseconds(50));
  finish(extra);
  for (const auto& batch : batches) finish(batch);
  for (const auto& work : works) check_all_once(*work, 5);
}

TEST(one_slow_batch_does_not_hold_up_the_others) {
  System system(2, 2);
  system.start();
  Gate gate;
  auto slow = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t) { gate.pass(); });
  const auto held = submit(system, slow, 1);
  for (std::size_t i = 0; i < 3 * kBatchesInFlight; ++i) {
    const auto batch = std::make_shared<Batch>(std::make_shared<CountingWork>(), 1);
    CHECK(system.try_submit(batch) == Submitted::kAccepted);  // one at a time: there is room
    finish(batch);
  }
  CHECK(!held->done());
  gate.open();
  finish(held);
}

TEST(an_error_ends_its_batch_exactly_and_nothing_else) {
  System system(3, 8);
  system.start();
  for (int round = 0; round < rounds(30); ++round) {
    const std::int64_t bad = round * 17 % 500;
    auto work =
        std::make_shared<CountingWork>(round % 3 ? 64 : 1, [&](SphereId, std::int64_t item) {
          if (item == bad) throw std::runtime_error("bad");
        });
    auto other = std::make_shared<CountingWork>();
    const auto failing = submit(system, work, 500);
    const auto fine = submit(system, other, 100);
    finish(failing);
    finish(fine);
    CHECK(failing->failed());
    CHECK_THROWS(std::rethrow_exception(failing->error()), std::runtime_error);
    CHECK_EQ(work->count.load() + failing->cancelled(), 500);  // the failed item is not run
    CHECK(!fine->failed());
    check_all_once(*other, 100);
  }
}

TEST(an_error_of_an_item_that_stop_finds_running_is_not_lost) {
  for (const int items : {1, 30}) {
    System system(1, 1);
    system.start();
    std::atomic<bool> begun{false};
    auto work = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t) {
      begun = true;
      while (!system.stopping()) std::this_thread::yield();
      // What had not begun is cancelled by now, or will be before anybody else is told.
      std::this_thread::sleep_for(Milliseconds(20));
      throw std::runtime_error("late");
    });
    const auto batch = submit(system, work, items);
    while (!begun) std::this_thread::yield();
    stop(system);
    CHECK(batch->done() && batch->failed());
    CHECK_EQ(batch->cancelled(), items);  // the failed one is not run
    CHECK_EQ(work->count.load(), 0);
  }
}

TEST(errors_everywhere_at_once_give_one_error) {
  System system(2, 12);
  system.start();
  for (int round = 0; round < rounds(40); ++round) {
    std::atomic<int> thrown{0};
    auto work = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t) {
      ++thrown;
      throw std::runtime_error("all");
    });
    const auto batch = submit(system, work, 48);
    finish(batch);
    CHECK(batch->failed());
    CHECK_EQ(work->count.load(), 0);
    CHECK_EQ(batch->cancelled(), 48);
    CHECK(thrown.load() >= 1);
  }
}

TEST(a_barrier_waits_for_the_work_before_it) {
  for (int levels = 1; levels <= 3; ++levels) {
    System system(levels, 4);
    system.start();
    for (int round = 0; round < rounds(10); ++round) {
      auto work = std::make_shared<CountingWork>();
      const auto batch = submit(system, work, 200);
      CHECK(meet(system, levels - 1) == Meeting::kReleased);
      CHECK_EQ(work->count.load(), 200);
      CHECK(meet(system, round % levels) == Meeting::kReleased);
      const std::uint64_t before = system.epochs();
      auto more = std::make_shared<CountingWork>();
      submit(system, more, 30);
      CHECK(meet(system, -1) == Meeting::kReleased);
      CHECK_EQ(more->count.load(), 30);
      CHECK_EQ(system.epochs(), before + 1);
    }
  }
}

TEST(meetings_one_after_another_with_work_from_elsewhere) {
  System system(2, 3);
  system.start();
  std::atomic<bool> over{false};
  std::vector<std::shared_ptr<Batch>> batches;
  auto work = std::make_shared<CountingWork>();
  std::thread submitter([&] {
    while (!over.load()) batches.push_back(submit(system, work, 7));
  });
  for (int round = 0; round < rounds(40); ++round) {
    CHECK(meet(system, round % 3 - 1) == Meeting::kReleased);
  }
  over.store(true);
  submitter.join();
  for (const auto& batch : batches) finish(batch);
  CHECK_EQ(work->count.load(), static_cast<std::int64_t>(7 * batches.size()));
}

TEST(a_meeting_comes_among_work_that_never_ends) {
  // The ring is full at first, and filled all the time, so no leaf finds its queue empty.
  for (int levels = 1; levels <= 3; ++levels) {
    for (const int concurrency : {1, 3}) {
      System system(levels, concurrency);
      system.start();
      std::atomic<bool> over{false};
      std::vector<std::shared_ptr<Batch>> batches;
      Gate full;  // else leaves might be faster than the submitter
      auto flood = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t) {
        full.pass();
        std::this_thread::sleep_for(std::chrono::microseconds(20));
      });
      std::thread submitter([&] {
        while (!over.load()) batches.push_back(submit(system, flood, 12));
      });
      while (system.wait_for_room(Milliseconds(0))) std::this_thread::yield();
      full.open();
      for (int level = -1; level < levels; ++level) {
        CHECK(meet(system, level) == Meeting::kReleased);
        auto before = std::make_shared<CountingWork>();
        const auto batch = submit(system, before, 30);
        const bool of_leaves = level == levels - 1 || level == -1;
        CHECK(meet(system, level) == Meeting::kReleased);
        if (of_leaves) CHECK(batch->done());
        finish(batch);
        check_all_once(*before, 30);
      }
      over.store(true);
      submitter.join();
      for (const auto& batch : batches) finish(batch);
      CHECK_EQ(flood->count.load(), static_cast<std::int64_t>(12 * batches.size()));
    }
  }
}

TEST(an_error_opens_the_barrier_and_the_next_one_works) {
  System system(2, 12);
  system.start();
  for (int round = 0; round < rounds(18); ++round) {
    Gate gate;
    auto work = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t) {
      gate.pass();
      throw std::runtime_error("while others wait");
    });
    const auto batch = submit(system, work, 1);
    std::uint32_t meeting = 0;
    while (meeting == 0) meeting = round % 2 ? system.try_open_epoch() : system.try_open_barrier(1);
    CHECK(system.wait_meeting_for(meeting, Milliseconds(0)) == Meeting::kPending);
    gate.open();
    CHECK(system.wait_meeting_for(meeting, kPatience) == Meeting::kAborted);
    finish(batch);
    CHECK(meet(system, round % 3 - 1) == Meeting::kReleased);
  }
}

TEST(letters_travel_along_edges_and_wait_to_be_taken) {
  struct Number final : Letter {
    explicit Number(int n) : n(n) {}
    int n;
  };
  System system(3, 2);
  const auto send = [&](SphereId source, SphereId target, int n) {
    std::unique_ptr<Letter> letter = std::make_unique<Number>(n);
    const Sent sent = system.try_send(source, target, letter);
    CHECK_EQ(letter == nullptr, sent == Sent::kDelivered);
    return sent;
  };
  for (int i = 0; i < static_cast<int>(Sphere::kInboxCapacity); ++i) {
    CHECK(send(0, 5, i) == Sent::kDelivered);
  }
  CHECK(send(0, 5, 999) == Sent::kFull);
  for (int i = 0; i < 100; ++i) CHECK_EQ(static_cast<Number&>(*system.try_receive(5)).n, i);
  CHECK(send(5, 0, 1) == Sent::kDelivered);
  CHECK(send(5, 6, 1) == Sent::kDelivered);
  CHECK_THROWS(send(0, 13, 1), std::invalid_argument);
  CHECK_THROWS(send(13, 25, 1), std::invalid_argument);
  CHECK_THROWS(send(5, 5, 1), std::invalid_argument);
  CHECK_THROWS(send(-1, 0, 1), std::invalid_argument);
  CHECK_THROWS(send(0, 157, 1), std::invalid_argument);
  CHECK(!system.try_receive(7));
  // What nobody took is freed with the system (AddressSanitizer would say).
}

TEST(after_the_work_all_spheres_sleep) {
  System system(3, 4);
  system.start();
  auto work = std::make_shared<CountingWork>();
  finish(submit(system, work, 1000));
  const auto all_idle = [&] {
    for (SphereId id = 0; id < system.topology().total(); ++id) {
      if (system.stats(id).state != State::kIdle) return false;
    }
    return true;
  };
  // A leaf that was given a turn for it may not have seen yet that there is nothing left.
  bool settled = false;
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (!settled && std::chrono::steady_clock::now() < end) {
    const auto quiet_after = [&](Milliseconds time) {
      std::this_thread::sleep_for(time);
      return all_idle();
    };
    settled = quiet_after(Milliseconds(50)) && quiet_after(Milliseconds(100));
  }
  CHECK(settled);
}

TEST(bad_arguments) {
  CHECK_THROWS(System(2, 0), std::invalid_argument);
  CHECK_THROWS(System(0, 1), std::invalid_argument);
  System system(2, 64);
  CHECK_EQ(system.concurrency(), 12);
  CHECK_THROWS(system.try_open_barrier(2), std::invalid_argument);
  const auto batch = std::make_shared<Batch>(std::make_shared<CountingWork>(), 3);
  CHECK(system.try_submit(batch) == Submitted::kStopped);  // not started
  system.start();
  const auto empty = std::make_shared<Batch>(std::make_shared<CountingWork>(), 0);
  CHECK(system.try_submit(empty) == Submitted::kAccepted);
  CHECK(empty->done());
}
