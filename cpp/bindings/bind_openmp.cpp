// OpenMP threads of Python's threads, see openmp_team.h.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "bindings.h"
#include "gil.h"
#include "openmp_team.h"

namespace torch_spheres::bindings {

namespace {

template <typename Function>
Function at(std::uintptr_t address) {
  return reinterpret_cast<Function>(address);
}

/// A context manager in C: no signal comes between the region's begin and the block, and should
/// an exception pass by, the destructor ends the region.
class PyHeldTeam {
 public:
  PyHeldTeam(std::uintptr_t start, std::uintptr_t end, std::uintptr_t team_size, unsigned threads)
      : openmp_{at<decltype(OpenMp::start)>(start), at<decltype(OpenMp::end)>(end),
                at<decltype(OpenMp::team_size)>(team_size)},
        threads_(threads) {}

  void enter() { team_.emplace(openmp_, threads_); }
  void exit(const py::object&, const py::object&, const py::object&) {
    const GilRelease release;  // it waits until the threads are awake
    team_.reset();
  }

 private:
  const OpenMp openmp_;
  const unsigned threads_;
  std::optional<HeldTeam> team_;
};

}  // namespace

void bind_openmp(py::module_& module) {
  py::class_<PyHeldTeam>(module, "HeldTeam",
                         "Inside its block the calling thread's OpenMP threads sleep.")
      .def(py::init<std::uintptr_t, std::uintptr_t, std::uintptr_t, unsigned>(), py::arg("start"),
           py::arg("end"), py::arg("team_size"), py::arg("threads"),
           "Addresses of GOMP_parallel_start, GOMP_parallel_end and omp_get_num_threads, and how "
           "many threads the team has, the calling one among them.")
      .def("__enter__", &PyHeldTeam::enter)
      .def("__exit__", &PyHeldTeam::exit, py::arg("type"), py::arg("value"), py::arg("traceback"));
}

}  // namespace torch_spheres::bindings
