// fused_update_cpu: one parallel region over the concatenated elements of all tensors, split evenly by count.
#include <algorithm>
#include <stdexcept>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "fused_update.h"
#include "fused_update_loop.h"

namespace freezeout {

namespace {

// With fewer elements a thread, waking the thread costs more than it saves.
constexpr std::int64_t kMinPerThread = 16384;
// The same code once for each instruction set. Without FMA in hardware, std::fma is a library call: slow, but correct.
struct Baseline {
  static constexpr const char* kName = "baseline";
  static bool is_supported() { return true; }
  template <class F, class T>
  static void run(const Slice<T>& slice, const RatesOf<F, T>& rates, unsigned options, float inverse_scale) {
    update<F, T>(slice, rates, options, inverse_scale);
  }
};
#if defined(__x86_64__)
struct V3 {
  static constexpr const char* kName = "x86-64-v3";
  static bool is_supported() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  }
  template <class F, class T>
  __attribute__((target("avx2,fma,bmi2"))) static void run(const Slice<T>& slice, const RatesOf<F, T>& rates,
                                                           unsigned options, float inverse_scale) {
    update<F, T>(slice, rates, options, inverse_scale);
  }
};
struct V4 {
  static constexpr const char* kName = "x86-64-v4";
  static bool is_supported() {
    return V3::is_supported() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
  template <class F, class T>
  __attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi2"))) static void run(
      const Slice<T>& slice, const RatesOf<F, T>& rates, unsigned options, float inverse_scale) {
    update<F, T>(slice, rates, options, inverse_scale);
  }
};
#define FREEZEOUT_ISAS V4, V3, Baseline
#else
#define FREEZEOUT_ISAS Baseline
#endif

struct Isa {
  const char* name;
  bool (*is_supported)();
};

template <class... I>
struct Isas {
  static constexpr Isa kAll[] = {{I::kName, I::is_supported}...};

  template <class F, class T>
  static auto run_of(int chosen) {
    using Run = void (*)(const Slice<T>&, const RatesOf<F, T>&, unsigned, float);
    static constexpr Run kRuns[] = {&I::template run<F, T>...};
    return kRuns[chosen];
  }
};
using AllIsas = Isas<FREEZEOUT_ISAS>;

int& chosen_isa() {
  static int chosen = static_cast<int>(std::find_if(std::begin(AllIsas::kAll), std::end(AllIsas::kAll),
                                                    [](const Isa& isa) { return isa.is_supported(); }) -
                                       std::begin(AllIsas::kAll));
  return chosen;
}

// Advances the counters. Returns the rates of each tensor that is updated.
template <class F, class T>
std::vector<RatesOf<F, T>> rates_of(const Batch& batch, const SharedInputs& inputs) {
  std::vector<double> lrs;
  lrs.reserve(batch.groups.size());
  for (const ParamGroup& group : batch.groups) {
    lrs.push_back(inputs.schedule_step ? scheduled_rate(group, static_cast<double>(*inputs.schedule_step)) : group.lr);
  }
  std::vector<RatesOf<F, T>> rates(batch.work.size());
  const TensorWork* last = nullptr;
  float last_step = 0;
  for (std::size_t i = 0; i < batch.work.size(); ++i) {
    const TensorWork& tensor = batch.work[i];
    if (!tensor.grad) continue;
    float step = 0;
    if constexpr (F::kCounts) step = *tensor.step += 1;
    // Powers cost time, and the tensors of a group are mostly at the same step.
    if (last && last->group == tensor.group && last_step == step) {
      rates[i] = rates[last - batch.work.data()];
    } else {
      rates[i] = F::template rates<typename Compute<T>::type>(batch.groups[tensor.group], lrs[tensor.group], step);
    }
    last = &tensor;
    last_step = step;
  }
  return rates;
}

template <class F, class T>
void run(const Batch& batch, const SharedInputs& inputs, int num_threads) {
  const std::vector<TensorWork>& work = batch.work;
  const auto update_one = AllIsas::run_of<F, T>(chosen_isa());
  const std::vector<RatesOf<F, T>> rates = rates_of<F, T>(batch, inputs);
  const float inverse_scale = inputs.grad_scale ? inverse_of_scale(*inputs.grad_scale) : 1.0f;
  std::vector<std::int64_t> begins(work.size() + 1, 0);
  for (std::size_t i = 0; i < work.size(); ++i) begins[i + 1] = begins[i] + (work[i].grad ? work[i].size : 0);
  const std::int64_t total = begins.back();

  // Elements [begin, end) of the concatenation of all tensors.
  const auto update_range = [&](std::int64_t begin, std::int64_t end) {
    std::size_t i = std::upper_bound(begins.begin(), begins.end(), begin) - begins.begin() - 1;
    for (; i < work.size() && begins[i] < end; ++i) {
      if (begins[i] == begins[i + 1]) continue;
      const std::int64_t from = std::max(begin - begins[i], std::int64_t{0});
      const std::int64_t to = std::min(end - begins[i], work[i].size);
      update_one(slice_of<T>(work[i], from, to - from), rates[i],
                 static_cast<unsigned>(batch.groups[work[i].group].options % kOptionSets), inverse_scale);
    }
  };

  const std::int64_t useful = std::max<std::int64_t>(total / kMinPerThread, 1);
  const int threads = static_cast<int>(std::min<std::int64_t>(std::max(num_threads, 1), useful));
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const std::int64_t count = omp_get_num_threads();
      const std::int64_t index = omp_get_thread_num();
      update_range(total * index / count, total * (index + 1) / count);
    }
    return;
  }
#endif
  update_range(0, total);
}

}  // namespace

void fused_update_cpu(const Batch& batch, const SharedInputs& inputs, int num_threads) {
  if (inputs.found_inf && *inputs.found_inf != 0.0f) return;
  visit_types(batch, [&](auto formula, auto element) {
    run<decltype(formula), decltype(element)>(batch, inputs, num_threads);
  });
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : AllIsas::kAll) {
    if (isa.is_supported()) names.push_back(isa.name);
  }
  return names;
}

std::string cpu_isa() { return AllIsas::kAll[chosen_isa()].name; }

void use_cpu_isa(const std::string& name) {
  for (const Isa& isa : AllIsas::kAll) {
    if (name == isa.name && isa.is_supported()) {
      chosen_isa() = static_cast<int>(&isa - AllIsas::kAll);
      return;
    }
  }
  throw std::invalid_argument("isa must be one of cpu_isas(), got '" + name + "'");
}

}  // namespace freezeout
