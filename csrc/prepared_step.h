// What a step of an optimizer checks and gathers: groups, parameters, their states and where they lie.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "memory_spans.h"
#include "prepared_group.h"
#include "prepared_state.h"
#include "tensor_batch.h"
#include "torch_tensor.h"

namespace freezeout {

// A PreparedStep is prepared once. Every step compares it with the optimizer's own lists and dicts before anything is
// written.
//
// A PreparedStep keeps no tensor alive from step to step. So a state that is popped frees its memory at once.
//
// Threads: a step has two parts. The first part runs everything that may run Python code, and takes references. Other
// threads may run meanwhile. The second part reads every address and updates, with the GIL held throughout. So nothing
// can be freed meanwhile.
class PreparedStep {
 public:
  // groups: the optimizer's param_groups.
  // state: the optimizer's state.
  // native: for each group a list that says, for each parameter, whether the compiled update takes the parameter. Empty
  //     for a group that is left alone. Such a group need not be a dict.
  // schedule: None, or for each group (peak, milestone, warmup), which take the place of its "lr".
  PreparedStep(std::shared_ptr<TensorReader> reader, int formula, const pybind11::list& groups,
               const pybind11::dict& state, const pybind11::list& native, const pybind11::object& schedule);

  // One step.
  // groups, state: as above.
  // num_threads: on the CPU.
  // inputs: None, or for each batch (schedule_step, grad_scale, found_inf). Each of the three is None or a tensor of
  //     one element on the batch's device.
  //
  // Returns a string where something has changed, so that the step must be prepared anew. Then no tensor was written.
  // Else returns (leftover, whether a graph captures the update).
  // leftover: None, or (group, position) of each parameter whose gradient the compiled update does not take: a gradient
  //     without an address, with another layout, or a negative view.
  // The versions of all parameters with a gradient are advanced.
  pybind11::object run(const pybind11::object& groups, const pybind11::object& state, int num_threads,
                       const pybind11::object& inputs);

  const std::vector<std::shared_ptr<TensorBatch>>& batches() const { return batches_; }

 private:
  // A tensor's Python object, and where the tensor's shape lay when it was read: a step asks for both ahead of time.
  struct Seen {
    PyObject* object;  // null for a state that is not used, or not made yet
    const std::int64_t* shape;
  };
  // A tensor of the compiled update: what every step looks at.
  struct Tensor {
    Seen param;
    Seen states[kMaxStates];
    Seen step;
    TensorWork* work;       // in its batch
    dlpack::Tensor layout;  // the parameter's; shape and strides lie in layouts_
    bool lacks_state;
    bool is_single;  // one element
  };
  struct Gradient {
    Seen seen;
    bool is_held;          // the step under way holds a reference
    const void* apart_at;  // an address at which the gradient shares no memory with what is written
  };
  struct Param {
    PyObject* object;
    int tensor;  // in tensors_; -1 where torch's loop updates the parameter
  };
  struct Group {
    PreparedGroup prepared;
    std::vector<Param> params;
    bool is_native;         // whether some parameter has a tensor
    std::uint64_t options;  // the formula's
    pybind11::object list;  // of parameters, held during a step
  };
  // Marks a step as running, from its begin to its end, also where the step throws.
  struct Turn {
    explicit Turn(PreparedStep& step);
    ~Turn();
    PreparedStep& step;
  };

  void add_group(const pybind11::object& dict, const pybind11::list& native, int index);
  void add_tensor(Group& group, int index, int position);
  Batch& batch_of(const dlpack::Tensor& view, const std::string& where);

  // Asks for what reading a tensor looks at.
  static void prefetch(const Seen& seen);
  // Reads a tensor into scratch_. Returns whether its layout is that of `tensor`.
  bool read_alike(Seen& seen, const Tensor& tensor);
  // Each returns null, or what has changed.
  const char* read(const pybind11::list& groups);
  const char* read_gradients(const Group& group);
  const char* locate(PyObject* state);
  const char* locate_tensor(std::size_t index);
  // The parameters that are updated.
  pybind11::list updated() const;
  // False if the tensor in `inputs` has another dtype or device than asked for.
  bool locate_inputs(const pybind11::object& inputs, std::vector<SharedInputs>& located);

  std::shared_ptr<TensorReader> reader_;
  Formula formula_;
  std::vector<Group> groups_;
  std::vector<ParamGroup> schedule_;
  std::vector<ParamGroup> read_groups_;
  PreparedState state_;
  std::vector<std::shared_ptr<TensorBatch>> batches_;
  std::size_t num_tensors_ = 0;
  std::vector<Tensor> tensors_;
  std::vector<std::int64_t> layouts_;        // shape and strides of each tensor
  std::vector<std::pair<int, int>> places_;  // group and position of each tensor
  std::vector<Gradient> grads_;              // of each tensor
  MemorySpans written_;
  std::vector<std::pair<int, int>> leftover_;
  TorchTensor scratch_;
  bool is_first_ = true;
  bool is_running_ = false;
};

}  // namespace freezeout
