// The optimizer's state, {parameter: {name: value}}, as it was when a step was prepared.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace freezeout {

// Holds addresses, no references: a state that is popped frees its memory at once.
class PreparedState {
 public:
  PreparedState() = default;
  explicit PreparedState(PyObject* dict);

  // The value of state[param][name]: a borrowed reference, null where there is none or None.
  PyObject* value_of(PyObject* param, const char* name) const;
  // Returns null where `dict` holds the same objects in the same order, else what has changed.
  const char* compare(PyObject* dict) const;

 private:
  struct Item {
    PyObject* param;
    PyObject* values;
    PyObject* key;  // null: the dict `values` is empty
    PyObject* value;
  };

  // Calls visit(Item) for each item of the state until visit returns false. Returns whether all were visited.
  template <class Visit>
  static bool visit_items(PyObject* dict, const Visit& visit);

  std::vector<Item> items_;
};

}  // namespace freezeout
