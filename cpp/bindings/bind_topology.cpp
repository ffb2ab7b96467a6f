#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bindings.h"
#include "topology.h"

namespace torch_spheres::bindings {

namespace py = pybind11;

namespace {

SphereId checked(SphereId id) {
  if (id < 0 || id >= Topology::first(kMaxLevels)) {
    throw std::invalid_argument("there is no sphere " + std::to_string(id));
  }
  return id;
}

/// A function of a sphere's id, once that is known to be one.
template <auto kFunction>
auto of_sphere() {
  return [](SphereId id) { return kFunction(checked(id)); };
}

/// A function of a level, once that is known to be one.
template <auto kFunction>
auto of_level() {
  return [](int level) {
    if (level < 0 || level >= kMaxLevels) {
      throw std::invalid_argument("level must be 0 to 3, got " + std::to_string(level));
    }
    return kFunction(level);
  };
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
          [](const Topology& self, SphereId id) {
            if (!self.contains(id)) {
              throw std::invalid_argument("there is no sphere " + std::to_string(id) +
                                          "; ids are 0 to " + std::to_string(self.total() - 1));
            }
            return self.is_leaf(id);
          },
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
      .def_static("count", of_level<&Topology::count>(), py::arg("level"),
                  "Spheres of a level: 1, 12, 144, 1728.")
      .def_static("first", of_level<&Topology::first>(), py::arg("level"),
                  "Id of the first sphere of a level.")
      .def_static("level", of_sphere<&Topology::level>(), py::arg("sphere"))
      .def_static("parent", of_sphere<&Topology::parent>(), py::arg("sphere"), "-1 for the root.")
      .def_static(
          "child",
          [](SphereId id, int group) {
            if (group < 0 || group >= kKissing) {
              throw std::invalid_argument("group must be 0 to 11, got " + std::to_string(group));
            }
            return Topology::child(checked(id), group);
          },
          py::arg("sphere"), py::arg("group"))
      .def_static("group", of_sphere<&Topology::group>(), py::arg("sphere"),
                  "0 to 11; -1 for the root.")
      .def_static("path", of_sphere<&Topology::path>(), py::arg("sphere"))
      .def_static("path_string", of_sphere<&Topology::path_string>(), py::arg("sphere"))
      .def_static("offset", of_sphere<&Topology::offset>(), py::arg("sphere"),
                  "The smallest work item of the sphere's subtree.")
      .def_static(
          "has_edge",
          [](SphereId a, SphereId b) { return Topology::has_edge(checked(a), checked(b)); },
          py::arg("a"), py::arg("b"));
}

}  // namespace torch_spheres::bindings
