// A param group of an optimizer. Each step reads its hyperparameters and compares it with what was prepared.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "fused_update.h"
#include "torch_tensor.h"

namespace freezeout {

class PreparedGroup {
 public:
  // dict: one of the optimizer's param_groups. A group that is no dict is never active.
  PreparedGroup(Formula formula, PyObject* dict);

  PyObject* dict() const { return dict_; }
  // Whether the group is a dict, is not frozen, and holds its parameters in a list.
  bool is_active() const { return is_active_; }
  // The list of parameters: a borrowed reference, null where there is none.
  PyObject* list() const { return list_; }

  // Reads the group. Returns null, or what has changed.
  // hyperparameters: takes the group's numbers. Null: only "params" and "frozen" are read.
  // list: becomes a reference to the list of parameters.
  const char* read(const TensorReader& reader, bool is_scheduled, ParamGroup* hyperparameters,
                   pybind11::object& list) const;

 private:
  struct Key {
    pybind11::object name;
    int kind;
    int slot;
  };

  Formula formula_;
  PyObject* dict_;
  PyObject* list_ = nullptr;
  std::vector<Key> keys_;  // in the dict's order
  bool is_frozen_ = false;
  bool is_capturable_ = false;
  bool is_active_ = false;
};

}  // namespace freezeout
