// A param group of an optimizer, looked at in each step: is it still as it was prepared, and its hyperparameters.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "fused_update.h"
#include "torch_tensor.h"

namespace freezeout {

class PreparedGroup {
 public:
  // `dict` is one of the optimizer's param_groups. What is no dict is never active.
  PreparedGroup(Formula formula, PyObject* dict);

  PyObject* dict() const { return dict_; }
  // Whether this is a dict with a list of parameters that is not frozen.
  bool is_active() const { return is_active_; }
  // The list of parameters; borrowed, and null where there is none.
  PyObject* list() const { return list_; }

  // Returns null, or what has changed.
  // hyperparameters: where they go; null: only "params" and "frozen" are looked at.
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
