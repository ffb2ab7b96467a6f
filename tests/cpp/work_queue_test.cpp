// The ring of batches, without any sphere: last items, late visitors, cancelled
// rests and back-pressure, each forced.
#include "work_queue.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "claimer.h"
#include "start_line.h"

using namespace torch_spheres;
using torch_spheres::testing::rounds;
using torch_spheres::testing::StartLine;

namespace {

/// Counts how often each item was run, and the work of every batch in one place.
class Tally final : public Work {
 public:
  using Each = std::function<void(std::int64_t)>;
  explicit Tally(std::int64_t items, std::int64_t chunk = 1, Each each = {})
      : hits_(static_cast<std::size_t>(items)), chunk_(chunk), each_(std::move(each)) {}

  void run(Claimer& claimer) override {
    Chunk chunk;
    while (claimer.next(chunk)) {
      for (std::int64_t i = 0; i < chunk.count; ++i) {
        const std::int64_t item = chunk.first + i * chunk.stride;
        if (each_) each_(item);
        hits_[static_cast<std::size_t>(item)].fetch_add(1, std::memory_order_relaxed);
        claimer.ran_of_chunk(i + 1);
      }
    }
  }
  std::int64_t max_chunk() const override { return chunk_; }

  std::int64_t count() const {
    return std::accumulate(hits_.begin(), hits_.end(), std::int64_t{0});
  }
  int most() const { return *std::max_element(hits_.begin(), hits_.end()); }
  int least() const { return *std::min_element(hits_.begin(), hits_.end()); }
  int hits(std::int64_t item) const { return hits_[static_cast<std::size_t>(item)]; }

 private:
  std::vector<std::atomic<int>> hits_;
  const std::int64_t chunk_;
  const Each each_;
};

/// A ring with counters and without threads.
struct Ring {
  explicit Ring(std::int32_t leaves) : ring(leaves), counters(std::size_t(leaves)) {
    for (WorkCounters& c : counters) pointers.push_back(&c);
  }
  /// What a sphere does in one slot; true if that completed the batch.
  bool visit(Slot& slot, std::int32_t leaf) {
    if (!WorkRing::enter(slot)) return false;
    Claimer claimer(ring, slot, leaf, Route(leaf, ring.leaves()), pointers.data(),
                    *pointers[static_cast<std::size_t>(leaf)]);
    try {
      slot.batch->work()->run(claimer);
    } catch (const std::runtime_error&) {
      claimer.fail(std::current_exception());
    }
    if (!claimer.had_work()) ring.close(slot);
    return ring.leave(slot, claimer.finished()) != nullptr;
  }
  /// One pass over all batches in flight; how many it completed.
  int visit_all(std::int32_t leaf) {
    int completed = 0;
    for (Slot* slot : ring.open()) completed += visit(*slot, leaf);
    return completed;
  }
  /// Of the open batches, oldest first.
  std::vector<std::uint64_t> tickets() {
    std::vector<std::uint64_t> all;
    for (const Slot* slot : ring.open()) all.push_back(slot->ticket);
    return all;
  }
  Slot* oldest() { return *ring.open().begin(); }
  std::uint64_t total(std::uint64_t (*of)(const WorkCounters&)) const {
    return std::accumulate(counters.begin(), counters.end(), std::uint64_t{0},
                           [&](std::uint64_t sum, const WorkCounters& c) { return sum + of(c); });
  }
  std::uint64_t run() const {
    return total([](const WorkCounters& c) { return c.items_run.get(); });
  }
  std::uint64_t stolen() const {
    return total([](const WorkCounters& c) { return c.items_stolen.get(); });
  }
  std::uint64_t given() const {
    return total([](const WorkCounters& c) { return c.items_given.get(); });
  }

  WorkRing ring;
  std::vector<WorkCounters> counters;
  std::vector<WorkCounters*> pointers;
};

}  // namespace

TEST(slices_share_out_every_item_once) {
  for (const std::int32_t leaves : {1, 12, 144}) {
    for (const std::int64_t n : {1, 11, 12, 13, 143, 144, 145, 1000}) {
      for (const std::int64_t chunk : {1, 64}) {
        Ring r(leaves);
        auto work = std::make_shared<Tally>(n, chunk);
        auto batch = std::make_shared<Batch>(work, n);
        CHECK(r.ring.publish(batch));
        std::int64_t queued = 0;
        for (std::int32_t leaf = 0; leaf < leaves; ++leaf) queued += r.ring.was_queued(leaf);
        CHECK_EQ(queued, n);
        CHECK(r.ring.was_queued(0) <= r.ring.queued_at_most());
        const auto leaf = static_cast<std::int32_t>(n % leaves);
        const auto own = static_cast<std::uint64_t>(r.ring.was_queued(leaf));
        CHECK_EQ(r.visit_all(leaf), 1);  // own items first, then everybody's
        CHECK(batch->done() && !batch->failed() && !r.ring.may_have_work());
        CHECK_EQ(batch->cancelled(), 0);
        CHECK(work->count() == n && work->most() == 1);
        CHECK_EQ(r.run(), static_cast<std::uint64_t>(n));
        CHECK_EQ(r.stolen(), static_cast<std::uint64_t>(n) - own);
        CHECK_EQ(r.given(), r.stolen());
      }
    }
  }
}

TEST(a_route_passes_every_leaf_once_and_siblings_first) {
  for (const std::int32_t leaves : {1, 12, 144, 1728}) {
    for (const std::int32_t leaf : {0, 1, 7, 13, leaves / 2, leaves - 1}) {
      if (leaf >= leaves) continue;
      for (const Route& route : {Route(leaf, leaves), Route::from_the_last(leaves)}) {
        for (const std::int64_t items : {std::int64_t{1}, std::int64_t{5}, std::int64_t{12},
                                         std::int64_t{leaves}, std::int64_t{5'000}}) {
          const std::int32_t count = route.count(items);
          CHECK_EQ(std::int64_t{count}, std::min<std::int64_t>(items, leaves));
          std::vector<int> passed(static_cast<std::size_t>(count));
          for (std::int32_t i = 0; i < count; ++i) {
            ++passed[static_cast<std::size_t>(route.at(i, count))];
          }
          CHECK(std::all_of(passed.begin(), passed.end(), [](int times) { return times == 1; }));
        }
      }
      const Route route(leaf, leaves);
      CHECK_EQ(route.at(0, leaves), leaf);
      // The last digit of a path is the first of a leaf's number.
      const std::int32_t step = std::max(1, leaves / kKissing);
      for (std::int32_t i = 0; i < std::min(leaves, kKissing); ++i) {
        CHECK_EQ(route.at(i, leaves) % step, leaf % step);
      }
      if (leaves != 1728) continue;
      for (std::int32_t i = 0; i < 144; ++i) CHECK_EQ(route.at(i, leaves) % 12, leaf % 12);
    }
  }
}

// Owner and thief, both already inside the batch, are released together on one item.
TEST(the_last_item_goes_to_owner_or_thief) {
  const int turns = rounds(4'000);
  Ring r(12);
  StartLine start(3), finish(3);
  std::atomic<int> completed{0};
  Slot* slot = nullptr;
  std::vector<std::thread> threads;
  for (std::int32_t leaf = 0; leaf < 2; ++leaf) {
    threads.emplace_back([&, leaf] {
      for (int round = 0; round < turns; ++round) {
        start.wait();
        completed += r.visit(*slot, leaf);
        finish.wait();
      }
    });
  }
  int wrong = 0;
  for (int round = 0; round < turns; ++round) {
    auto work = std::make_shared<Tally>(1);
    auto batch = std::make_shared<Batch>(work, 1);
    wrong += !r.ring.publish(batch);
    slot = r.oldest();
    start.wait();
    finish.wait();
    wrong += work->count() != 1 || !batch->done() || completed.load() != round + 1;
  }
  for (auto& thread : threads) thread.join();
  CHECK_EQ(wrong, 0);
  CHECK_EQ(r.run(), static_cast<std::uint64_t>(turns));
  CHECK_EQ(r.stolen(), r.given());
}

// The same with both threads held inside Work::run until the other is there too, on slices that are
// shorter than a chunk: the fetch_adds overshoot.
TEST(the_last_items_of_a_slice_are_not_taken_twice) {
  for (const std::int64_t chunk : {1, 64}) {
    const int turns = rounds(700);
    const std::int64_t n = 30;  // slices of 3 and 2
    Ring r(12);
    StartLine start(4), finish(4);
    std::atomic<int> completed{0};
    std::vector<std::thread> threads;
    for (std::int32_t leaf = 0; leaf < 3; ++leaf) {
      threads.emplace_back([&, leaf] {
        for (int round = 0; round < turns; ++round) {
          start.wait();
          completed += r.visit_all(leaf);
          finish.wait();
        }
      });
    }
    int wrong = 0;
    for (int round = 0; round < turns; ++round) {
      auto work = std::make_shared<Tally>(n, chunk);
      wrong += !r.ring.publish(std::make_shared<Batch>(work, n));
      start.wait();
      finish.wait();
      wrong += work->count() != n || work->most() != 1 || completed.load() != round + 1;
    }
    for (auto& thread : threads) thread.join();
    CHECK_EQ(wrong, 0);
    CHECK_EQ(r.run(), static_cast<std::uint64_t>(turns * n));
    CHECK_EQ(r.stolen(), r.given());
  }
}

TEST(a_late_visitor_finds_the_next_batch_of_the_slot) {
  Ring r(12);
  CHECK(r.ring.publish(std::make_shared<Batch>(std::make_shared<Tally>(5), 5)));
  Slot* late = r.oldest();
  CHECK_EQ(r.visit_all(3), 1);
  CHECK(!WorkRing::enter(*late));  // free
  CHECK(r.tickets().empty());
  for (std::size_t i = 1; i < kBatchesInFlight; ++i) {
    CHECK(r.ring.publish(std::make_shared<Batch>(std::make_shared<Tally>(1), 1)));
  }
  CHECK_EQ(r.visit_all(0), static_cast<int>(kBatchesInFlight) - 1);
  auto work = std::make_shared<Tally>(20);
  CHECK(r.ring.publish(std::make_shared<Batch>(work, 20)));
  CHECK(r.oldest() == late && r.visit(*late, 7));
  CHECK(work->count() == 20 && work->most() == 1 && r.tickets().empty());
}

TEST(a_batch_that_takes_long_holds_no_slot_but_its_own) {
  Ring r(12);
  const auto publish = [&r](std::int64_t n) {
    CHECK(!r.ring.was_full());
    const auto batch = std::make_shared<Batch>(std::make_shared<Tally>(n), n);
    CHECK(r.ring.publish(batch));
    return batch;
  };
  const auto slow = publish(2);
  Slot* const held = r.oldest();
  CHECK(WorkRing::enter(*held));  // somebody is at it all the time
  for (int lap = 0; lap < 3; ++lap) {
    for (std::size_t i = 1; i < kBatchesInFlight; ++i) publish(1);
    const std::vector<std::uint64_t> tickets = r.tickets();
    CHECK(r.ring.was_full() && r.oldest() == held);
    CHECK(std::is_sorted(tickets.begin(), tickets.end()));
    for (Slot* slot : r.ring.open()) {
      if (slot != held) CHECK(r.visit(*slot, 0));
    }
    CHECK(r.tickets() == std::vector<std::uint64_t>{0} && r.ring.may_have_work(1));
    CHECK(!r.ring.may_have_work(0));
  }
  CHECK_EQ(r.visit_all(1), 0);
  CHECK(!r.ring.may_have_work());  // it is in flight, but nothing of it is left to take
  CHECK(r.ring.leave(*held, 0) == slow);
}

// Visitors that ignore tickets and try every slot all the time, so that they enter, and complete,
// batches whose publication is not finished yet.
TEST(visitors_storm_slots_while_they_are_recycled) {
  const int batches = rounds(3'000);
  Ring r(12);
  std::vector<Slot*> slots;
  for (std::size_t i = 0; i < kBatchesInFlight; ++i) {
    CHECK(r.ring.publish(std::make_shared<Batch>(std::make_shared<Tally>(1), 1)));
    slots.push_back(*(r.ring.open().end() - 1));
  }
  auto work = std::make_shared<Tally>(3);
  std::atomic<int> completed{0};
  const int expected = batches + static_cast<int>(kBatchesInFlight);
  std::vector<std::thread> visitors;
  for (std::int32_t leaf = 0; leaf < 3; ++leaf) {
    visitors.emplace_back([&, leaf] {
      for (std::size_t at = 0; completed.load() < expected; ++at) {
        completed += r.visit(*slots[at % slots.size()], leaf);
        if (at % slots.size() == 0) std::this_thread::yield();
      }
    });
  }
  std::int64_t items = 0;
  for (int i = 0; i < batches; ++i) {
    auto batch = std::make_shared<Batch>(work, 1 + i % 3);
    while (!r.ring.publish(batch)) std::this_thread::yield();
    items += batch->items();
  }
  for (auto& visitor : visitors) visitor.join();  // hangs if an item is lost
  CHECK_EQ(completed.load(), expected);
  CHECK_EQ(work->count(), items);
  CHECK_EQ(r.run(), static_cast<std::uint64_t>(items) + kBatchesInFlight);
  CHECK_EQ(r.stolen(), r.given());
}

TEST(the_65th_batch_is_refused_until_one_is_done) {
  Ring r(12);
  std::vector<std::shared_ptr<Tally>> works;
  for (std::size_t i = 0; i < kBatchesInFlight; ++i) {
    CHECK(!r.ring.was_full());
    works.push_back(std::make_shared<Tally>(13));
    CHECK(r.ring.publish(std::make_shared<Batch>(works.back(), 13)));
  }
  auto work = std::make_shared<Tally>(13);
  auto batch = std::make_shared<Batch>(work, 13);
  CHECK(r.ring.was_full());
  CHECK(!r.ring.publish(batch));
  CHECK_EQ(r.ring.was_queued(0), static_cast<std::int64_t>(2 * kBatchesInFlight));
  CHECK(r.visit(*r.oldest(), 0));
  CHECK(!r.ring.was_full());
  CHECK(r.ring.publish(batch));
  CHECK(r.ring.was_full());
  CHECK(!batch->done());
  CHECK_EQ(r.visit_all(0), static_cast<int>(kBatchesInFlight));
  CHECK(batch->done());
  works.push_back(work);
  for (const auto& each : works) CHECK(each->least() == 1 && each->most() == 1);
}

TEST(a_cancelled_rest_and_the_items_run_make_up_the_batch) {
  const std::int64_t n = 200;
  for (int round = 0; round < rounds(120); ++round) {
    Ring r(12);
    auto work = std::make_shared<Tally>(n, round % 2 == 0 ? 1 : 64);
    auto batch = std::make_shared<Batch>(work, n);
    CHECK(r.ring.publish(batch));
    StartLine start(3);
    std::atomic<int> completed{0};
    std::vector<std::thread> visitors;
    for (std::int32_t leaf = 0; leaf < 2; ++leaf) {
      visitors.emplace_back([&, leaf] {
        start.wait();
        completed += r.visit_all(leaf);
      });
    }
    start.wait();
    const Batch* const only = round % 3 == 0 ? batch.get() : nullptr;
    r.ring.cancel(only, [&] { ++completed; });
    for (auto& visitor : visitors) visitor.join();
    CHECK(batch->done() && !batch->failed());
    CHECK_EQ(completed.load(), 1);
    CHECK_EQ(work->count() + batch->cancelled(), n);
    CHECK_EQ(r.run(), static_cast<std::uint64_t>(work->count()));
    CHECK(work->most() <= 1);
  }
}

TEST(cancelling_one_batch_spares_the_others) {
  Ring r(12);
  auto keep = std::make_shared<Tally>(50), drop = std::make_shared<Tally>(50);
  auto kept = std::make_shared<Batch>(keep, 50), dropped = std::make_shared<Batch>(drop, 50);
  CHECK(r.ring.publish(kept) && r.ring.publish(dropped));
  int completed = 0;
  r.ring.cancel(dropped.get(), [&] { ++completed; });
  CHECK_EQ(completed, 1);
  CHECK(dropped->done() && !kept->done());
  CHECK_EQ(dropped->cancelled(), 50);
  CHECK_EQ(r.visit_all(0), 1);
  CHECK_EQ(keep->count(), 50);
  CHECK_EQ(drop->count(), 0);
}

TEST(an_error_inside_a_chunk_counts_exactly) {
  for (const std::int64_t bad : {0, 5, 12, 24, 599, 1199}) {
    Ring r(12);
    const std::int64_t n = 1200;
    auto work = std::make_shared<Tally>(n, 64, [&](std::int64_t item) {
      if (item == bad) throw std::runtime_error("bad");
    });
    auto batch = std::make_shared<Batch>(work, n);
    CHECK(r.ring.publish(batch));
    CHECK(r.visit(*r.oldest(), 0));
    CHECK(batch->done() && batch->failed());
    CHECK_EQ(work->hits(bad), 0);
    CHECK(batch->cancelled() >= 1);
    CHECK_EQ(work->count() + batch->cancelled(), n);
    CHECK_EQ(r.run(), static_cast<std::uint64_t>(work->count()));
    CHECK_EQ(r.stolen(), r.given());
    CHECK_THROWS(std::rethrow_exception(batch->error()), std::runtime_error);
  }
}
