// How a sphere takes chunks of items out of a batch that it visits: its own first, then its
// siblings', then everybody's.
//
//     void MyWork::run(Claimer& claimer) {
//       Chunk chunk;
//       while (claimer.next(chunk)) {
//         for (std::int64_t i = 0; i < chunk.count; ++i) use(chunk.first + i * chunk.stride);
//       }
//     }
//
// Times are counted per chunk, each item with the chunk's mean; when a chunk took longer than those
// before, one item of it counts with what is beyond their mean.  A trace shows chunks too, but for
// Python items, which are taken one by one while there is one.
//
// Owner: all of it; a Claimer lives on one sphere's stack for one visit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <utility>

#include "work_queue.h"

namespace torch_spheres {

/// The leaves that somebody takes from, one after the other, each of them once: itself, its
/// siblings, its cousins, and so on to the farthest.
class Route {
 public:
  /// Beginning with `leaf`, as a leaf does.  Odd ones go down the row of siblings and even ones up,
  /// so that two thieves who started side by side do not follow each other.
  Route(std::int32_t leaf, std::int32_t leaves)
      : leaf_(leaf), leaves_(leaves), up_(leaf / step() % 2 == 0) {}
  /// From the last leaf down, as helpers do: those that are woken begin with the first.
  static Route from_the_last(std::int32_t leaves) {
    Route route(leaves - 1, leaves);
    route.up_ = false;
    return route;
  }

  /// How many leaves own items of a batch of so many.
  std::int32_t count(std::int64_t items) const {
    return static_cast<std::int32_t>(std::min<std::int64_t>(items, leaves_));
  }
  /// The i-th of `count` leaves.
  std::int32_t at(std::int32_t i, std::int32_t count) const {
    if (count < leaves_ || leaves_ == 1) {
      const std::int32_t first = std::min(leaf_, count - 1);
      return (up_ ? first + i : first + count - i) % count;
    }
    // Siblings differ in the last digit of their paths, which is the first of a leaf's number.
    std::int32_t other = 0;
    std::int32_t far = i;
    for (std::int32_t unit = step(); unit >= 1; unit /= kKissing, far /= kKissing) {
      const std::int32_t away = far % kKissing;
      const std::int32_t mine = leaf_ / unit % kKissing;
      other += (up_ ? mine + away : mine + kKissing - away) % kKissing * unit;
    }
    return other;
  }

 private:
  std::int32_t step() const { return std::max(1, leaves_ / kKissing); }

  std::int32_t leaf_;
  std::int32_t leaves_;
  bool up_;
};

/// A sphere's hand in one batch that it visits.   Owner: all of it.
class Claimer {
 public:
  /// Takes along `route`, and counts for `mine`; `counters` holds those of all leaves.  Takes
  /// nothing more once now_ns() is past `until`; 0: no limit.
  Claimer(WorkRing& ring, Slot& slot, SphereId sphere, const Route& route,
          WorkCounters* const* counters, WorkCounters& mine, std::uint64_t until = 0)
      : ring_(ring),
        slot_(slot),
        sphere_(sphere),
        route_(route),
        victims_(route.count(slot.batch->items())),
        counters_(counters),
        mine_(mine),
        until_(until),
        max_chunk_(slot.batch->work()->max_chunk()),
        label_(slot.batch->work()->label()),
        is_timed_(slot.batch->work()->state() == State::kProcessing) {}

  /// Where its thread records what it runs; null: nowhere.
  void record_with(Recorder* recorder) { recorder_ = recorder; }
  /// Whose turn it is to look for work, if it is the visitor's: told once that it found some, and
  /// before that perhaps that finding out may take long.
  class Looker {
   public:
    virtual void finds_out_later(Claimer& claimer) = 0;
    virtual void found(Claimer& claimer) = 0;

   protected:
    ~Looker() = default;
  };
  void tell(Looker* looker) { looker_ = looker; }

  /// Before a wait for something that only this batch needs: others have to look meanwhile.
  void may_take_long() {
    if (looker_ != nullptr) looker_->finds_out_later(*this);
  }

  SphereId sphere() const { return sphere_; }
  Slot& slot() const { return slot_; }
  /// So many items of the current chunk were run until now, for when it is left by an exception.
  void ran_of_chunk(std::int64_t count) {
    ran_ = count;
    ran_at_ = now_ns();
  }
  /// When the items of the chunk began: at next(), or later.
  std::uint64_t begun() const { return begun_; }
  void begin_items(std::uint64_t now) { begun_ = now; }

  /// Accounts for the previous chunk as finished and takes the next.  False: nothing is left to
  /// take here, or its time is over.
  bool next(Chunk& chunk) {
    const std::uint64_t now = now_ns();
    finish_chunk(chunk_count_, now);
    adapt(now);
    begun_ = now;
    if (until_ == 0 || now < until_) {
      for (; victim_ < victims_; ++victim_) {
        if (!take_from(route_.at(victim_, victims_), chunk)) continue;
        ran_ = 0;
        if (looker_ != nullptr) std::exchange(looker_, nullptr)->found(*this);
        return true;
      }
    }
    tell_victim();
    return false;
  }
  /// How long the items of the last chunk took, at next().
  std::uint64_t chunk_ns() const { return chunk_ns_; }

  /// Whether there was something to take a moment ago.
  bool had_work() const {
    for (std::int32_t i = victim_; i < victims_; ++i) {
      if (slot_.was_left(route_.at(i, victims_)) > 0) return true;
    }
    return false;
  }

  /// For the sphere: the work threw.
  void fail(std::exception_ptr error) {
    const std::int64_t lost = chunk_count_ - ran_;
    Batch& batch = *slot_.batch;
    batch.cancelled_.fetch_add(lost, std::memory_order_relaxed);
    finish_chunk(ran_, ran_at_);
    tell_victim();
    finished_ += lost;
    if (!batch.erred_.exchange(true, std::memory_order_relaxed)) batch.error_ = std::move(error);
    const std::int64_t rest = ring_.cancel_rest(slot_);
    finished_ += rest;
    if (records()) {
      recorder_->record({now_ns(), now_ns(), -lost - rest, 1, 0, TraceKind::kQueued, 0});
    }
  }
  std::int64_t finished() const { return finished_; }

 private:
  static constexpr std::uint64_t kFastChunkNs = 10'000;  // long beside a claim

  bool records() const { return recorder_ != nullptr && recorder_->on(); }
  void finish_chunk(std::int64_t ran, std::uint64_t now) {
    finished_ += ran;
    chunk_count_ = 0;
    if (ran == 0) return;
    chunk_ns_ = now - begun_;
    if (records()) [[unlikely]]
      trace(now, ran);
    mine_.items_run.add(static_cast<std::uint64_t>(ran));
    if (is_timed_) count_time(chunk_ns_, static_cast<std::uint64_t>(ran));
    if (counters_[chunk_owner_] != &mine_) {
      mine_.items_stolen.add(static_cast<std::uint64_t>(ran));
      mine_.stolen_from[chunk_group_].add(static_cast<std::uint64_t>(ran));
      stolen_ += static_cast<std::uint64_t>(ran);
      if (size_ == 1) tell_victim();
    }
  }
  /// Pieces of gradient sums are not timed: among them nobody would find the items of the user.
  void count_time(std::uint64_t ns, std::uint64_t items) {
    const std::uint64_t others = mean_ns_ * (items - 1);
    if (items > 1 && ns > kFastChunkNs && ns > others) {
      // Most of it is usually one item's: as the mean of all it would be found nowhere.
      mine_.item_times.add(others, items - 1);
      mine_.item_times.add(ns - others, 1);
    } else {
      mine_.item_times.add(ns, items);
      mean_ns_ = ns / items;
    }
  }
  [[gnu::noinline]] void trace(std::uint64_t now, std::int64_t count) {
    recorder_->record({begun_, now, chunk_first_, static_cast<std::uint32_t>(count),
                       static_cast<std::int16_t>(chunk_owner_), TraceKind::kItem,
                       static_cast<std::uint8_t>(label_)});
  }
  /// Counts what was stolen on the victim's side: not at every fast chunk, since that line is
  /// shared with other thieves.
  void tell_victim() {
    if (stolen_ == 0) return;
    counters_[chunk_owner_]->items_given.add(stolen_);
    stolen_ = 0;
  }
  /// Doubles the chunk while chunks are fast; one slow chunk makes it 1 again, so that no more than
  /// max_chunk items ever hide behind a slow one.
  void adapt(std::uint64_t now) {
    if (max_chunk_ == 1) return;
    size_ = taken_at_ != 0 && now - taken_at_ < kFastChunkNs ? std::min(size_ * 2, max_chunk_) : 1;
    if (records() && label_ == TraceLabel::kPython) [[unlikely]]
      size_ = 1;
    taken_at_ = now;
  }
  bool take_from(std::int32_t owner, Chunk& chunk) {
    const Cursor::Taken taken = slot_.cursors[static_cast<std::size_t>(owner)].take(size_);
    if (taken.count == 0) return false;
    if (owner != chunk_owner_) {
      tell_victim();
      chunk_group_ = static_cast<std::size_t>(owner / std::max(1, ring_.leaves() / kKissing));
    }
    chunk = {owner + taken.first * ring_.leaves(), ring_.leaves(), taken.count};
    chunk_count_ = taken.count;
    chunk_owner_ = owner;
    chunk_first_ = chunk.first;
    return true;
  }

  WorkRing& ring_;
  Slot& slot_;
  const SphereId sphere_;
  const Route route_;
  const std::int32_t victims_;
  std::int32_t victim_ = 0;  // on the route; nothing is left at those before
  WorkCounters* const* const counters_;
  WorkCounters& mine_;
  const std::uint64_t until_;
  const std::int64_t max_chunk_;
  const TraceLabel label_;
  const bool is_timed_;
  Looker* looker_ = nullptr;
  std::uint64_t stolen_ = 0;  // from chunk_owner_, not told it yet
  std::int64_t size_ = 1;
  std::int64_t chunk_count_ = 0;
  std::int64_t chunk_first_ = 0;
  std::int32_t chunk_owner_ = 0;
  std::size_t chunk_group_ = 0;  // the owner's
  std::int64_t ran_ = 0;
  std::uint64_t ran_at_ = 0;
  std::int64_t finished_ = 0;
  std::uint64_t taken_at_ = 0;  // now_ns(), as is:
  std::uint64_t begun_ = 0;     // when the chunk began
  std::uint64_t chunk_ns_ = 0;
  std::uint64_t mean_ns_ = 0;  // of an item, in the last fast chunk
  Recorder* recorder_ = nullptr;
};

}  // namespace torch_spheres
