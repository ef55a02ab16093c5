// Tensors of one dtype on one device, and the update of them all.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <tuple>
#include <vector>

#include "fused_update.h"

namespace freezeout {

struct TensorBatch {
  Batch batch;
  int device_type;  // DLPack's
  int device_index;
  // CUDA only: where the bytes of table() lie on the device.
  std::uintptr_t table_address = 0;
  // CUDA only: the stream to launch on. torch's allocator knows that this stream reads the table.
  std::uintptr_t stream = 0;

  // The TensorEntry table, to be copied to the device.
  pybind11::bytes table() const;
  // Updates all tensors. Returns whether the stream is being captured into a graph.
  // num_threads: on the CPU.
  // The GIL is held throughout, so that no other Python thread can free a tensor meanwhile.
  bool run(const SharedInputs& inputs, int num_threads) const;

  void set_table(std::uintptr_t address, std::uintptr_t on_stream) {
    table_address = address;
    stream = on_stream;
  }
  // Throws std::invalid_argument where tensors that are written share memory with one another or with gradients.
  void check_memory() const;
  // Throws std::invalid_argument where gradients share memory: a scale would divide them twice.
  void check_scaled() const;
  // As `run`, with the SharedInputs as addresses, 0 for null.
  bool run_addresses(int num_threads, std::uintptr_t schedule_step, std::uintptr_t grad_scale,
                     std::uintptr_t found_inf) const;
};

// The formula with this number. Throws std::invalid_argument where there is none.
Formula checked_formula(int formula);

// A bit for each state that the formula uses.
unsigned states_of(Formula formula, std::uint64_t options);

// A TensorWork: (param, states, grad, step, size, group), pointers as addresses.
using WorkTuple = std::tuple<std::uintptr_t, std::array<std::uintptr_t, kMaxStates>, std::uintptr_t, std::uintptr_t,
                             std::int64_t, std::uint32_t>;
// A ParamGroup: (lr, milestone, warmup, weight_decay, coefficients, options).
using GroupTuple = std::tuple<double, double, double, double, std::array<double, 3>, std::uint64_t>;

// Throws std::invalid_argument where the tuples do not fit each other or the formula.
TensorBatch make_tensor_batch(int formula, int dtype, int device_type, int device_index,
                              const std::vector<WorkTuple>& work, const std::vector<GroupTuple>& groups);

}  // namespace freezeout
