// fused_sgd_cuda: a block for each chunk of each tensor, all of them in one launch.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "fused_sgd_chunk.h"

namespace freezeout {

namespace {

template <class T, int kWords>
__global__ void __launch_bounds__(kThreads)
    fused_sgd_kernel(const __grid_constant__ LaunchArguments<kWords> arguments) {
  const int tensor = tensor_of_block(arguments, blockIdx.x);
  if (tensor < 0) return;
  // One thread for the block: the schedule is a cosine in double.
  __shared__ double lr;
  if (threadIdx.x == 0) lr = rate_of_group(arguments, group_of_tensor(arguments, tensor));
  __syncthreads();
  update_block<T>(arguments, blockIdx.x, tensor, lr, threadIdx.x);
}

void check(cudaError_t error, const char* what, int device) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgets it: the next launch's check must not find this one
  throw std::runtime_error("fused_sgd_cuda: " + std::string(what) + " failed on cuda:" + std::to_string(device) + ": " +
                           cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

// Makes `device` current, and the one before current again.
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

template <class T>
void run(const std::vector<TensorWork>& work, const std::vector<GroupRates>& groups, const DeviceInputs& inputs,
         int device, cudaStream_t stream) {
  for_each_launch(work, groups, inputs, [&](const auto& arguments, std::uint32_t blocks) {
    constexpr int kWords = sizeof(arguments.words) / sizeof(arguments.words[0]);
    fused_sgd_kernel<T, kWords><<<blocks, kThreads, 0, stream>>>(arguments);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
      const std::string what =
          "launch of " + std::to_string(blocks) + " blocks for " + std::to_string(arguments.num_tensors) + " tensors";
      check(error, what.c_str(), device);
    }
  });
}

}  // namespace

bool fused_sgd_cuda(Dtype dtype, const std::vector<TensorWork>& work, const std::vector<GroupRates>& groups,
                    const DeviceInputs& inputs, int device, std::uintptr_t stream_handle) {
  const DeviceGuard guard(device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_handle);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing", device);
  switch (dtype) {
    case Dtype::kFloat:
      run<float>(work, groups, inputs, device, stream);
      break;
    case Dtype::kDouble:
      run<double>(work, groups, inputs, device, stream);
      break;
    case Dtype::kHalf:
      run<Half>(work, groups, inputs, device, stream);
      break;
    case Dtype::kBFloat16:
      run<BFloat16>(work, groups, inputs, device, stream);
      break;
  }
  return status == cudaStreamCaptureStatusActive;
}

}  // namespace freezeout
