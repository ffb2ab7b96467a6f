#include <pybind11/gil_safe_call_once.h>
#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/typing.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "bindings.h"
#include "stats.h"

namespace torch_spheres::bindings {

namespace py = pybind11;

namespace {

using Ints = py::typing::Tuple<py::int_, py::ellipsis>;

/// A tuple of counts; spheres that have counted nothing, most of them, share one.
template <std::size_t kSize>
Ints counts_of(const std::array<std::uint64_t, kSize>& counts) {
  if (std::all_of(counts.begin(), counts.end(), [](std::uint64_t count) { return count == 0; })) {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Ints> zeros;
    return zeros
        .call_once_and_store_result(
            [] { return Ints(py::cast(std::array<std::uint64_t, kSize>{})); })
        .get_stored();
  }
  return Ints(py::cast(counts));
}

Ints item_time_edges() {
  std::array<std::uint64_t, ItemTimes::kBuckets - 1> edges;
  for (std::size_t i = 0; i < edges.size(); ++i) edges[i] = ItemTimes::edge(i);
  return Ints(py::cast(edges));
}

}  // namespace

void bind_stats(py::module_& module) {
  py::native_enum<State>(module, "State", "enum.Enum", R"(
      What a sphere's thread is doing; at any moment it is in one of these states.

      Attributes:
          READY: awake between any two of the other states, looking for what to do.
          PROCESSING: running work items.
          IDLE: asleep, with nothing to do.
          WAITING: asleep at a barrier, or in a work item that waits for those of other spheres.
          ACCUMULATING: summing gradients.
          TERMINATING: ended by `KissingSpheres.stop`, or not started yet.)")
      .value("READY", State::kReady)
      .value("PROCESSING", State::kProcessing)
      .value("IDLE", State::kIdle)
      .value("WAITING", State::kWaiting)
      .value("ACCUMULATING", State::kAccumulating)
      .value("TERMINATING", State::kTerminating)
      .finalize();

  module.def("item_time_edges", &item_time_edges,
             "The upper edges, in nanoseconds, of all buckets of item times but the last.");

  py::class_<SphereStats>(module, "SphereStats", "One sphere's figures at one moment.")
      .def_readonly("id", &SphereStats::id)
      .def_readonly("state", &SphereStats::state)
      .def_readonly("items_run", &SphereStats::items_run)
      .def_readonly("items_stolen", &SphereStats::items_stolen)
      .def_readonly("items_given", &SphereStats::items_given)
      .def_readonly("messages_sent", &SphereStats::messages_sent)
      .def_readonly("messages_received", &SphereStats::messages_received)
      .def_readonly("queue_high_water", &SphereStats::queue_high_water)
      .def_readonly("queued", &SphereStats::queued)
      .def_readonly("item_time_ns", &SphereStats::item_time_ns)
      .def_property_readonly(
          "item_time_counts",
          [](const SphereStats& self) { return counts_of(self.item_time_counts); })
      .def_property_readonly("stolen_from",
                             [](const SphereStats& self) { return counts_of(self.stolen_from); })
      .def_readonly("state_ns", &SphereStats::state_ns,
                    "Nanoseconds in each state, in the order of State.");
}

}  // namespace torch_spheres::bindings
