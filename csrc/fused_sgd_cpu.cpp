// fused_sgd_cpu: one parallel region over the concatenated elements of all tensors, split evenly by count.
#include <algorithm>
#include <stdexcept>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "fused_sgd.h"
#include "half_types.h"

namespace freezeout {

namespace {

// Below this many elements a thread, waking it costs more than it saves.
constexpr std::int64_t kMinPerThread = 16384;
// Elements unscaled at a time, so that the update finds them in the first-level cache.
constexpr std::int64_t kUnscaleBlock = 1024;

template <class T>
struct Slice {
  T* param;
  T* buffer;
  T* grad;
  std::int64_t size;
};

template <unsigned kOptions, class T, class R>
FREEZEOUT_HOST_DEVICE void update_slice(const Slice<T>& slice, const Rates<R> rates) {
  T* __restrict param = slice.param;
  T* __restrict buffer = slice.buffer;
  const T* __restrict grad = slice.grad;
  constexpr bool kReads = (kOptions & kMomentum) && !(kOptions & kFirstStep);
  for (std::int64_t i = 0; i < slice.size; ++i) {
    const R b = kReads ? load(buffer[i]) : R{0};
    const Updated<R> updated = sgd_update<R>(load(param[i]), b, load(grad[i]), rates, kOptions);
    param[i] = store<T, R>(updated.param);
    if (kOptions & kMomentum) buffer[i] = store<T, R>(updated.buffer);
  }
}

// The loop with `options` known to the compiler.
template <class T, class R>
FREEZEOUT_HOST_DEVICE void update_with(unsigned options, const Slice<T>& slice, const Rates<R> rates) {
#define FREEZEOUT_CASE(o) \
  case (o):               \
    return update_slice<(o)>(slice, rates);
#define FREEZEOUT_CASES(o)                     \
  FREEZEOUT_CASE(o)                            \
  FREEZEOUT_CASE((o) | kMomentum)              \
  FREEZEOUT_CASE((o) | kMomentum | kNesterov)  \
  FREEZEOUT_CASE((o) | kMomentum | kFirstStep) \
  FREEZEOUT_CASE((o) | kMomentum | kNesterov | kFirstStep)
  switch (options) {
    FREEZEOUT_CASES(0)
    FREEZEOUT_CASES(kWeightDecay)
    FREEZEOUT_CASES(kMaximize)
    FREEZEOUT_CASES(kWeightDecay | kMaximize)
  }
#undef FREEZEOUT_CASES
#undef FREEZEOUT_CASE
}

template <class T, class R>
FREEZEOUT_HOST_DEVICE void unscale(const Slice<T>& slice, float inverse_scale) {
  for (std::int64_t i = 0; i < slice.size; ++i) {
    slice.grad[i] = store<T, R>(load(slice.grad[i]) * static_cast<R>(inverse_scale));
  }
}

template <class T>
FREEZEOUT_HOST_DEVICE void update(const Slice<T>& slice, const GroupRates& group, double lr, bool first,
                                  float inverse_scale) {
  using R = typename Compute<T>::type;
  const Rates<R> rates = rates_of<R>(group, lr);
  unsigned options = static_cast<unsigned>(group.options);
  if (!(options & kMomentum)) options &= ~kNesterov;
  if ((options & kMomentum) && first) options |= kFirstStep;
  const bool scaled = inverse_scale != 1.0f;
  const std::int64_t block_size = scaled ? kUnscaleBlock : slice.size;
  for (std::int64_t begin = 0; begin < slice.size; begin += block_size) {
    const Slice<T> block{slice.param + begin, slice.buffer ? slice.buffer + begin : nullptr, slice.grad + begin,
                         slice.size - begin < block_size ? slice.size - begin : block_size};
    if (scaled) unscale<T, R>(block, inverse_scale);
    update_with(options, block, rates);
  }
}

// The same code once for each instruction set. Without FMA in hardware std::fma is a slow, right library call.
struct Isa {
  const char* name;
  bool (*supported)();
  void (*update_float)(Slice<float>, const GroupRates&, double, bool, float);
  void (*update_double)(Slice<double>, const GroupRates&, double, bool, float);
  void (*update_half)(Slice<Half>, const GroupRates&, double, bool, float);
  void (*update_bfloat16)(Slice<BFloat16>, const GroupRates&, double, bool, float);
};

#define FREEZEOUT_UPDATE(isa, attribute, T)                                                                          \
  attribute void update_##isa(Slice<T> slice, const GroupRates& group, double lr, bool first, float inverse_scale) { \
    update<T>(slice, group, lr, first, inverse_scale);                                                               \
  }
#define FREEZEOUT_ISA(isa, attribute)      \
  FREEZEOUT_UPDATE(isa, attribute, float)  \
  FREEZEOUT_UPDATE(isa, attribute, double) \
  FREEZEOUT_UPDATE(isa, attribute, Half)   \
  FREEZEOUT_UPDATE(isa, attribute, BFloat16)

FREEZEOUT_ISA(baseline, )
#if defined(__x86_64__)
FREEZEOUT_ISA(v3, __attribute__((target("avx2,fma,bmi2"))))
FREEZEOUT_ISA(v4, __attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,bmi2"))))

bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Isa kIsas[] = {
#if defined(__x86_64__)
    {"x86-64-v4", has_v4, update_v4, update_v4, update_v4, update_v4},
    {"x86-64-v3", has_v3, update_v3, update_v3, update_v3, update_v3},
#endif
    {"baseline", [] { return true; }, update_baseline, update_baseline, update_baseline, update_baseline},
};

const Isa*& chosen_isa() {
  static const Isa* chosen =
      std::find_if(std::begin(kIsas), std::end(kIsas), [](const Isa& isa) { return isa.supported(); });
  return chosen;
}

template <class T>
auto update_of(const Isa& isa) {
  if constexpr (std::is_same_v<T, float>) return isa.update_float;
  if constexpr (std::is_same_v<T, double>) return isa.update_double;
  if constexpr (std::is_same_v<T, Half>) return isa.update_half;
  if constexpr (std::is_same_v<T, BFloat16>) return isa.update_bfloat16;
}

template <class T>
void run(const std::vector<TensorWork>& work, const std::vector<GroupRates>& groups, int num_threads, double step,
         float inverse_scale) {
  const auto update_one = update_of<T>(*chosen_isa());
  std::vector<double> lrs(groups.size());
  for (std::size_t i = 0; i < groups.size(); ++i) lrs[i] = step < 0 ? groups[i].lr : scheduled_rate(groups[i], step);
  std::vector<std::int64_t> begins(work.size() + 1, 0);
  for (std::size_t i = 0; i < work.size(); ++i) begins[i + 1] = begins[i] + (work[i].grad ? work[i].size : 0);
  const std::int64_t total = begins.back();

  // Elements [begin, end) of the concatenation of all tensors.
  const auto update_range = [&](std::int64_t begin, std::int64_t end) {
    std::size_t i = std::upper_bound(begins.begin(), begins.end(), begin) - begins.begin() - 1;
    for (; i < work.size() && begins[i] < end; ++i) {
      const TensorWork& tensor = work[i];
      if (begins[i] == begins[i + 1]) continue;
      const std::int64_t from = std::max(begin - begins[i], std::int64_t{0});
      const std::int64_t to = std::min(end - begins[i], tensor.size);
      const Slice<T> slice{static_cast<T*>(tensor.param) + from,
                           tensor.buffer ? static_cast<T*>(tensor.buffer) + from : nullptr,
                           static_cast<T*>(tensor.grad) + from, to - from};
      update_one(slice, groups[tensor.group], lrs[tensor.group], tensor.first, inverse_scale);
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

void fused_sgd_cpu(Dtype dtype, const std::vector<TensorWork>& work, const std::vector<GroupRates>& groups,
                   int num_threads, double step, float inverse_scale) {
  switch (dtype) {
    case Dtype::kFloat:
      return run<float>(work, groups, num_threads, step, inverse_scale);
    case Dtype::kDouble:
      return run<double>(work, groups, num_threads, step, inverse_scale);
    case Dtype::kHalf:
      return run<Half>(work, groups, num_threads, step, inverse_scale);
    case Dtype::kBFloat16:
      return run<BFloat16>(work, groups, num_threads, step, inverse_scale);
  }
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (isa.supported()) names.push_back(isa.name);
  }
  return names;
}

std::string cpu_isa() { return chosen_isa()->name; }

void use_cpu_isa(const std::string& name) {
  for (const Isa& isa : kIsas) {
    if (name == isa.name && isa.supported()) {
      chosen_isa() = &isa;
      return;
    }
  }
  throw std::invalid_argument("isa must be one of cpu_isas(), got '" + name + "'");
}

}  // namespace freezeout
