#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "helped_run.h"
#include "row_gather.h"

namespace torch_spheres::bindings {

namespace {

/// Below this a hand-over to other threads costs more than it saves.
constexpr std::size_t kWorthSharing = 256u << 10;

/// The buffer of a contiguous int64 array, for as long as it lives.
class Addresses {
 public:
  explicit Addresses(const py::buffer& array) : info_(array.request()) {
    if (info_.ndim != 1 || info_.itemsize != sizeof(std::int64_t) ||
        (info_.size > 1 && info_.strides[0] != info_.itemsize)) {
      throw std::invalid_argument("addresses must be a contiguous array of int64");
    }
  }
  const std::int64_t* data() const { return static_cast<const std::int64_t*>(info_.ptr); }
  std::size_t size() const { return static_cast<std::size_t>(info_.size); }

 private:
  py::buffer_info info_;
};

void gather_rows(const py::sequence& columns, PySystem* system) {
  GatherJob job;
  std::vector<Addresses> addresses;
  addresses.reserve(columns.size());
  for (const py::handle item : columns) {
    const auto column = py::cast<py::tuple>(item);
    if (column.size() != 3) {
      throw std::invalid_argument("a column is (addresses, bytes of a row, address of the output)");
    }
    addresses.emplace_back(py::cast<py::buffer>(column[0]));
    const Addresses& rows = addresses.back();
    job.add({rows.data(), rows.size(), py::cast<std::size_t>(column[1]),
             reinterpret_cast<char*>(py::cast<std::uintptr_t>(column[2]))});
  }
  run_helped<GatherWork>(job, system, job.bytes() >= kWorthSharing, "gather_rows()");
}

}  // namespace

void bind_gather(py::module_& module) {
  module.def("gather_rows", &gather_rows, py::arg("columns"), py::arg("system") = py::none(),
             "Copies rows to where they belong in batches. A column is (addresses of its rows, "
             "bytes of a row, address of the output); nothing is checked, see gather.py.");
}

}  // namespace torch_spheres::bindings
