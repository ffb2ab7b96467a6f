// What a thread did, event by event, in a ring that it alone writes: the oldest are overwritten.
//
//     owner:   if (recorder.on()) recorder.record({.begin = ..., .end = now_ns(), ...});
//     reader:  TraceRing ring(capacity);  recorder.begin(ring);  ...;  recorder.end();
//              ring.events(), ring.lost()
//
// Owner: record, which never waits.   Reader (one at a time): begin, end.   Any thread: on.
//
// While nobody traces a recorder costs a load and a branch.
// Ordering: `writing_` and `ring_` are seq_cst on both sides: either the owner finds ring_ null,
// and writes nothing, or end() finds it writing, and waits for the few nanoseconds that this takes.
// The owner's last store of writing_ (release) pairs with end()'s load, so after end() the ring
// belongs to the reader and its events, which are plain memory, may be read.
// A word of the owner's that it stores (seq_cst) before it asks on_after_store(), and that the
// reader loads (seq_cst) after begin(): either the owner records what it stored, or the reader
// finds it there.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "platform.h"

namespace torch_spheres {

enum class TraceKind : std::uint8_t {
  kState,     ///< label: the State that ended; other: the one that began
  kItem,      ///< label: what kind of work; other: leaf that it belonged to; item, count
  kPhase,     ///< label: which; item: shard, of kLoad batch, or -1
  kWork,      ///< begin: the sphere `other` saw more work and woke this one; end: it was awake
  kGradient,  ///< begin: gradients were ready on the sphere `other`; end: they are taken
  kQueued,    ///< item: so many more (or fewer, if negative) wait in the queues
  kThread,    ///< item: native id of the thread that the sphere has from now on
};

/// Of items and phases.
enum class TraceLabel : std::uint8_t {
  kPython,
  kNative,
  kSumPiece,
  kGather,
  kForward,
  kLoss,
  kBackward,
  kSum,
  kLoad
};
inline constexpr int kTraceLabels = 9;

inline const char* trace_label_name(TraceLabel label) {
  static constexpr const char* names[kTraceLabels] = {
      "item", "native item", "sum piece", "gather", "forward", "loss", "backward", "sum", "load"};
  return names[static_cast<int>(label)];
}

struct TraceEvent {
  std::uint64_t begin;  ///< now_ns(); 0: before the trace began
  std::uint64_t end;
  std::int64_t item;
  std::uint32_t count;
  std::int16_t other;
  TraceKind kind;
  std::uint8_t label;
};
static_assert(sizeof(TraceEvent) == 32);

/// The last `capacity` events.  Memory is taken as it is needed, so that a ring of a thread that
/// does little is small.   Owner: push.   After the owner: the rest.
class TraceRing {
 public:
  explicit TraceRing(std::size_t capacity) : capacity_(capacity) {
    if (capacity == 0) throw std::invalid_argument("a trace's capacity must be at least 1, got 0");
  }

  void push(const TraceEvent& event) noexcept {
    if (at_ / kSegment == segments_.size() && !grow()) {
      ++refused_;
      return;
    }
    segments_[at_ / kSegment][at_ % kSegment] = event;
    ++written_;
    if (++at_ == capacity_) at_ = 0;
  }

  /// Oldest first.
  std::vector<TraceEvent> events() const {
    const std::size_t count = std::min<std::uint64_t>(written_, capacity_);
    std::vector<TraceEvent> result(count);
    const std::size_t oldest = written_ > capacity_ ? at_ : 0;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t place = (oldest + i) % capacity_;
      result[i] = segments_[place / kSegment][place % kSegment];
    }
    return result;
  }
  /// Gives the memory back; nothing may be pushed any more.
  void clear() { Segments().swap(segments_); }
  /// Events that were overwritten, or that there was no memory for.
  std::uint64_t lost() const {
    return refused_ + (written_ > capacity_ ? written_ - capacity_ : 0);
  }

 private:
  using Segments = std::vector<std::unique_ptr<TraceEvent[]>>;
  static constexpr std::size_t kSegment = 256;

  /// One segment more; false if there is no memory for it.
  bool grow() noexcept {
    try {
      segments_.emplace_back(std::unique_ptr<TraceEvent[]>(new TraceEvent[kSegment]));
      return true;
    } catch (const std::bad_alloc&) {
      return false;  // the next event asks again
    }
  }

  const std::size_t capacity_;
  Segments segments_;   // those that were reached
  std::size_t at_ = 0;  // where the next one goes, in the last segment or right behind it
  std::uint64_t written_ = 0;
  std::uint64_t refused_ = 0;
};

/// A thread's place for the ring that it records in, while there is one.
template <template <typename> class Atomic>
class BasicRecorder {
 public:
  bool on() const { return ring_.load(std::memory_order_relaxed) != nullptr; }
  /// The same, after a store that must not be missed by both sides, see the top.
  bool on_after_store() const { return ring_.load() != nullptr; }

  void record(const TraceEvent& event) {
    if (!on()) return;
    writing_.store(true);
    if (TraceRing* ring = ring_.load()) ring->push(event);
    writing_.store(false, std::memory_order_release);
  }

  void begin(TraceRing& ring) { ring_.store(&ring); }
  /// Afterwards the owner does not touch the ring any more.
  void end() {
    ring_.store(nullptr);
    while (writing_.load()) std::this_thread::yield();
  }

 private:
  Atomic<TraceRing*> ring_{nullptr};
  Atomic<bool> writing_{false};
};
using Recorder = BasicRecorder<std::atomic>;

/// What one thread recorded.
struct TraceTrack {
  std::int32_t sphere = -1;    ///< -1: a thread that is no sphere's
  std::string name;            ///< of such a thread
  std::int64_t native_id = 0;  ///< of its first thread in the trace, 0: there was none
  std::uint8_t first_state = 0;
  std::uint8_t last_state = 0;
  std::uint64_t last_since = 0;    ///< when last_state began, which may be after the trace
  std::vector<TraceEvent> events;  ///< none ends after the trace; a state is cut there
  std::uint64_t lost = 0;
};

/// What all threads of a system recorded.
struct TraceRecord {
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  std::int64_t queued = 0;  ///< items that waited at `begin`
  std::vector<TraceTrack> tracks;
};

}  // namespace torch_spheres
