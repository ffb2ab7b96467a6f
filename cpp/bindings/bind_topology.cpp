#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bindings.h"
#include "topology.h"

namespace torch_spheres::bindings {

namespace py = pybind11;

namespace {

int checked_level(int level) {
  if (level < 0 || level >= kMaxLevels) {
    throw std::invalid_argument("level must be 0 to 3, got " + std::to_string(level));
  }
  return level;
}

SphereId checked(SphereId id) {
  if (id < 0 || id >= Topology::first(kMaxLevels)) {
    throw std::invalid_argument("there is no sphere " + std::to_string(id));
  }
  return id;
}

SphereId checked(const Topology& topology, SphereId id) {
  if (!topology.contains(id)) {
    throw std::invalid_argument("there is no sphere " + std::to_string(id) + "; ids are 0 to " +
                                std::to_string(topology.total() - 1));
  }
  return id;
}

}  // namespace

void bind_topology(py::module_& module) {
  module.attr("KISSING") = kKissing;
  module.attr("MAX_LEVELS") = kMaxLevels;
  py::class_<Topology>(module, "Topology", "The arithmetic of sphere ids; no threads.")
      .def(py::init<int>(), py::arg("levels"))
      .def_property_readonly("levels", &Topology::levels)
      .def_property_readonly("total", &Topology::total)
      .def_property_readonly("leaves", &Topology::leaves)
      .def(
          "is_leaf",
          [](const Topology& self, SphereId id) { return self.is_leaf(checked(self, id)); },
          py::arg("sphere"))
      .def(
          "leaf_of_item",
          [](const Topology& self, std::int64_t item) {
            if (item < 0) {
              throw std::invalid_argument("item must be at least 0, got " + std::to_string(item));
            }
            return self.leaf_of_item(item);
          },
          py::arg("item"))
      .def("contains", &Topology::contains, py::arg("sphere"))
      .def_static(
          "count", [](int level) { return Topology::count(checked_level(level)); },
          py::arg("level"), "Spheres of a level: 1, 12, 144, 1728.")
      .def_static(
          "first", [](int level) { return Topology::first(checked_level(level)); },
          py::arg("level"), "Id of the first sphere of a level.")
      .def_static(
          "level", [](SphereId id) { return Topology::level(checked(id)); }, py::arg("sphere"))
      .def_static(
          "parent", [](SphereId id) { return Topology::parent(checked(id)); }, py::arg("sphere"),
          "-1 for the root.")
      .def_static(
          "child",
          [](SphereId id, int group) {
            if (group < 0 || group >= kKissing) {
              throw std::invalid_argument("group must be 0 to 11, got " + std::to_string(group));
            }
            return Topology::child(checked(id), group);
          },
          py::arg("sphere"), py::arg("group"))
      .def_static(
          "group", [](SphereId id) { return Topology::group(checked(id)); }, py::arg("sphere"),
          "0 to 11; -1 for the root.")
      .def_static(
          "path", [](SphereId id) { return Topology::path(checked(id)); }, py::arg("sphere"))
      .def_static(
          "path_string", [](SphereId id) { return Topology::path_string(checked(id)); },
          py::arg("sphere"))
      .def_static(
          "offset", [](SphereId id) { return Topology::offset(checked(id)); }, py::arg("sphere"),
          "The smallest work item of the sphere's subtree.")
      .def_static(
          "has_edge",
          [](SphereId a, SphereId b) { return Topology::has_edge(checked(a), checked(b)); },
          py::arg("a"), py::arg("b"));
}

}  // namespace torch_spheres::bindings
