// GluMlp over split regions: which residuals a token fetches, and products of bases and residuals.
#include <algorithm>

#include "errors.hpp"
#include "glu_mlp.hpp"
#include "stopwatch.hpp"

namespace dipper {

// A token's residuals of a refined region: what it fetches, and what is cached, which costs nothing.
void GluMlp::fetch_residuals(int32_t r, const float* values, Ledger& ledger) {
  const Region& region = model_.regions[static_cast<size_t>(r)];
  ColumnCache& cache = caches_[static_cast<size_t>(r)];
  {
    const Timed timed(ledger.select);
    try {
      refine(values, region.residual_norm, region.order, region.columns_per_unit, cache.cached(),
             options_.fetch[static_cast<size_t>(r)], options_.run_cost[static_cast<size_t>(r)], refinement_);
    } catch (const ConfigError& e) {
      throw ConfigError(region_name(r) + ": " + e.what());
    }
    split_ = {0, region.n_columns, base_memory_[static_cast<size_t>(r)]};
    const std::span<const int32_t> slots = cache.slots();
    unit_data_.resize(slots.size());
    unit_ticket_.assign(slots.size(), 0);
    for (size_t u = 0; u < slots.size(); ++u) unit_data_[u] = slots[u] >= 0 ? slot(r, slots[u]) : nullptr;
    const CacheStep& step = cache.step(refinement_.demanded);
    admissions_.assign(step.admissions.begin(), step.admissions.end());
    counters_.selected += refinement_.demanded.size();
    counters_.hits += static_cast<uint64_t>(step.n_hits);
    counters_.misses += step.misses.size();
    for (const Admission& a : admissions_) counters_.evictions += a.evicted >= 0;
    counters_.useful_bytes += step.misses.size() * region.unit_bytes;
    plan_misses(region, refinement_.read);
  }
  batch_.awaits = !plan_.ranges.empty();
  if (plan_.ranges.empty()) return;
  uint64_t first_ticket = 0;
  {
    const Timed timed(ledger.submit);
    first_ticket = reader_.submit(plan_.ranges);
  }
  const Timed timed(ledger.select);
  size_t admission = 0;
  admitted_record_.resize(admissions_.size());
  for (size_t i = 0; i < refinement_.read.size(); ++i) {
    const auto u = static_cast<size_t>(refinement_.read[i]);
    if (unit_data_[u] != nullptr) continue;  // cached, between two that are not
    unit_data_[u] = miss_staging_ + plan_.staging_offset[i];
    unit_ticket_[u] = first_ticket + plan_.n_ranges_needed[i];
    if (admission < admissions_.size() && admissions_[admission].column == refinement_.read[i])
      admitted_record_[admission++] = unit_data_[u];
  }
}

// Columns [first, last) of a split region with all of their units, as these lie on flash.
void GluMlp::take_units(const Region& region, int32_t first, int32_t last, const uint8_t* units, const uint8_t* bases,
                        uint64_t ticket) {
  split_ = {first, last, bases};
  unit_data_.resize(static_cast<size_t>(region.n_units()));
  unit_ticket_.assign(unit_data_.size(), ticket);
  const int32_t first_unit = first / region.columns_per_unit;
  const int32_t end_unit = (last + region.columns_per_unit - 1) / region.columns_per_unit;
  for (int32_t u = first_unit; u < end_unit; ++u, units += region.unit_bytes)
    unit_data_[static_cast<size_t>(u)] = units;
  batch_.awaits = ticket != 0;
}

// The same of the next chunk of a stream.
void GluMlp::take_chunk(const Region& region, const WeightStream& stream, const uint8_t* bases) {
  const StreamChunk& chunk = stream.current();
  take_units(region, chunk.first, chunk.last, stream.data(), bases != nullptr ? bases : stream.bases(),
             stream.ticket());
}

// One block's columns of a split region at hand: their bases, and the residuals of those that are refined.
struct GluMlp::SplitBlock {
  int32_t n = 0;
  const uint8_t* base[kMaxGroup];
  const uint8_t* refined[kMaxGroup];   // by column; null: not refined
  const uint8_t* residual[kMaxGroup];  // those that are, back to back
  int32_t n_refined = 0;
  uint64_t ticket = 0;  // of the last read that brings one
};

GluMlp::SplitBlock GluMlp::split_block_at(const Region& region, int32_t block, int32_t group) const {
  SplitBlock out;
  const int32_t first = block * group;
  out.n = std::min(group, split_.last - first);
  for (int32_t i = 0; i < out.n; ++i) {
    const auto column = static_cast<size_t>(first + i);
    const auto unit = static_cast<size_t>(region.unit_of[column]);
    out.base[i] = split_.base(region, first + i);
    out.refined[i] = nullptr;
    if (unit_data_[unit] == nullptr) continue;
    out.refined[i] = unit_data_[unit] + region.offset_in_unit[column];
    out.residual[out.n_refined++] = out.refined[i];
    out.ticket = std::max(out.ticket, unit_ticket_[unit]);
  }
  return out;
}

// Adds one block's part of a matrix's products, of some halves of its tiles; `next` is the block to come.
void GluMlp::multiply_block_of(const WeightView& w, const MatrixInputs& in, int32_t block, const SplitBlock& at,
                               const SplitBlock& next, Share halves, float* sums) const {
  SplitColumns columns{block, {at.n, at.base, in.q + block * w.grid.group}, {}, in.blocks[block], 0, {}};
  columns.coarse = columns.inputs.sum;
  int16_t q[padded_inputs(kMaxGroup)];
  int32_t n = 0;
  for (int32_t i = 0; i < at.n; ++i) {
    if (at.refined[i] == nullptr) continue;
    q[n++] = columns.base.q[i];
    columns.coarse -= columns.base.q[i];
  }
  if (n % 2 == 1) q[n] = 0;
  columns.residual = {n, at.residual, q};
  if (next.n > 0) columns.next = {next.n, next.base, nullptr};
  kernels_.gemv_split(w, columns, halves.first, halves.last, sums);
}

// One token's products with the columns at hand of a split region. Threads share the halves of all matrices' tiles and,
// where nothing is awaited, the two halves of the columns; matrices whose columns lie in the same blocks go together.
void GluMlp::multiply_split(const Region& region, const Sums& sums, Ledger& ledger) {
  const double start = now_s();
  const double waited = ledger.wait;
  const size_t n_matrices = region.matrices.size();
  MatrixInputs inputs[2];
  int32_t n_halves = 0;
  for (size_t m = 0; m < n_matrices; ++m) {
    inputs[m] = projector_.inputs(region.matrices[m].grid);
    n_halves += region.matrices[m].n_halves();
  }
  const int n_sides = batch_.awaits || pool_.size() % 2 == 1 ? 1 : 2;
  const bool together = n_matrices == 2 && region.matrices[0].grid.group == region.matrices[1].grid.group;
  pool_.run([&](int thread) {
    const Share all = share(n_halves, thread / n_sides, pool_.size() / n_sides);
    const int side = thread % n_sides;
    Share own[2];  // of each matrix's halves
    for (int32_t m = 0, before = 0; m < static_cast<int32_t>(n_matrices); ++m) {
      const int32_t n = region.matrices[static_cast<size_t>(m)].n_halves();
      own[m] = {std::clamp(all.first - before, 0, n), std::clamp(all.last - before, 0, n)};
      before += n;
    }
    for (size_t first = 0; first < n_matrices; first += together ? 2 : 1) {
      const int32_t group = region.matrices[first].grid.group;
      const int32_t first_block = split_.first / group;
      const int32_t end_block = (split_.last + group - 1) / group;
      const int32_t middle = std::clamp(region.half_column() / group, first_block, end_block);
      const int32_t begin = n_sides == 2 && side == 1 ? middle : first_block;
      const int32_t end = n_sides == 2 && side == 0 ? middle : end_block;
      SplitBlock at, next;
      if (begin < end) next = split_block_at(region, begin, group);
      for (int32_t b = begin; b < end; ++b) {
        at = next;
        next = b + 1 < end ? split_block_at(region, b + 1, group) : SplitBlock{};
        if (!wait_ticket(thread, at.ticket, ledger)) return;
        for (size_t m = first; m < (together ? 2 : first + 1); ++m) {
          if (own[m].first < own[m].last)
            multiply_block_of(region.matrices[m], inputs[m], b, at, next, own[m], sums.of(b >= middle)[m]);
        }
      }
    }
  });
  ledger.gemv += now_s() - start - (ledger.wait - waited);
}

void GluMlp::step_split(int32_t r, const float* values, const Sums& sums, Ledger& ledger) {
  const Region& region = model_.regions[static_cast<size_t>(r)];
  projector_.take(values, region.n_columns, 1);
  if (options_.refines(r)) {
    fetch_residuals(r, values, ledger);
    multiply_split(region, sums, ledger);
    admit(r, ledger);
  } else if (const uint8_t* held = region_base_[static_cast<size_t>(r)]) {
    take_units(region, 0, region.n_columns, held, held + region.bases_at(), 0);
    multiply_split(region, sums, ledger);
  } else {
    WeightStream& stream = of_token();
    for (bool more = true; more;) {
      more = stream.current().last < region.n_columns;
      take_chunk(region, stream, nullptr);
      multiply_split(region, sums, ledger);
      const Timed timed(ledger.submit);
      stream.release();
    }
  }
}

// Which columns of a refined region each token of a block has refined -> refined_columns_, in the closed loop.
void GluMlp::refine_block(int32_t r, const float* x, int32_t n_tokens, const BlockMasks& masks, const uint8_t* forced) {
  const Region& region = model_.regions[static_cast<size_t>(r)];
  const auto n = static_cast<size_t>(region.n_columns);
  if (masks.kind == BlockMasks::Kind::kForced) {
    refined_columns_.assign(forced, forced + static_cast<size_t>(n_tokens) * n);
    return;
  }
  if (!options_.refines(r)) return;
  const bool own = masks.kind == BlockMasks::Kind::kOwn;
  if (!own && !masks.touch_cache) return;
  ColumnCache& cache = caches_[static_cast<size_t>(r)];
  refined_columns_.resize(static_cast<size_t>(n_tokens) * n);
  std::vector<uint8_t> used;
  for (int32_t t = 0; t < n_tokens; ++t) {
    try {
      refine(x + static_cast<size_t>(t) * n, region.residual_norm, region.order, region.columns_per_unit,
             cache.cached(), options_.fetch[static_cast<size_t>(r)], options_.run_cost[static_cast<size_t>(r)],
             refinement_);
    } catch (const ConfigError& e) {
      throw ConfigError(region_name(r) + ": token " + std::to_string(t) + ": " + e.what());
    }
    used.assign(cache.cached(), cache.cached() + region.n_units());
    for (const int32_t u : refinement_.fetched) used[static_cast<size_t>(u)] = 1;
    const CacheStep& step = cache.step(refinement_.demanded, own);
    if (!own) continue;
    counters_.selected += refinement_.demanded.size();
    counters_.hits += static_cast<uint64_t>(step.n_hits);
    counters_.misses += step.misses.size();
    for (const Admission& a : step.admissions) counters_.evictions += a.evicted >= 0;
    uint8_t* columns = refined_columns_.data() + static_cast<size_t>(t) * n;
    for (size_t c = 0; c < n; ++c) columns[c] = used[static_cast<size_t>(region.unit_of[c])];
  }
}

// The inputs of a matrix whose columns are refined, 0 elsewhere -> refined_q_; the sums of the others -> coarse_.
void GluMlp::take_refined(const WeightView& w, const MatrixInputs& inputs, int32_t n_tokens) {
  const auto n = static_cast<size_t>(w.n_cols);
  const auto stride = static_cast<size_t>(inputs.q_stride);
  const auto n_blocks = static_cast<size_t>(w.n_blocks);
  refined_q_.resize(static_cast<size_t>(n_tokens) * stride);
  coarse_.resize(static_cast<size_t>(n_tokens) * n_blocks);
  pool_.share_out(n_tokens, 2, [&](int32_t first, int32_t last) {
    for (auto t = static_cast<size_t>(first); t < static_cast<size_t>(last); ++t) {
      const int16_t* q = inputs.q + t * stride;
      const uint8_t* used = refined_columns_.data() + t * n;
      int16_t* out = refined_q_.data() + t * stride;
      for (size_t b = 0; b < n_blocks; ++b) {
        const size_t begin = b * static_cast<size_t>(w.grid.group);
        const size_t end = std::min(n, begin + static_cast<size_t>(w.grid.group));
        int32_t coarse = 0;
        for (size_t c = begin; c < end; ++c) {
          out[c] = used[c] ? q[c] : int16_t{0};
          coarse += used[c] ? 0 : q[c];
        }
        coarse_[t * n_blocks + b] = coarse;
      }
      if (stride > n) out[n] = 0;
    }
  });
}

// A block's products with the columns at hand of a split region, of which every unit is.
void GluMlp::multiply_split_block(const Region& region, int32_t n_tokens, bool all_refined, const Sums& sums,
                                  Ledger& ledger) {
  const double start = now_s();
  const double waited = ledger.wait;
  for (size_t m = 0; m < region.matrices.size(); ++m) {
    const WeightView& w = region.matrices[m];
    const MatrixInputs in = projector_.inputs(w.grid);
    const int32_t group = w.grid.group;
    if (!all_refined && refined_group_ != group) {
      take_refined(w, in, n_tokens);
      refined_group_ = group;
    }
    pool_.run([&](int thread) {
      if (!wait_ticket(thread, unit_ticket_[0], ledger)) return;
      const Share tiles = share(w.n_tiles(), thread, pool_.size());
      for (int32_t t = tiles.first; t < tiles.last; ++t) {
        for (int32_t b = split_.first / group; b * group < split_.last; ++b) {
          const int32_t first = b * group;
          const int32_t n = std::min(group, split_.last - first);
          const uint8_t* base[kMaxGroup];
          const uint8_t* residual[kMaxGroup];
          for (int32_t i = 0; i < n; ++i) {
            const auto column = static_cast<size_t>(first + i);
            base[i] = split_.base(region, first + i);
            residual[i] = unit_data_[static_cast<size_t>(region.unit_of[column])] + region.offset_in_unit[column];
          }
          const SplitTokens tokens{b,
                                   n,
                                   base,
                                   residual,
                                   in.q + first,
                                   all_refined ? in.q + first : refined_q_.data() + first,
                                   in.q_stride,
                                   in.blocks + b,
                                   all_refined ? nullptr : coarse_.data() + b,
                                   w.n_blocks,
                                   n_tokens};
          kernels_.gemm_split(w, tokens, t, t + 1, sums.of(first >= region.half_column())[m], sums.stride);
        }
      }
    });
  }
  ledger.gemv += now_s() - start - (ledger.wait - waited);
}

void GluMlp::split_block(int32_t r, const float* x, int32_t n_tokens, const BlockMasks& masks, const uint8_t* forced,
                         const Sums& sums, Ledger& ledger) {
  const Region& region = model_.regions[static_cast<size_t>(r)];
  {
    const Timed timed(ledger.select);
    refine_block(r, x, n_tokens, masks, forced);
  }
  const bool all_refined =
      masks.kind == BlockMasks::Kind::kDense || (masks.kind == BlockMasks::Kind::kOwn && !options_.refines(r));
  projector_.take(x, region.n_columns, n_tokens);
  refined_group_ = 0;
  if (const uint8_t* held = region_base_[static_cast<size_t>(r)]) {
    take_units(region, 0, region.n_columns, held, held + region.bases_at(), 0);
    multiply_split_block(region, n_tokens, all_refined, sums, ledger);
    return;
  }
  const bool fills_slots = options_.refines(r) && (masks.kind == BlockMasks::Kind::kOwn || masks.touch_cache);
  const uint8_t* bases = base_memory_[static_cast<size_t>(r)];  // of refined regions
  for (bool more = true; more;) {
    const StreamChunk chunk = stream_->current();
    const uint8_t* first_base =
        bases == nullptr ? nullptr : bases + static_cast<uint64_t>(chunk.first) * region.base_bytes;
    take_chunk(region, *stream_, first_base);
    multiply_split_block(region, n_tokens, all_refined, sums, ledger);
    if (fills_slots) copy_streamed(r, chunk, stream_->data());
    stream_->release();
    more = chunk.last < region.n_columns;
  }
}

}  // namespace dipper
