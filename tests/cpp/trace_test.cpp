// Whole systems that are traced while they work.
#include <map>

#include "helper.h"
#include "system_support.h"
#include "tracer.h"

using namespace torch_spheres;
using namespace torch_spheres::testing;

namespace {

struct Counted {
  std::int64_t items = 0;
  std::int64_t stolen = 0;
  std::int64_t queued = 0;
  std::uint64_t lost = 0;
  std::map<TraceKind, std::int64_t> events;
};

/// Counts what was recorded, and checks what must hold of each event.
Counted count(const TraceRecord& record, const System& system) {
  Counted found;
  found.queued = record.queued;
  for (const TraceTrack& track : record.tracks) {
    found.lost += track.lost;
    std::uint64_t last_end = 0;
    for (const TraceEvent& event : track.events) {
      CHECK(event.begin <= event.end);
      CHECK(event.end <= record.end);
      ++found.events[event.kind];
      if (event.kind == TraceKind::kQueued) found.queued += event.item;
      // What a thread records it records as it ends.
      CHECK(event.end >= last_end || event.kind == TraceKind::kQueued);
      last_end = event.end;
      if (event.kind != TraceKind::kItem) continue;
      found.items += event.count;
      CHECK_EQ(event.item % system.topology().leaves(), std::int64_t{event.other});
      const SphereId owner = system.topology().leaf_of_item(event.other);
      if (owner != std::max(track.sphere, 0)) found.stolen += event.count;
    }
  }
  return found;
}

std::uint64_t total_stolen(const System& system) {
  std::uint64_t stolen = 0;
  for (SphereId id = 0; id < system.topology().total(); ++id) {
    stolen += system.stats(id).items_stolen;
  }
  return stolen;
}

}  // namespace

TEST(tracks_know_threads_that_begin_late_and_states_that_are_not_recorded) {
  System system(1, 1);
  Tracer::Spheres spheres;
  for (int i = 0; i < 3; ++i) spheres.push_back(std::make_unique<Sphere>(system, 0));
  spheres[1]->native_id.store(11);
  Tracer tracer;
  CHECK(tracer.begin(spheres, 10, [] { return 0; }));
  for (int i = 0; i < 3; ++i) spheres[i]->native_id.store(20 + i);
  // As by a thread that is interrupted before it can record that.
  spheres[2]->clock.transition(State::kReady);
  const TraceRecord record = tracer.end(spheres);
  CHECK_EQ(record.tracks[0].native_id, std::int64_t{20});
  CHECK_EQ(record.tracks[1].native_id, std::int64_t{11});
  const TraceTrack& track = record.tracks[2];
  CHECK(track.events.empty());
  CHECK_EQ(int{track.first_state}, static_cast<int>(State::kTerminating));
  CHECK_EQ(int{track.last_state}, static_cast<int>(State::kReady));
  CHECK(record.begin <= track.last_since && track.last_since <= record.end);
}

TEST(what_ends_after_the_trace_is_not_in_it_and_states_are_cut) {
  System system(1, 1);
  Tracer::Spheres spheres;
  for (int i = 0; i < 2; ++i) spheres.push_back(std::make_unique<Sphere>(system, 0));
  Tracer tracer;
  CHECK(tracer.begin(spheres, 10, [] { return 0; }));
  const std::uint64_t now = now_ns(), later = now + 3'600'000'000'000;
  spheres[0]->recorder.record({now, now, 1, 1, 0, TraceKind::kItem, 0});
  spheres[0]->recorder.record({now, later, 2, 1, 0, TraceKind::kItem, 0});
  spheres[1]->recorder.record({now, later, -1, 1, 0, TraceKind::kState, 1});
  spheres[1]->recorder.record({later, later + 1, -1, 1, 0, TraceKind::kState, 0});
  const TraceRecord record = tracer.end(spheres);
  CHECK_EQ(record.tracks[0].events.size(), std::size_t{1});
  CHECK_EQ(record.tracks[0].events[0].item, std::int64_t{1});
  CHECK_EQ(record.tracks[1].events.size(), std::size_t{1});
  CHECK_EQ(record.tracks[1].events[0].begin, now);
  CHECK_EQ(record.tracks[1].events[0].end, record.end);
}

TEST(as_many_items_and_steals_as_the_counters_say) {
  for (const int levels : {1, 2, 3}) {
    for (const int concurrency : {1, 3, 12}) {
      for (const std::int64_t chunk : {1, 8}) {
        System system(levels, concurrency);
        system.start();
        CHECK(system.begin_trace(1 << 16));
        CHECK(!system.begin_trace(1 << 16));
        std::array<std::vector<std::shared_ptr<Batch>>, 3> batches;
        std::vector<std::thread> threads;
        for (std::size_t t = 0; t < batches.size(); ++t) {
          threads.emplace_back([&, t] {
            for (std::size_t i = 0; i < 10; ++i) {
              const auto items = static_cast<std::int64_t>(1 + (i * 37 + t * 101) % 300);
              batches[t].push_back(submit(system, std::make_shared<CountingWork>(chunk), items));
            }
          });
        }
        for (auto& thread : threads) thread.join();
        std::int64_t submitted = 0;
        for (const auto& of_thread : batches) {
          for (const auto& batch : of_thread) {
            finish(batch);
            submitted += batch->items();
          }
        }
        const TraceRecord record = system.end_trace();
        CHECK(!system.tracing());
        const Counted found = count(record, system);
        CHECK_EQ(found.lost, std::uint64_t{0});
        CHECK_EQ(found.items, submitted);
        CHECK_EQ(found.stolen, static_cast<std::int64_t>(total_stolen(system)));
        CHECK_EQ(found.queued, submitted);
        CHECK_EQ(record.tracks.size(), static_cast<std::size_t>(system.topology().total()) + 3);
        stop(system);
      }
    }
  }
}

TEST(a_small_ring_loses_the_oldest_and_says_how_many) {
  System system(2, 2);
  system.start();
  CHECK(system.begin_trace(8));
  finish(submit(system, std::make_shared<CountingWork>(), 500));
  const TraceRecord record = system.end_trace();
  std::int64_t items = 0;
  std::uint64_t lost = 0;
  for (const TraceTrack& track : record.tracks) {
    CHECK(track.events.size() <= 8);
    lost += track.lost;
    for (const TraceEvent& event : track.events) items += event.kind == TraceKind::kItem;
  }
  CHECK(lost > 0);
  CHECK(items + static_cast<std::int64_t>(lost) >= 500);
  stop(system);
}

TEST(traces_begin_and_end_while_threads_submit) {
  System system(2, 4);
  system.start();
  std::atomic<bool> enough{false};
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      while (!enough.load()) finish(submit(system, std::make_shared<CountingWork>(4), 50));
    });
  }
  std::int64_t items = 0;
  for (int i = 0; i < rounds(40) || items == 0; ++i) {
    CHECK(system.begin_trace(1 + static_cast<std::size_t>(i) * 7));
    std::this_thread::sleep_for(std::chrono::microseconds(100 * (i % 10)));
    items += count(system.end_trace(), system).items;
  }
  enough.store(true);
  for (auto& thread : threads) thread.join();
  stop(system);
}

TEST(a_trace_outlives_stop_and_start) {
  System system(2, 2);
  CHECK(system.begin_trace(1000));
  for (int i = 0; i < 3; ++i) {
    system.start();
    finish(submit(system, std::make_shared<CountingWork>(), 20));
    stop(system);
  }
  const TraceRecord record = system.end_trace();
  const Counted found = count(record, system);
  CHECK_EQ(found.items, std::int64_t{60});
  CHECK_EQ(found.events.at(TraceKind::kThread), std::int64_t{3 * 13});
}

TEST(items_that_never_run_leave_the_queue) {
  System system(2, 1);
  system.start();
  CHECK(system.begin_trace(1000));
  auto failing = std::make_shared<CountingWork>(1, [](SphereId, std::int64_t item) {
    if (item == 20) throw std::runtime_error("no");
  });
  auto batch = submit(system, failing, 100);
  finish(batch);
  Gate gate;
  auto waiting = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t) { gate.pass(); });
  auto dropped = submit(system, waiting, 100);
  while (waiting->running.load() == 0) std::this_thread::yield();
  system.cancel(dropped);
  gate.open();
  finish(dropped);
  const Counted found = count(system.end_trace(), system);
  // The item that failed had begun, but CountingWork does not count it as run.
  CHECK_EQ(found.items, 200 - batch->cancelled() - dropped->cancelled());
  CHECK_EQ(found.queued, found.items);
  stop(system);
}

TEST(a_helper_has_a_track_of_its_own) {
  System system(2, 2);
  system.start();
  CHECK(system.begin_trace(1000));
  std::thread([&] {
    auto work = std::make_shared<CountingWork>();
    auto batch = submit(system, work, 100);
    Helper helper(system);
    while (!helper.wait_for(*batch, Milliseconds(100))) {
    }
  }).join();
  const TraceRecord record = system.end_trace();
  const Counted found = count(record, system);
  CHECK_EQ(found.items, std::int64_t{100});
  CHECK_EQ(found.stolen, static_cast<std::int64_t>(total_stolen(system)));
  std::int64_t helped = 0;
  for (const TraceTrack& track : record.tracks) {
    for (const TraceEvent& event : track.events) {
      if (track.sphere < 0 && event.kind == TraceKind::kItem) helped += event.count;
    }
  }
  CHECK_EQ(helped, static_cast<std::int64_t>(system.stats(0).items_run));
  stop(system);
}

TEST(wakes_and_gradients_are_recorded_by_who_is_woken_and_who_takes_them) {
  System system(3, 4);
  system.start();
  CHECK(system.begin_trace(10000));
  // They wait for each other, so four leaves are at them, of which three were woken by another.
  std::atomic<int> running{0};
  const auto work = std::make_shared<CountingWork>(1, [&](SphereId, std::int64_t) {
    ++running;
    while (running.load() < 4) std::this_thread::yield();
  });
  finish(submit(system, work, 4));
  for (std::int32_t leaf = 0; leaf < 144; ++leaf) {
    system.trace_gradient(system.topology().leaf_of_item(leaf), now_ns());
  }
  stop(system);
  const TraceRecord record = system.end_trace();
  std::int64_t gradients = 0;
  std::int64_t woken = 0;
  for (const TraceTrack& track : record.tracks) {
    for (const TraceEvent& event : track.events) {
      if (event.kind == TraceKind::kGradient) {
        CHECK_EQ(track.sphere, kNoSphere);
        CHECK(system.topology().is_leaf(event.other));
        ++gradients;
      } else if (event.kind == TraceKind::kWork) {
        CHECK(event.begin <= event.end && event.other != track.sphere);
        CHECK(system.topology().is_leaf(event.other) && system.topology().is_leaf(track.sphere));
        ++woken;
      }
    }
  }
  CHECK_EQ(gradients, std::int64_t{144});
  CHECK(woken >= 3);
}
