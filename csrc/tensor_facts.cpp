#include "tensor_facts.h"

#include <string>
#include <utility>

namespace py = pybind11;

namespace freezeout {

TensorReader::TensorReader(py::object tensor_type, py::object parameter_type, py::dict dtypes, bool exchange)
    : tensor_type_(std::move(tensor_type)), parameter_type_(std::move(parameter_type)), dtypes_(std::move(dtypes)) {
  // The attribute's own getter: half the time of looking `grad` up on every tensor.
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

bool TensorReader::read_attributes(PyObject* object, TensorFacts& facts) const {
  const py::handle tensor(object);
  try {
    const py::object dtype = tensor.attr("dtype");
    if (!dtypes_.contains(dtype)) return false;
    const auto [code, bits] = dtypes_[dtype].cast<std::pair<int, int>>();
    facts.view.dtype = {static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits), 1};

    const py::object device = tensor.attr("device");
    const auto type = device.attr("type").cast<std::string>();
    if (type != "cpu" && type != "cuda") return false;
    facts.view.device = {type == "cpu" ? dlpack::kCpu : dlpack::kCuda,
                         device.attr("index").is_none() ? 0 : device.attr("index").cast<int>()};

    facts.owned.clear();
    for (const py::object& sizes : {py::object(tensor.attr("shape")), py::object(tensor.attr("stride")())}) {
      for (const py::handle size : sizes) facts.owned.push_back(size.cast<std::int64_t>());
    }
    facts.view.ndim = static_cast<std::int32_t>(facts.owned.size() / 2);
    facts.view.shape = facts.owned.data();
    facts.view.strides = facts.owned.data() + facts.view.ndim;
    facts.view.byte_offset = 0;
    facts.view.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<std::uintptr_t>());
    return true;
  } catch (py::error_already_set&) {
    return false;  // sparse tensors have no strides
  }
}

}  // namespace freezeout
