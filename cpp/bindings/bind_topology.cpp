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
  py::class_<Topology>(module, "Topology", R"(
      The shape of the hierarchy: arithmetic on the numbers of spheres, without threads.

      Spheres are numbered from 0, level by level: 0 is the root, 1 to 12 are its children, and level
      *l* has 12^*l* spheres. The leaves, which are the last level, run the work: item *k* belongs to
      the leaf whose path from the root is *k* in base 12, least significant digit first.

      Args:
          levels: 1 to 4, the root's included.

      Attributes:
          levels: as given.
          total: spheres of all levels: 1, 13, 157 or 1885.
          leaves: spheres of the last level: 1, 12, 144 or 1728.

      Raises:
          ValueError: another number of levels. The methods raise it for a sphere, a level, a group
              or an item that there is not.)")
      .def(py::init<int>(), py::arg("levels"))
      .def_property_readonly("levels", &Topology::levels)
      .def_property_readonly("total", &Topology::total)
      .def_property_readonly("leaves", &Topology::leaves)
      .def(
          "is_leaf",
          [](const Topology& self, SphereId id) {
            self.require(id);
            return self.is_leaf(id);
          },
          py::arg("sphere"), "Whether a sphere is on the last level.")
      .def(
          "leaf_of_item",
          [](const Topology& self, std::int64_t item) {
            if (item < 0) {
              throw std::invalid_argument("item must be at least 0, got " + std::to_string(item));
            }
            return self.leaf_of_item(item);
          },
          py::arg("item"),
          "The leaf that owns a work item, numbered from 0 in its batch; others may steal it.")
      .def("contains", &Topology::contains, py::arg("sphere"),
           "Whether there is such a sphere; any integer may be asked for.")
      .def_static("count", of_level<&Topology::count>(), py::arg("level"),
                  "How many spheres a level has: 1, 12, 144 or 1728 for level 0, 1, 2 or 3.")
      .def_static("first", of_level<&Topology::first>(), py::arg("level"),
                  "The first sphere of a level, which is also how many there are above it.")
      .def_static("level", of_sphere<&Topology::level>(), py::arg("sphere"),
                  "The level that a sphere is on: 0 for the root, up to 3.")
      .def_static("parent", of_sphere<&Topology::parent>(), py::arg("sphere"),
                  "A sphere's parent; -1 for the root.")
      .def_static(
          "child",
          [](SphereId id, int group) {
            if (group < 0 || group >= kKissing) {
              throw std::invalid_argument("group must be 0 to 11, got " + std::to_string(group));
            }
            return Topology::child(checked(id), group);
          },
          py::arg("sphere"), py::arg("group"),
          "A sphere's child of a group, 0 to 11, as if the sphere were no leaf.")
      .def_static("group", of_sphere<&Topology::group>(), py::arg("sphere"),
                  "A sphere's symmetry group, its index among the siblings: 0 to 11; -1 for the "
                  "root.")
      .def_static("path", of_sphere<&Topology::path>(), py::arg("sphere"),
                  "The groups on the way from the root to a sphere, as ``[1, 7]``; none for the "
                  "root.")
      .def_static("path_string", of_sphere<&Topology::path_string>(), py::arg("sphere"),
                  "The path as text: ``\"1.7\"``, or ``\"root\"``.")
      .def_static("offset", of_sphere<&Topology::offset>(), py::arg("sphere"),
                  "The smallest work item of a sphere's subtree, whose items are that one and all "
                  "that differ from it by a multiple of 12^level.")
      .def_static(
          "has_edge",
          [](SphereId a, SphereId b) { return Topology::has_edge(checked(a), checked(b)); },
          py::arg("a"), py::arg("b"),
          "Whether two spheres touch: parent and child, or siblings. Messages go along edges.");
}

}  // namespace torch_spheres::bindings
