#include "tensor_view.h"

#include <algorithm>

namespace torch_spheres::bindings {

namespace py = pybind11;

namespace {

// The binary layout of DLPack 1.x, as its specification gives it.
struct DlTensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t dimensions;
  std::uint8_t type_code, type_bits;
  std::uint16_t type_lanes;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; may be null for contiguous
  std::uint64_t byte_offset;
};
struct ExchangeApi {
  std::uint32_t major, minor;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, DlTensor* out);
  void* current_work_stream;
};
constexpr std::int32_t kCpu = 1;
constexpr std::uint8_t kFloat = 2;
constexpr std::uint8_t kBrainFloat = 4;

/// Null where torch has no such interface, or another version of it: then Python is asked.
const ExchangeApi* exchange_api() {
  static const ExchangeApi* const api = []() -> const ExchangeApi* {
    const py::object type = py::module_::import("torch").attr("Tensor");
    if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return nullptr;
    const auto capsule = type.attr("__dlpack_c_exchange_api__");
    const auto* found =
        static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (found == nullptr) {
      PyErr_Clear();
      return nullptr;
    }
    return found->major == 1 && found->tensor_from_object != nullptr ? found : nullptr;
  }();
  return api;
}

bool known_type(const DlTensor& tensor, DType& dtype) {
  if (tensor.type_lanes != 1) return false;
  if (tensor.type_code == kBrainFloat && tensor.type_bits == 16) {
    dtype = DType::bfloat16;
    return true;
  }
  if (tensor.type_code != kFloat) return false;
  switch (tensor.type_bits) {
    case 16:
      dtype = DType::float16;
      return true;
    case 32:
      dtype = DType::float32;
      return true;
    case 64:
      dtype = DType::float64;
      return true;
    default:
      return false;
  }
}

bool contiguous(const DlTensor& tensor, std::size_t& numel) {
  std::int64_t expected = 1;
  bool ordered = true;
  for (std::int32_t d = tensor.dimensions; d-- > 0;) {
    if (tensor.strides != nullptr && tensor.shape[d] != 1 && tensor.strides[d] != expected) {
      ordered = false;
    }
    expected *= tensor.shape[d];
  }
  numel = static_cast<std::size_t>(expected);
  return ordered || expected == 0;
}

}  // namespace

bool TensorView::same_form(const TensorView& other) const {
  return dtype == other.dtype && dimensions == other.dimensions &&
         std::equal(shape, shape + dimensions, other.shape);
}

bool view_tensor(py::handle tensor, TensorView& view) {
  static const auto* const is_neg = new py::str("is_neg");  // interned, and leaked on purpose
  static const auto* const tensor_type =
      new py::object(py::module_::import("torch").attr("Tensor"));
  const ExchangeApi* api = exchange_api();
  // Subclasses may mean something else by their contents; parameters do not.
  if (api == nullptr || !py::isinstance(tensor, *tensor_type)) return false;
  DlTensor found{};
  if (api->tensor_from_object(tensor.ptr(), &found) != 0) {
    PyErr_Clear();  // sparse, meta, quantised, ...: not for us
    return false;
  }
  if (found.device_type != kCpu || !known_type(found, view.dtype) ||
      !contiguous(found, view.numel)) {
    return false;
  }
  // A view such as z.conj().imag has its negation still to come, which DLPack does not tell.
  const auto negated =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), is_neg->ptr()));
  if (!negated) throw py::error_already_set();
  if (negated.ptr() != Py_False) return false;
  view.data = static_cast<char*>(found.data) + found.byte_offset;
  view.dimensions = found.dimensions;
  view.shape = found.shape;
  return true;
}

}  // namespace torch_spheres::bindings
