#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "gradient_work.h"
#include "py_system.h"

namespace torch_spheres::bindings {

namespace {

/// Below this a hand-over to other threads costs more than it saves.
constexpr std::size_t kWorthSharing = 4u << 20;

void run_job(const SumJob& job, PySystem* system) {
  if (system == nullptr || !system->running() || system->core().on_own_thread() ||
      job.bytes() < kWorthSharing) {
    const py::gil_scoped_release release;
    job.run_here();
    return;
  }
  const auto batch = system->submit_core(std::make_shared<SumWork>(job), job.items(), "tree_sum()");
  try {
    wait_interruptibly({}, [&](Milliseconds time) { return batch->wait_for(time); });
  } catch (...) {
    // The buffers die with this call: let no sphere touch them afterwards.
    const py::gil_scoped_release release;
    system->core().cancel(batch);
    while (!batch->wait_for(Milliseconds(1000))) {
    }
    throw;
  }
  if (batch->cancelled() > 0) throw StoppedError("tree_sum(): the spheres were stopped");
}

}  // namespace

void bind_gradients(py::module_& module) {
  py::native_enum<DType>(module, "DType", "enum.Enum", "Element types that the C++ sums know.")
      .value("float32", DType::float32)
      .value("float64", DType::float64)
      .value("bfloat16", DType::bfloat16)
      .value("float16", DType::float16)
      .finalize();
  py::native_enum<Isa>(module, "Isa", "enum.Enum", "Instruction sets that the sums can use.")
      .value("baseline", Isa::baseline)
      .value("avx2", Isa::avx2)
      .value("avx512", Isa::avx512)
      .finalize();
  module.def("active_isa", &active_isa);
  module.def("available_isas", &available_isas);
  module.def("set_isa", &set_isa, py::arg("isa"), "For tests: every ISA gives the same bits.");
  module.def(
      "read_range",
      [](std::uintptr_t data, std::size_t numel) {
        const py::gil_scoped_release release;
        return read_range(reinterpret_cast<const float*>(data), numel);
      },
      py::arg("data"), py::arg("numel"), "Reads float32 memory: the benchmark's bandwidth ceiling.");

  py::class_<SumJob>(module, "SumJob", "Tree sums of buffers given by address; see tree_sum().")
      .def(py::init([](int depth) {
             if (depth < 0 || depth >= kMaxLevels) {
               throw std::invalid_argument("depth must be 0 to 3, got " + std::to_string(depth));
             }
             return std::make_unique<SumJob>(depth);
           }),
           py::arg("depth"))
      .def(
          "add",
          [](SumJob& self, DType dtype, std::uintptr_t out,
             const std::vector<std::uintptr_t>& shards, std::size_t numel, double scale,
             bool accumulate) {
            if (shards.size() != self.leaves()) {
              throw std::invalid_argument("expected " + std::to_string(self.leaves()) +
                                          " shards, got " + std::to_string(shards.size()));
            }
            std::vector<const void*> pointers(shards.size());
            for (std::size_t i = 0; i < shards.size(); ++i) {
              pointers[i] = reinterpret_cast<const void*>(shards[i]);
            }
            SumSegment segment{};
            segment.dtype = dtype;
            segment.out = reinterpret_cast<void*>(out);
            segment.numel = numel;
            segment.scale = scale;
            segment.accumulate = accumulate;
            self.add(segment, pointers);
          },
          py::arg("dtype"), py::arg("out"), py::arg("shards"), py::arg("numel"),
          py::arg("scale") = 1.0, py::arg("accumulate") = false)
      .def("run", &run_job, py::arg("system") = py::none(),
           "Runs the sums: on the spheres if there are any and the sums are large.");
}

}  // namespace torch_spheres::bindings
