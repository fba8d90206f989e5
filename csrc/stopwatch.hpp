// Seconds of a scope, added to a ledger line.
#pragma once

#include <chrono>

namespace dipper {

inline double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class Timed {
 public:
  explicit Timed(double& line) : line_(line), start_(now_s()) {}
  ~Timed() { line_ += now_s() - start_; }
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  double& line_;
  double start_;
};

}  // namespace dipper
