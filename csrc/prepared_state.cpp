// PreparedState: the items of the state in the order of its dicts.
#include "prepared_state.h"

namespace freezeout {

template <class Visit>
bool PreparedState::visit_items(PyObject* dict, const Visit& visit) {
  PyObject *param, *values, *key, *value;
  for (Py_ssize_t i = 0; PyDict_Next(dict, &i, &param, &values);) {
    bool any = false;
    for (Py_ssize_t j = 0; PyDict_Check(values) && PyDict_Next(values, &j, &key, &value); any = true) {
      if (!visit(Item{param, values, key, value})) return false;
    }
    if (!any && !visit(Item{param, values, nullptr, nullptr})) return false;
  }
  return true;
}

PreparedState::PreparedState(PyObject* dict) {
  visit_items(dict, [&](const Item& item) {
    items_.push_back(item);
    return true;
  });
}

PyObject* PreparedState::value_of(PyObject* param, const char* name) const {
  for (const Item& item : items_) {
    if (item.param == param && item.key && PyUnicode_Check(item.key) &&
        PyUnicode_CompareWithASCIIString(item.key, name) == 0) {
      return item.value == Py_None ? nullptr : item.value;
    }
  }
  return nullptr;
}

const char* PreparedState::compare(PyObject* dict) const {
  constexpr std::size_t kAhead = 16;
  std::size_t count = 0;
  const bool equal = visit_items(dict, [&](const Item& item) {
    if (count == items_.size()) return false;
    if (count + kAhead < items_.size()) __builtin_prefetch(items_[count + kAhead].values);
    const Item& known = items_[count++];
    return known.param == item.param && known.values == item.values && known.key == item.key &&
           known.value == item.value;
  });
  if (!equal) return "a state was added or replaced";
  return count == items_.size() ? nullptr : "a state was removed";
}

}  // namespace freezeout
