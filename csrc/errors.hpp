// The exceptions that leave the native core; the bindings map each to its Python namesake.
#pragma once

#include <stdexcept>

namespace dipper {

struct ConfigError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct BundleError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct FlashError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace dipper
