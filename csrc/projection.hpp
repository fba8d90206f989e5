// Products with matrices that lie by tiles, for one token or many.
#pragma once

#include <cstdint>
#include <span>

#include "arena.hpp"
#include "kernels.hpp"
#include "thread_pool.hpp"

namespace dipper {

// out = start + W x. With `second`, columns from `split` on (a multiple of kMaxGroup) are summed there, from zero, and
// added last: the order in which an MLP's products are summed wherever its weights lie (docs/architecture.md).
struct Projection {
  const WeightView& weight;
  const float* start;  // [n_start], null: zero
  int32_t n_start;
  float* out;  // [n_tokens, stride], stride padded to the weight's rows
  int64_t stride;
  float* second = nullptr;  // as out
  int32_t split = 0;
};

// Inputs become integers once for all matrices that they meet; threads share the rows of the outputs.
class Projector {
 public:
  Projector(const Kernels& kernels, ThreadPool& pool, int32_t max_cols, int32_t max_tokens);
  static uint64_t bytes(int32_t max_cols, int32_t max_tokens);

  // What the next products are with: x [n_tokens, n_cols], which must stay as it is.
  void take(const float* x, int32_t n_cols, int32_t n_tokens);
  // The inputs taken, as a matrix of this grid wants them.
  MatrixInputs inputs(const Grid& grid);
  void project(std::span<const Projection> projections);

 private:
  const Kernels& kernels_;
  ThreadPool& pool_;
  Arena memory_;
  const float* x_ = nullptr;
  int32_t n_cols_ = 0;
  int32_t n_tokens_ = 0;
  struct Integers {  // in blocks of 32, and of 16
    int16_t* q = nullptr;
    BlockInputs* blocks = nullptr;
    bool made = false;
  } integers_[2];
};

}  // namespace dipper
