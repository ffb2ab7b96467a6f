// Rings of events, and recorders that are turned on and off under their owners.
#include <thread>

#include "no_memory.h"
#include "shaky_atomic.h"
#include "system_support.h"
#include "trace.h"

using namespace torch_spheres;
using namespace torch_spheres::testing;

namespace {

TraceEvent numbered(std::uint64_t number) {
  return {number, number + 1, -static_cast<std::int64_t>(number), 1, 0, TraceKind::kItem, 0};
}

void check_numbers(const std::vector<TraceEvent>& events, std::uint64_t first) {
  for (std::size_t i = 0; i < events.size(); ++i) {
    CHECK_EQ(events[i].begin, first + i);
    CHECK_EQ(events[i].end, first + i + 1);
    CHECK_EQ(events[i].item, -static_cast<std::int64_t>(first + i));
  }
}

}  // namespace

TEST(a_ring_keeps_the_last_events_and_counts_the_others) {
  CHECK_THROWS(TraceRing(0), std::invalid_argument);
  for (const std::size_t capacity : {1, 5, 256, 257, 1000}) {
    for (const std::uint64_t written : {0u, 1u, 5u, 255u, 256u, 257u, 1000u, 2345u}) {
      TraceRing ring(capacity);
      for (std::uint64_t i = 0; i < written; ++i) ring.push(numbered(i));
      const std::uint64_t kept = std::min<std::uint64_t>(written, capacity);
      CHECK_EQ(ring.events().size(), kept);
      CHECK_EQ(ring.lost(), written - kept);
      check_numbers(ring.events(), written - kept);
    }
  }
}

TEST(a_ring_takes_memory_as_it_is_needed) {
  const std::size_t before = memory_taken;
  TraceRing ring(std::size_t{1} << 24);
  CHECK_EQ(std::size_t{memory_taken}, before);
  ring.push(numbered(0));
  CHECK(memory_taken - before < 10'000);
  for (std::uint64_t i = 1; i < 2560; ++i) ring.push(numbered(i));
  CHECK(memory_taken - before < 2 * 2560 * sizeof(TraceEvent));
  check_numbers(ring.events(), 0);
}

TEST(events_that_there_is_no_memory_for_are_lost) {
  TraceRing ring(600);
  allocations_left = 0;
  for (std::uint64_t i = 0; i < 3; ++i) ring.push(numbered(i));
  allocations_left = -1;
  CHECK_EQ(ring.lost(), std::uint64_t{3});
  CHECK_EQ(ring.events().size(), std::size_t{0});
  for (std::uint64_t i = 0; i < 10; ++i) ring.push(numbered(i));
  allocations_left = 0;
  for (std::uint64_t i = 10; i < 300; ++i) ring.push(numbered(i));
  allocations_left = -1;
  CHECK_EQ(ring.lost(), std::uint64_t{3 + 300 - 256});
  CHECK_EQ(ring.events().size(), std::size_t{256});
  check_numbers(ring.events(), 0);
}

TEST(a_recorder_that_is_off_records_nothing) {
  Recorder recorder;
  CHECK(!recorder.on());
  recorder.record(numbered(0));
  TraceRing ring(4);
  recorder.begin(ring);
  CHECK(recorder.on());
  recorder.record(numbered(1));
  recorder.end();
  recorder.record(numbered(2));
  CHECK_EQ(ring.events().size(), std::size_t{1});
  check_numbers(ring.events(), 1);
}

TEST(rings_are_whole_after_end_while_the_owner_goes_on) {
  Recorder recorder;
  std::atomic<bool> stop{false};
  std::thread owner([&] {
    for (std::uint64_t number = 0; !stop.load(std::memory_order_relaxed); ++number) {
      recorder.record(numbered(number));
    }
  });
  std::uint64_t seen = 0;
  for (int i = 0; i < rounds(500) || seen == 0; ++i) {
    TraceRing ring(64);
    recorder.begin(ring);
    if (i % 3 == 0) std::this_thread::yield();
    recorder.end();
    const std::vector<TraceEvent> events = ring.events();
    if (!events.empty()) check_numbers(events, events[0].begin);
    seen += events.size();
  }
  stop.store(true);
  owner.join();
}

TEST(a_change_of_state_is_recorded_or_seen_as_the_trace_begins) {
  BasicStateClock<ShakyAtomic> clock;
  BasicRecorder<ShakyAtomic> recorder;
  std::atomic<int> changes{0};
  std::atomic<bool> stop{false};
  std::thread owner([&] {
    for (bool ready = true; !stop.load(); ready = !ready) {
      change_state(clock, recorder, ready ? State::kReady : State::kIdle);
      ++changes;
    }
  });
  int missed = 0;
  for (int i = 0, recorded = 0; i < rounds(2'000) || recorded == 0; ++i) {
    TraceRing ring(1000);
    recorder.begin(ring);
    const std::uint64_t since = clock.now().second;
    // The second change from now has begun under the trace, so that there is an event to look at.
    for (const int before = changes.load(); changes.load() < before + 2;) std::this_thread::yield();
    recorder.end();
    const std::vector<TraceEvent> events = ring.events();
    if (events.empty()) continue;
    ++recorded;
    // The state that was seen is the one that the first event ended, or a later one.
    missed += ring.lost() == 0 && since < events[0].begin;
  }
  stop.store(true);
  owner.join();
  CHECK_EQ(missed, 0);
}
