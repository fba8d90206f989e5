// Which instruction set runs: asked of the CPU once, or named by the user.
#include "kernels.hpp"

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
#endif

namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> tables;
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    tables.push_back(&avx512::table);
  }
  if (has_avx2) tables.push_back(&avx2::table);
#endif
  tables.push_back(&scalar::table);
  return tables;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* t : available()) names.emplace_back(t->name);
  return names;
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
