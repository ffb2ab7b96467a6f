#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "gradient_work.h"
#include "helper.h"
#include "py_system.h"
#include "tensor_view.h"
#include "turn.h"

namespace torch_spheres::bindings {

namespace {

/// Below this a hand-over to other threads costs more than it saves.
constexpr std::size_t kSumWorthSharing = 4u << 20;

/// Owner: one thread at a time, as its sums are run without the GIL; a second one gets an error.
class PySumJob {
 public:
  explicit PySumJob(int depth) : depth_(depth) {
    if (depth < 0 || depth >= kMaxLevels) {
      throw std::invalid_argument("depth must be 0 to 3, got " + std::to_string(depth));
    }
  }
  int depth() const { return depth_; }

  bool try_add(py::sequence shards, py::handle out) {
    const Turn turn(taken_, "SumJob");
    TensorView target;
    const auto count = static_cast<std::size_t>(Topology::count(depth_));
    if (shards.size() != count || !view_tensor(out, target)) return false;
    std::vector<const void*> pointers(count);
    TensorView view;
    for (std::size_t k = 0; k < count; ++k) {
      const py::object shard = shards[k];
      if (shard.is_none()) continue;
      if (!view_tensor(shard, view) || !view.same_form(target)) return false;
      const bool apart =
          view.data + view.bytes() <= target.data || target.data + target.bytes() <= view.data;
      if (view.data != target.data && !apart) return false;
      // Torch gives empty tensors no memory; null would say absent, which is as good.
      pointers[k] = view.data;
    }
    work_->add({target.dtype, target.data, std::move(pointers), target.numel, depth_});
    return true;
  }

  void run(PySystem* system) {
    const Turn turn(taken_, "SumJob");
    if (system == nullptr || !system->running() || system->core().on_own_thread() ||
        work_->bytes() < kSumWorthSharing) {
      const GilRelease release;
      work_->run_here();
      return;
    }
    const auto batch = system->submit_core(work_, work_->items(), "tree_sum()");
    Helper helper(system->core());
    try {
      wait_interruptibly({}, [&](Milliseconds time) { return helper.wait_for(*batch, time); });
    } catch (...) {
      // The buffers die with this call: let no sphere touch them afterwards.
      const GilRelease release;
      system->core().cancel(batch);
      batch->wait(kForever);
      throw;
    }
    if (batch->cancelled() > 0) throw StoppedError("tree_sum(): the spheres were stopped");
  }

 private:
  const int depth_;
  const std::shared_ptr<SumWork> work_ = std::make_shared<SumWork>();
  std::atomic<bool> taken_{false};
};

}  // namespace

void bind_gradients(py::module_& module) {
  module.def(
      "active_isa", [] { return isa_name(active_isa()); },
      "The instruction set that the sums use: baseline, avx2 or avx512.");
  module.def("read_tensors_by", &read_tensors_by, py::arg("exchange"),
             "Once, on import: torch.Tensor.__dlpack_c_exchange_api__, or None.");

  py::class_<PySumJob>(module, "SumJob", "Tree sums of buffers given by address; see tree_sum().")
      .def(py::init<int>(), py::arg("depth"))
      .def_property_readonly("depth", &PySumJob::depth)
      .def(
          "try_add", &PySumJob::try_add, py::arg("shards"), py::arg("out"),
          "Adds the sum of tensors (None: absent) into a tensor. False, with nothing added, unless "
          "all are contiguous CPU tensors of one known type and shape, and overlap only as a "
          "whole.")
      .def("run", &PySumJob::run, py::arg("system") = py::none(),
           "Runs the sums: on the spheres if there are any and the sums are large.");
}

}  // namespace torch_spheres::bindings
