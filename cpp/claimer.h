// How a sphere takes chunks of items out of a batch that it visits: its own first, then its
// siblings'.
//
//     void MyWork::run(Claimer& claimer) {
//       Chunk chunk;
//       while (claimer.next(chunk)) {
//         for (std::int64_t i = 0; i < chunk.count; ++i) use(chunk.first + i * chunk.stride);
//       }
//     }
//
// Times are counted per chunk, each item with the chunk's mean; work whose items are long beside a
// look at the clock says so item by item: begin_items() before the first, item_done() after each,
// end_items() before anything else is done.  While items turn out to be as short as that all the
// same, only every eighth is looked at, and each counts with the mean of the eight; when the eight
// took longer, one of them counts with what is beyond the mean of those before.
//
// Owner: all of it; a Claimer lives on one sphere's stack for one visit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <memory>
#include <utility>

#include "work_queue.h"

namespace torch_spheres {

/// A sphere's hand in one batch that it visits.   Owner: all of it.
class Claimer {
 public:
  /// Takes from `leaf` first, then from its siblings, and counts for `mine`; `counters` holds those
  /// of all leaves.  Takes nothing more once now_ns() is past `until`; 0: no limit.
  Claimer(WorkRing& ring, Slot& slot, SphereId sphere, std::int32_t leaf, const Siblings& siblings,
          WorkCounters* const* counters, WorkCounters& mine, std::uint64_t until = 0)
      : ring_(ring),
        slot_(slot),
        sphere_(sphere),
        siblings_(siblings),
        counters_(counters),
        mine_(mine),
        until_(until),
        max_chunk_(slot.batch->work()->max_chunk()),
        is_timed_(slot.batch->work()->state() == State::kProcessing),
        ns_per_tick_(ns_per_tick()),
        group_step_(std::max(1, ring.leaves() / kKissing)),
        // Odd leaves go down the row of siblings and even ones up, so that two thieves who started
        // side by side do not follow each other from cursor to cursor.
        direction_((leaf - siblings.base) / siblings.step % 2 == 0 ? 1 : siblings.count - 1),
        victim_(leaf) {}

  /// Where its thread records what it runs; null: nowhere.
  void record_with(Recorder* recorder) { recorder_ = recorder; }

  SphereId sphere() const { return sphere_; }
  /// Items of the current chunk that were run, when it is left by an exception.
  void ran_of_chunk(std::int64_t count) { ran_ = count; }
  /// What passed since next() is not to count for the first item.
  void begin_items() {
    begun_ = ticks();
    if (records()) [[unlikely]]
      traced_ = now_ns();
  }
  /// An item has been run: its end is the begin of the next.
  void item_done() {
    if (++unseen_ < look_after_ && !records()) return;
    look();
  }
  /// What comes now is no item's.
  void end_items() {
    if (unseen_ > 0) look();
  }

  /// Accounts for the previous chunk as finished and takes the next: own items first, then those
  /// of the siblings.  False: nothing is left to take here.
  bool next(Chunk& chunk) {
    const std::uint64_t now = ticks();
    if (records()) [[unlikely]]
      trace_rest(chunk_count_);
    finish_chunk(chunk_count_, now);
    adapt(now);
    begun_ = now;
    if (until_ != 0 && now_ns() >= until_) {
      tell_victim();
      return false;
    }
    for (std::int32_t i = 0; i < siblings_.count; ++i) {
      if (take_from(victim_, chunk)) {
        ran_ = 0;
        return true;
      }
      victim_ = following(victim_);
    }
    tell_victim();
    return false;
  }

  /// Whether there was something to take a moment ago.
  bool had_work() const {
    for (std::int32_t i = 0; i < siblings_.count; ++i) {
      if (slot_.was_left(siblings_.base + i * siblings_.step) > 0) return true;
    }
    return false;
  }

  /// For the sphere: the work threw.
  void fail(std::exception_ptr error) {
    const std::int64_t lost = chunk_count_ - ran_;
    if (records()) trace_rest(ran_);
    Batch& batch = *slot_.batch;
    batch.cancelled_.fetch_add(lost, std::memory_order_relaxed);
    finish_chunk(ran_, ticks());
    tell_victim();
    finished_ += lost;
    if (!batch.erred_.exchange(true, std::memory_order_relaxed)) batch.error_ = std::move(error);
    const std::int64_t rest = ring_.cancel_rest(slot_);
    finished_ += rest;
    if (records()) {
      recorder_->record({now_ns(), now_ns(), -lost - rest, 1, 0, TraceKind::kQueued, 0});
    }
  }
  bool took_any() const { return finished_ > 0; }
  std::int64_t finished() const { return finished_; }

 private:
  // Some ten microseconds, whatever a tick is: it only has to be long beside a claim.
  static constexpr std::uint64_t kFastChunk = 20'000;
  // Some hundreds of nanoseconds: beside more, a look at the clock is next to nothing.
  static constexpr std::uint64_t kShortItem = 1'000;
  static constexpr std::int64_t kShortItems = 8;

  /// Counts the items since the last look.
  [[gnu::noinline]] void look() {
    const std::uint64_t now = ticks();
    const auto many = static_cast<std::uint64_t>(unseen_);
    if (now - begun_ < kShortItem * many) {
      short_mean_ = (now - begun_) / many;
      look_after_ = kShortItems;
    } else {
      if (many > 1) {
        // Most of it is usually one item's: as the mean of eight it would be found nowhere.
        const std::uint64_t others = begun_ + short_mean_ * (many - 1);
        count_time(others, many - 1);
        begun_ = others;
      }
      look_after_ = 1;
    }
    count_time(now, look_after_ == 1 ? 1 : many);
    begun_ = now;
    if (records()) [[unlikely]]
      trace(now_ns(), unseen_);
    counted_ += unseen_;
    unseen_ = 0;
  }

  bool records() const { return recorder_ != nullptr && recorder_->on(); }
  /// The next `count` items of the chunk are one slice, which ends now.
  [[gnu::noinline]] void trace(std::uint64_t now, std::int64_t count) {
    recorder_->record({traced_, now, chunk_first_ + counted_ * ring_.leaves(),
                       static_cast<std::uint32_t>(count), static_cast<std::int16_t>(chunk_owner_),
                       TraceKind::kItem, static_cast<std::uint8_t>(slot_.batch->work()->label())});
    traced_ = now;
  }
  /// What was run of the chunk and is in no slice yet; what comes next begins now.
  [[gnu::noinline]] void trace_rest(std::int64_t ran) {
    const std::uint64_t now = now_ns();
    if (ran > counted_) trace(now, ran - counted_);
    traced_ = now;
  }
  void finish_chunk(std::int64_t ran, std::uint64_t now) {
    finished_ += ran;
    if (ran > 0) {
      mine_.items_run.add(static_cast<std::uint64_t>(ran));
      if (ran > counted_) count_time(now, static_cast<std::uint64_t>(ran - counted_));
      if (counters_[chunk_owner_] != &mine_) {
        mine_.items_stolen.add(static_cast<std::uint64_t>(ran));
        mine_.stolen_from[chunk_group_].add(static_cast<std::uint64_t>(ran));
        stolen_ += static_cast<std::uint64_t>(ran);
        if (size_ == 1) tell_victim();
      }
    }
    chunk_count_ = counted_ = unseen_ = 0;
  }
  void count_time(std::uint64_t now, std::uint64_t items) {
    // Pieces of gradient sums are another kind: among them nobody would find the items of the user.
    if (is_timed_) mine_.item_times.add(elapsed_ns(begun_, now, ns_per_tick_), items);
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
    size_ = taken_at_ != 0 && now - taken_at_ < kFastChunk ? std::min(size_ * 2, max_chunk_) : 1;
    taken_at_ = now;
  }
  std::int32_t following(std::int32_t leaf) const {
    const std::int32_t place = (leaf - siblings_.base) / siblings_.step;
    return siblings_.base + (place + direction_) % siblings_.count * siblings_.step;
  }
  bool take_from(std::int32_t owner, Chunk& chunk) {
    const Cursor::Taken taken = slot_.cursors[static_cast<std::size_t>(owner)].take(size_);
    if (taken.count == 0) return false;
    if (owner != chunk_owner_) {
      tell_victim();
      chunk_group_ = static_cast<std::size_t>(owner / group_step_);
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
  const Siblings siblings_;
  WorkCounters* const* const counters_;
  WorkCounters& mine_;
  const std::uint64_t until_;
  const std::int64_t max_chunk_;
  const bool is_timed_;
  const double ns_per_tick_;
  const std::int32_t group_step_;  // leaves of one group of the root's
  const std::int32_t direction_;
  std::uint64_t stolen_ = 0;  // from chunk_owner_, not told it yet
  std::int32_t victim_;
  std::int64_t size_ = 1;
  std::int64_t chunk_count_ = 0;
  std::int32_t chunk_owner_ = 0;
  std::size_t chunk_group_ = 0;   // the owner's
  std::int64_t counted_ = 0;      // items of the chunk whose times are counted
  std::int64_t unseen_ = 0;       // that item_done() has told of since
  std::int64_t look_after_ = 1;   // so many of those
  std::uint64_t short_mean_ = 0;  // ticks that an item took when they were short
  std::int64_t chunk_first_ = 0;
  std::int64_t ran_ = 0;
  std::int64_t finished_ = 0;
  std::uint64_t taken_at_ = 0;  // ticks(), as is:
  std::uint64_t begun_ = 0;     // when the items began whose times are not counted yet
  Recorder* recorder_ = nullptr;
  // Where the next slice of a trace begins; 0, or something in the past: before the trace did.
  std::uint64_t traced_ = 0;
};

}  // namespace torch_spheres
