#include "tracer.h"

#include <pthread.h>

#include <utility>

#include "sphere.h"

namespace torch_spheres {

namespace {

std::atomic<std::uint64_t> last_number{0};
std::atomic<std::uint64_t> last_thread{0};

std::string name_here() {
  char name[64] = "";
#if defined(__linux__) || defined(__APPLE__)
  pthread_getname_np(pthread_self(), name, sizeof(name));
#endif
  return name;
}

}  // namespace

bool Tracer::begin(Spheres& spheres, std::size_t capacity) {
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
    track.native_id = sphere.native_id.load(std::memory_order_relaxed);
    sphere.recorder.begin(*rings_[i]);
    // After recording began: if no change of state is recorded, it was this one all the time.
    track.first_state = static_cast<std::uint8_t>(sphere.clock.state());
  }
  number_.store(last_number.fetch_add(1) + 1, std::memory_order_relaxed);
  on_.store(true, std::memory_order_relaxed);
  return true;
}

void Tracer::begin_with(std::int64_t queued) {
  const std::lock_guard lock(mutex_);
  record_.queued = queued;
  record_.begin = now_ns();
}

TraceRecord Tracer::end(Spheres& spheres) {
  const std::lock_guard lock(mutex_);
  if (!on()) throw std::logic_error("no trace is being recorded");
  on_.store(false, std::memory_order_relaxed);
  for (auto& sphere : spheres) sphere->recorder.end();
  for (auto& guest : guests_) guest->recorder.end();
  record_.end = now_ns();
  for (std::size_t i = 0; i < spheres.size(); ++i) {
    TraceTrack& track = record_.tracks[i];
    const auto [state, since] = spheres[i]->clock.now();
    track.last_state = static_cast<std::uint8_t>(state);
    track.last_since = since;
    track.events = rings_[i]->events();
    track.lost = rings_[i]->lost();
    rings_[i].reset();
  }
  for (auto& guest : guests_) {
    guest->track.events = guest->ring.events();
    guest->track.lost = guest->ring.lost();
    guest->ring.clear();  // its thread may keep it until it ends
    record_.tracks.push_back(std::move(guest->track));
  }
  rings_.clear();
  guests_.clear();
  return std::move(record_);
}

Recorder* Tracer::recorder_here() {
  if (!on()) return nullptr;
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
      guest->track.name = name_here();
      guest->track.native_id = native_thread_id();
      guests_.push_back(guest);
      guest->recorder.begin(guest->ring);
    }
  }
  return &guest->recorder;
}

}  // namespace torch_spheres
