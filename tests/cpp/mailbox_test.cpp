// The small parts alone: the mailbox's lost or repeated messages, leaves had by two, late arrivals
// at a barrier, and a cursor's items taken or cancelled.
#include "mailbox.h"

#include <algorithm>
#include <array>
#include <thread>
#include <vector>

#include "barrier.h"
#include "check.h"
#include "park.h"
#include "permits.h"
#include "shaky_atomic.h"
#include "start_line.h"
#include "work_queue.h"

using namespace torch_spheres;
using torch_spheres::testing::rounds;
using torch_spheres::testing::ShakyAtomic;
using torch_spheres::testing::StartLine;

TEST(messages_keep_their_order) {
  for (const std::size_t capacity : {1, 2, 64}) {
    Mailbox<int> box(capacity);
    int pushed = 0, popped = 0, value = -1;
    for (std::size_t lap = 0; lap < 1000; ++lap) {
      const std::size_t fill = lap % (capacity + 1);
      for (std::size_t i = 0; i < fill; ++i) {
        value = pushed++;
        CHECK(box.try_push(value));
      }
      value = -1;
      if (fill == capacity) CHECK(!box.try_push(value));
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
  Mailbox<std::unique_ptr<int>> box(1);
  auto first = std::make_unique<int>(1);
  auto second = std::make_unique<int>(2);
  CHECK(box.try_push(first) && !first);
  CHECK(!box.try_push(second));
  CHECK(second && *second == 2);
  CHECK(box.try_pop(first) && *first == 1);
  CHECK(box.try_push(second) && !second);
}  // AddressSanitizer: what is left is freed

namespace {

struct Traffic {
  int producers, consumers;
  std::size_t capacity;
  int each;
};

/// Each consumer must see each producer's messages in the order in which they were sent.
void run_traffic(const Traffic& t) {
  Mailbox<std::uint32_t> box(t.capacity);
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
  run_traffic({1, 1, 2, rounds(300)});
  run_traffic({3, 1, 32, rounds(300)});
  run_traffic({1, 3, 2, rounds(300)});
  run_traffic({3, 3, 4, rounds(300)});
}

TEST(a_permit_is_had_by_one) {
  BasicPermits<ShakyAtomic> permits(2);
  std::atomic<int> holders{0}, most{0}, had{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < rounds(300); ++i) {
        if (!permits.try_acquire()) continue;
        most = std::max(most.load(), ++holders);
        ++had;
        --holders;
        permits.release();
      }
    });
  }
  for (std::thread& t : threads) t.join();
  CHECK(had > 0 && most <= 2);
  CHECK(permits.try_acquire() && permits.try_acquire() && !permits.try_acquire());
}

// Popped by two and removed by its owner: one of the three has it.
TEST(a_leaf_of_a_set_is_had_by_one) {
  const int turns = rounds(1'000);
  BasicLeafSet<ShakyAtomic> set(200);
  StartLine start(4), finish(4);
  std::atomic<int> had{0}, wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      for (int round = 0; round < turns; ++round) {
        start.wait();
        if (t == 2) {
          had += set.remove(round % 200);
        } else if (const std::int32_t leaf = set.pop(); leaf >= 0) {
          ++had;
          wrong += leaf != round % 200;
        }
        finish.wait();
      }
    });
  }
  int lost = 0;
  for (int round = 0; round < turns; ++round) {
    set.add(round % 200);
    start.wait();
    finish.wait();
    lost += had.load() != round + 1 || set.was_any();
  }
  for (auto& thread : threads) thread.join();
  CHECK_EQ(lost, 0);
  CHECK_EQ(wrong.load(), 0);
  set.add(130);
  set.add(70);
  CHECK(set.pop() == 70 && set.pop() == 130 && set.pop() == -1);
}

// Leaves that get turns, look, find one item or none, stop looking and become idle, while others
// submit an item, or help, and wait for it: between any two steps comes another thread's.
TEST(no_item_is_left_while_a_permit_and_a_leaf_are_free) {
  constexpr std::int32_t kLeaves = 3;
  BasicTurns<ShakyAtomic> turns(70, 1);
  ShakyAtomic<std::int64_t> items{0};
  std::array<Parker, kLeaves> parkers;
  std::array<std::atomic<bool>, kLeaves> granted{};
  std::atomic<int> running{0}, most{0};
  std::atomic<std::int64_t> ran{0};
  const auto dispatch = [&] {
    const auto may_have_work = [&] { return items.load() > 0; };
    for (std::int32_t leaf; (leaf = turns.next(may_have_work)) >= 0;) {
      granted[static_cast<std::size_t>(leaf)] = true;
      parkers[static_cast<std::size_t>(leaf)].wake();
    }
  };
  const auto take = [&] {
    for (std::int64_t left = items.load(); left > 0;) {
      if (items.compare_exchange_weak(left, left - 1)) return true;
    }
    return false;
  };
  const std::int64_t all = rounds(1'000);
  StartLine line(2);
  std::vector<std::thread> threads;
  for (std::int32_t leaf = 0; leaf < kLeaves; ++leaf) {
    threads.emplace_back([&, leaf, at = static_cast<std::size_t>(leaf)] {
      turns.asleep.add(leaf);
      dispatch();
      while (ran < all) {
        parkers[at].park();
        if (!granted[at].exchange(false)) continue;
        most = std::max(most.load(), ++running);
        bool looks = true;
        while (take()) {
          if (looks) {
            turns.stop_looking();
            dispatch();
          }
          looks = false;
          if (++ran == all) {
            for (Parker& parker : parkers) parker.wake();
          }
        }
        if (looks) turns.stop_looking();
        --running;
        turns.permits.release();
        dispatch();
        turns.awake.add(leaf);
        dispatch();
        if (turns.awake.remove(leaf)) {  // it has spun for long enough
          turns.asleep.add(leaf);
          dispatch();
        }
      }
    });
  }
  for (int t = 0; t < 2; ++t) {
    threads.emplace_back([&, t] {
      for (std::int64_t i = 0; i < all; ++i) {
        line.wait();
        if (t == 0) {
          items.fetch_add(1);
        } else if (turns.permits.try_acquire()) {  // a helper comes and goes
          turns.permits.release();
        }
        dispatch();
        while (ran < i + 1) std::this_thread::yield();  // for ever, if nobody looks
      }
    });
  }
  for (std::thread& t : threads) t.join();
  CHECK_EQ(ran.load(), all);
  CHECK_EQ(most.load(), 1);
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
