// Python face of selection and column cache: checks what the native code takes for granted, copies results to numpy.
// Docstrings with the equations stand in src/dipper/cache.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "column_cache.hpp"
#include "errors.hpp"
#include "replay.hpp"
#include "selection.hpp"

namespace nb = nanobind;
using dipper::ColumnCache;
using dipper::ConfigError;

namespace {

template <class T, int32_t kDimensions>
using Input = nb::ndarray<const T, nb::ndim<kDimensions>, nb::c_contig, nb::device::cpu>;
struct StepResult {
  int32_t n_hits;
  Output<int32_t> misses, admissions;
};

StepResult step(ColumnCache& cache, const Input<int32_t, 1>& mask, bool counted,
                const std::optional<Input<int32_t, 1>>& next_use) {
  for (size_t i = 0; i < mask.size(); ++i) {
    const int32_t column = mask.data()[i];
    if (column < 0 || column >= cache.n_columns()) {
      throw ConfigError("mask holds column " + std::to_string(column) + " at position " + std::to_string(i) +
                        ", but the region has " + std::to_string(cache.n_columns()) +
                        " columns: use the mask of the same region");
    }
    if (i > 0 && column <= mask.data()[i - 1]) {
      throw ConfigError("mask holds column " + std::to_string(column) + " after " + std::to_string(mask.data()[i - 1]) +
                        " at position " + std::to_string(i) +
                        ": a mask ascends without repeats; sort it, np.unique(mask)");
    }
  }
  std::span<const int32_t> next;
  if (next_use) next = {next_use->data(), next_use->size()};
  const dipper::CacheStep& done = cache.step({mask.data(), mask.size()}, counted, next);
  auto admissions = new_array<int32_t>({done.admissions.size(), 3});
  int32_t* row = admissions.data();
  for (const auto& [column, slot, evicted] : done.admissions) {
    *row++ = column;
    *row++ = slot;
    *row++ = evicted;
  }
  return {done.n_hits, copy_array<int32_t>(done.misses), std::move(admissions)};
}

Output<bool> cached(const ColumnCache& cache) {
  auto flags = new_array<bool>({static_cast<size_t>(cache.n_columns())});
  std::transform(cache.cached(), cache.cached() + cache.n_columns(), flags.data(), [](uint8_t c) { return c != 0; });
  return flags;
}

Output<int32_t> top_k(const Input<float, 1>& scores, int32_t k, float gamma,
                      const std::optional<Input<bool, 1>>& cached) {
  if (cached && cached->size() != scores.size()) {
    throw ConfigError("cached has " + std::to_string(cached->size()) + " flags for " + std::to_string(scores.size()) +
                      " scores: give one flag a column");
  }
  // Guards the size of the result; the native code tells the error.
  auto mask = new_array<int32_t>({k < 0 ? 0 : std::min(static_cast<size_t>(k), scores.size())});
  const auto* flags = cached ? reinterpret_cast<const uint8_t*>(cached->data()) : nullptr;
  dipper::SelectionScratch scratch;
  dipper::top_k({scores.data(), scores.size()}, k, gamma, flags, scratch, mask.data());
  return mask;
}

nb::tuple scan(const Input<float, 2>& scores, int32_t k, float gamma, ColumnCache* cache, bool counted) {
  const size_t n_tokens = scores.shape(0), n = scores.shape(1);
  auto masks = new_array<int32_t>({n_tokens, k < 0 ? 0 : std::min(static_cast<size_t>(k), n)});
  auto hits = new_array<int32_t>({n_tokens});
  {
    nb::gil_scoped_release released;
    dipper::scan(scores.data(), static_cast<int32_t>(n_tokens), static_cast<int32_t>(n), k, gamma, cache, counted,
                 masks.data(), hits.data());
  }
  return nb::make_tuple(std::move(masks), std::move(hits));
}

nb::tuple refine(const Input<float, 1>& x, const Input<float, 1>& norm, const Input<int32_t, 1>& order,
                 int32_t columns_per_unit, const Input<bool, 1>& cached, int32_t n_fetch, float run_cost) {
  const size_t n = x.size();
  if (norm.size() != n || order.size() != n) {
    throw ConfigError(std::to_string(n) + " inputs, " + std::to_string(norm.size()) + " norms and " +
                      std::to_string(order.size()) + " columns in order: give one of each a column");
  }
  if (columns_per_unit < 1) {
    throw ConfigError("columns_per_unit is " + std::to_string(columns_per_unit) + ": a unit has at least 1");
  }
  const auto per_unit = static_cast<size_t>(columns_per_unit);
  if (cached.size() != (n + per_unit - 1) / per_unit) {
    throw ConfigError("cached has " + std::to_string(cached.size()) + " flags for " +
                      std::to_string((n + per_unit - 1) / per_unit) + " units: give one flag a unit");
  }
  if (n_fetch < 0) throw ConfigError("n_fetch is " + std::to_string(n_fetch) + ": at least 0 units are fetched");
  if (!(run_cost >= 0.0f && run_cost <= 1e6f)) {
    throw ConfigError("run_cost is " + std::to_string(run_cost) +
                      ": what starting a read costs lies in 0 to 1e6 units");
  }
  std::vector<uint8_t> seen(n);
  for (size_t i = 0; i < n; ++i) {
    const int32_t column = order.data()[i];
    if (column < 0 || static_cast<size_t>(column) >= n || seen[static_cast<size_t>(column)]++) {
      throw ConfigError("order holds " + std::to_string(column) + " at position " + std::to_string(i) +
                        ": it is a permutation of the " + std::to_string(n) + " columns");
    }
  }
  dipper::Refinement out;
  dipper::refine(x.data(), norm.data(), {order.data(), n}, columns_per_unit,
                 reinterpret_cast<const uint8_t*>(cached.data()), n_fetch, run_cost, out);
  return nb::make_tuple(copy_array<float>(out.scores), copy_array<int32_t>(out.read), copy_array<int32_t>(out.fetched),
                        copy_array<int32_t>(out.demanded));
}

// A replay's masks (where they are new) and traffic by token.
struct Replayed {
  explicit Replayed(size_t n_tokens)
      : hits(new_array<int32_t>({n_tokens})),
        admissions(new_array<int32_t>({n_tokens})),
        reads(new_array<int32_t>({n_tokens})),
        flash_bytes(new_array<int64_t>({n_tokens})) {}

  dipper::Traffic traffic() { return {hits.data(), admissions.data(), reads.data(), flash_bytes.data()}; }
  nb::dict dict() const {
    nb::dict d;
    d["hits"] = hits;
    d["admissions"] = admissions;
    d["reads"] = reads;
    d["flash_bytes"] = flash_bytes;
    return d;
  }
  Output<int32_t> hits, admissions, reads;
  Output<int64_t> flash_bytes;
};

nb::dict replay_masks(const Input<int32_t, 2>& masks, uint64_t offset, uint32_t record_bytes, uint32_t alignment,
                      ColumnCache& cache, bool counted, const std::optional<Input<int32_t, 2>>& next_use) {
  if (next_use && (next_use->shape(0) != masks.shape(0) || next_use->shape(1) != masks.shape(1))) {
    throw ConfigError("next uses are for other masks: give one a selected column, next_uses(masks, n_columns)");
  }
  Replayed out(masks.shape(0));
  std::span<const int32_t> next;
  if (next_use) next = {next_use->data(), next_use->size()};
  {
    nb::gil_scoped_release released;
    dipper::replay_masks({masks.data(), masks.size()}, static_cast<int32_t>(masks.shape(0)),
                         static_cast<int32_t>(masks.shape(1)), next, {offset, record_bytes, alignment}, cache, counted,
                         out.traffic());
  }
  return out.dict();
}

nb::dict replay_scores(const Input<float, 2>& scores, int32_t k, float gamma, uint64_t offset, uint32_t record_bytes,
                       uint32_t alignment, ColumnCache& cache, bool counted) {
  const size_t n_tokens = scores.shape(0), n = scores.shape(1);
  Replayed out(n_tokens);
  std::vector<int32_t> masks(n_tokens * (k < 0 ? 0 : std::min(static_cast<size_t>(k), n)));
  {
    nb::gil_scoped_release released;
    dipper::replay_scores(scores.data(), static_cast<int32_t>(n_tokens), static_cast<int32_t>(n), k, gamma,
                          {offset, record_bytes, alignment}, cache, counted, masks.data(), out.traffic());
  }
  return out.dict();
}

Output<int32_t> next_uses(const Input<int32_t, 2>& masks, int32_t n_columns) {
  for (size_t i = 0; i < masks.size(); ++i) {
    if (masks.data()[i] < 0 || masks.data()[i] >= n_columns) {
      throw ConfigError("a mask holds column " + std::to_string(masks.data()[i]) + ", but the region has " +
                        std::to_string(n_columns) + " columns: use the masks of the same region");
    }
  }
  auto out = new_array<int32_t>({masks.shape(0), masks.shape(1)});
  dipper::next_uses({masks.data(), masks.size()}, static_cast<int32_t>(masks.shape(0)),
                    static_cast<int32_t>(masks.shape(1)), n_columns, out.data());
  return out;
}

}  // namespace

void bind_cache(nb::module_& m) {
  // Arrays that own their memory: a property's default policy would tie them to the object.
  constexpr auto kOwned = nb::rv_policy::automatic;

  nb::class_<StepResult>(m, "CacheStep")
      .def_ro("n_hits", &StepResult::n_hits)
      .def_ro("misses", &StepResult::misses, kOwned)
      .def_ro("admissions", &StepResult::admissions, kOwned);

  nb::class_<ColumnCache>(m, "ColumnCache")
      .def(
          "__init__",
          [](ColumnCache* self, int32_t n_columns, int32_t capacity, const std::string& policy, float decay,
             const std::string& admission) {
            new (self) ColumnCache(n_columns, capacity, dipper::cache_policy(policy), decay, ColumnCache::kHistoryLimit,
                                   dipper::cache_admission(admission));
          },
          nb::arg("n_columns"), nb::arg("capacity"), nb::arg("policy"), nb::arg("decay") = 0.99f,
          nb::arg("admission") = "best")
      .def("step", &step, nb::arg("mask").noconvert(), nb::arg("counted") = true,
           nb::arg("next_use").noconvert() = nb::none())
      .def(
          "pin",
          [](ColumnCache& cache, const Input<int32_t, 1>& columns) { cache.pin({columns.data(), columns.size()}); },
          nb::arg("columns").noconvert())
      .def("clear", &ColumnCache::clear)
      .def("reset_counters", &ColumnCache::reset_counters)
      .def_prop_ro("n_columns", &ColumnCache::n_columns)
      .def_prop_ro("capacity", &ColumnCache::capacity)
      .def_prop_ro("policy", [](const ColumnCache& cache) { return dipper::cache_policy_name(cache.policy()); })
      .def_prop_ro("size", &ColumnCache::size)
      .def_prop_ro("cached", &cached, kOwned)
      .def_prop_ro(
          "slots", [](const ColumnCache& cache) { return copy_array<int32_t>(cache.slots()); }, kOwned)
      .def_prop_ro("hits", &ColumnCache::hits)
      .def_prop_ro("misses", &ColumnCache::misses)
      .def_prop_ro("evictions", &ColumnCache::evictions)
      .def_prop_ro("admissions", &ColumnCache::admissions);

  m.def("n_selected", &dipper::n_selected, nb::arg("density"), nb::arg("n"));
  m.def("top_k", &top_k, nb::arg("scores").noconvert(), nb::arg("k"), nb::arg("gamma") = 1.0f,
        nb::arg("cached").noconvert() = nb::none());
  m.def("scan", &scan, nb::arg("scores").noconvert(), nb::arg("k"), nb::arg("gamma") = 1.0f,
        nb::arg("cache") = nb::none(), nb::arg("counted") = true);
  m.def("refine", &refine, nb::arg("x").noconvert(), nb::arg("norm").noconvert(), nb::arg("order").noconvert(),
        nb::arg("columns_per_unit"), nb::arg("cached").noconvert(), nb::arg("n_fetch"), nb::arg("run_cost"));
  m.def("next_uses", &next_uses, nb::arg("masks").noconvert(), nb::arg("n_columns"));
  m.def("replay_masks", &replay_masks, nb::arg("masks").noconvert(), nb::arg("offset"), nb::arg("record_bytes"),
        nb::arg("alignment"), nb::arg("cache"), nb::arg("counted") = true,
        nb::arg("next_use").noconvert() = nb::none());
  m.def("replay_scores", &replay_scores, nb::arg("scores").noconvert(), nb::arg("k"), nb::arg("gamma"),
        nb::arg("offset"), nb::arg("record_bytes"), nb::arg("alignment"), nb::arg("cache"), nb::arg("counted") = true);
}
