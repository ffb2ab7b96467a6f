#include "tracer.h"

#include <algorithm>
#include <utility>

#include "sphere.h"

namespace torch_spheres {

namespace {

std::atomic<std::uint64_t> last_number{0};
std::atomic<std::uint64_t> last_thread{0};

/// Only what ended until then, and the state that lasted beyond.
std::vector<TraceEvent> up_to(std::uint64_t end, std::vector<TraceEvent> events) {
  for (TraceEvent& event : events) {
    if (event.kind == TraceKind::kState && event.begin < end) event.end = std::min(event.end, end);
  }
  std::erase_if(events, [end](const TraceEvent& event) { return event.end > end; });
  return events;
}

}  // namespace

bool Tracer::begin(Spheres& spheres, std::size_t capacity,
                   const std::function<std::int64_t()>& count_queued) {
  const std::lock_guard lock(mutex_);
  if (on()) return false;
  capacity_ = capacity;
  record_ = {};
  std::vector<std::unique_ptr<TraceRing>> rings;
  for (std::size_t i = 0; i < spheres.size(); ++i) {
    rings.push_back(std::make_unique<TraceRing>(capacity));
  }
  rings_ = std::move(rings);
  record_.tracks.resize(spheres.size());
  for (std::size_t i = 0; i < spheres.size(); ++i) {
    Sphere& sphere = *spheres[i];
    TraceTrack& track = record_.tracks[i];
    track.sphere = sphere.id;
    sphere.recorder.begin(*rings_[i]);
    // After recording began, and seq_cst: what the sphere stores later it records.
    track.native_id = sphere.native_id.load();
    track.first_state = static_cast<std::uint8_t>(sphere.clock.now().first);
  }
  number_.store(last_number.fetch_add(1) + 1, std::memory_order_relaxed);
  on_.store(true, std::memory_order_release);  // with recorder_here(): number_ comes with it
  record_.queued = count_queued();
  record_.begin = now_ns();
  return true;
}

TraceRecord Tracer::end(Spheres& spheres) {
  const std::lock_guard lock(mutex_);
  if (!on()) throw std::logic_error("no trace is being recorded");
  on_.store(false, std::memory_order_relaxed);
  // First: all threads still record, so that up to this moment no track has a gap.
  record_.end = now_ns();
  for (std::size_t i = 0; i < spheres.size(); ++i) {
    Sphere& sphere = *spheres[i];
    TraceTrack& track = record_.tracks[i];
    sphere.recorder.end();
    // At once: a sphere that was interrupted between a change of state before record_.end and its
    // record has not made another one yet.
    const auto [state, since] = sphere.clock.now();
    track.last_state = static_cast<std::uint8_t>(state);
    track.last_since = since;
    // Its thread may have started (start() does not wait for that) only after begin() looked.
    if (track.native_id == 0) track.native_id = sphere.native_id.load();
  }
  for (auto& guest : guests_) guest->recorder.end();
  for (std::size_t i = 0; i < spheres.size(); ++i) {
    TraceTrack& track = record_.tracks[i];
    track.events = up_to(record_.end, rings_[i]->events());
    track.lost = rings_[i]->lost();
    rings_[i].reset();
  }
  for (auto& guest : guests_) {
    guest->track.events = up_to(record_.end, guest->ring.events());
    guest->track.lost = guest->ring.lost();
    guest->ring.clear();  // its thread may keep it until it ends
    record_.tracks.push_back(std::move(guest->track));
  }
  rings_.clear();
  guests_.clear();
  return std::move(record_);
}

Recorder* Tracer::recorder_here() {
  // acquire: whoever sees that a trace is on sees its number too.
  if (!on_.load(std::memory_order_acquire)) return nullptr;
  thread_local const std::uint64_t thread = last_thread.fetch_add(1) + 1;
  thread_local std::uint64_t known = 0;  // the trace that `guest` belongs to
  thread_local std::shared_ptr<Guest> guest;
  if (known != number_.load(std::memory_order_relaxed)) {
    const std::lock_guard lock(mutex_);
    if (!on()) return nullptr;
    known = number_.load(std::memory_order_relaxed);
    guest.reset();
    for (const auto& other : guests_) {  // a thread that records for two systems in turn
      if (other->thread == thread) guest = other;
    }
    if (guest == nullptr) {
      guest = std::make_shared<Guest>(capacity_);
      guest->thread = thread;
      guest->track.name = thread_name();
      guest->track.native_id = native_thread_id();
      guests_.push_back(guest);
      guest->recorder.begin(guest->ring);
    }
  }
  return &guest->recorder;
}

}  // namespace torch_spheres
