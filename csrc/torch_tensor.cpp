// TensorReader: what it asks of torch once, and the slow way to read a tensor.
#include "torch_tensor.h"

#include <string>
#include <utility>

namespace py = pybind11;

namespace freezeout {

TensorReader::TensorReader(py::type tensor_type, py::type parameter_type, py::dict dtypes,
                           py::function increment_version, bool exchange)
    : tensor_type_(std::move(tensor_type)),
      parameter_type_(std::move(parameter_type)),
      dtypes_(std::move(dtypes)),
      increment_version_(std::move(increment_version)) {
  // The attribute's own getter takes half the time of looking `grad` up on every tensor.
  grad_descriptor_ = tensor_type_.attr("grad");
  if (Py_TYPE(grad_descriptor_.ptr()) == &PyGetSetDescr_Type) {
    get_grad_ = reinterpret_cast<PyGetSetDescrObject*>(grad_descriptor_.ptr())->d_getset;
  }

  if (!exchange || !py::hasattr(tensor_type_, "__dlpack_c_exchange_api__")) return;
  exchange_capsule_ = tensor_type_.attr("__dlpack_c_exchange_api__");
  if (!PyCapsule_IsValid(exchange_capsule_.ptr(), dlpack::kCapsuleName)) return;
  const auto* api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(exchange_capsule_.ptr(), dlpack::kCapsuleName));
  while (api && api->major > dlpack::kMajorVersion) api = api->older;
  if (api && api->major == dlpack::kMajorVersion) {
    tensor_from_object_ = api->tensor_from_object;
    current_stream_ = api->current_stream;
  }
}

bool TensorReader::is_neg(PyObject* object) const { return py::handle(object).attr("is_neg")().cast<bool>(); }

bool TensorReader::read_attributes(PyObject* object, TorchTensor& tensor) const {
  const py::handle self(object);
  try {
    const py::object dtype = self.attr("dtype");
    if (!dtypes_.contains(dtype)) return false;
    const auto [code, bits] = dtypes_[dtype].cast<std::pair<int, int>>();
    tensor.view.dtype = {static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits), 1};

    const py::object device = self.attr("device");
    const auto type = device.attr("type").cast<std::string>();
    if (type != "cpu" && type != "cuda") return false;
    tensor.view.device = {type == "cpu" ? dlpack::kCpu : dlpack::kCuda,
                          device.attr("index").is_none() ? 0 : device.attr("index").cast<int>()};

    tensor.owned.clear();
    for (const py::object& sizes : {py::object(self.attr("shape")), py::object(self.attr("stride")())}) {
      for (const py::handle size : sizes) tensor.owned.push_back(size.cast<std::int64_t>());
    }
    tensor.view.ndim = static_cast<std::int32_t>(tensor.owned.size() / 2);
    tensor.view.shape = tensor.owned.data();
    tensor.view.strides = tensor.owned.data() + tensor.view.ndim;
    tensor.view.byte_offset = 0;
    tensor.view.data = reinterpret_cast<void*>(self.attr("data_ptr")().cast<std::uintptr_t>());
    return true;
  } catch (py::error_already_set&) {
    return false;  // sparse tensors have no strides
  }
}

}  // namespace freezeout
