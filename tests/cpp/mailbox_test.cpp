// The small parts alone: the parker's lost wake-ups, the mailbox's lost or repeated messages,
// permits left unused, late arrivals at a barrier, and a cursor's items taken or cancelled.
#include "mailbox.h"

#include <algorithm>
#include <array>
#include <thread>
#include <vector>

#include "barrier.h"
#include "check.h"
#include "cursor.h"
#include "park.h"
#include "permits.h"
#include "shaky_atomic.h"
#include "start_line.h"

using namespace torch_spheres;
using torch_spheres::testing::rounds;
using torch_spheres::testing::ShakyAtomic;
using torch_spheres::testing::StartLine;
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

TEST(messages_keep_their_order_and_wrap_around) {
  for (const std::size_t capacity : {2, 4, 64}) {
    Mailbox<int> box(capacity);
    int pushed = 0, popped = 0, value = -1;
    for (std::size_t lap = 0; lap < 1000; ++lap) {
      const std::size_t fill = lap % (capacity + 1);
      for (std::size_t i = 0; i < fill; ++i) CHECK(box.try_push(pushed++));
      if (fill == capacity) CHECK(!box.try_push(-1));
      CHECK_EQ(box.was_empty(), fill == 0);
      for (std::size_t i = 0; i < fill; ++i) {
        CHECK(box.try_pop(value));
        CHECK_EQ(value, popped++);
      }
      CHECK(!box.try_pop(value));
    }
  }
}

TEST(a_full_mailbox_refuses_and_leaves_the_message_with_the_sender) {
  Mailbox<std::unique_ptr<int>> box(8);
  for (int i = 0; i < 8; ++i) CHECK(box.try_push(std::make_unique<int>(i)));
  auto ninth = std::make_unique<int>(8);
  CHECK(!box.try_push(ninth));
  CHECK(ninth && *ninth == 8);
  std::unique_ptr<int> first;
  CHECK(box.try_pop(first) && *first == 0);
  CHECK(box.try_push(ninth));
  CHECK(!ninth);
  for (int i = 1; i <= 8; ++i) CHECK(box.try_pop(first) && *first == i);
  CHECK(!box.try_pop(first));
}  // AddressSanitizer: nothing is left

TEST(letters_left_over_are_freed) {
  Mailbox<std::unique_ptr<int>> box(8);
  for (int i = 0; i < 5; ++i) CHECK(box.try_push(std::make_unique<int>(i)));
}

TEST(a_capacity_that_the_sequence_cannot_tell_apart_is_refused) {
  for (const std::size_t capacity : {0, 1, 3, 12, 100}) {
    CHECK_THROWS(Mailbox<int>{capacity}, std::invalid_argument);
  }
}

namespace {

struct Traffic {
  int producers, consumers;
  std::size_t capacity;
  int each;
};

/// Each consumer must see each producer's messages in the order in which they were sent.
void run_traffic(const Traffic& t) {
  Mailbox<std::uint32_t, ShakyAtomic> box(t.capacity);
  const std::uint32_t total = static_cast<std::uint32_t>(t.producers * t.each);
  std::atomic<std::uint32_t> taken{0};
  std::atomic<std::uint64_t> sum{0};
  std::atomic<int> disorder{0};
  std::vector<std::thread> threads;
  for (int p = 0; p < t.producers; ++p) {
    threads.emplace_back([&, p] {
      for (int i = 0; i < t.each; ++i) {
        std::uint32_t value = static_cast<std::uint32_t>(p * t.each + i);
        while (!box.try_push(value)) std::this_thread::yield();
      }
    });
  }
  for (int c = 0; c < t.consumers; ++c) {
    threads.emplace_back([&] {
      std::vector<std::int64_t> last(static_cast<std::size_t>(t.producers), -1);
      std::uint32_t value = 0;
      while (taken.load() < total) {
        if (!box.try_pop(value)) {
          std::this_thread::yield();
          continue;
        }
        auto& before = last[value / static_cast<std::uint32_t>(t.each)];
        disorder += static_cast<std::int64_t>(value) <= before;
        before = value;
        sum += value;
        ++taken;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK_EQ(taken.load(), total);
  CHECK_EQ(sum.load(), std::uint64_t{total} * (total - 1) / 2);
  CHECK_EQ(disorder.load(), 0);
  CHECK(box.was_empty());
}

}  // namespace

TEST(many_producers_and_consumers_lose_and_repeat_nothing) {
  run_traffic({1, 1, 2, rounds(3'000)});
  run_traffic({3, 1, 32, rounds(2'000)});  // as spheres use it
  run_traffic({1, 3, 2, rounds(2'000)});
  run_traffic({3, 3, 4, rounds(2'000)});
}

TEST(the_last_message_goes_to_one_of_two_consumers) {
  const int turns = rounds(2'000);
  Mailbox<std::unique_ptr<int>, ShakyAtomic> box(2);
  StartLine start(3), finish(3);
  std::atomic<int> taken{0};
  std::atomic<std::int64_t> sum{0};
  std::vector<std::thread> consumers;
  for (int c = 0; c < 2; ++c) {
    consumers.emplace_back([&] {
      for (int round = 0; round < turns; ++round) {
        start.wait();
        std::unique_ptr<int> message;
        if (box.try_pop(message)) {
          ++taken;
          sum += *message;
        }
        finish.wait();
      }
    });
  }
  int wrong = 0;
  for (int round = 0; round < turns; ++round) {
    wrong += !box.try_push(std::make_unique<int>(round));
    start.wait();
    finish.wait();
    wrong += taken.load() != round + 1;
  }
  for (auto& consumer : consumers) consumer.join();
  CHECK_EQ(wrong, 0);
  CHECK_EQ(sum.load(), std::int64_t{turns} * (turns - 1) / 2);
}

// The race of marker and releaser: whoever comes second must find the other's half.
TEST(no_ready_leaf_is_left_while_a_permit_is_free) {
  const int turns = rounds(1'000);
  BasicPermits<ShakyAtomic> permits(144, 1);
  std::atomic<int> granted{0}, holders{0}, most{0};
  const auto dispatch = [&] {
    while (permits.any_ready() && permits.try_acquire()) {
      most = std::max(most.load(), ++holders);
      if (permits.pop_ready() >= 0) ++granted;
      --holders;
      permits.release();
    }
  };
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < turns; ++i) {
        permits.mark_ready((t * 50 + i) % 144);
        dispatch();
      }
    });
  }
  for (std::thread& t : threads) t.join();
  CHECK(!permits.any_ready());
  CHECK(granted.load() > 0 && granted.load() <= 3 * turns);
  CHECK_EQ(most.load(), 1);
  CHECK(permits.try_acquire());
  CHECK(!permits.try_acquire());
}

TEST(a_ready_leaf_is_popped_by_one_of_two) {
  const int turns = rounds(1'000);
  BasicPermits<ShakyAtomic> permits(200, 1);
  StartLine start(3), finish(3);
  std::atomic<int> popped{0}, wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 2; ++t) {
    threads.emplace_back([&] {
      for (int round = 0; round < turns; ++round) {
        start.wait();
        const std::int32_t leaf = permits.pop_ready();
        popped += leaf >= 0;
        wrong += leaf >= 0 && leaf != round % 200;
        finish.wait();
      }
    });
  }
  int lost = 0;
  for (int round = 0; round < turns; ++round) {
    permits.mark_ready(round % 200);
    start.wait();
    finish.wait();
    lost += popped.load() != round + 1;
  }
  for (auto& thread : threads) thread.join();
  CHECK_EQ(lost, 0);
  CHECK_EQ(wrong.load(), 0);
}

TEST(a_late_arrival_does_not_count_for_the_next_meeting) {
  Barrier barrier;
  const std::uint32_t first = barrier.open(2);
  CHECK(!barrier.arrive(first));
  CHECK(barrier.abort(first));
  CHECK(!barrier.abort(first) && !barrier.release(first));
  const std::uint32_t second = barrier.open(2);
  CHECK(!barrier.arrive(first));  // too late: for nobody
  CHECK(!barrier.arrive(second));
  CHECK(barrier.outcome(second) == Meeting::kPending);
  CHECK(barrier.arrive(second));
  CHECK(barrier.release(second));
  CHECK(barrier.outcome(second) == Meeting::kReleased);
  CHECK(!barrier.abort(second));
}

TEST(who_asks_late_is_told_of_its_own_meeting) {
  Barrier barrier;
  const auto was_aborted = [](std::uint32_t id) { return id % 3 == 0 || id % 7 == 5; };
  for (std::uint32_t id = 1; id <= 100; ++id) {
    CHECK_EQ(barrier.open(1), id);
    CHECK(barrier.outcome(id) == Meeting::kPending);
    CHECK(was_aborted(id) ? barrier.abort(id) : barrier.arrive(id) && barrier.release(id));
    for (std::uint32_t asked = std::max(id, 32u) - 31; asked <= id; ++asked) {
      CHECK(barrier.outcome(asked) ==
            (was_aborted(asked) ? Meeting::kAborted : Meeting::kReleased));
    }
  }
}

TEST(arrivals_and_an_abort_race_for_one_outcome) {
  const int turns = rounds(500);
  BasicBarrier<ShakyAtomic> barrier;
  StartLine start(4), finish(4);
  std::uint32_t id = 0;
  std::atomic<int> released{0}, aborted{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      for (int round = 0; round < turns; ++round) {
        start.wait();
        if (t == 2) {
          aborted += barrier.abort(id);
        } else if (barrier.arrive(id)) {
          released += barrier.release(id);
        }
        finish.wait();
      }
    });
  }
  int wrong = 0;
  for (int round = 0; round < turns; ++round) {
    const int before = aborted.load();
    id = barrier.open(2);
    start.wait();
    finish.wait();
    wrong += released.load() + aborted.load() != round + 1;
    wrong +=
        barrier.outcome(id) != (aborted.load() > before ? Meeting::kAborted : Meeting::kReleased);
  }
  for (auto& thread : threads) thread.join();
  CHECK_EQ(wrong, 0);
}

// Owner, thief and one who cancels, with other threads between any two of their accesses.
TEST(what_is_taken_of_a_cursor_and_what_is_cancelled_make_up_its_items) {
  const int turns = rounds(2'000);
  BasicCursor<ShakyAtomic> cursor;
  StartLine start(4), finish(4);
  std::array<std::atomic<int>, 6> hits{};
  std::atomic<std::int64_t> cancelled{0};
  std::vector<std::thread> threads;
  for (int taker = 0; taker < 2; ++taker) {
    threads.emplace_back([&, taker] {
      for (int round = 0; round < turns; ++round) {
        start.wait();
        for (auto taken = cursor.take(1 + taker); taken.count > 0; taken = cursor.take(1 + taker)) {
          for (std::int64_t i = 0; i < taken.count; ++i) ++hits.at(std::size_t(taken.first + i));
        }
        finish.wait();
      }
    });
  }
  threads.emplace_back([&] {
    for (int round = 0; round < turns; ++round) {
      start.wait();
      if (round % 2 == 0) cancelled += cursor.cancel();
      finish.wait();
    }
  });
  int twice = 0, lost = 0;
  for (int round = 0; round < turns; ++round) {
    const int items = 1 + round % static_cast<int>(hits.size());
    cursor.fill(items);
    start.wait();
    finish.wait();
    std::int64_t seen = cancelled.exchange(0);
    for (std::atomic<int>& hit : hits) {
      twice += hit.load() > 1;
      seen += hit.exchange(0);
    }
    lost += seen != items;
    CHECK_EQ(cursor.was_left(), 0);
  }
  for (auto& thread : threads) thread.join();
  CHECK_EQ(twice, 0);
  CHECK_EQ(lost, 0);
}

int main(int argc, char** argv) { return torch_spheres::testing::run_all_tests(argc, argv); }
