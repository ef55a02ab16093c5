// A CUDA device of host memory for torch's CPU build: operators on its tensors run as the CPU's, on the same memory.
//
// What a real device refuses is refused: tensors of different devices in one operator, reading a value back or copying
// between host and device while a graph is captured.
// Idea: a boxed fallback over aliases, as for torch's test backend,
// https://github.com/pytorch/pytorch/tree/main/test/cpp_extensions/open_registration_extension/torch_openreg
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../../csrc/torch_tensor.h"

namespace py = pybind11;

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);

std::atomic<bool> capturing{false};
std::atomic<bool> capture_failed{false};
std::atomic<int> sync_debug_mode{0};  // 1 warns, 2 raises
std::atomic<std::uintptr_t> current_stream{0};

// Memory

// The storage's memory as `device`'s, which keeps the storage alive.
at::DataPtr data_on(c10::Device device, const c10::Storage& storage) {
  return {const_cast<void*>(storage.data()), new c10::Storage(storage),
          [](void* context) { delete static_cast<c10::Storage*>(context); }, device};
}

// The tensor's memory as a tensor of `device`.
at::Tensor alias_of(const at::Tensor& tensor, c10::Device device, at::DataPtr data) {
  auto impl = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), tensor.storage().nbytes(),
                                                    std::move(data), c10::GetCPUAllocator(), /*resizable=*/true);
  const c10::DispatchKey key = device.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA;
  at::Tensor alias =
      at::detail::make_tensor<c10::TensorImpl>(c10::Storage(std::move(impl)), c10::DispatchKeySet(key), tensor.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return alias;
}

at::Tensor alias_of(const at::Tensor& tensor, c10::Device device) {
  return alias_of(tensor, device, data_on(device, tensor.storage()));
}

// What became of an alias is the original's.
void take_back(const at::Tensor& original, const at::Tensor& alias) {
  const c10::Storage& storage = alias.storage();
  if (storage.data() != original.storage().data() || storage.nbytes() != original.storage().nbytes()) {
    original.storage().set_data_ptr(data_on(kDevice, storage));
    original.storage().set_nbytes(storage.nbytes());
  }
  if (alias.sizes() != original.sizes() || alias.strides() != original.strides())
    original.unsafeGetTensorImpl()->set_sizes_and_strides(alias.sizes(), alias.strides(), alias.storage_offset());
}

// Capture

void synchronizes(const std::string& what) {
  if (capturing) capture_failed = true;
  TORCH_CHECK(!capturing, "CUDA error: operation not permitted when stream is capturing (", what, ")");
  TORCH_CHECK(sync_debug_mode != 2, "called a synchronizing CUDA operation (", what, ")");
  if (sync_debug_mode == 1) TORCH_WARN("called a synchronizing CUDA operation (", what, ")");
}

// Operators

const std::unordered_set<std::string> kSynchronizing = {
    "aten::_local_scalar_dense", "aten::equal",    "aten::nonzero",
    "aten::masked_select",       "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive",
};

class HostCall {
 public:
  HostCall(const c10::OperatorHandle& op, torch::jit::Stack* stack) : op_(op), stack_(stack) {}

  void run() {
    const auto& schema = op_.schema();
    const std::string name = c10::toString(op_.operator_name());
    if (kSynchronizing.count(name)) synchronizes(name);
    // A GPU's convolutions of float16 sum in float32; the CPU's own take twenty times as long.
    const bool may_widen = name.rfind("aten::convolution", 0) == 0;
    bool is_wide = false;
    const auto on_the_host = [&](const at::Tensor& tensor) {
      const at::Tensor found = host(tensor);
      if (!may_widen || !found.defined() || found.scalar_type() != at::kHalf) return found;
      is_wide = true;
      return found.to(at::kFloat);
    };
    for (std::size_t i = stack_->size() - schema.arguments().size(); i < stack_->size(); ++i)
      (*stack_)[i] = mapped((*stack_)[i], on_the_host);
    TORCH_CHECK(!stranger_.defined(), "Expected all tensors to be on the same device, but got a tensor on ",
                stranger_.defined() ? stranger_.device().str() : "", " beside others on cuda:0 (", name, ")");
    op_.callBoxed(stack_);
    // An operator may have resized its output, or given it other memory.
    for (const auto& [original, alias] : aliases_) take_back(original, alias);
    for (std::size_t i = stack_->size() - schema.returns().size(); i < stack_->size(); ++i)
      (*stack_)[i] = mapped((*stack_)[i], [&](const at::Tensor& tensor) {
        return device(is_wide && tensor.defined() ? tensor.to(at::kHalf) : tensor);
      });
  }

 private:
  template <class F>
  static c10::IValue mapped(const c10::IValue& value, const F& of_tensor) {
    if (value.isTensor()) return of_tensor(value.toTensor());
    if (value.isDevice()) return value.toDevice().is_cuda() ? c10::IValue(c10::Device(c10::kCPU)) : value;
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(of_tensor(tensor));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
        list.push_back(tensor ? std::optional<at::Tensor>(of_tensor(*tensor)) : std::nullopt);
      return list;
    }
    return value;
  }

  at::Tensor host(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      if (tensor.dim() > 0) stranger_ = tensor;
      return tensor;
    }
    for (const auto& [original, alias] : aliases_)
      if (original.is_same(tensor)) return alias;
    aliases_.emplace_back(tensor, alias_of(tensor, c10::kCPU));
    return aliases_.back().second;
  }

  at::Tensor device(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.is_cuda()) return tensor;
    for (const auto& [original, alias] : aliases_) {
      if (alias.is_same(tensor)) return original;
    }
    return alias_of(tensor, kDevice);
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack* stack_;
  std::vector<std::pair<at::Tensor, at::Tensor>> aliases_;
  at::Tensor stranger_;  // of another device
};

void on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) { HostCall(op, stack).run(); }

at::Tensor host_of(const at::Tensor& tensor) { return tensor.is_cuda() ? alias_of(tensor, c10::kCPU) : tensor; }

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (self.device() != source.device() && !non_blocking) synchronizes("copy_ between host and device");
  at::Tensor target = host_of(self);
  target.copy_(host_of(source));
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, std::int64_t offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("record_stream", [](at::Tensor&, c10::Stream) {});
  m.impl("copy_", copy_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", [](at::Tensor& self, at::Storage source) -> at::Tensor& {
    const auto elements = static_cast<std::int64_t>(source.nbytes() / self.itemsize());
    return set_storage(self, std::move(source), 0, {elements}, {1});
  });
  // Chosen by the device elsewhere, among kernels that are not there.
  for (const char* name : {"convolution", "convolution_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

// Devices and streams: one device; everything runs at once, on the host.

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// Its random numbers are the host's.
struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};

// torch's table of DLPack functions, which knows the streams of this device.
py::capsule exchange_with_streams(const py::capsule& torchs) {
  using freezeout::dlpack::ExchangeApi;
  static ExchangeApi table;
  table = *static_cast<const ExchangeApi*>(torchs.get_pointer());
  table.current_stream = [](std::int32_t type, std::int32_t, void** stream) {
    *stream = type == freezeout::dlpack::kCuda ? reinterpret_cast<void*>(current_stream.load()) : nullptr;
    return 0;
  };
  return py::capsule(&table, freezeout::dlpack::kCapsuleName);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  // torch has made its own, which refuse everything, while it was imported: these take their place.
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks;
  module.def("set_sync_debug_mode", [](int mode) { sync_debug_mode = mode; });
  module.def("get_sync_debug_mode", [] { return sync_debug_mode.load(); });
  module.def("synchronizes", &synchronizes);
  module.def("set_current_stream", [](std::uintptr_t stream) { current_stream = stream; });
  module.def("exchange_with_streams", &exchange_with_streams);
  module.def("set_capturing", [](bool on) { capturing = on; });
  module.def("is_capturing", [] { return capturing.load(); });
  module.def("take_capture_failure", [] { return capture_failed.exchange(false); });
  // The tensor's memory, which it does not keep alive.
  module.def("unowned", [](const at::Tensor& tensor) {
    return alias_of(tensor, kDevice, {const_cast<void*>(tensor.storage().data()), kDevice});
  });
}
