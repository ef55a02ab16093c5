// fused_update_cuda: a block for each chunk of each tensor, all of them in one launch.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "fused_update_block.h"

namespace freezeout {

namespace {

template <class F, class T, int kWords>
__global__ void __launch_bounds__(kThreads)
    fused_update_kernel(const __grid_constant__ LaunchArguments<kWords> arguments) {
  const int tensor = tensor_of_block(arguments, blockIdx.x);
  if (tensor < 0) return;
  __shared__ RatesOf<F, T> rates;
  if (threadIdx.x == 0) rates = rates_of_block<F, T>(arguments, tensor);
  __syncthreads();
  update_block<F, T>(arguments, blockIdx.x, tensor, rates, threadIdx.x);
}

void check(cudaError_t error, const char* what, int device) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, which the next launch's check must not find
  throw std::runtime_error("fused_update_cuda: " + std::string(what) + " failed on cuda:" + std::to_string(device) +
                           ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

// Makes `device` current. The destructor makes the device before it current again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice", device);
    if (before_ == device) return;
    check(cudaSetDevice(device), "cudaSetDevice", device);
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <class F, class T>
void run(const Batch& batch, TensorEntry* table, const SharedInputs& inputs, int device, cudaStream_t stream) {
  for_each_launch(batch, table, inputs, [&](const auto& arguments, std::uint32_t blocks) {
    constexpr int kWords = sizeof(arguments.words) / sizeof(arguments.words[0]);
    fused_update_kernel<F, T, kWords><<<blocks, kThreads, 0, stream>>>(arguments);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
      const std::string what =
          "launch of " + std::to_string(blocks) + " blocks for " + std::to_string(arguments.num_tensors) + " tensors";
      check(error, what.c_str(), device);
    }
  });
}

}  // namespace

bool fused_update_cuda(const Batch& batch, TensorEntry* table, const SharedInputs& inputs, int device,
                       std::uintptr_t stream_handle) {
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing", device);
  visit_types(batch, [&](auto formula, auto element) {
    run<decltype(formula), decltype(element)>(batch, table, inputs, device, stream);
  });
  return status == cudaStreamCaptureStatusActive;
}

}  // namespace freezeout
