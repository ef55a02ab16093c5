// What a step of an optimizer checks and gathers: groups, parameters, their states and where they lie.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "prepared_group.h"
#include "tensor_batch.h"
#include "torch_tensor.h"

namespace freezeout {

// Prepared once, and compared at every step with the optimizer's own lists and dicts before anything is written.
//
// A PreparedStep keeps no tensor alive from step to step, so that a state that was popped frees its memory at once.
//
// Threads: a step first runs all that may run Python code and so let other threads in, and takes references. Then it
// reads every address and updates, with the GIL held throughout: nothing can be freed meanwhile.
class PreparedStep {
 public:
  // groups, state: the optimizer's.
  // native: for each group, for each parameter, whether it is updated here; empty for a group that is left alone, which
  // may be no dict then.
  // schedule: None, or for each group (peak, milestone, warmup), which replace its "lr".
  PreparedStep(std::shared_ptr<TensorReader> reader, int formula, const pybind11::list& groups,
               const pybind11::dict& state, const pybind11::list& native, const pybind11::object& schedule);

  // One step. inputs: None, or for each batch (schedule_step, grad_scale, found_inf), each a tensor of one element on
  // the batch's device or None.
  // Returns a string that says what has changed so that the step must be prepared anew, and no tensor is written then.
  // Else (leftover, whether a graph captures the update), leftover being None or [(group, position)] of parameters
  // whose gradients have no address or another layout. The versions of all parameters with a gradient are advanced.
  pybind11::object run(const pybind11::object& groups, const pybind11::object& state, int num_threads,
                       const pybind11::object& inputs);

  const std::vector<std::shared_ptr<TensorBatch>>& batches() const { return batches_; }

 private:
  struct Tensor {
    PyObject* param;
    PyObject* states[kMaxStates];  // null where unused, and before the first gradient
    PyObject* step;
    bool lacks_state;
    bool is_single;  // one element
    int position;    // in its group
    std::size_t batch;
    std::size_t slot;       // in the batch's work
    TorchTensor layout;     // the parameter's
    pybind11::object grad;  // of the step under way
  };
  struct Group {
    PreparedGroup prepared;
    std::vector<PyObject*> params;
    std::vector<int> tensor_of;  // -1: not updated here
    bool is_native;              // some parameter is
    unsigned states;             // a bit for each state that the formula uses
    pybind11::object list;       // of parameters, held during a step
  };
  // state[param], an item at a time, in the dict's order.
  struct StateItem {
    PyObject* param;
    PyObject* values;
    PyObject* key;  // null: the dict is empty
    PyObject* value;
  };
  // The time from the begin of a step to its end, however that comes.
  struct Turn {
    explicit Turn(PreparedStep& step);
    ~Turn();
    PreparedStep& step;
  };

  void add_group(const pybind11::object& dict, const pybind11::list& native, int index);
  void add_states(const pybind11::dict& state);
  void add_tensor(Group& group, int index, int position);
  std::size_t batch_of(const dlpack::Tensor& view, const std::string& where);
  PyObject* state_of(PyObject* param, const char* name) const;  // borrowed; null if there is none

  // Each returns null, or what has changed.
  const char* read(const pybind11::list& groups, pybind11::list& updated);
  const char* read_gradients(Group& group, int index, pybind11::list& updated);
  const char* compare_state(PyObject* state) const;
  const char* locate(PyObject* state);
  const char* locate_tensor(Tensor& tensor, int group);
  // False if the tensor in `inputs` has another dtype or device than asked for.
  bool locate_inputs(const pybind11::object& inputs, std::vector<SharedInputs>& located);

  std::shared_ptr<TensorReader> reader_;
  Formula formula_;
  std::vector<Group> groups_;
  std::vector<ParamGroup> schedule_;
  std::vector<ParamGroup> read_groups_;
  std::vector<Tensor> tensors_;
  std::vector<StateItem> state_;
  std::vector<std::shared_ptr<TensorBatch>> batches_;
  std::vector<std::pair<int, int>> leftover_;
  TorchTensor scratch_;
  bool is_first_ = true;
  bool is_running_ = false;
};

}  // namespace freezeout
