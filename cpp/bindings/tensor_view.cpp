#include "tensor_view.h"

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

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

/// What view_tensor() knows of torch: written once, on import, and leaked on purpose.
struct Torch {
  py::object tensor, parameter, strided, is_neg;
  std::array<std::pair<py::object, DType>, 4> dtypes;
  const ExchangeApi* exchange = nullptr;
  py::str dtype{"dtype"}, layout{"layout"}, is_cpu{"is_cpu"}, shape{"shape"};
  py::str is_contiguous{"is_contiguous"}, data_ptr{"data_ptr"};
};
const Torch* torch = nullptr;

/// Null where torch has no such interface, or another version of it.
const ExchangeApi* exchange_in(const py::object& capsule) {
  if (capsule.is_none()) return nullptr;
  const auto* found =
      static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (found == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  return found->major == 1 && found->tensor_from_object != nullptr ? found : nullptr;
}

bool known_type(const DlTensor& tensor, DType& dtype) {
  for (const DType known : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    const auto code = known == DType::bfloat16 ? kBrainFloat : kFloat;
    if (tensor.type_code == code && tensor.type_bits == 8 * element_size(known)) {
      dtype = known;
      return tensor.type_lanes == 1;
    }
  }
  return false;
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

bool view_by_exchange(py::handle tensor, TensorView& view) {
  DlTensor found{};
  if (torch->exchange->tensor_from_object(tensor.ptr(), &found) != 0) {
    PyErr_Clear();  // sparse, meta, quantised, ...: not for us
    return false;
  }
  if (found.device_type != kCpu || !known_type(found, view.dtype) ||
      !contiguous(found, view.numel)) {
    return false;
  }
  view.data = static_cast<char*>(found.data) + (found.data == nullptr ? 0 : found.byte_offset);
  view.shape.assign(found.shape, found.shape + found.dimensions);
  return true;
}

py::object called(py::handle tensor, const py::str& method) {
  const auto value =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), method.ptr()));
  if (!value) throw py::error_already_set();
  return value;
}

bool view_by_methods(py::handle tensor, TensorView& view) {
  const py::object dtype = tensor.attr(torch->dtype);
  const auto* known = std::find_if(torch->dtypes.begin(), torch->dtypes.end(),
                                   [&](const auto& pair) { return pair.first.is(dtype); });
  if (known == torch->dtypes.end() || tensor.attr(torch->layout).ptr() != torch->strided.ptr() ||
      tensor.attr(torch->is_cpu).ptr() != Py_True ||
      called(tensor, torch->is_contiguous).ptr() != Py_True) {
    return false;
  }
  view.dtype = known->second;
  view.shape.clear();
  view.numel = 1;
  for (const py::handle size : py::tuple(tensor.attr(torch->shape))) {
    view.shape.push_back(size.cast<std::int64_t>());
    view.numel *= static_cast<std::size_t>(view.shape.back());
  }
  try {
    view.data = reinterpret_cast<char*>(called(tensor, torch->data_ptr).cast<std::uintptr_t>());
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_RuntimeError)) throw;
    return false;  // it has no memory of its own: a transform's, for one
  }
  return true;
}

}  // namespace

void read_tensors_by(const py::object& exchange) {
  const auto module = py::module_::import("torch");
  auto known = std::make_unique<Torch>();
  known->tensor = module.attr("Tensor");
  known->parameter = module.attr("nn").attr("Parameter");
  known->is_neg = known->tensor.attr("is_neg");  // no look-up for each tensor
  known->strided = module.attr("strided");
  known->dtypes = {{{module.attr("float32"), DType::float32},
                    {module.attr("float64"), DType::float64},
                    {module.attr("bfloat16"), DType::bfloat16},
                    {module.attr("float16"), DType::float16}}};
  known->exchange = exchange_in(exchange);
  torch = known.release();
}

bool view_tensor(py::handle tensor, TensorView& view) {
  const py::handle type = py::type::handle_of(tensor);
  if (torch == nullptr || (!type.is(torch->tensor) && !type.is(torch->parameter))) return false;
  const bool viewed =
      torch->exchange != nullptr ? view_by_exchange(tensor, view) : view_by_methods(tensor, view);
  // Without memory: zeros that torch does not store.  With a negation still to come, as
  // z.conj().imag, which DLPack does not tell: not what is in the memory.
  if (!viewed || (view.data == nullptr && view.numel != 0)) return false;
  const auto negated =
      py::reinterpret_steal<py::object>(PyObject_CallOneArg(torch->is_neg.ptr(), tensor.ptr()));
  if (!negated) throw py::error_already_set();
  return negated.ptr() == Py_False;
}

}  // namespace torch_spheres::bindings
