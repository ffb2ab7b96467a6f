// Threads that sleep until they are called: the parker's lost wake-ups, news that nobody hears, and
// leaves that pause within work items.
#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

#include "park.h"
#include "shaky_atomic.h"
#include "start_line.h"
#include "system_support.h"

using namespace torch_spheres;
using namespace torch_spheres::testing;
using ShakyParker = BasicParker<ShakyAtomic>;

TEST(a_wake_before_the_park_is_kept) {
  Parker parker;
  parker.wake();
  parker.wake();  // one token, however often
  parker.park();
  std::atomic<bool> returned{false};
  std::thread sleeper([&] {
    parker.park();
    returned = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const bool slept = !returned;
  parker.wake();
  sleeper.join();
  CHECK(slept);
}

// Plain ints: that each side sees the other's write rests on park and wake alone, which is for
// ThreadSanitizer to judge.  A lost wake-up would hang.
TEST(two_parkers_hammering_each_other) {
  ShakyParker ping, pong;
  int value = 0;
  const int turns = rounds(4'000);
  std::thread other([&] {
    for (int i = 0; i < turns; ++i) {
      ping.park();
      ++value;
      pong.wake();
    }
  });
  int wrong = 0;
  for (int i = 0; i < turns; ++i) {
    ping.wake();
    pong.park();
    wrong += value != i + 1;
  }
  other.join();
  CHECK_EQ(wrong, 0);
  CHECK_EQ(value, turns);
}

TEST(many_wakers_and_one_sleeper) {
  ShakyParker parker;
  std::atomic<std::int64_t> count{0}, sum{0};
  const int wakers = 3, each = rounds(5'000);
  std::vector<std::thread> threads;
  for (int w = 0; w < wakers; ++w) {
    threads.emplace_back([&, w] {
      for (int i = 0; i < each; ++i) {
        sum.fetch_add(w * each + i, std::memory_order_relaxed);
        count.fetch_add(1, std::memory_order_relaxed);
        parker.wake();
      }
    });
  }
  // Hangs if the last wake is lost.
  while (count.load(std::memory_order_relaxed) < wakers * each) parker.park();
  for (auto& thread : threads) thread.join();
  const std::int64_t n = wakers * each;
  CHECK_EQ(sum.load(), n * (n - 1) / 2);
}

// A word for each way to sleep: what waits for news on one thread is told by another.
template <typename Wait, typename Wake>
void run_sleepers(Wait wait, Wake wake) {
  std::atomic<std::uint32_t> word{0};
  const std::uint32_t turns = static_cast<std::uint32_t>(rounds(2'000));
  std::vector<std::thread> threads;
  for (int t = 0; t < 2; ++t) {
    threads.emplace_back([&] {
      for (std::uint32_t seen = 0; seen < turns; seen = word.load()) wait(word, seen, kForever);
    });
  }
  for (std::uint32_t i = 1; i <= turns; ++i) {
    word.store(i);
    wake(word);
    if (i % 3 == 0) std::this_thread::yield();
  }
  for (auto& thread : threads) thread.join();  // hangs if the last wake is lost
  const auto begin = std::chrono::steady_clock::now();
  const auto until = begin + std::chrono::milliseconds(20);
  while (std::chrono::steady_clock::now() < until) wait(word, turns, until);
  wait(word, turns, until);         // its time is over
  wait(word, turns + 1, kForever);  // it holds something else
  CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(60));
}

TEST(sleepers_on_a_word_are_woken_and_look_up_when_their_time_is_over) {
  using Word = std::atomic<std::uint32_t>;
  run_sleepers([](Word& word, std::uint32_t seen, Deadline until) { wait_on(word, seen, until); },
               [](Word& word) { wake_all(word); });
  run_sleepers(
      [](Word& word, std::uint32_t seen, Deadline until) { portable::wait_on(word, seen, until); },
      [](Word& word) { portable::wake_all(word); });
}

TEST(news_reach_all_that_wait) {
  BasicNews<ShakyAtomic> news;
  std::atomic<int> value{0};
  const int turns = rounds(300);
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      for (int i = 1; i <= turns; ++i) news.wait(kForever, [&] { return value.load() >= i; });
    });
  }
  for (int i = 1; i <= turns; ++i) {
    value.store(i);
    news.tell();
  }
  for (auto& thread : threads) thread.join();  // hangs if one is not heard
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(5);
  CHECK(!news.wait(until, [] { return false; }));
  CHECK(std::chrono::steady_clock::now() >= until);
}

TEST(spinning_that_does_not_pay_is_tried_seldom) {
  Luck luck;
  int tried = 0;
  const auto never = [&] { return false; };
  for (int i = 0; i < 200; ++i) {
    tried += luck.allows();
    spin_until(luck, 0, never);
  }
  CHECK(tried >= 8 && tried < 60);
  for (int i = 0; i < 4; ++i) luck.tell(true);
  CHECK(luck.allows() && luck.allows());
}

namespace {

/// Where `parties` items wait for each other, again and again, as the shards of a batch do.
class Meetings {
 public:
  Meetings(System& system, int parties) : system_(system), parties_(parties) {}

  /// False: the system is stopping.
  bool meet(SphereId leaf) {
    std::uint64_t turn = 0;
    std::vector<SphereId> called;
    {
      const std::lock_guard lock(mutex_);
      turn = turns_.load();
      waiting_.push_back(leaf);
      if (static_cast<int>(waiting_.size()) == parties_) {
        called.swap(waiting_);
        turns_.store(turn + 1);
      }
    }
    for (const SphereId other : called) {
      if (other != leaf) system_.call_back(other);
    }
    while (turns_.load() == turn) {
      if (system_.stopping()) return false;
      --computing;
      system_.pause();
      const int now = ++computing;
      int most = most_computing.load();
      while (now > most && !most_computing.compare_exchange_weak(most, now)) {
      }
    }
    return true;
  }

  std::uint64_t turns() const { return turns_.load(); }
  std::atomic<int> computing{0};  // items that run and have not paused
  std::atomic<int> most_computing{0};

 private:
  System& system_;
  const int parties_;
  std::mutex mutex_;
  std::vector<SphereId> waiting_;
  std::atomic<std::uint64_t> turns_{0};
};

/// Items that meet so many times each.
std::shared_ptr<CountingWork> meeting_work(Meetings& meetings, int times) {
  return std::make_shared<CountingWork>(8, [&meetings, times](SphereId leaf, std::int64_t) {
    const int now = ++meetings.computing;
    int most = meetings.most_computing.load();
    while (now > most && !meetings.most_computing.compare_exchange_weak(most, now)) {
    }
    for (int i = 0; i < times && meetings.meet(leaf); ++i) {
    }
    --meetings.computing;
  });
}

}  // namespace

TEST(items_on_all_leaves_meet_though_few_may_run_at_once) {
  for (const Shape shape : shapes()) {
    if (shape.levels == 4) continue;
    System system(shape.levels, shape.concurrency);
    system.start();
    const int leaves = system.topology().leaves();
    for (int round = 0; round < rounds(leaves > 12 ? 5 : 50); ++round) {
      const int items = round % 2 == 0 ? leaves : 1 + round % leaves;
      Meetings meetings(system, items);
      const auto work = meeting_work(meetings, 5);
      finish(submit(system, work, items));
      check_all_once(*work, items);
      CHECK_EQ(meetings.turns(), 5u);
      CHECK(meetings.most_computing.load() <= shape.concurrency);
    }
  }
}

TEST(other_work_runs_while_leaves_are_paused) {
  System system(2, 1);
  system.start();
  std::atomic<SphereId> leaf{kNoSphere};
  std::atomic<bool> done{false};
  const auto paused = std::make_shared<CountingWork>(1, [&](SphereId sphere, std::int64_t) {
    leaf.store(sphere);
    while (!done.load()) system.pause();
  });
  const auto waiting = submit(system, paused, 1);
  const auto other = std::make_shared<CountingWork>();
  finish(submit(system, other, 500));
  check_all_once(*other, 500);
  while (leaf.load() == kNoSphere) std::this_thread::yield();
  while (system.stats(leaf.load()).state != State::kWaiting) std::this_thread::yield();
  // Called for nothing, it pauses again.
  for (int i = 0; i < rounds(100); ++i) system.call_back(leaf.load());
  finish(submit(system, other, 500));
  CHECK(!waiting->done());
  done.store(true);
  system.call_back(leaf.load());
  finish(waiting);
}

TEST(a_call_that_comes_first_is_kept) {
  System system(2, 2);
  system.start();
  const auto work = std::make_shared<CountingWork>(1, [&](SphereId leaf, std::int64_t) {
    for (int i = 0; i < 100; ++i) {
      system.call_back(leaf);
      system.call_back(leaf);
      system.pause();
    }
  });
  finish(submit(system, work, 12));
  check_all_once(*work, 12);
}

TEST(calls_and_pauses_race) {
  System system(2, 2);
  system.start();
  constexpr std::uint64_t kCalls = 2000;
  std::atomic<SphereId> leaf{kNoSphere};
  std::atomic<std::uint64_t> sent{0}, seen{0};
  const auto work = std::make_shared<CountingWork>(1, [&](SphereId sphere, std::int64_t) {
    leaf.store(sphere);
    while (seen.load() < kCalls) {
      while (sent.load() == seen.load()) system.pause();
      seen.store(sent.load());
    }
  });
  const auto batch = submit(system, work, 1);
  while (leaf.load() == kNoSphere) std::this_thread::yield();
  for (std::uint64_t i = 1; i <= kCalls; ++i) {
    sent.store(i);
    system.call_back(leaf.load());
    if (i % 3 == 0) {
      while (seen.load() < i) std::this_thread::yield();
    }
  }
  finish(batch);
}

TEST(stop_ends_all_pauses) {
  for (int round = 0; round < rounds(60); ++round) {
    System system(2, 1 + round % 3);
    for (int again = 0; again < 2; ++again) {
      system.start();
      Meetings meetings(system, 13);  // one more than can ever come
      const auto work = meeting_work(meetings, 1);
      const auto batch = submit(system, work, 12);
      if (round % 2 == 0) {
        while (work->running.load() < 12) std::this_thread::yield();
      } else {
        std::this_thread::sleep_for(std::chrono::microseconds(20 * round));
      }
      stop(system);
      CHECK(batch->done());
      CHECK_EQ(work->count.load() + batch->cancelled(), 12);
    }
  }
}

TEST(a_pause_is_for_work_items) {
  System system(2, 1);
  system.start();
  CHECK_THROWS(system.pause(), std::logic_error);
}
