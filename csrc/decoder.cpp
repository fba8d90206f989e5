#include "decoder.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "errors.hpp"
#include "stopwatch.hpp"

namespace dipper {

namespace {

constexpr int32_t kHeadTokens = 12;      // logits rows kept at once
constexpr int32_t kEmbeddingReads = 16;  // rows of an untied embedding in flight
constexpr uint64_t kAlign = FlashReader::alignment();

// Positions are kept in blocks of 16 (Kernels::attend).
int64_t padded_positions(int32_t context) { return (static_cast<int64_t>(context) + 15) / 16 * 16; }

uint64_t embedding_slot_bytes(const Model& model) {
  return model.tied ? 0 : (model.embedding.row_bytes + kAlign - 1) / kAlign * kAlign + kAlign;
}

// Offsets, in floats, of the buffers that one block of tokens needs.
struct ScratchLayout {
  int64_t x, normed, branch, q, k, v, attended, scores, logits, angles, total;

  ScratchLayout(const Model& m, const DecoderOptions& o) {
    const int64_t t = o.block_tokens;
    const int32_t heads = m.n_heads * m.head_dim;
    const int32_t kv = m.n_kv_heads * m.head_dim;
    int64_t at = 0;
    const auto take = [&at](int64_t floats) {
      const int64_t here = at;
      at += (floats + 15) / 16 * 16;
      return here;
    };
    x = take(t * m.hidden);
    normed = take(t * m.hidden);
    branch = take(t * padded_rows(m.hidden));
    q = take(t * padded_rows(heads));
    k = take(t * padded_rows(kv));
    v = take(t * padded_rows(kv));
    attended = take(t * heads);
    scores = take(static_cast<int64_t>(o.n_threads) * score_floats(o.context));
    logits = take(std::min<int64_t>(t, kHeadTokens) * padded_rows(m.vocab));
    angles = take(static_cast<int64_t>(m.ropes.size()) * t * m.head_dim);
    total = at;
  }
};

int32_t widest_input(const Model& m) { return std::max({m.n_heads * m.head_dim, m.hidden, m.intermediate}); }

// Bytes of one head: of its keys, or values, of their scales, of all.
struct KvLayout {
  uint64_t codes, scales, head;

  KvLayout(const Model& m, const DecoderOptions& o) {
    const auto positions = static_cast<uint64_t>(padded_positions(o.context));
    codes = positions * static_cast<uint64_t>(m.head_dim * kv_code_bytes(o.kv));
    scales = positions * static_cast<uint64_t>(kv_scale_bytes(o.kv));
    head = positions * static_cast<uint64_t>(kv_position_bytes(o.kv, m.head_dim));
  }
};

uint64_t kv_bytes(const Model& m, const DecoderOptions& o) {
  return static_cast<uint64_t>(m.n_layers) * static_cast<uint64_t>(m.n_kv_heads) * KvLayout(m, o).head;
}

}  // namespace

MemoryPlan plan_memory(const Model& model, const DecoderOptions& options) {
  MemoryPlan plan;
  plan.resident = model.resident_bytes;
  plan.mlp = plan_mlp_memory(model, options.mlp);
  plan.kv = kv_bytes(model, options);
  plan.scratch = static_cast<uint64_t>(ScratchLayout(model, options).total) * sizeof(float) +
                 GluMlp::scratch_bytes(model, options.block_tokens) +
                 Projector::bytes(widest_input(model), options.block_tokens) +
                 kEmbeddingReads * embedding_slot_bytes(model);
  return plan;
}

Decoder::Decoder(std::unique_ptr<Model> model, const DecoderOptions& options,
                 const std::function<void(std::span<const uint8_t>)>& check_resident)
    : model_(std::move(model)),
      options_(options),
      kernels_(&select_kernels(options.isa)),
      pool_(options.n_threads),
      projector_(*kernels_, pool_, widest_input(*model_), options.block_tokens) {
  Model& m = *model_;
  load_resident();
  check_resident({m.resident.data(), m.resident_bytes});
  flash_ = std::make_unique<FlashReader>(m.flash_path, options.reader);
  mlp_ = std::make_unique<GluMlp>(m, options.mlp, *kernels_, pool_, projector_, *flash_, options.block_tokens);
  if (!m.tied) {
    ReaderOptions rows = options.reader;
    rows.depth = kEmbeddingReads;
    embedding_reader_ = std::make_unique<FlashReader>(m.flash_path, rows);
    embedding_buffer_ = Arena(kEmbeddingReads * embedding_slot_bytes(m));
  }
  hidden_p_ = padded_rows(m.hidden);
  q_p_ = padded_rows(m.n_heads * m.head_dim);
  kv_p_ = padded_rows(m.n_kv_heads * m.head_dim);
  vocab_p_ = padded_rows(m.vocab);

  kv_ = Arena(kv_bytes(m, options));
  const ScratchLayout layout(m, options);
  scratch_ = Arena(static_cast<uint64_t>(layout.total) * sizeof(float));
  float* base = scratch_.floats();
  x_ = base + layout.x;
  normed_ = base + layout.normed;
  branch_ = base + layout.branch;
  q_ = base + layout.q;
  k_ = base + layout.k;
  v_ = base + layout.v;
  attended_ = base + layout.attended;
  scores_ = base + layout.scores;
  logits_ = base + layout.logits;
  angles_ = base + layout.angles;
  reset_counters();
}

void Decoder::load_resident() {
  FlashReader file(model_->resident_path, options_.reader);
  if (file.file_bytes() != model_->resident_bytes) {
    throw BundleError(model_->resident_path + " has " + std::to_string(file.file_bytes()) + " bytes, the header says " +
                      std::to_string(model_->resident_bytes) + ": the bundle is damaged, pack it again");
  }
  std::vector<ReadRange> ranges;
  for (uint64_t at = 0; at < model_->resident_bytes; at += 1u << 20) {
    ranges.push_back({at, static_cast<uint32_t>(std::min<uint64_t>(1u << 20, model_->resident_bytes - at)),
                      model_->resident.data() + at});
  }
  file.wait(file.submit(ranges) + ranges.size());
}

void Decoder::check_tokens(std::span<const int32_t> tokens) const {
  if (tokens.empty()) throw ConfigError("no tokens to run: give at least one");
  for (const int32_t t : tokens) {
    if (t < 0 || t >= model_->vocab) {
      throw ConfigError("token id " + std::to_string(t) + " is outside the vocabulary of " +
                        std::to_string(model_->vocab));
    }
  }
  const int64_t need = static_cast<int64_t>(n_past_) + static_cast<int64_t>(tokens.size());
  if (need > options_.context) {
    throw ConfigError("the context is full: " + std::to_string(need) + " positions are needed, --ctx gives " +
                      std::to_string(options_.context) + "; raise --ctx or shorten the prompt");
  }
}

void Decoder::embed(std::span<const int32_t> tokens, float* x) {
  const Model& m = *model_;
  if (m.tied) {
    for (size_t t = 0; t < tokens.size(); ++t) dequantise_row(m.head, tokens[t], x + t * static_cast<size_t>(m.hidden));
  } else {
    const uint64_t slot = embedding_slot_bytes(m);
    for (size_t first = 0; first < tokens.size(); first += kEmbeddingReads) {
      const size_t n = std::min<size_t>(kEmbeddingReads, tokens.size() - first);
      std::vector<ReadRange> ranges(n);
      std::vector<uint64_t> skip(n);
      for (size_t i = 0; i < n; ++i) {
        const uint64_t begin = m.embedding.offset + static_cast<uint64_t>(tokens[first + i]) * m.embedding.row_bytes;
        const uint64_t from = begin / kAlign * kAlign;
        const uint64_t to = (begin + m.embedding.row_bytes + kAlign - 1) / kAlign * kAlign;
        skip[i] = begin - from;
        ranges[i] = {from, static_cast<uint32_t>(to - from), embedding_buffer_.data() + i * slot};
      }
      embedding_reader_->wait(embedding_reader_->submit(ranges) + n);
      for (size_t i = 0; i < n; ++i) {
        dequantise_embedding_row(m.embedding.grid, ranges[i].dst + skip[i], m.hidden,
                                 x + (first + i) * static_cast<size_t>(m.hidden));
      }
    }
  }
  if (m.embedding_scale != 1.0f) {
    for (size_t i = 0; i < tokens.size() * static_cast<size_t>(m.hidden); ++i) x[i] *= m.embedding_scale;
  }
}

// cos and sin of every rotary table for positions n_past_ ..., [table][token][dim / 2][2]; angles in fp32 as the
// reference has them.
void Decoder::fill_angles(int32_t first, int32_t n_tokens) {
  const Model& m = *model_;
  for (size_t r = 0; r < m.ropes.size(); ++r) {
    const RopeTable& rope = m.ropes[r];
    const bool is_long = rope.long_inv_freq != nullptr && options_.context > rope.original_context;
    const float* inv_freq = is_long ? rope.long_inv_freq : rope.short_inv_freq;
    const float scale = is_long ? rope.scale_long : rope.scale_short;
    for (int32_t t = 0; t < n_tokens; ++t) {
      float* out = angles_ + (static_cast<int64_t>(r) * options_.block_tokens + t) * m.head_dim;
      for (int32_t i = 0; i < rope.dim / 2; ++i) {
        const float angle = static_cast<float>(first + t) * inv_freq[i];
        out[2 * i] = static_cast<float>(std::cos(static_cast<double>(angle))) * scale;
        out[2 * i + 1] = static_cast<float>(std::sin(static_cast<double>(angle))) * scale;
      }
    }
  }
}

namespace {

// Rotates the pairs (i, i + dim/2) of one head.
void rotate(float* head, int32_t dim, const float* angles) {
  const int32_t half = dim / 2;
  for (int32_t i = 0; i < half; ++i) {
    const float c = angles[2 * i];
    const float s = angles[2 * i + 1];
    const float a = head[i];
    const float b = head[i + half];
    head[i] = a * c - b * s;
    head[i + half] = b * c + a * s;
  }
}

}  // namespace

KvHead Decoder::kv_head(int32_t layer, int32_t head) const {
  const KvLayout layout(*model_, options_);
  uint8_t* k = kv_.data() + static_cast<uint64_t>(layer * model_->n_kv_heads + head) * layout.head;
  uint8_t* scales = k + 2 * layout.codes;
  return {options_.kv, k, k + layout.codes, reinterpret_cast<float*>(scales),
          reinterpret_cast<float*>(scales + layout.scales)};
}

void Decoder::attention(int32_t layer, const float* x, int32_t n_tokens, float* out) {
  const Model& m = *model_;
  const LayerWeights& l = m.layers[static_cast<size_t>(layer)];
  const int32_t hd = m.head_dim;
  const Projection qkv[3] = {{l.q, l.q_bias, m.n_heads * hd, q_, q_p_},
                             {l.k, l.k_bias, m.n_kv_heads * hd, k_, kv_p_},
                             {l.v, l.v_bias, m.n_kv_heads * hd, v_, kv_p_}};
  projector_.take(x, m.hidden, n_tokens);
  projector_.project(qkv);

  const RopeTable& rope = m.ropes[static_cast<size_t>(l.rope)];
  const auto place = [&](int32_t t) {  // norms, rotation and the KV cache of one token
    const float* angles = angles_ + (static_cast<int64_t>(l.rope) * options_.block_tokens + t) * hd;
    for (int32_t h = 0; h < m.n_heads; ++h) {
      float* q = q_ + t * q_p_ + h * hd;
      if (l.q_norm != nullptr) kernels_->rms_norm(q, l.q_norm, hd, m.norm_eps, q);
      rotate(q, rope.dim, angles);
    }
    for (int32_t h = 0; h < m.n_kv_heads; ++h) {
      float* k = k_ + t * kv_p_ + h * hd;
      if (l.k_norm != nullptr) kernels_->rms_norm(k, l.k_norm, hd, m.norm_eps, k);
      rotate(k, rope.dim, angles);
      kernels_->keep(k, v_ + t * kv_p_ + h * hd, n_past_ + t, hd, kv_head(layer, h));
    }
  };
  pool_.share_out(n_tokens, 2, [&](int32_t first, int32_t last) {
    for (int32_t t = first; t < last; ++t) place(t);
  });
  pool_.run([&](int thread) {  // neighbouring query heads, whose keys and values are then read once
    float* scores = scores_ + static_cast<int64_t>(thread) * score_floats(options_.context);
    const int32_t group = m.n_heads / m.n_kv_heads;
    for (int32_t t = 0; t < n_tokens; ++t) {
      const int32_t last = n_past_ + t + 1;
      const int32_t first = l.window > 0 ? std::max(0, last - l.window) : 0;
      const Share heads = share(m.n_heads, (thread + t) % pool_.size(), pool_.size());  // uneven ones go round
      for (int32_t h = heads.first, next; h < heads.last; h = next) {
        next = std::min(heads.last, (h / group + 1) * group);
        kernels_->attend(q_ + t * q_p_ + h * hd, next - h, kv_head(layer, h / group), hd, first, last,
                         m.attention_scale, scores, attended_ + (static_cast<int64_t>(t) * m.n_heads + h) * hd);
      }
    }
  });
  const Projection o{l.o, l.o_bias, m.hidden, out, hidden_p_};
  projector_.take(attended_, m.n_heads * hd, n_tokens);
  projector_.project({&o, 1});
}

// x += norm(branch), the norm where the model has sandwich norms.
void Decoder::add_branch(float* branch, const float* norm, int32_t n_tokens) {
  const int32_t n = model_->hidden;
  for (int32_t t = 0; t < n_tokens; ++t) {
    float* b = branch + t * hidden_p_;
    if (norm != nullptr) kernels_->rms_norm(b, norm, n, model_->norm_eps, b);
    kernels_->add(b, n, x_ + static_cast<int64_t>(t) * n);
  }
}

void Decoder::normalise(const float* weight, int32_t n_tokens) {
  const int64_t n = model_->hidden;
  for (int32_t t = 0; t < n_tokens; ++t)
    kernels_->rms_norm(x_ + t * n, weight, model_->hidden, model_->norm_eps, normed_ + t * n);
}

// The residual stream of n_tokens through all layers; block == nullptr: one token through its own masks and the caches.
void Decoder::run_layers(int32_t n_tokens, const Block* block) {
  try {
    run_each_layer(n_tokens, block);
  } catch (...) {
    mlp_->abandon();
    throw;
  }
}

void Decoder::run_each_layer(int32_t n_tokens, const Block* block) {
  const Model& m = *model_;
  fill_angles(n_past_, n_tokens);
  if (block != nullptr) {
    mlp_->set_token(static_cast<uint32_t>(n_past_), block->tokens[0]);
    mlp_->begin_block();
  }
  for (int32_t i = 0; i < m.n_layers; ++i) {
    const LayerWeights& l = m.layers[static_cast<size_t>(i)];
    const double start = now_s();
    normalise(l.attn_norm, n_tokens);
    attention(i, normed_, n_tokens, branch_);
    add_branch(branch_, l.post_attn_norm, n_tokens);
    ledger_.attention += now_s() - start;
    normalise(l.mlp_norm, n_tokens);
    if (block == nullptr) {
      mlp_->step(i, normed_, branch_, ledger_);
    } else {
      BlockMasks masks;
      masks.kind = block->kind;
      masks.touch_cache = block->touch;
      masks.tokens = block->tokens;
      if (block->kind == BlockMasks::Kind::kForced) {
        masks.input = (*block->forced_input)[static_cast<size_t>(i)] + static_cast<int64_t>(block->first) * m.hidden;
        masks.glu = (*block->forced_glu)[static_cast<size_t>(i)] + static_cast<int64_t>(block->first) * m.intermediate;
      }
      mlp_->forward(i, normed_, n_tokens, masks, branch_, hidden_p_, ledger_);
    }
    add_branch(branch_, l.post_mlp_norm, n_tokens);
  }
}

// logits [n_tokens, vocab padded] of rows of the residual stream.
void Decoder::run_head(const float* x, int32_t n_tokens, float* logits) {
  const Model& m = *model_;
  const double start = now_s();
  for (int32_t t = 0; t < n_tokens; ++t) {
    kernels_->rms_norm(x + static_cast<int64_t>(t) * m.hidden, m.final_norm, m.hidden, m.norm_eps,
                       normed_ + static_cast<int64_t>(t) * m.hidden);
  }
  const Projection head{m.head, nullptr, 0, logits, vocab_p_};
  projector_.take(normed_, m.hidden, n_tokens);
  projector_.project({&head, 1});
  ledger_.head += now_s() - start;
}

std::span<const float> Decoder::step(int32_t token) {
  const ThreadPool::PinnedCaller pinned(pool_);
  check_tokens({&token, 1});
  const double start = now_s();
  const auto accounted = [this] {
    return ledger_.select + ledger_.submit + ledger_.wait + ledger_.gemv + ledger_.attention + ledger_.head;
  };
  const double before = accounted();
  mlp_->set_token(static_cast<uint32_t>(n_past_), token);
  embed({&token, 1}, x_);
  run_layers(1, nullptr);
  run_head(x_, 1, logits_);
  ++n_past_;
  ++n_steps_;
  ledger_.rest += now_s() - start - (accounted() - before);
  return {logits_, static_cast<size_t>(model_->vocab)};
}

std::span<const float> Decoder::prefill(std::span<const int32_t> tokens, bool warm) {
  const ThreadPool::PinnedCaller pinned(pool_);
  check_tokens(tokens);
  for (size_t first = 0; first < tokens.size(); first += static_cast<size_t>(options_.block_tokens)) {
    const size_t n = std::min<size_t>(static_cast<size_t>(options_.block_tokens), tokens.size() - first);
    embed(tokens.subspan(first, n), x_);
    const Block block{BlockMasks::Kind::kDense, warm, 0, nullptr, nullptr, tokens.data() + first};
    run_layers(static_cast<int32_t>(n), &block);
    n_past_ += static_cast<int32_t>(n);
    if (first + n == tokens.size()) run_head(x_ + static_cast<int64_t>(n - 1) * model_->hidden, 1, logits_);
  }
  return {logits_, static_cast<size_t>(model_->vocab)};
}

void Decoder::forward(std::span<const int32_t> tokens, const ForwardRequest& request) {
  const ThreadPool::PinnedCaller pinned(pool_);
  check_tokens(tokens);
  const Model& m = *model_;
  for (size_t first = 0; first < tokens.size(); first += static_cast<size_t>(options_.block_tokens)) {
    const size_t n = std::min<size_t>(static_cast<size_t>(options_.block_tokens), tokens.size() - first);
    embed(tokens.subspan(first, n), x_);
    const Block block{
        request.kind,         false, static_cast<int32_t>(first), &request.forced_input, &request.forced_glu,
        tokens.data() + first};
    run_layers(static_cast<int32_t>(n), &block);
    n_past_ += static_cast<int32_t>(n);
    if (request.logits == nullptr && request.nll == nullptr) continue;
    for (size_t at = 0; at < n; at += kHeadTokens) {
      const auto rows = static_cast<int32_t>(std::min<size_t>(kHeadTokens, n - at));
      run_head(x_ + static_cast<int64_t>(at) * m.hidden, rows, logits_);
      pool_.run([&](int thread) {
        for (int32_t r = thread; r < rows; r += pool_.size()) {
          const float* row = logits_ + r * vocab_p_;
          const size_t t = first + at + static_cast<size_t>(r);
          if (request.logits != nullptr)
            std::copy(row, row + m.vocab, request.logits + t * static_cast<size_t>(m.vocab));
          if (request.nll != nullptr && request.next[t] >= 0) {
            request.nll[t] = kernels_->log_sum_exp(row, m.vocab) - static_cast<double>(row[request.next[t]]);
          }
        }
      });
    }
  }
}

void Decoder::reset() { n_past_ = 0; }

void Decoder::reset_cache() { mlp_->clear_caches(); }

void Decoder::pin_static() {
  for (size_t r = 0; r < model_->regions.size(); ++r) {
    std::vector<int32_t> first(static_cast<size_t>(options_.mlp.capacity[r]));
    for (size_t c = 0; c < first.size(); ++c) first[c] = static_cast<int32_t>(c);
    mlp_->pin(static_cast<int32_t>(r), first);
  }
}

ReaderCounters Decoder::flash_total() const {
  ReaderCounters c = flash_->counters();
  if (embedding_reader_) {
    c.reads += embedding_reader_->counters().reads;
    c.bytes += embedding_reader_->counters().bytes;
  }
  return c;
}

ReaderCounters Decoder::flash_counters() const {
  ReaderCounters c = flash_total();
  c.reads += mlp_->counters().simulated.reads - flash_start_.reads;
  c.bytes += mlp_->counters().simulated.bytes - flash_start_.bytes;
  return c;
}

void Decoder::configure(const std::vector<int32_t>& k, float gamma, CachePolicy policy, float decay,
                        const std::vector<int32_t>& capacity) {
  mlp_->configure(k, gamma, policy, decay, capacity);
  options_.mlp.capacity = capacity;
}

void Decoder::reset_counters() {
  ledger_ = {};
  n_steps_ = 0;
  mlp_->reset_counters();
  flash_start_ = flash_total();
}

}  // namespace dipper
