#include "mailbox.h"

#include <thread>
#include <vector>

#include "barrier.h"
#include "check.h"
#include "park.h"
#include "permits.h"

using namespace torch_spheres;

#if defined(__SANITIZE_THREAD__)
constexpr int kRounds = 3000;
#else
constexpr int kRounds = 20000;
#endif

TEST(messages_come_out_in_order_and_a_full_box_keeps_nothing) {
  Mailbox<int> box(4);
  int out = 0;
  for (int lap = 0; lap < 100; ++lap) {
    for (int i = 0; i < 4; ++i) CHECK(box.try_push(lap * 10 + i));
    int fifth = 99;
    CHECK(!box.try_push(fifth));
    CHECK_EQ(fifth, 99);
    for (int i = 0; i < 4; ++i) {
      CHECK(box.try_pop(out));
      CHECK_EQ(out, lap * 10 + i);
    }
    CHECK(!box.try_pop(out));
  }
  CHECK_THROWS(Mailbox<int>(6), std::invalid_argument);
}

TEST(many_producers_and_consumers_lose_and_repeat_nothing) {
  constexpr int kThreads = 4;
  Mailbox<std::int64_t> box(16);
  std::atomic<std::int64_t> count{0};
  std::atomic<std::int64_t> sum{0};
  std::vector<std::thread> threads;
  for (int p = 0; p < kThreads; ++p) {
    threads.emplace_back([&, p] {
      for (std::int64_t i = 0; i < kRounds; ++i) {
        std::int64_t value = p * std::int64_t{kRounds} + i;
        while (!box.try_push(value)) std::this_thread::yield();
      }
    });
    threads.emplace_back([&] {
      std::int64_t value = 0;
      while (count.load() < std::int64_t{kThreads} * kRounds) {
        if (box.try_pop(value)) {
          sum += value;
          ++count;
        } else {
          std::this_thread::yield();
        }
      }
    });
  }
  for (std::thread& t : threads) t.join();
  const std::int64_t n = std::int64_t{kThreads} * kRounds;
  CHECK_EQ(count.load(), n);
  CHECK_EQ(sum.load(), n * (n - 1) / 2);
}

TEST(the_last_message_goes_to_exactly_one_of_two_consumers) {
  Mailbox<int> box(2);
  std::atomic<int> round{0};
  std::atomic<int> finished{0};
  std::atomic<int> taken{0};
  const auto consume = [&] {
    for (int r = 1; r <= kRounds / 4; ++r) {
      while (round.load() < r) std::this_thread::yield();
      int value = 0;
      if (box.try_pop(value)) taken += value;
      ++finished;
    }
  };
  std::thread a(consume);
  std::thread b(consume);
  int lost = 0;
  for (int r = 1; r <= kRounds / 4; ++r) {
    const int before = taken.load();
    box.try_push(1);
    round.store(r);  // both see the one element at once
    while (finished.load() < 2 * r) std::this_thread::yield();
    if (taken.load() != before + 1) ++lost;
  }
  a.join();
  b.join();
  CHECK_EQ(lost, 0);
  CHECK_EQ(taken.load(), kRounds / 4);
}

TEST(a_wake_before_or_during_park_is_never_lost) {
  Parker parker;
  parker.wake();
  parker.park();  // returns at once
  std::atomic<int> given{0};
  std::atomic<int> seen{0};
  std::thread owner([&] {
    while (seen.load() < kRounds) {
      if (given.load() > seen.load()) {
        ++seen;
      } else {
        parker.park();
      }
    }
  });
  for (int i = 0; i < kRounds; ++i) {
    ++given;
    parker.wake();
    if (i % 3 == 0) {
      while (seen.load() < given.load()) std::this_thread::yield();
    }
  }
  owner.join();  // hangs if a wake was lost
  CHECK_EQ(seen.load(), kRounds);
}

TEST(no_ready_leaf_is_left_while_a_permit_is_free) {
  // The race of marker and releaser: whoever comes second must find the other's half.
  Permits permits(144, 1);
  std::atomic<int> granted{0};
  const auto dispatch = [&] {
    while (permits.any_ready() && permits.try_acquire()) {
      if (permits.pop_ready() >= 0) ++granted;
      permits.release();
    }
  };
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kRounds; ++i) {
        permits.mark_ready((t * 50 + i) % 144);
        dispatch();
      }
    });
  }
  for (std::thread& t : threads) t.join();
  CHECK(!permits.any_ready());
  CHECK(granted.load() > 0);
  CHECK(permits.try_acquire());
  CHECK(!permits.try_acquire());
}

TEST(a_late_arrival_does_not_count_for_the_next_meeting) {
  Barrier barrier;
  const std::uint32_t first = barrier.open(2);
  CHECK(!barrier.arrive(first));
  CHECK(barrier.abort(first));
  CHECK(!barrier.abort(first));
  CHECK(barrier.outcome(first) == Meeting::kAborted);
  const std::uint32_t second = barrier.open(2);
  CHECK(!barrier.arrive(first));  // too late: for nobody
  CHECK(!barrier.arrive(second));
  CHECK(barrier.outcome(second) == Meeting::kPending);
  CHECK(barrier.arrive(second));
  barrier.release(second);
  CHECK(barrier.outcome(second) == Meeting::kReleased);
  CHECK(!barrier.abort(second));
}

int main(int argc, char** argv) { return torch_spheres::testing::run_all_tests(argc, argv); }
