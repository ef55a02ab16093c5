// The tensor table, and fused_sgd_cuda's blocks on the host.
#include "fused_sgd_chunk.h"

namespace freezeout {

std::vector<TensorEntry> make_tensor_table(const std::vector<TensorWork>& work) {
  std::vector<TensorEntry> table;
  table.reserve(work.size());
  std::uint32_t chunk_end = 0;
  for (const TensorWork& tensor : work) {
    chunk_end += chunks_of(tensor.size);
    table.push_back({tensor.param, tensor.buffer, tensor.size, chunk_end, tensor.group});
  }
  return table;
}

namespace {

template <class T>
int run(const std::vector<TensorWork>& work, const std::vector<GroupRates>& groups, const DeviceInputs& inputs) {
  return for_each_launch(work, groups, inputs, [](const auto& arguments, std::uint32_t blocks) {
    for (std::uint32_t block = 0; block < blocks; ++block) {
      const int tensor = tensor_of_block(arguments, block);
      if (tensor < 0) continue;
      const double lr = rate_of_group(arguments, group_of_tensor(arguments, tensor));
      for (int thread = 0; thread < kThreads; ++thread) update_block<T>(arguments, block, tensor, lr, thread);
    }
  });
}

}  // namespace

int fused_sgd_emulated(Dtype dtype, const std::vector<TensorWork>& work, const std::vector<GroupRates>& groups,
                       const DeviceInputs& inputs) {
  switch (dtype) {
    case Dtype::kFloat:
      return run<float>(work, groups, inputs);
    case Dtype::kDouble:
      return run<double>(work, groups, inputs);
    case Dtype::kHalf:
      return run<Half>(work, groups, inputs);
    case Dtype::kBFloat16:
      return run<BFloat16>(work, groups, inputs);
  }
  return 0;
}

}  // namespace freezeout
