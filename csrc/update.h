// Tensors of one dtype on one device, and what runs over them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "fused_sgd.h"

namespace freezeout {

struct Update {
  Dtype dtype;
  int device_type;  // DLPack's
  int device_index;
  std::vector<TensorWork> work;
  std::vector<GroupRates> groups;

  // The bytes of the TensorEntry table, for the device.
  pybind11::bytes table() const;
  void run_cpu(int num_threads, double step, float inverse_scale) const;
  // Addresses as in DeviceInputs, 0 for null. Returns whether the stream is being captured.
  bool run_cuda(std::uintptr_t table, std::uintptr_t step, std::uintptr_t grad_scale, std::uintptr_t found_inf,
                std::uintptr_t stream) const;
  // The same on the host, over a table there, 0 for a new one. Returns the number of launches.
  int run_emulated(std::uintptr_t table, std::uintptr_t step, std::uintptr_t grad_scale,
                   std::uintptr_t found_inf) const;
};

void bind_update(pybind11::module_& module);

}  // namespace freezeout
