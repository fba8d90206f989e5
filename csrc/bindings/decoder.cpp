// The decoder in Python: a bundle's header (already validated by bundle.py) becomes a Model, options a DecoderOptions.
#include "decoder.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "errors.hpp"

namespace nb = nanobind;
using namespace dipper;

namespace {

using Tokens = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Mask = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
T get(const nb::dict& d, const char* key) {
  if (!d.contains(key))
    throw BundleError(std::string("the header lacks '") + key + "': the bundle is damaged, pack it again");
  return nb::cast<T>(d[key]);
}

Codes codes_of(const std::string& name) {
  static const std::map<std::string, Codes> known{{"q4", Codes::kQ4},  {"q5", Codes::kQ5},   {"q6", Codes::kQ6},
                                                  {"q8", Codes::kQ8},  {"f16", Codes::kF16}, {"bf16", Codes::kBF16},
                                                  {"f32", Codes::kF32}};
  const auto at = known.find(name);
  if (at == known.end()) throw BundleError("codes '" + name + "' are unknown to this dipper: upgrade it");
  return at->second;
}

int32_t code_bits(Codes codes) {
  switch (codes) {
    case Codes::kQ4:
      return 4;
    case Codes::kQ5:
      return 5;
    case Codes::kQ6:
      return 6;
    default:
      throw BundleError("a matrix is split whose codes are not of 4 to 6 bits: pack the bundle again");
  }
}

Scale scale_of(const std::string& name) {
  static const std::map<std::string, Scale> known{{"none", Scale::kNone}, {"f16", Scale::kF16}, {"f16m", Scale::kF16M},
                                                  {"u8", Scale::kU8},     {"i8", Scale::kI8},   {"u8m", Scale::kU8M}};
  const auto at = known.find(name);
  if (at == known.end()) throw BundleError("scale '" + name + "' is unknown to this dipper: upgrade it");
  return at->second;
}

Grid grid_of(const nb::dict& d) {
  const Grid grid{codes_of(get<std::string>(d, "codes")), scale_of(get<std::string>(d, "scale")),
                  get<int32_t>(d, "group"), get<int32_t>(d, "zero_point"), get<int32_t>(d, "super_blocks")};
  // The kernels' buffers are made for these; bundle.py has said so in better words already.
  if ((grid.group != 16 && grid.group != kMaxGroup) || grid.super_blocks < 1) {
    throw BundleError("a grid has group " + std::to_string(grid.group) + " and super_blocks " +
                      std::to_string(grid.super_blocks) + ", which this dipper cannot run: pack the bundle again");
  }
  return grid;
}

class Reader {
 public:
  Reader(const nb::dict& header, const std::string& directory) : header_(header), model_(std::make_unique<Model>()) {
    model_->resident_path = directory + "/resident.bin";
    model_->flash_path = directory + "/flash.bin";
    model_->resident_bytes = get<uint64_t>(get<nb::dict>(get<nb::dict>(header, "files"), "resident.bin"), "bytes");
    model_->resident = Arena(model_->resident_bytes);
    tensors_ = get<nb::dict>(header, "tensors");
  }

  std::unique_ptr<Model> read() {
    read_sizes();
    read_ropes();
    model_->final_norm = vector("final_norm");
    model_->head = matrix("head");
    const auto layers = get<nb::list>(get<nb::dict>(header_, "model"), "layers");
    for (int32_t i = 0; i < model_->n_layers; ++i)
      model_->layers.push_back(layer(i, nb::cast<nb::dict>(layers[static_cast<size_t>(i)])));
    for (nb::handle r : get<nb::list>(header_, "regions")) model_->regions.push_back(region(nb::cast<nb::dict>(r)));
    if (!model_->tied) {
      const auto e = get<nb::dict>(header_, "embedding");
      model_->embedding = {get<int32_t>(e, "rows"), get<uint64_t>(e, "offset"), get<uint32_t>(e, "row_bytes"),
                           grid_of(e)};
    }
    return std::move(model_);
  }

 private:
  void read_sizes() {
    const auto m = get<nb::dict>(header_, "model");
    Model& out = *model_;
    out.n_layers = get<int32_t>(m, "n_layers");
    out.hidden = get<int32_t>(m, "hidden_size");
    out.intermediate = get<int32_t>(m, "intermediate_size");
    out.n_heads = get<int32_t>(m, "n_heads");
    out.n_kv_heads = get<int32_t>(m, "n_kv_heads");
    out.head_dim = get<int32_t>(m, "head_dim");
    out.vocab = get<int32_t>(m, "vocab_size");
    out.norm_eps = get<float>(m, "norm_eps");
    out.embedding_scale = get<float>(m, "embedding_scale");
    out.attention_scale = get<float>(m, "attention_scale");
    out.tied = get<bool>(m, "tied");
    const auto activation = get<std::string>(m, "activation");
    if (activation != "silu" && activation != "gelu_tanh")
      throw BundleError("activation '" + activation + "' is unknown to this dipper: upgrade it");
    out.activation = activation == "silu" ? Activation::kSilu : Activation::kGeluTanh;
  }

  void read_ropes() {
    for (nb::handle h : get<nb::list>(get<nb::dict>(header_, "model"), "rope")) {
      const auto r = nb::cast<nb::dict>(h);
      RopeTable table;
      table.dim = get<int32_t>(r, "dim");
      table.short_inv_freq = vector(get<std::string>(r, "short"));
      if (!r["long"].is_none()) table.long_inv_freq = vector(get<std::string>(r, "long"));
      table.original_context = get<int32_t>(r, "original_context");
      table.scale_short = get<float>(r, "scale_short");
      table.scale_long = get<float>(r, "scale_long");
      model_->ropes.push_back(table);
    }
  }

  const uint8_t* resident_at(const nb::dict& d) const { return model_->resident.data() + get<uint64_t>(d, "offset"); }

  const float* vector(const std::string& name) const {
    return reinterpret_cast<const float*>(resident_at(get<nb::dict>(tensors_, name.c_str())));
  }
  const float* optional_vector(const std::string& name) const {
    return tensors_.contains(name.c_str()) ? vector(name) : nullptr;
  }

  WeightView matrix(const std::string& name) const {
    const auto d = get<nb::dict>(tensors_, name.c_str());
    const auto shape = get<std::vector<int32_t>>(d, "shape");
    WeightView w = weight(d, shape[0], shape[1]);
    w.tiled = resident_at(d);
    return w;
  }

  WeightView weight(const nb::dict& d, int32_t rows, int32_t cols) const {
    WeightView w;
    w.grid = grid_of(d);
    w.n_rows = (rows + kHalfTileRows - 1) / kHalfTileRows * kHalfTileRows;
    w.n_cols = cols;
    w.n_blocks = (cols + w.grid.group - 1) / w.grid.group;
    if (w.grid.scale == Scale::kNone) return w;
    const auto scales = get<nb::dict>(d, "scales");
    const auto array = [&](const char* name) -> const uint8_t* {
      return scales.contains(name) ? resident_at(nb::cast<nb::dict>(scales[name])) : nullptr;
    };
    w.d = reinterpret_cast<const uint16_t*>(array("d"));
    w.dm = reinterpret_cast<const uint16_t*>(w.grid.scale == Scale::kF16M ? array("m") : array("dm"));
    w.sub = array("sub");
    w.subm = array("subm");
    return w;
  }

  LayerWeights layer(int32_t i, const nb::dict& d) const {
    const std::string at = "layers." + std::to_string(i) + ".";
    LayerWeights l;
    l.attn_norm = vector(at + "attn_norm");
    l.mlp_norm = vector(at + "mlp_norm");
    l.q = matrix(at + "q");
    l.k = matrix(at + "k");
    l.v = matrix(at + "v");
    l.o = matrix(at + "o");
    l.q_bias = optional_vector(at + "q_bias");
    l.k_bias = optional_vector(at + "k_bias");
    l.v_bias = optional_vector(at + "v_bias");
    l.o_bias = optional_vector(at + "o_bias");
    l.q_norm = optional_vector(at + "q_norm");
    l.k_norm = optional_vector(at + "k_norm");
    l.post_attn_norm = optional_vector(at + "post_attn_norm");
    l.post_mlp_norm = optional_vector(at + "post_mlp_norm");
    l.rope = get<int32_t>(d, "rope");
    l.window = get<int32_t>(d, "window");
    return l;
  }

  Region region(const nb::dict& d) const {
    Region r;
    r.n_columns = get<int32_t>(d, "n_columns");
    r.offset = get<uint64_t>(d, "offset");
    r.record_bytes = get<uint32_t>(d, "record_bytes");
    r.columns_per_unit = get<int32_t>(d, "columns_per_unit");
    r.unit_bytes = get<uint32_t>(d, "unit_bytes");
    for (nb::handle h : get<nb::list>(d, "matrices")) {
      const auto m = nb::cast<nb::dict>(h);
      WeightView w = weight(m, get<int32_t>(m, "rows"), r.n_columns);
      read_planes(m, w);
      r.matrices.push_back(w);
    }
    if (!d["base"].is_none()) read_split(d, r);
    if (!r.split() && (r.columns_per_unit != 1 || !d["order"].is_none() || r.unit_bytes != r.record_bytes)) {
      throw BundleError(
          "this bundle groups or reorders columns that are not split, which this dipper cannot run: upgrade it");
    }
    return r;
  }

  void read_planes(const nb::dict& m, WeightView& w) const {
    const auto base_bits = get<int32_t>(m, "base_bits");
    if (base_bits != 0) w.residual_bits = code_bits(w.grid.codes) - base_bits;
    size_t n = 0;
    for (nb::handle h : get<nb::list>(m, "planes")) {
      const auto d = nb::cast<nb::dict>(h);
      const Plane plane{get<int32_t>(d, "bits"), get<int32_t>(d, "shift"),
                        static_cast<uint32_t>(get<uint64_t>(d, "offset"))};
      if (base_bits == 0) {
        if (n == 2) throw BundleError("a matrix has more than two planes, which this dipper cannot run: upgrade it");
        w.plane_offset[n++] = plane.offset;
        continue;
      }
      Planes& part = get<std::string>(d, "tier") == "base" ? w.base : w.residual;
      if (part.n == Planes::kMax || (plane.bits != 1 && plane.bits != 2 && plane.bits != 4)) {
        throw BundleError("the codes of a split matrix lie in planes that this dipper cannot run: upgrade it");
      }
      part.plane[part.n++] = plane;
    }
  }

  void read_split(const nb::dict& d, Region& r) const {
    const auto base = get<nb::dict>(d, "base");
    r.base_bytes = get<uint32_t>(base, "record_bytes");
    r.base_offset = get<uint64_t>(base, "offset");
    constexpr uint64_t kAlign = FlashReader::alignment();
    if (r.base_offset != r.offset + (r.units_bytes() + kAlign - 1) / kAlign * kAlign) {
      throw BundleError(
          "the bases of a region do not follow its units, as this dipper reads them: pack the bundle again");
    }
    const std::string name = "layers." + std::to_string(get<int32_t>(d, "layer")) + "." + get<std::string>(d, "kind");
    r.residual_norm = vector(name + "_residual");
    const auto n = static_cast<size_t>(r.n_columns);
    if (d["order"].is_none()) {
      r.order.resize(n);
      std::iota(r.order.begin(), r.order.end(), 0);
    } else {
      r.order = get<std::vector<int32_t>>(d, "order");
      r.natural = false;
    }
    r.unit_of.resize(n);
    r.offset_in_unit.resize(n);
    for (int32_t i = 0; i < r.n_columns; ++i) {
      const auto column = static_cast<size_t>(r.order[static_cast<size_t>(i)]);
      r.unit_of[column] = i / r.columns_per_unit;
      r.offset_in_unit[column] = static_cast<uint32_t>(i % r.columns_per_unit) * r.record_bytes;
    }
  }

  nb::dict header_;
  nb::dict tensors_;
  std::unique_ptr<Model> model_;
};

// A vector of a calibration, which calibration.py has validated, with zeros up to `padded`. Never -0: a sum that starts
// there would keep the sign that one more product of zero takes away.
std::vector<float> fitted(nb::handle array, int32_t n, int32_t padded) {
  const auto values = nb::cast<Vector>(array);
  if (values.size() != static_cast<size_t>(n)) {
    throw ConfigError("a vector of the calibration has " + std::to_string(values.size()) + " values, expected " +
                      std::to_string(n) + ": calibrate this model anew");
  }
  std::vector<float> out(static_cast<size_t>(padded));
  std::transform(values.data(), values.data() + n, out.begin(), [](float v) { return v + 0.0f; });
  return out;
}

// Lists by region; an empty one leaves that part out. A bias is a list by matrix.
std::shared_ptr<const std::vector<RegionFit>> fits_of(const nb::dict& d, const Model& model) {
  const auto factors = get<nb::list>(d, "factors");
  const auto means = get<nb::list>(d, "means");
  const auto biases = get<nb::list>(d, "biases");
  if (factors.size() + means.size() == 0) return nullptr;
  const size_t n = model.regions.size();
  if ((factors.size() != 0 && factors.size() != n) || (means.size() != 0 && means.size() != n) ||
      biases.size() != means.size()) {
    throw ConfigError("the calibration has vectors for other than the model's " + std::to_string(n) +
                      " regions: calibrate this model anew");
  }
  std::vector<RegionFit> fits(n);
  for (size_t r = 0; r < n; ++r) {
    const Region& region = model.regions[r];
    const int32_t n_columns = region.n_columns;
    if (factors.size() != 0) fits[r].factor = fitted(factors[r], n_columns, n_columns);
    if (means.size() == 0) continue;
    fits[r].mean = fitted(means[r], n_columns, n_columns);
    const auto by_matrix = nb::cast<nb::list>(biases[r]);
    if (by_matrix.size() != region.matrices.size()) {
      throw ConfigError("the calibration has a bias too few or too many: calibrate this model anew");
    }
    for (size_t m = 0; m < by_matrix.size(); ++m) {
      const int32_t rows = r % 2 == 0 ? model.intermediate : model.hidden;
      fits[r].bias[m] = fitted(by_matrix[m], rows, region.matrices[m].n_rows);
    }
  }
  return std::make_shared<const std::vector<RegionFit>>(std::move(fits));
}

DecoderOptions options_of(const nb::dict& d, const Model& model) {
  DecoderOptions o;
  const auto residency = get<std::string>(d, "residency");
  o.mlp.residency = residency == "resident"    ? Residency::kResident
                    : residency == "stream"    ? Residency::kStream
                    : residency == "simulated" ? Residency::kSimulated
                                               : Residency::kCached;
  o.mlp.prune = get<bool>(d, "prune");
  o.mlp.k = get<std::vector<int32_t>>(d, "k");
  if (o.mlp.prune) o.mlp.fits = fits_of(d, model);
  o.mlp.gamma = get<float>(d, "gamma");
  o.mlp.policy = cache_policy(get<std::string>(d, "cache"));
  o.mlp.decay = get<float>(d, "cache_decay");
  o.mlp.capacity = get<std::vector<int32_t>>(d, "capacity");
  o.mlp.pinned = get<std::vector<uint8_t>>(d, "pinned");
  o.mlp.refined = get<std::vector<uint8_t>>(d, "refined");
  o.mlp.fetch = get<std::vector<int32_t>>(d, "fetch");
  o.mlp.run_cost = get<std::vector<float>>(d, "run_cost");
  o.mlp.stream_slots = get<int32_t>(d, "stream_slots");
  o.mlp.stream_chunk_bytes = get<uint32_t>(d, "stream_chunk_bytes");
  o.context = get<int32_t>(d, "context");
  o.kv = kv_codes(get<std::string>(d, "kv"));
  o.block_tokens = get<int32_t>(d, "block_tokens");
  o.n_threads = get<int32_t>(d, "n_threads");
  o.isa = get<std::string>(d, "isa");
  const auto backend = get<std::string>(d, "reader");
  o.reader.backend = backend == "io_uring" ? ReadBackend::kIoUring
                     : backend == "pread"  ? ReadBackend::kPread
                                           : ReadBackend::kAuto;
  o.reader.depth = get<int32_t>(d, "depth");
  return o;
}

nb::dict plan_dict(const MemoryPlan& p) {
  nb::dict d;
  d["resident"] = p.resident;
  d["calibration"] = p.mlp.calibration;
  d["pinned"] = p.mlp.pinned;
  d["slots"] = p.mlp.slots;
  d["staging"] = p.mlp.staging;
  d["bookkeeping"] = p.mlp.bookkeeping;
  d["kv"] = p.kv;
  d["scratch"] = p.scratch;
  return d;
}

nb::dict counters_dict(const Decoder& decoder) {
  const MlpCounters& c = decoder.mlp().counters();
  const ReaderCounters flash = decoder.flash_counters();
  const Ledger& l = decoder.ledger();
  nb::dict ledger;
  ledger["select"] = l.select;
  ledger["submit"] = l.submit;
  ledger["wait"] = l.wait;
  ledger["gemv"] = l.gemv;
  ledger["attention"] = l.attention;
  ledger["head"] = l.head;
  ledger["rest"] = l.rest;
  nb::dict d;
  d["n_tokens"] = decoder.n_steps();
  d["selected"] = c.selected;
  d["hits"] = c.hits;
  d["misses"] = c.misses;
  d["evictions"] = c.evictions;
  d["useful_bytes"] = c.useful_bytes;
  d["flash_bytes"] = flash.bytes;
  d["reads"] = flash.reads;
  d["ledger_s"] = ledger;
  return d;
}

std::vector<const uint8_t*> mask_pointers(const std::vector<Mask>& masks, int32_t n_layers, size_t n_tokens,
                                          int32_t n) {
  if (masks.size() != static_cast<size_t>(n_layers)) {
    throw ConfigError("forced masks for " + std::to_string(masks.size()) + " layers, the model has " +
                      std::to_string(n_layers));
  }
  std::vector<const uint8_t*> pointers;
  for (const Mask& m : masks) {
    if (m.shape(0) != n_tokens || m.shape(1) != static_cast<size_t>(n)) {
      throw ConfigError("a forced mask has shape [" + std::to_string(m.shape(0)) + ", " + std::to_string(m.shape(1)) +
                        "], expected [" + std::to_string(n_tokens) + ", " + std::to_string(n) + "]");
    }
    pointers.push_back(m.data());
  }
  return pointers;
}

Output<float> logits_of(Decoder& decoder, const Tokens& tokens, const std::string& kind, const std::vector<Mask>& input,
                        const std::vector<Mask>& glu) {
  const Model& m = decoder.model();
  ForwardRequest request;
  if (kind == "forced") {
    request.kind = BlockMasks::Kind::kForced;
    request.forced_input = mask_pointers(input, m.n_layers, tokens.size(), m.hidden);
    request.forced_glu = mask_pointers(glu, m.n_layers, tokens.size(), m.intermediate);
  } else {
    request.kind = kind == "own" ? BlockMasks::Kind::kOwn : BlockMasks::Kind::kDense;
  }
  Output<float> logits = new_array<float>({tokens.size(), static_cast<size_t>(m.vocab)});
  request.logits = logits.data();
  {
    nb::gil_scoped_release released;
    decoder.forward({tokens.data(), tokens.size()}, request);
  }
  return logits;
}

Output<double> losses_of(Decoder& decoder, const Tokens& tokens, const Tokens& next) {
  if (next.size() != tokens.size()) throw ConfigError("next tokens and tokens differ in number");
  for (size_t t = 0; t < next.size(); ++t) {
    if (next.data()[t] >= decoder.model().vocab) {
      throw ConfigError("token id " + std::to_string(next.data()[t]) + " is outside the vocabulary of " +
                        std::to_string(decoder.model().vocab));
    }
  }
  ForwardRequest request;
  request.kind = BlockMasks::Kind::kOwn;
  request.next = next.data();
  Output<double> nll = new_array<double>({tokens.size()});
  std::fill(nll.data(), nll.data() + tokens.size(), 0.0);
  request.nll = nll.data();
  {
    nb::gil_scoped_release released;
    decoder.forward({tokens.data(), tokens.size()}, request);
  }
  return nll;
}

}  // namespace

void bind_decoder(nb::module_& m) {
  m.def(
      "plan_memory",
      [](const nb::dict& header, const std::string& directory, const nb::dict& options) {
        const std::unique_ptr<Model> model = Reader(header, directory).read();
        const DecoderOptions o = options_of(options, *model);
        nb::dict d = plan_dict(plan_memory(*model, o));
        const ReaderCounters stream = stream_reads(*model, o.mlp);
        d["stream_reads"] = stream.reads;
        d["stream_bytes"] = stream.bytes;
        return d;
      },
      nb::arg("header"), nb::arg("directory"), nb::arg("options"));

  nb::class_<Decoder>(m, "Decoder")
      .def(
          "__init__",
          [](Decoder* self, const nb::dict& header, const std::string& directory, const nb::dict& options,
             const nb::callable& check_resident) {
            std::unique_ptr<Model> model = Reader(header, directory).read();
            const DecoderOptions o = options_of(options, *model);
            const nb::gil_scoped_release released;
            new (self) Decoder(std::move(model), o, [&](std::span<const uint8_t> bytes) {
              const nb::gil_scoped_acquire acquired;
              check_resident(
                  nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>(bytes.data(), {bytes.size()}, nb::none()));
            });
          },
          nb::arg("header"), nb::arg("directory"), nb::arg("options"), nb::arg("check_resident"))
      .def("step",
           [](nb::handle_t<Decoder> handle, int32_t token) {
             auto& self = nb::cast<Decoder&>(handle);
             std::span<const float> logits;
             {
               nb::gil_scoped_release released;
               logits = self.step(token);
             }
             return nb::ndarray<nb::numpy, const float, nb::ndim<1>>(logits.data(), {logits.size()}, handle);
           })
      .def("prefill",
           [](Decoder& self, const Tokens& tokens, bool warm) {
             std::span<const float> logits;
             {
               nb::gil_scoped_release released;
               logits = self.prefill({tokens.data(), tokens.size()}, warm);
             }
             return copy_array<float>(logits);
           })
      .def("logits", &logits_of)
      .def("start_energies", &Decoder::start_energies)
      .def("energies",
           [](const Decoder& d) {
             nb::list out;
             for (const std::vector<double>& e : d.mlp().energies()) out.append(nb::cast(e));
             return out;
           })
      .def("losses", &losses_of)
      .def("advance",
           [](Decoder& self, const Tokens& tokens) {
             ForwardRequest request;
             request.kind = BlockMasks::Kind::kOwn;
             nb::gil_scoped_release released;
             self.forward({tokens.data(), tokens.size()}, request);
           })
      .def("reset", &Decoder::reset)
      .def("reset_cache", &Decoder::reset_cache)
      .def("pin_static", &Decoder::pin_static)
      .def("configure",
           [](Decoder& self, const std::vector<int32_t>& k, float gamma, const std::string& cache, float decay,
              const std::vector<int32_t>& capacity) { self.configure(k, gamma, cache_policy(cache), decay, capacity); })
      .def("reset_counters", &Decoder::reset_counters)
      .def("counters", &counters_dict)
      .def("start_trace",
           [](Decoder& self, const std::string& path, const std::string& header, bool with_scores) {
             self.start_trace(std::make_unique<TraceWriter>(path, header, with_scores));
           })
      .def("finish_trace", &Decoder::finish_trace)
      .def_prop_ro("n_past", &Decoder::n_past)
      .def_prop_ro("isa", [](const Decoder& self) { return self.kernels().name; })
      .def_prop_ro(
          "reader_backend",
          [](const Decoder& self) { return self.reader().backend() == ReadBackend::kIoUring ? "io_uring" : "pread"; })
      .def_prop_ro("reader_notes",
                   [](const Decoder& self) {
                     return std::vector<std::string>{self.reader().backend_note(), self.reader().direct_note()};
                   })
      .def_prop_ro("direct", [](const Decoder& self) { return self.reader().direct(); });
}
