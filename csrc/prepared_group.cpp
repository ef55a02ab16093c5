// Which keys of a param group each formula reads, and the reading of their values.
#include "prepared_group.h"

namespace py = pybind11;

namespace freezeout {

namespace {

enum Kind : int { kIgnored, kParams, kFlag, kNumber, kRate, kPair };
enum Number : int { kLr, kDecay, kMomentumNumber, kDampening, kEpsNumber, kFirstBeta, kSecondBeta, kNumbers };
enum Flag : int {
  kFrozen,
  kCapturable,
  kDifferentiable,
  kMaximizeFlag,
  kNesterovFlag,
  kAmsgradFlag,
  kDecoupled,
  kFlags
};

constexpr unsigned kOfSgd = 1u << static_cast<int>(Formula::kSgd);
constexpr unsigned kOfAdamW = 1u << static_cast<int>(Formula::kAdamW);

struct KnownKey {
  const char* name;
  Kind kind;
  int slot;  // a Number or a Flag
  unsigned formulas;
};
constexpr KnownKey kKnownKeys[] = {{"params", kParams, 0, kOfSgd | kOfAdamW},
                                   {"lr", kRate, kLr, kOfSgd | kOfAdamW},
                                   {"weight_decay", kNumber, kDecay, kOfSgd | kOfAdamW},
                                   {"maximize", kFlag, kMaximizeFlag, kOfSgd | kOfAdamW},
                                   {"frozen", kFlag, kFrozen, kOfSgd | kOfAdamW},
                                   {"capturable", kFlag, kCapturable, kOfSgd | kOfAdamW},
                                   {"differentiable", kFlag, kDifferentiable, kOfSgd | kOfAdamW},
                                   {"momentum", kNumber, kMomentumNumber, kOfSgd},
                                   {"dampening", kNumber, kDampening, kOfSgd},
                                   {"nesterov", kFlag, kNesterovFlag, kOfSgd},
                                   {"betas", kPair, kFirstBeta, kOfAdamW},
                                   {"eps", kNumber, kEpsNumber, kOfAdamW},
                                   {"amsgrad", kFlag, kAmsgradFlag, kOfAdamW},
                                   {"decoupled_weight_decay", kFlag, kDecoupled, kOfAdamW}};

// A number or flag of another type runs code of its own, which may let other threads in. So references are held.
double as_number(PyObject* object) {
  if (PyFloat_CheckExact(object)) return PyFloat_AS_DOUBLE(object);
  const py::object held = py::reinterpret_borrow<py::object>(object);
  const double value = PyLong_CheckExact(object) ? PyLong_AsDouble(object) : PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

bool as_bool(PyObject* object) {
  if (object == Py_False) return false;
  if (object == Py_True) return true;
  const py::object held = py::reinterpret_borrow<py::object>(object);
  const int value = PyObject_IsTrue(object);
  if (value < 0) throw py::error_already_set();
  return value != 0;
}

// Reads the two numbers of a pair. Returns false where `value` is no pair of numbers.
bool as_pair(PyObject* object, double* pair) {
  const py::object held = py::reinterpret_borrow<py::object>(object);
  const bool is_tuple = PyTuple_CheckExact(object);
  if ((is_tuple ? PyTuple_GET_SIZE(object) : PySequence_Check(object) ? PySequence_Size(object) : 0) != 2) {
    PyErr_Clear();
    return false;
  }
  for (int i = 0; i < 2; ++i) {
    const py::object item = is_tuple ? py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(object, i))
                                     : py::reinterpret_steal<py::object>(PySequence_GetItem(object, i));
    if (!item) throw py::error_already_set();
    pair[i] = as_number(item.ptr());
  }
  return true;
}

void set_sgd(const double (&numbers)[kNumbers], const bool (&flags)[kFlags], ParamGroup& group) {
  group.coefficients[Sgd::kMomentumOf] = numbers[kMomentumNumber];
  group.coefficients[Sgd::kUndamped] = 1 - numbers[kDampening];
  if (numbers[kMomentumNumber] == 0) return;
  group.options |= Sgd::kMomentum | (flags[kNesterovFlag] ? Sgd::kNesterov : 0u);
}

void set_adamw(const double (&numbers)[kNumbers], const bool (&flags)[kFlags], ParamGroup& group) {
  group.coefficients[AdamW::kBeta1] = numbers[kFirstBeta];
  group.coefficients[AdamW::kBeta2] = numbers[kSecondBeta];
  group.coefficients[AdamW::kEps] = numbers[kEpsNumber];
  if (flags[kAmsgradFlag]) group.options |= AdamW::kAmsgrad;
  if (numbers[kDecay] != 0 && !flags[kDecoupled]) group.options |= AdamW::kCoupled;
}

}  // namespace

PreparedGroup::PreparedGroup(Formula formula, PyObject* dict) : formula_(formula), dict_(dict) {
  PyObject *name, *value;
  for (Py_ssize_t i = 0; PyDict_Check(dict) && PyDict_Next(dict, &i, &name, &value);) {
    const KnownKey* found = nullptr;
    for (const KnownKey& known : kKnownKeys) {
      const bool is_read = known.formulas >> static_cast<int>(formula) & 1;
      if (is_read && PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, known.name) == 0) found = &known;
    }
    keys_.push_back(
        {py::reinterpret_borrow<py::object>(name), found ? found->kind : kIgnored, found ? found->slot : 0});
    if (!found) continue;
    if (found->kind == kParams) list_ = value;
    if (found->kind == kFlag && found->slot == kFrozen) is_frozen_ = as_bool(value);
    if (found->kind == kFlag && found->slot == kCapturable) is_capturable_ = as_bool(value);
  }
  is_active_ = !is_frozen_ && list_ && PyList_Check(list_);
}

const char* PreparedGroup::read(const TensorReader& reader, bool is_scheduled, ParamGroup* hyperparameters,
                                py::object& list) const {
  double numbers[kNumbers] = {};
  bool flags[kFlags] = {};
  bool is_float_rate = false;
  std::size_t count = 0;
  PyObject *name, *value;
  for (Py_ssize_t i = 0; PyDict_Next(dict_, &i, &name, &value); ++count) {
    if (count == keys_.size() || keys_[count].name.ptr() != name) return "a group's keys changed";
    const Key& key = keys_[count];
    if (!hyperparameters && key.kind != kParams && (key.kind != kFlag || key.slot != kFrozen)) continue;
    switch (key.kind) {
      case kParams:
        if (value != list_) return "a group's list of parameters was replaced";
        list = py::reinterpret_borrow<py::object>(value);
        break;
      case kFlag:
        flags[key.slot] = as_bool(value);
        break;
      case kNumber:
        numbers[key.slot] = as_number(value);
        break;
      case kRate:
        if (!PyFloat_CheckExact(value) && reader.is_tensor(value)) {
          const auto held = py::reinterpret_borrow<py::object>(value);
          if (held.attr("requires_grad").cast<bool>()) return "a learning rate requires grad";
          is_float_rate = held.attr("itemsize").cast<int>() == 4 && !is_scheduled;
        }
        numbers[key.slot] = as_number(value);
        break;
      case kPair:
        if (!as_pair(value, numbers + key.slot)) return "a group's betas are no pair";
        break;
    }
  }
  if (count != keys_.size()) return "a group's keys changed";
  if (flags[kFrozen] != is_frozen_) return "a group was frozen or thawed";
  if (!hyperparameters) return nullptr;
  if (flags[kCapturable] != is_capturable_) return "a group became capturable, or is so no longer";
  if (flags[kDifferentiable]) return "a group became differentiable";

  ParamGroup& group = *hyperparameters;
  group.lr = numbers[kLr];
  group.weight_decay = numbers[kDecay];
  group.options = (numbers[kDecay] != 0 ? kWeightDecay : 0u) | (flags[kMaximizeFlag] ? kMaximize : 0u);
  if (is_float_rate) group.options |= kFloatRate;
  formula_ == Formula::kSgd ? set_sgd(numbers, flags, group) : set_adamw(numbers, flags, group);
  return nullptr;
}

}  // namespace freezeout
