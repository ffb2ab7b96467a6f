#include <deque>

#include "helper.h"
#include "system_support.h"

using namespace torch_spheres;
using namespace torch_spheres::testing;

namespace {

/// Calls the spheres together at one level after the other until they are stopped; false: one call
/// was never heard.
bool meet_until_stopped(System& system) {
  for (int call = 0;; ++call) {
    const int level = call % (system.topology().levels() + 1) - 1;
    const std::uint32_t meeting =
        level < 0 ? system.try_open_epoch() : system.try_open_barrier(level);
    if (meeting == 0) {
      if (system.stopping()) return true;
      std::this_thread::yield();
    } else if (system.wait_meeting_for(meeting, kPatience) == Meeting::kPending) {
      return false;
    }
  }
}

/// What was accepted in the name of `work`, and what of it will never run.
struct Ledger {
  explicit Ledger(std::function<void(SphereId, std::int64_t)> each = {})
      : work(std::make_shared<CountingWork>(1, std::move(each))) {}
  std::shared_ptr<Batch> submit(System& system, std::int64_t items) {
    const auto batch = torch_spheres::testing::submit(system, work, items);  // throws once stopped
    accepted += items;
    return batch;
  }
  bool close(Batch& batch) {
    const bool done = batch.wait_for(kPatience);
    cancelled += batch.cancelled();
    return done;
  }
  void check() const { CHECK_EQ(work->count.load() + cancelled.load(), accepted); }

  const std::shared_ptr<CountingWork> work;
  std::atomic<std::int64_t> accepted{0};
  std::atomic<std::int64_t> cancelled{0};
};

}  // namespace

TEST(every_item_is_run_once_at_every_level_and_concurrency) {
  for (const auto& [levels, concurrency] : shapes()) {
    System system(levels, concurrency);
    system.start();
    const int turns = rounds(levels == 4 ? 2 : 7);
    std::vector<std::thread> submitters;
    std::atomic<int> wrong{0};
    std::atomic<int> most{0};
    for (int s = 0; s < 3; ++s) {
      submitters.emplace_back([&, s, turns] {
        const std::int64_t sizes[] = {1, 11, 12, 13, 143, 145, 2000};
        for (int turn = 0; turn < turns; ++turn) {
          const std::int64_t n = sizes[(turn + s) % 7];
          auto work = std::make_shared<CountingWork>((turn + s) % 2 ? 64 : 1);
          const auto batch = submit(system, work, n);
          if (!batch->wait_for(kPatience)) ++wrong;
          if (work->count.load() != n || work->sum.load() != n * (n - 1) / 2) ++wrong;
          most = std::max(most.load(), work->most_running.load());
        }
      });
    }
    for (std::thread& t : submitters) t.join();
    CHECK_EQ(wrong.load(), 0);
    CHECK(most.load() <= system.concurrency());
    stop(system);
  }
}

TEST(never_more_than_concurrency_items_at_once_over_all_batches) {
  for (const int concurrency : {1, 2, 8, 64}) {
    System system(3, concurrency);
    system.start();
    std::shared_ptr<CountingWork> work;
    work = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t item) {
      if (item % 5 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
      // However few cores there are: the other batches have such an item too.
      const auto end = std::chrono::steady_clock::now() + kPatience;
      while (item == 0 && concurrency > 1 && work->most_running.load() < 2 &&
             std::chrono::steady_clock::now() < end) {
        std::this_thread::yield();
      }
    });
    std::vector<std::shared_ptr<Batch>> batches;
    for (int i = 0; i < 40; ++i) batches.push_back(submit(system, work, 50));
    for (const auto& batch : batches) finish(batch);
    CHECK_EQ(work->count.load(), 2000);
    CHECK(work->most_running.load() <= system.concurrency());
    if (concurrency > 1) CHECK(work->most_running.load() > 1);
  }
}

TEST(stop_during_work_accounts_for_every_item) {
  for (const auto& [levels, concurrency] : shapes()) {
    System system(levels, concurrency);
    for (int round = 0; round < rounds(levels == 4 ? 1 : 3); ++round) {
      system.start();
      std::vector<std::shared_ptr<Batch>> batches;
      std::vector<std::shared_ptr<CountingWork>> works;
      for (int i = 0; i < 30; ++i) {
        works.push_back(std::make_shared<CountingWork>(
            i % 2 ? 8 : 1, [](SphereId, std::int64_t) { std::this_thread::yield(); }));
        batches.push_back(submit(system, works.back(), 300));
      }
      if (round % 2) std::this_thread::sleep_for(std::chrono::microseconds(300 * round));
      stop(system);
      for (std::size_t i = 0; i < batches.size(); ++i) {
        CHECK(batches[i]->done());
        CHECK_EQ(works[i]->count.load() + batches[i]->cancelled(), 300);
        CHECK(!batches[i]->failed());
      }
    }
  }
}

TEST(stop_releases_submitters_that_wait_for_room) {
  for (int round = 0; round < rounds(4); ++round) {
    System system(2, 2);
    system.start();
    std::atomic<std::int64_t> ran_or_cancelled{0};
    std::atomic<std::int64_t> accepted{0};
    std::vector<std::thread> submitters;
    for (int s = 0; s < 4; ++s) {
      submitters.emplace_back([&] {
        std::vector<std::pair<std::shared_ptr<Batch>, std::shared_ptr<CountingWork>>> mine;
        try {
          for (;;) {
            auto work = std::make_shared<CountingWork>();
            auto batch = submit(system, work, 20);
            accepted += 20;
            mine.emplace_back(std::move(batch), std::move(work));
          }
        } catch (const std::runtime_error&) {
        }
        for (const auto& [batch, work] : mine) {
          if (batch->wait_for(kPatience)) ran_or_cancelled += work->count + batch->cancelled();
        }
      });
    }
    std::this_thread::sleep_for(Milliseconds(5));
    stop(system);
    for (std::thread& t : submitters) t.join();
    CHECK_EQ(ran_or_cancelled.load(), accepted.load());
  }
}

TEST(stop_opens_barriers) {
  for (int round = 0; round < rounds(6); ++round) {
    System system(3, 4);
    system.start();
    Gate gate;
    // Holds one leaf back, so that the meeting cannot be complete before stop() comes.
    auto work = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t) { gate.pass(); });
    const auto batch = submit(system, work, 1);
    while (work->running.load() == 0) std::this_thread::yield();
    const std::uint32_t meeting = round % 2 ? system.try_open_epoch() : system.try_open_barrier(2);
    CHECK(meeting != 0);
    std::thread caller([&] { system.wait_meeting_for(meeting, kPatience); });
    if (round % 3) std::this_thread::sleep_for(Milliseconds(1));
    system.request_stop();
    caller.join();
    CHECK(system.wait_meeting_for(meeting, Milliseconds(0)) == Meeting::kAborted);
    gate.open();
    CHECK(system.join_for(kPatience));
    check_all_once(*work, 1);
  }
}

TEST(barrier_against_stop) {
  for (int round = 0; round < rounds(30); ++round) {
    System system(2, 4);
    system.start();
    std::atomic<int> outcomes{0};
    std::thread caller([&] {
      for (;;) {
        const std::uint32_t meeting = system.try_open_barrier(1);
        if (meeting == 0) {
          if (system.stopping()) break;
          continue;
        }
        if (system.wait_meeting_for(meeting, kPatience) == Meeting::kPending) return;  // a hang
        ++outcomes;
      }
      outcomes += 1'000'000;
    });
    std::this_thread::sleep_for(std::chrono::microseconds(round * 7 % 500));
    stop(system);
    caller.join();
    CHECK(outcomes.load() >= 1'000'000);
  }
}

TEST(everything_at_once_until_stop) {
  // Work without end, work with a helper, work that fails, and meetings of all kinds.
  for (int levels = 1; levels <= 3; ++levels) {
    for (const int concurrency : {1, 3}) {
      System system(levels, concurrency);
      Ledger flood, helped;
      Ledger failing([](SphereId, std::int64_t item) {  // those that throw count as cancelled
        if (item % 10 == 7) throw std::runtime_error("seven");
      });
      std::atomic<int> hung{0};
      for (int life = 0; life < rounds(8); ++life) {
        system.start();
        std::vector<std::thread> threads;
        const auto until_stopped = [&](auto once) {
          threads.emplace_back([&hung, once]() mutable {
            try {
              while (once()) {
              }
              ++hung;
            } catch (const std::runtime_error&) {  // stopped
            }
          });
        };
        std::deque<std::shared_ptr<Batch>> under_way;
        until_stopped([&] {
          under_way.push_back(flood.submit(system, 12));
          if (under_way.size() < kBatchesInFlight) return true;
          const auto oldest = under_way.front();
          under_way.pop_front();
          return flood.close(*oldest);
        });
        until_stopped([&] {
          const auto batch = helped.submit(system, 40);
          {
            Helper helper(system);
            for (int i = 0; i < 6000 && !helper.wait_for(*batch, Milliseconds(10)); ++i) {
            }
          }
          return helped.close(*batch);
        });
        until_stopped([&] { return failing.close(*failing.submit(system, 20)); });
        threads.emplace_back([&] { hung += !meet_until_stopped(system); });
        std::this_thread::sleep_for(std::chrono::microseconds(life * 701 % 20'000));
        stop(system);
        for (std::thread& thread : threads) thread.join();
        for (const auto& batch : under_way) hung += !flood.close(*batch);
        CHECK_EQ(hung.load(), 0);
        for (const Ledger* ledger : {&flood, &helped, &failing}) ledger->check();
        CHECK_EQ(flood.work->running.load() + helped.work->running.load(), 0);
      }
    }
  }
}

TEST(start_and_stop_many_times_with_work_between) {
  System system(2, 3);
  for (int round = 0; round < rounds(24); ++round) {
    system.start();
    auto work = std::make_shared<CountingWork>(8);
    finish(submit(system, work, 100));
    check_all_once(*work, 100);
    if (round % 4 == 0) CHECK(meet(system, round % 8 ? 1 : -1) == Meeting::kReleased);
    stop(system);
    CHECK(!system.running());
  }
}

TEST(cancel_takes_only_its_own_batch) {
  System system(2, 4);
  system.start();
  for (int round = 0; round < rounds(30); ++round) {
    auto victim = std::make_shared<CountingWork>(
        1, [](SphereId, std::int64_t) { std::this_thread::yield(); });
    auto other = std::make_shared<CountingWork>();
    const auto cancelled = submit(system, victim, 500);
    const auto kept = submit(system, other, 100);
    system.cancel(cancelled);
    finish(cancelled);
    finish(kept);
    CHECK_EQ(victim->count.load() + cancelled->cancelled(), 500);
    check_all_once(*other, 100);
  }
}

TEST(work_handed_out_by_work) {
  System system(2, 4);
  system.start();
  auto inner = std::make_shared<CountingWork>();
  std::vector<std::shared_ptr<Batch>> batches(20);
  auto outer = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t item) {
    auto& batch = batches[static_cast<std::size_t>(item)] = std::make_shared<Batch>(inner, 10);
    while (system.try_submit(batch) == Submitted::kFull) std::this_thread::yield();
  });
  for (int round = 0; round < rounds(8); ++round) {
    finish(submit(system, outer, 20));
    for (const auto& batch : batches) finish(batch);
    CHECK_EQ(inner->count.load(), 200 * (round + 1));
  }
}
