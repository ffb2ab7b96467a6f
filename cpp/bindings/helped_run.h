// Runs a job of many short native items: the calling thread works along with the spheres.
#pragma once

#include <memory>
#include <string>

#include "helper.h"
#include "py_system.h"

namespace torch_spheres::bindings {

/// `Job` has items() and run_here(); `JobWork` is made of one. Here and now, without the GIL, if it
/// is not `worth_sharing` or there are no spheres to share it with.
template <typename JobWork, typename Job>
void run_helped(const Job& job, PySystem* system, bool worth_sharing, const char* what) {
  if (system == nullptr || !system->running() || system->core().on_own_thread() || !worth_sharing) {
    const py::gil_scoped_release release;
    job.run_here();
    return;
  }
  const auto batch = system->submit_core(std::make_shared<JobWork>(job), job.items(), what);
  Helper helper(system->core());
  try {
    wait_interruptibly({}, [&](Milliseconds time) { return helper.wait_for(*batch, time); });
  } catch (...) {
    // The buffers die with this call: let no sphere touch them afterwards.
    const py::gil_scoped_release release;
    system->core().cancel(batch);
    while (!batch->wait_for(Milliseconds(1000))) {
    }
    throw;
  }
  if (batch->cancelled() > 0) {
    throw StoppedError(std::string(what) + ": the spheres were stopped");
  }
}

}  // namespace torch_spheres::bindings
