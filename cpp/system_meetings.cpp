// How the spheres of a System meet, what users send each other, and items that wait for each other.
#include <stdexcept>
#include <string>

#include "system.h"

namespace torch_spheres {

// ---- meetings ----

std::uint32_t System::try_open_barrier(int level) {
  if (level < 0 || level >= topology_.levels()) {
    throw std::invalid_argument("level must be 0 to " + std::to_string(topology_.levels() - 1) +
                                ", got " + std::to_string(level));
  }
  return open_meeting(level);
}

std::uint32_t System::try_open_epoch() { return open_meeting(kAllLevels); }

std::uint32_t System::open_meeting(int level) {
  const std::lock_guard lock(meeting_mutex_);
  if (!running() || stopping() || meets()) return 0;
  meeting_level_.store(level);
  called_at_.store(ring_.newest());
  const std::int32_t spheres = level == kAllLevels ? topology_.total() : Topology::count(level);
  const std::uint32_t meeting = barrier_.open(static_cast<std::uint32_t>(spheres));
  sphere(0).parker.wake();  // each wakes its children
  return meeting;
}

/// By the last to arrive.
void System::release_meeting(std::uint32_t meeting) {
  const int level = meeting_level_.load();
  if (level == kAllLevels) epochs_.fetch_add(1);  // first, for those who have seen the release
  if (!barrier_.release(meeting) && level == kAllLevels) epochs_.fetch_sub(1);
  for (int l = 0; l < topology_.levels(); ++l) {
    if (level == l || level == kAllLevels) wake_level(l);
  }
  news_.tell();
}

void System::abort_meeting() {
  if (!barrier_.abort(barrier_.current())) return;
  for (int level = 0; level < topology_.levels(); ++level) wake_level(level);
  news_.tell();
}

void System::wake_level(int level) {
  for (SphereId id = Topology::first(level); id < Topology::first(level + 1); ++id) {
    sphere(id).parker.wake();
  }
}

Meeting System::wait_meeting_for(std::uint32_t meeting, Milliseconds timeout) {
  news_.wait(std::chrono::steady_clock::now() + timeout,
             [&] { return barrier_.was_released(meeting); });
  return barrier_.outcome(meeting);
}

// ---- messages between users ----

Sent System::try_send(SphereId source, SphereId target, std::unique_ptr<Letter>& letter) {
  topology_.require(source);
  topology_.require(target);
  if (!Topology::has_edge(source, target)) {
    throw std::invalid_argument("spheres " + std::to_string(source) + " (" +
                                Topology::path_string(source) + ") and " + std::to_string(target) +
                                " (" + Topology::path_string(target) +
                                ") do not touch: messages go to the parent, a child or a sibling");
  }
  if (!sphere(target).inbox.try_push(letter)) return Sent::kFull;
  sphere(source).messages_sent.add(1);
  news_.tell();
  return Sent::kDelivered;
}

std::unique_ptr<Letter> System::try_receive(SphereId id) {
  std::unique_ptr<Letter> letter;
  if (sphere(id).inbox.try_pop(letter)) sphere(id).messages_received.add(1);
  return letter;
}

void System::wait_for_mail(SphereId id, Milliseconds timeout) {
  news_.wait(std::chrono::steady_clock::now() + timeout,
             [&] { return stopping() || !sphere(id).inbox.was_empty(); });
}

// ---- items that wait for each other ----

void System::pause() {
  if (!on_own_thread() || !topology_.is_leaf(current()->id)) {
    throw std::logic_error("pause() outside of a work item");
  }
  sphere(current()->id).pause();
}

void System::call_back(SphereId leaf) {
  Sphere& called = sphere(leaf);
  if (called.presence.exchange(Presence::kCalled) != Presence::kPaused) return;
  turns_.returning.add(called.offset);
  dispatch();
}

}  // namespace torch_spheres
