// A torch tensor read without torch: where its elements are, by the parts of DLPack 1.x's C ABI that read a tensor
// without owning it (https://dmlc.github.io/dlpack/latest/c_api.html).
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
  int (*tensor_from_object)(void* object, Tensor* out);  // may be null; 0 on success, else a Python error is set
  // 0 on success. torch: at::cuda::getCurrentCUDAStream(device_index).stream(), null for the default stream.
  int (*current_stream)(std::int32_t device_type, std::int32_t device_index, void** stream);
};

}  // namespace dlpack

// DLPack's view of a tensor. The slow reader keeps shape and strides here; the fast one points into the tensor.
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
  // Shape and strides into `owned`, so that the tensor may go.
  void own_layout();
};

// Whether b's elements, in memory order, belong to a's: equal dtype, device, shape and strides.
inline bool same_layout(const TorchTensor& a, const TorchTensor& b) {
  if (a.view.ndim != b.view.ndim || std::memcmp(&a.view.dtype, &b.view.dtype, sizeof(a.view.dtype)) ||
      std::memcmp(&a.view.device, &b.view.device, sizeof(a.view.device))) {
    return false;
  }
  for (int i = 0; i < a.view.ndim; ++i) {
    if (a.view.shape[i] != b.view.shape[i]) return false;
    // The stride of a dimension of size 1 is arbitrary.
    if (a.view.strides[i] != b.view.strides[i] && a.view.shape[i] != 1) return false;
  }
  return true;
}

// Reads tensors by `torch.Tensor.__dlpack_c_exchange_api__` (torch 2.11 and later), else by attributes.
class TensorReader {
 public:
  // torch.Tensor, torch.nn.Parameter, {torch.dtype: (DLPack code, bits)}, torch.autograd.graph.increment_version;
  // `exchange` false: by attributes in any case.
  TensorReader(pybind11::type tensor_type, pybind11::type parameter_type, pybind11::dict dtypes,
               pybind11::function increment_version, bool exchange);

  bool exchanges() const { return tensor_from_object_ != nullptr; }

  // torch's current stream of a CUDA device. False, without a Python error, where torch does not tell.
  bool current_stream(int device_index, std::uintptr_t& stream) const {
    void* handle = nullptr;
    if (!current_stream_ || current_stream_(dlpack::kCuda, device_index, &handle) != 0) {
      PyErr_Clear();
      return false;
    }
    stream = reinterpret_cast<std::uintptr_t>(handle);
    return true;
  }

  // Exactly torch.Tensor or torch.nn.Parameter: a DTensor or FakeTensor must not reach the exchange (it crashes).
  bool is_plain(PyObject* object) const {
    return Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(tensor_type_.ptr()) ||
           Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(parameter_type_.ptr());
  }
  bool is_tensor(PyObject* object) const { return PyObject_IsInstance(object, tensor_type_.ptr()) == 1; }

  // False, without a Python error, for what has no address: not plain, no strides, a null pointer to elements.
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

  // tensor.grad; throws error_already_set.
  pybind11::object grad(PyObject* object) const {
    PyObject* grad = get_grad_ ? get_grad_->get(object, get_grad_->closure) : PyObject_GetAttrString(object, "grad");
    if (!grad) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(grad);
  }

  // Counts an in-place change of each of the tensors, for autograd to notice.
  void increment_versions(const pybind11::list& tensors) const {
    if (!tensors.empty()) increment_version_(tensors);
  }

  // Whether elements are the negatives of those in memory, as the imaginary part of a conjugate is.
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
