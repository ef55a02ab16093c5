// Where a torch tensor's elements are, read without torch.
// DLPack 1.x's C ABI reads a tensor without owning it; its structs stand here as far as that takes.
// Source: https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "tensor_table.h"

namespace freezeout {

namespace dlpack {

constexpr const char* kCapsuleName = "dlpack_exchange_api";
constexpr std::uint32_t kMajorVersion = 1;

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : std::uint8_t { kIntCode = 0, kFloatCode = 2, kBFloatCode = 4 };

struct Device {
  std::int32_t type;
  std::int32_t index;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

struct ExchangeApi {
  std::uint32_t major;
  std::uint32_t minor;
  ExchangeApi* older;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  // May be null. Returns 0 on success; else a Python error is set.
  int (*tensor_from_object)(void* object, Tensor* out);
  // Returns 0 on success. torch gives at::cuda::getCurrentCUDAStream(device_index).stream(), null for the default one.
  int (*current_stream)(std::int32_t device_type, std::int32_t device_index, void** stream);
};

}  // namespace dlpack

// DLPack's view of a tensor. The fast reader's shape and strides point into the tensor, the slow reader's into `owned`.
struct TorchTensor {
  dlpack::Tensor view;
  std::vector<std::int64_t> owned;

  void* data() const { return static_cast<char*>(view.data) + view.byte_offset; }
  std::int64_t size() const {
    std::int64_t size = 1;
    for (int i = 0; i < view.ndim; ++i) size *= view.shape[i];
    return size;
  }
  bool is(dlpack::TypeCode code, int bits) const {
    return view.dtype.code == code && view.dtype.bits == bits && view.dtype.lanes == 1;
  }
};

// Whether a and b have equal dtype, device, shape and strides. Then their elements correspond in memory order.
inline bool same_layout(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  if (a.ndim != b.ndim || std::memcmp(&a.dtype, &b.dtype, sizeof(a.dtype)) ||
      std::memcmp(&a.device, &b.device, sizeof(a.device))) {
    return false;
  }
  for (int i = 0; i < a.ndim; ++i) {
    if (a.shape[i] != b.shape[i]) return false;
    // The stride of a dimension of size 1 is arbitrary.
    if (a.strides[i] != b.strides[i] && a.shape[i] != 1) return false;
  }
  return true;
}

// Reads tensors by `torch.Tensor.__dlpack_c_exchange_api__` (torch 2.11 and later), else by attributes.
class TensorReader {
 public:
  // tensor_type: torch.Tensor.
  // parameter_type: torch.nn.Parameter.
  // dtypes: {torch.dtype: (DLPack code, bits)}.
  // increment_version: torch.autograd.graph.increment_version.
  // exchange: false reads by attributes even where torch has the exchange.
  TensorReader(pybind11::type tensor_type, pybind11::type parameter_type, pybind11::dict dtypes,
               pybind11::function increment_version, bool exchange);

  bool exchanges() const { return tensor_from_object_ != nullptr; }

  // Sets `stream` to torch's current stream of a CUDA device.
  // Returns false, without a Python error, where torch does not tell.
  bool current_stream(int device_index, std::uintptr_t& stream) const {
    void* handle = nullptr;
    if (!current_stream_ || current_stream_(dlpack::kCuda, device_index, &handle) != 0) {
      PyErr_Clear();
      return false;
    }
    stream = reinterpret_cast<std::uintptr_t>(handle);
    return true;
  }

  // Whether the type is exactly torch.Tensor or torch.nn.Parameter. The exchange crashes on a DTensor or FakeTensor.
  bool is_plain(PyObject* object) const {
    return Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(tensor_type_.ptr()) ||
           Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(parameter_type_.ptr());
  }
  bool is_tensor(PyObject* object) const { return PyObject_IsInstance(object, tensor_type_.ptr()) == 1; }

  // Reads where the object's elements are.
  // Returns false, without a Python error, for what has no address: an object that is not plain, a tensor without
  // strides, a null pointer to elements.
  bool read(PyObject* object, TorchTensor& tensor) const {
    if (!is_plain(object)) return false;
    if (!tensor_from_object_) {
      if (!read_attributes(object, tensor)) return false;
    } else if (tensor_from_object_(object, &tensor.view) != 0) {
      PyErr_Clear();
      return false;
    }
    return tensor.view.data != nullptr || tensor.size() == 0;
  }

  // object.grad. Throws error_already_set.
  pybind11::object grad(PyObject* object) const {
    PyObject* grad = get_grad_ ? get_grad_->get(object, get_grad_->closure) : PyObject_GetAttrString(object, "grad");
    if (!grad) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(grad);
  }

  // Counts an in-place change of each tensor, which autograd compares.
  void increment_versions(const pybind11::list& tensors) const {
    if (!tensors.empty()) increment_version_(tensors);
  }

  // Whether the elements are the negatives of what is in memory, as those of a conjugate's imaginary part are.
  bool is_neg(PyObject* object) const;

 private:
  bool read_attributes(PyObject* object, TorchTensor& tensor) const;

  pybind11::object tensor_type_;
  pybind11::object parameter_type_;
  pybind11::dict dtypes_;
  pybind11::function increment_version_;
  pybind11::object exchange_capsule_;
  pybind11::object grad_descriptor_;
  const PyGetSetDef* get_grad_ = nullptr;
  int (*tensor_from_object_)(void*, dlpack::Tensor*) = nullptr;
  int (*current_stream_)(std::int32_t, std::int32_t, void**) = nullptr;
};

}  // namespace freezeout
