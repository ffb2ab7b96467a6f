// What System records for a trace beside what its spheres record themselves.
#include "system.h"

namespace torch_spheres {

bool System::begin_trace(std::size_t capacity) {
  const std::lock_guard lock(submit_mutex_);  // what is counted below is not submitted meanwhile
  if (!tracer_.begin(spheres_, capacity)) return false;
  std::int64_t queued = 0;
  for (std::int32_t leaf = 0; leaf < topology_.leaves(); ++leaf) queued += ring_.was_queued(leaf);
  tracer_.begin_with(queued);
  return true;
}

Recorder* System::recorder_here() {
  if (!tracing()) return nullptr;
  if (on_own_thread()) return &sphere(current()->id).recorder;
  return tracer_.recorder_here();
}

void System::trace_queued(std::int64_t more) {
  Recorder* recorder = more != 0 ? recorder_here() : nullptr;
  if (recorder == nullptr) return;
  const std::uint64_t now = now_ns();
  recorder->record({now, now, more, 1, 0, TraceKind::kQueued, 0});
}

void System::trace_phase(TraceLabel phase, std::int64_t shard, std::uint64_t begin) {
  Recorder* recorder = recorder_here();
  if (recorder == nullptr) return;
  recorder->record(
      {begin, now_ns(), shard, 1, 0, TraceKind::kPhase, static_cast<std::uint8_t>(phase)});
}

void System::trace_gradient(SphereId source, std::uint64_t sent) {
  if (Recorder* recorder = recorder_here()) {
    recorder->record(
        {sent, now_ns(), -1, 1, static_cast<std::int16_t>(source), TraceKind::kGradient, 0});
  }
}

void System::gradient_ready(std::int32_t leaf) {
  if (tracing()) leaf_spheres_[static_cast<std::size_t>(leaf)]->gradient_at.store(now_ns());
}

void System::gradients_taken() {
  if (!tracing()) return;
  for (Sphere* leaf : leaf_spheres_) {
    if (const std::uint64_t at = leaf->gradient_at.exchange(0); at != 0)
      trace_gradient(leaf->id, at);
  }
}

}  // namespace torch_spheres
