// What FusedSGD prepares once and checks at every step: groups, parameters, momentum buffers and where they lie.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <vector>

#include "tensor_facts.h"
#include "update.h"

namespace freezeout {

// Holds no tensor alive: every object is reached anew through the optimizer's own lists and dicts, and every address is
// compared, before anything is written. So a popped state frees its memory at once.
class Plan {
 public:
  // groups, state: the optimizer's. native: for each group a list with, for each parameter, whether it is planned.
  // fresh: {parameter: new momentum buffer}, not yet in the state and not yet written.
  // schedule: None, or for each group (peak, milestone, warmup), which replace its "lr".
  Plan(std::shared_ptr<TensorReader> reader, pybind11::list groups, pybind11::dict state, pybind11::list native,
       pybind11::dict fresh, pybind11::object schedule);

  // Reads rates and gradients into the updates. Null when ready, else what has changed so that a new plan is needed.
  const char* gather(pybind11::list groups, pybind11::dict state);

  // gather and all updates in one call, where they are the CPU's alone. Returns updated(); None where something has
  // changed or is left over: then nothing was written.
  pybind11::object step_cpu(pybind11::list groups, pybind11::dict state, int num_threads);

  // The same where they are CUDA's alone. tables: for each update its table's address, and the stream that torch's
  // allocator knows to use it. step, grad_scale, found_inf: tensors of one element, or None. Returns (updated(),
  // whether a graph captures it); None also where another stream is torch's current one, or a scalar is on another
  // device.
  pybind11::object step_cuda(pybind11::list groups, pybind11::dict state, const pybind11::list& tables,
                             pybind11::handle step, pybind11::handle grad_scale, pybind11::handle found_inf);

  const std::vector<std::shared_ptr<Update>>& updates() const { return updates_; }
  // Parameters that the gathered step updates.
  pybind11::list updated() const;
  // (group, position) of parameters with a gradient that has no address or another layout.
  const std::vector<std::pair<int, int>>& leftover() const { return leftover_; }
  // Lets go of the gathered gradients.
  void release() { grads_.clear(); }

 private:
  enum Role {
    kIgnored,
    kParams,
    kLr,
    kMomentumKey,
    kDampeningKey,
    kDecayKey,
    kNesterovKey,
    kMaximizeKey,
    kDifferentiableKey,
    kFrozenKey
  };
  struct Tensor {
    PyObject* param;
    PyObject* buffer;  // null without momentum, and before the first gradient
    bool fresh;
    int position;  // in its group
    std::size_t update;
    std::size_t slot;   // in the update's work
    TensorFacts facts;  // shape and strides are in `owned`
  };
  struct Group {
    PyObject* dict;
    std::vector<pybind11::object> keys;
    std::vector<Role> roles;
    PyObject* params_list;
    std::vector<PyObject*> params;
    std::vector<int> tensor_of;  // -1: not planned
    bool native;                 // some parameter is planned
    bool frozen;
    bool momentum;
  };
  // release() at the end of a scope, however that is left.
  struct Release {
    explicit Release(Plan& plan) : plan(plan) {}
    ~Release() { plan.release(); }
    Plan& plan;
  };
  struct StateEntry {
    PyObject* param;
    PyObject* values;
    PyObject* buffer;  // null if it has none
  };

  void add_group(PyObject* dict, const pybind11::list& native, const pybind11::dict& fresh, int index);
  void add_tensor(PyObject* param, bool momentum, const pybind11::dict& fresh, int group, int position);
  static bool same_layout(const Tensor& tensor, const TensorFacts& facts);

  // Each returns null, or what has changed.
  const char* check_state(PyObject* state) const;
  const char* read_group(const Group& group, PyObject* dict, GroupRates* rates) const;  // null: rates are not read
  const char* gather_group(Group& group, PyObject* dict, int index);
  const char* gather_tensor(Tensor& tensor, int group);
  // The address of a tensor of one element, 0 for None; false if it has another dtype or device than asked for.
  bool read_scalar(pybind11::handle object, dlpack::TypeCode code, int bits, const Update& update,
                   std::uintptr_t& address);

  std::shared_ptr<TensorReader> reader_;
  std::vector<Group> groups_;
  std::vector<GroupRates> schedule_;
  std::vector<GroupRates> rates_;
  std::vector<Tensor> tensors_;
  std::vector<StateEntry> state_;
  std::vector<std::shared_ptr<Update>> updates_;
  std::vector<pybind11::object> grads_;
  std::vector<PyObject*> updated_;
  std::vector<std::pair<int, int>> leftover_;
  TensorFacts scratch_;
  bool first_gather_ = true;
};

void bind_plan(pybind11::module_& module);

}  // namespace freezeout
