// Item times: the buckets' arithmetic, the clock, and what claims count of chunks, errors and
// thefts.
#include "item_times.h"

#include <atomic>
#include <chrono>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "helper.h"
#include "system_support.h"

using namespace torch_spheres;
using namespace torch_spheres::testing;

namespace {

/// Far more than the items of a test take.
constexpr Milliseconds kBefore{400};
constexpr Milliseconds kSlow{50};

std::uint64_t counted(const SphereStats& stats) {
  return std::accumulate(stats.item_time_counts.begin(), stats.item_time_counts.end(),
                         std::uint64_t{0});
}

std::uint64_t stolen(const SphereStats& stats) {
  return std::accumulate(stats.stolen_from.begin(), stats.stolen_from.end(), std::uint64_t{0});
}

/// Items counted in buckets that reach beyond a time.
std::uint64_t counted_from(const SphereStats& stats, std::uint64_t ns) {
  std::uint64_t sum = 0;
  for (std::size_t i = ItemTimes::bucket(ns); i < ItemTimes::kBuckets; ++i) {
    sum += stats.item_time_counts[i];
  }
  return sum;
}

/// The items took no longer than was measured around them, without kBefore.
void check_at_most(const SphereStats& stats, std::uint64_t measured_ns) {
  CHECK(stats.item_time_ns <= measured_ns);
}

/// Work of the kind that sums gradients.
class Sums final : public Work {
 public:
  void run(Claimer& claimer) override {
    Chunk chunk;
    while (claimer.next(chunk)) {
    }
  }
  State state() const override { return State::kAccumulating; }
};

/// Begins late, as work that waits for the GIL does; the last item of each chunk throws, if asked
/// to.
class BeginsLate final : public Work {
 public:
  explicit BeginsLate(bool fails = false, std::int64_t slow = -1) : fails_(fails), slow_(slow) {}
  void run(Claimer& claimer) override {
    Chunk chunk;
    if (!claimer.next(chunk)) return;
    std::this_thread::sleep_for(kBefore);  // not to be counted
    begun.store(now_ns());
    claimer.begin_items(begun.load());
    do {
      for (std::int64_t i = 0; i < chunk.count; ++i) {
        if (chunk.first + i * chunk.stride == slow_) std::this_thread::sleep_for(kSlow);
      }
      if (fails_) {
        claimer.ran_of_chunk(chunk.count);
        measured_ns += now_ns() - begun.load();
        std::this_thread::sleep_for(kBefore);  // nor that
        throw std::runtime_error("after the items of a chunk");
      }
    } while (claimer.next(chunk));
    measured_ns += now_ns() - begun.load();
  }
  std::int64_t max_chunk() const override { return 8; }

  std::atomic<std::uint64_t> begun{0};        // now_ns() before the first item
  std::atomic<std::uint64_t> measured_ns{0};  // from there to behind the last

 private:
  const bool fails_;
  const std::int64_t slow_;
};

}  // namespace

TEST(each_time_is_below_its_buckets_edge_and_not_below_the_one_before) {
  constexpr std::size_t last = ItemTimes::kBuckets - 1;
  for (std::size_t i = 0; i < last; ++i) {
    const std::uint64_t edge = ItemTimes::edge(i);
    CHECK_EQ(ItemTimes::bucket(edge - 1), i);
    CHECK_EQ(ItemTimes::bucket(edge), i + 1);
    if (i == 0) continue;
    const std::uint64_t below = ItemTimes::edge(i - 1);
    CHECK(below < edge);
    CHECK(4 * (edge - below) <= below);
  }
  CHECK_EQ(ItemTimes::bucket(0), 0u);
  CHECK_EQ(ItemTimes::edge(0), 64u);
  CHECK_EQ(ItemTimes::edge(last - 1), std::uint64_t{1} << 38);
  CHECK_EQ(ItemTimes::bucket(~std::uint64_t{0}), last);
}

TEST(items_are_counted_with_their_mean_and_the_total_is_exact) {
  ItemTimes times;
  times.add(1000, 1);
  times.add(1003, 10);
  times.add(0, 1);
  const ItemTimes::Counts counts = times.counts();
  CHECK_EQ(counts[ItemTimes::bucket(1000)], 1u);
  CHECK_EQ(counts[ItemTimes::bucket(100)], 10u);
  CHECK_EQ(counts[0], 1u);
  CHECK_EQ(std::accumulate(counts.begin(), counts.end(), std::uint64_t{0}), 12u);
  CHECK_EQ(times.total_ns(), 2003u);
}

TEST(every_item_that_runs_is_counted_once_whoever_runs_it) {
  for (int levels = 1; levels <= 4; ++levels) {
    for (const std::int64_t chunk : {1, 64}) {
      if (levels == 4 && chunk == 1) continue;
      System system(levels, 4);
      system.start();
      auto work = std::make_shared<CountingWork>(chunk);
      const auto batch = submit(system, work, 5'000);
      Helper helper(system);
      CHECK(helper.wait_for(*batch, kPatience));
      finish(submit(system, std::make_shared<CountingWork>(chunk), 2'000));
      stop(system);
      std::uint64_t all = 0;
      for (const SphereStats& stats : system.stats()) {
        CHECK_EQ(counted(stats), stats.items_run);
        CHECK_EQ(stolen(stats), stats.items_stolen);
        CHECK_EQ(stats.queued, 0u);
        all += counted(stats);
      }
      CHECK_EQ(all, 7'000u);
    }
  }
}

TEST(an_items_time_is_in_its_bucket) {
  System system(2, 1);
  system.start();
  auto work = std::make_shared<CountingWork>(1, [](SphereId, std::int64_t item) {
    if (item == 7) std::this_thread::sleep_for(Milliseconds(30));
  });
  finish(submit(system, work, 24));
  stop(system);
  std::uint64_t slow = 0, total = 0;
  for (const SphereStats& stats : system.stats()) {
    slow += counted_from(stats, 29'000'000);
    total += stats.item_time_ns;
  }
  CHECK(slow >= 1);
  CHECK(total >= 29'000'000);
}

TEST(times_leave_out_what_came_before_the_first_item_and_after_an_error) {
  System system(1, 1);
  system.start();
  const auto good = std::make_shared<BeginsLate>();
  finish(submit(system, good, 100));
  const auto bad = std::make_shared<BeginsLate>(true);
  const auto batch = submit(system, bad, 100);
  finish(batch);
  CHECK(batch->failed());
  stop(system);
  const SphereStats stats = system.stats(0);
  CHECK_EQ(stats.items_run, 100u + 100u - static_cast<std::uint64_t>(batch->cancelled()));
  CHECK_EQ(counted(stats), stats.items_run);
  check_at_most(stats, good->measured_ns.load() + bad->measured_ns.load());
}

TEST(a_slow_item_among_short_ones_of_its_chunk_is_its_own) {
  System system(1, 1);
  system.start();
  const auto work = std::make_shared<BeginsLate>(false, 50);
  finish(submit(system, work, 100));
  stop(system);
  const SphereStats stats = system.stats(0);
  CHECK_EQ(counted(stats), 100u);
  const auto slow = static_cast<std::uint64_t>(std::chrono::nanoseconds(kSlow).count());
  CHECK(stats.item_time_ns >= slow);
  check_at_most(stats, work->measured_ns.load());
  CHECK(counted_from(stats, slow / 10 * 9) >= 1);  // not spread over those beside it
}

TEST(sums_of_gradients_are_no_items_of_the_users) {
  System system(2, 2);
  system.start();
  finish(submit(system, std::make_shared<Sums>(), 500));
  stop(system);
  std::uint64_t run = 0;
  for (const SphereStats& stats : system.stats()) {
    run += stats.items_run;
    CHECK_EQ(counted(stats), 0u);
    CHECK_EQ(stats.item_time_ns, 0u);
  }
  CHECK_EQ(run, 500u);
}

TEST(thefts_are_counted_by_the_owners_group) {
  for (const int levels : {2, 3}) {
    System system(levels, 2);
    system.start();
    // Leaf 0 stands in its first item until the others of its family are done, by whom else.
    const std::int64_t leaves = system.topology().leaves();
    const std::int64_t step = leaves / kKissing;
    std::atomic<int> others{0};
    auto work = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t item) {
      if (item % step != 0) return;
      if (item != 0) {
        ++others;
      } else {
        while (others.load() < kKissing - 1) std::this_thread::yield();
      }
    });
    finish(submit(system, work, leaves));
    stop(system);
    std::array<std::uint64_t, kKissing> given{};
    std::array<std::uint64_t, kKissing> taken{};
    for (const SphereStats& stats : system.stats()) {
      if (!system.topology().is_leaf(stats.id)) continue;
      given[static_cast<std::size_t>(Topology::group(stats.id))] += stats.items_given;
      for (std::size_t group = 0; group < kKissing; ++group)
        taken[group] += stats.stolen_from[group];
      // Cousins may be of one group.
      if (levels == 2) {
        CHECK_EQ(stats.stolen_from[static_cast<std::size_t>(Topology::group(stats.id))], 0u);
      }
    }
    CHECK(given == taken);
    CHECK(std::accumulate(taken.begin(), taken.end(), std::uint64_t{0}) > 0);
  }
}

TEST(a_helpers_thefts_are_counted_by_the_leafs_group) {
  System system(3, 1);
  system.start();
  Helper helper(system);
  CHECK(helper.helps());
  const auto batch = submit(system, std::make_shared<CountingWork>(), 3 * 144);
  CHECK(helper.wait_for(*batch, kPatience));
  for (const std::uint64_t count : system.stats(0).stolen_from) CHECK_EQ(count, 36u);
}

TEST(what_waits_is_counted_in_the_leaf_and_above_it) {
  System system(3, 1);
  system.start();
  Gate gate;
  auto blocker = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t) { gate.pass(); });
  const auto blocked = submit(system, blocker, 1);
  while (blocker->running.load() == 0) std::this_thread::yield();
  auto work = std::make_shared<CountingWork>();
  const auto batch = submit(system, work, 2 * 144 + 1);
  const std::vector<SphereStats> all = system.stats();
  CHECK_EQ(all[0].queued, 289u);
  for (SphereId id = 0; id < system.topology().total(); ++id) {
    const SphereStats& stats = all[static_cast<std::size_t>(id)];
    if (system.topology().is_leaf(id)) {
      CHECK_EQ(stats.queued, Topology::offset(id) == 0 ? 3u : 2u);
    } else if (id > 0) {
      CHECK_EQ(stats.queued, Topology::group(id) == 0 ? 25u : 24u);
    }
  }
  gate.open();
  finish(blocked);
  finish(batch);
  CHECK_EQ(system.stats()[0].queued, 0u);
}

// What Prometheus takes for a restart: a time that is less than it was.
TEST(times_in_states_never_go_back) {
  StateClock clock;
  clock.transition(State::kReady);
  std::atomic<bool> done{false};
  std::thread owner([&] {
    for (int i = 0; i < rounds(50'000); ++i) {
      clock.transition(State::kIdle);
      clock.transition(State::kReady);
    }
    done.store(true);
  });
  std::array<std::uint64_t, kStates> before = clock.times();
  int worse = 0;
  std::uint64_t most = 0;
  while (!done.load()) {
    const auto times = clock.times();
    for (std::size_t s = 0; s < kStates; ++s) {
      if (times[s] < before[s]) {
        ++worse;
        most = std::max(most, before[s] - times[s]);
      }
    }
    before = times;
  }
  owner.join();
  CHECK_EQ(worse, 0);
  CHECK_EQ(most, 0u);
}
