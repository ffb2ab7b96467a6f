// How the spheres of a System meet, and what they tell each other: barriers, epochs, messages of
// users, and the news of gradients.
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
  return open_meeting(MessageKind::kBarrier, level);
}

std::uint32_t System::try_open_epoch() { return open_meeting(MessageKind::kEpochEnd, 0); }

std::uint32_t System::open_meeting(MessageKind kind, int level) {
  const std::lock_guard lock(meeting_mutex_);
  // Messages of an aborted meeting may still lie in mailboxes; waiting for them to be read keeps
  // the mailboxes bounded.
  if (!running() || stopping() || !barrier_.was_released(barrier_.current()) ||
      meeting_messages_.load() != 0) {
    return 0;
  }
  const std::uint32_t meeting = barrier_.open(static_cast<std::uint32_t>(Topology::count(level)));
  called_at_.store(ring_.newest());
  post(0, {kind, static_cast<std::int8_t>(level), kNoSphere, meeting});
  return meeting;
}

void System::open_barrier(std::uint32_t meeting, int level) {
  barrier_.release(meeting);
  wake_level(level);
  tell_news();
}

void System::abort_meeting() {
  if (!barrier_.abort(barrier_.current())) return;
  for (int level = 0; level < topology_.levels(); ++level) wake_level(level);
  tell_news();
}

void System::wake_level(int level) {
  for (SphereId id = Topology::first(level); id < Topology::first(level + 1); ++id) {
    sphere(id).parker.wake();
  }
}

Meeting System::wait_meeting_for(std::uint32_t meeting, Milliseconds timeout) {
  wait_news(timeout, [&] { return barrier_.was_released(meeting); });
  return barrier_.outcome(meeting);
}

// ---- messages between users ----

Sent System::try_send(SphereId source, SphereId target, std::unique_ptr<Letter>& letter) {
  for (const SphereId id : {source, target}) {
    if (!topology_.contains(id)) {
      throw std::invalid_argument("there is no sphere " + std::to_string(id) + "; ids are 0 to " +
                                  std::to_string(topology_.total() - 1));
    }
  }
  if (!Topology::has_edge(source, target)) {
    throw std::invalid_argument("spheres " + std::to_string(source) + " (" +
                                Topology::path_string(source) + ") and " + std::to_string(target) +
                                " (" + Topology::path_string(target) +
                                ") do not touch: messages go to the parent, a child or a sibling");
  }
  if (!sphere(target).inbox.try_push(letter)) return Sent::kFull;
  sphere(source).messages_sent.add(1);
  tell_news();
  return Sent::kDelivered;
}

std::unique_ptr<Letter> System::try_receive(SphereId id) {
  std::unique_ptr<Letter> letter;
  if (sphere(id).inbox.try_pop(letter)) sphere(id).messages_received.add(1);
  return letter;
}

void System::wait_for_mail(SphereId id, Milliseconds timeout) {
  wait_news(timeout, [&] { return stopping() || !sphere(id).inbox.was_empty(); });
}

// ---- gradients ----

void System::gradient_ready(std::int32_t leaf) {
  report_gradients(*leaf_spheres_[static_cast<std::size_t>(leaf)]);
}

void System::report_gradients(Sphere& sphere) {
  if (sphere.id == 0) {
    gradient_rounds_.fetch_add(1);
    tell_news();
  } else if (sphere.gradients_ready.fetch_add(1) == 0) {
    post(Topology::parent(sphere.id), {MessageKind::kGradientReady, 0, sphere.id, 0});
  }
}

bool System::wait_gradient_rounds_for(std::uint64_t rounds, Milliseconds timeout) {
  return wait_news(timeout, [&] { return stopping() || gradient_rounds() >= rounds; });
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
  permits_.mark_returning(called.offset);
  dispatch();
}

}  // namespace torch_spheres
