// fused_update_cuda without CUDA: the kernel's blocks run one after another on the host, on host addresses.
//
// With a recorder set, a launch is its arguments, copied, and a number: the recorder says whether to run it now or keep
// it for freezeout_run, as a captured graph does.
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>

#include "../csrc/build_info_cuda.h"
#include "../csrc/fused_update_block.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace freezeout {

namespace {

struct Launch {
  Batch batch;
  TensorEntry* table;
  SharedInputs inputs;
};
// What the recorder answers.
enum Answer : int { kRunNow = 0, kRecorded = 1, kNoDevice = 2, kFails = 3 };

std::map<std::int64_t, Launch> recorded;
std::int64_t next_number = 1;
int (*recorder)(std::int64_t number, int device, std::uintptr_t stream) = nullptr;
int launches = 0;

template <class F, class T>
void run(const Launch& launch) {
  launches =
      for_each_launch(launch.batch, launch.table, launch.inputs, [](const auto& arguments, std::uint32_t blocks) {
        for (std::uint32_t block = 0; block < blocks; ++block) {
          const int tensor = tensor_of_block(arguments, block);
          if (tensor < 0) continue;
          const RatesOf<F, T> rates = rates_of_block<F, T>(arguments, tensor);
          for (int thread = 0; thread < kThreads; ++thread) update_block<F, T>(arguments, block, tensor, rates, thread);
        }
      });
}

void run(const Launch& launch) {
  visit_types(launch.batch, [&](auto formula, auto element) { run<decltype(formula), decltype(element)>(launch); });
}

}  // namespace

bool fused_update_cuda(const Batch& batch, TensorEntry* table, const SharedInputs& inputs, int device,
                       std::uintptr_t stream) {
  const Launch launch{batch, table, inputs};
  const std::int64_t number = next_number++;
  const int answer = recorder ? recorder(number, device, stream) : kRunNow;
  if (answer == kNoDevice) {
    throw std::runtime_error("fused_update_cuda: cudaSetDevice failed on cuda:" + std::to_string(device) +
                             ": cudaErrorInvalidDevice, no such device");
  }
  if (answer == kFails) throw std::runtime_error("fused_update_cuda: no launch");
  if (answer == kRecorded) {
    recorded.emplace(number, launch);
    return true;
  }
  run(launch);
  return false;
}

std::vector<int> cuda_architectures() { return {900}; }
int cuda_compiled_version() { return 13000; }
int cuda_driver_version() { return 13000; }

}  // namespace freezeout

EXPORTED void freezeout_record(int (*recorder)(std::int64_t, int, std::uintptr_t)) { freezeout::recorder = recorder; }
EXPORTED void freezeout_run(std::int64_t number) { freezeout::run(freezeout::recorded.at(number)); }
// Kernel launches of the last update.
EXPORTED int freezeout_launches() { return freezeout::launches; }
