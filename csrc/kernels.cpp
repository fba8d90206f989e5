// Which instruction set runs: asked of the CPU once, or named by the user.
#include "kernels.hpp"

#include <algorithm>

#include "errors.hpp"

namespace dipper {

namespace scalar {
extern const Kernels table;
}
#if defined(__x86_64__) || defined(_M_X64)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels table;
}
#endif

namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> tables;
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni")) {
    tables.push_back(&avx512::table);
  }
  if (has_avx2) tables.push_back(&avx2::table);
#elif defined(__aarch64__)
  tables.push_back(&neon::table);
#endif
  tables.push_back(&scalar::table);
  return tables;
}

}  // namespace

void quantise_blocks(const Kernels& kernels, const float* x, int32_t n, int32_t group, int16_t* q,
                     BlockInputs* blocks) {
  for (int32_t first = 0; first < n; first += group)
    *blocks++ = kernels.quantise(x + first, std::min(group, n - first), q + first);
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* t : available()) names.emplace_back(t->name);
  return names;
}

KvCodes kv_codes(const std::string& name) {
  if (name == "f32") return KvCodes::kF32;
  if (name == "f16") return KvCodes::kF16;
  if (name == "int8") return KvCodes::kI8;
  throw ConfigError("kv '" + name + "' is unknown: choose f32, f16, int8");
}

const Kernels& select_kernels(const std::string& isa) {
  const std::vector<const Kernels*> tables = available();
  if (isa == "auto") return *tables.front();
  std::string names;
  for (const Kernels* t : tables) {
    if (isa == t->name) return *t;
    names += std::string(names.empty() ? "" : ", ") + t->name;
  }
  throw ConfigError("instruction set '" + isa + "' is not available on this CPU: choose auto or one of " + names);
}

}  // namespace dipper
