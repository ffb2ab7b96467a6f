#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "allocator.h"
#include "bindings.h"
#include "dropped.h"
#include "py_system.h"

namespace torch_spheres::bindings {

namespace {

py::tuple subtrees(const PySystem& self) {
  const System& core = self.core();
  std::uint64_t elapsed = 0;
  py::list all;
  const SphereId last = core.topology().levels() > 1 ? kKissing : 0;
  for (SphereId id = 0; id <= last; ++id) {
    const SubtreeTotals t = core.subtree_totals(id);
    if (id == 0) elapsed = t.elapsed_ns;
    all.append(py::make_tuple(id, py::tuple(py::cast(t.spheres)), t.items_run, t.items_stolen,
                              t.queued, t.busy_ns));
  }
  return py::make_tuple(elapsed, all);
}

}  // namespace

void bind_system(py::module_& module) {
  py::register_exception<StoppedError>(module, "StoppedError", PyExc_RuntimeError);
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Timeout& error) {
      PyErr_SetString(PyExc_TimeoutError, error.what());
    }
  });

  module.def(
      "current_sphere", [] { return System::current() ? System::current()->id : kNoSphere; },
      "The id of the sphere whose thread is calling, or -1.");
  module.def(
      "keep_freed_memory", &keep_freed_memory, py::arg("lean"),
      "Has the C library reuse freed memory instead of returning it; see runtime/malloc.py.");
  module.def(
      "join_dropped", [] { wait_interruptibly({}, &join_dropped_for); },
      "Waits until the threads of all systems that were dropped have ended.");
  module.def("set_thread_hooks", &SphereGil::set_hooks, py::arg("enter"), py::arg("leave"),
             "Called on a sphere's thread before its first and after its last Python call.");

  py::class_<PySystem, std::shared_ptr<PySystem>>(module, "System",
                                                  "The running hierarchy; see KissingSpheres.")
      .def(py::init<int, int, std::uint64_t>(), py::arg("levels"), py::arg("concurrency"),
           py::arg("starts") = 0, "`starts`: of the system that it replaces.")
      .def_property_readonly("concurrency",
                             [](const PySystem& self) { return self.core().concurrency(); })
      .def("start", &PySystem::start)
      .def(
          "stop",
          [](PySystem& self, Seconds timeout) {
            const PySystem::Lost lost = self.stop(timeout);
            return std::make_pair(lost.items, lost.error);
          },
          py::arg("timeout") = py::none(),
          "Returns what nobody was told of: how many items were not run, and an item's error.")
      .def("running", &PySystem::running)
      .def("forked", &PySystem::forked)
      .def("on_own_thread", [](const PySystem& self) { return self.core().on_own_thread(); })
      .def("submit", &PySystem::submit, py::arg("fn"), py::arg("items"), py::arg("collect"))
      .def("submit_native", &PySystem::submit_native, py::arg("fn"), py::arg("items"))
      .def("cancel", &PySystem::cancel, py::arg("work"))
      .def(
          "pause", &PySystem::pause,
          "In a work item: sleeps, without a turn to compute, until call_back(), or for no reason.")
      .def("call_back", &PySystem::call_back, py::arg("leaf"),
           "Ends the pause of the item that a leaf is at, or the one to come.")
      .def("wait", &PySystem::wait, py::arg("timeout") = py::none())
      .def(
          "waiters",
          [](const PySystem& self, const PyBatch& work) { return self.waiters() + work.waiters(); },
          py::arg("work"), "How many threads wait for this work: for tests.")
      .def("require_running", &PySystem::require_running, py::arg("what"))
      .def("require_outside", &PySystem::require_outside, py::arg("what"))
      .def("barrier", &PySystem::barrier, py::arg("level"), py::arg("timeout") = py::none())
      .def("epoch", &PySystem::epoch, py::arg("timeout") = py::none())
      .def("send", &PySystem::send, py::arg("source"), py::arg("target"), py::arg("value"))
      .def("receive", &PySystem::receive, py::arg("sphere"), py::arg("timeout") = py::none())
      .def(
          "gradient_ready",
          [](PySystem& self, std::int32_t leaf) {
            if (self.running()) self.core().gradient_ready(leaf);
          },
          py::arg("leaf"), "For a trace: a shard's gradients are there.")
      .def(
          "gradients_complete", [](PySystem& self) { self.core().gradients_taken(); },
          "For a trace: the calling thread takes the gradients of all shards.")
      .def_property_readonly("starts", &PySystem::starts)
      .def("begin_trace", &PySystem::begin_trace, py::arg("capacity"))
      .def("end_trace", &PySystem::end_trace)
      .def_property_readonly("tracing", [](const PySystem& self) { return self.core().tracing(); })
      .def("trace_phase", &PySystem::trace_phase, py::arg("label"), py::arg("shard"),
           py::arg("begin"), "Records what the calling thread did since `begin`, in nanoseconds.")
      .def("trace_gradient", &PySystem::trace_gradient, py::arg("source"), py::arg("sent"),
           "Records that the calling thread takes gradients that a sphere had ready then.")
      .def(
          "subtrees", &subtrees,
          "(ns since start, [(sphere, spheres in each state, items, stolen, queued, busy ns)]): of "
          "the root alone, then of each kissing sphere's whole subtree.")
      .def("stats", [](const PySystem& self) { return self.core().stats(); });
}

}  // namespace torch_spheres::bindings
