// One transformer: decode step and block forward (prefill, evaluation), attention with KV cache, head.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "glu_mlp.hpp"
#include "model.hpp"
#include "projection.hpp"

namespace dipper {

struct DecoderOptions {
  MlpOptions mlp;
  int32_t context = 1024;  // positions that the KV cache has room for
  KvCodes kv = KvCodes::kF16;
  int32_t block_tokens = 256;  // tokens that prefill and evaluation take at once
  int32_t n_threads = 1;
  std::string isa = "auto";
  ReaderOptions reader;
};

// Everything that a decoder allocates for the model, by what for.
struct MemoryPlan {
  uint64_t resident = 0;  // resident.bin: attention, head, norms, scales of the MLP
  MlpMemory mlp;
  uint64_t kv = 0;
  uint64_t scratch = 0;

  uint64_t total() const {
    return resident + mlp.calibration + mlp.pinned + mlp.slots + mlp.staging + mlp.bookkeeping + kv + scratch;
  }
};
MemoryPlan plan_memory(const Model& model, const DecoderOptions& options);

// What Decoder::forward computes and where it puts it.
struct ForwardRequest {
  BlockMasks::Kind kind = BlockMasks::Kind::kDense;
  std::vector<const uint8_t*> forced_input;  // kForced: by layer, [n_tokens, hidden], nonzero = used
  std::vector<const uint8_t*> forced_glu;    // [n_tokens, intermediate]
  float* logits = nullptr;                   // [n_tokens, vocab] or null
  const int32_t* next = nullptr;             // [n_tokens]: the token that each row should predict, < 0: none
  double* nll = nullptr;                     // [n_tokens] or null
};

class Decoder {
 public:
  // Reads resident.bin and pinned regions. Throws BundleError / FlashError / ConfigError. check_resident is told
  // resident.bin as it was read, before anything is laid out anew, and may throw.
  Decoder(std::unique_ptr<Model> model, const DecoderOptions& options,
          const std::function<void(std::span<const uint8_t>)>& check_resident);

  // One token through its own masks: logits [vocab], valid until the next call.
  std::span<const float> step(int32_t token);
  // Dense, streamed layer by layer; with `warm` the column caches take the prompt's masks. Logits of the last token.
  std::span<const float> prefill(std::span<const int32_t> tokens, bool warm);
  // Tokens in blocks through the given kind of masks, every token's logits or losses. Continues after n_past().
  void forward(std::span<const int32_t> tokens, const ForwardRequest& request);

  void reset();        // forget the KV cache
  void reset_cache();  // empty the column caches
  // A simulated engine only (GluMlp::configure).
  void configure(const std::vector<int32_t>& k, float gamma, CachePolicy policy, float decay,
                 const std::vector<int32_t>& capacity);
  void pin_static();  // static caches: the first columns of each region
  void reset_counters();
  void start_trace(std::unique_ptr<TraceWriter> trace) { mlp_->start_trace(std::move(trace)); }
  void start_energies() { mlp_->start_energies(); }
  void finish_trace() { mlp_->finish_trace(); }

  int32_t n_past() const { return n_past_; }
  const Model& model() const { return *model_; }
  const DecoderOptions& options() const { return options_; }
  const Kernels& kernels() const { return *kernels_; }
  const FlashReader& reader() const { return *flash_; }
  const GluMlp& mlp() const { return *mlp_; }
  const Ledger& ledger() const { return ledger_; }
  ReaderCounters flash_counters() const;  // since reset_counters()
  uint64_t n_steps() const { return n_steps_; }

 private:
  // What run_layers needs of a block: its masks, and where its first token stands in the forced ones.
  struct Block {
    BlockMasks::Kind kind;
    bool touch;
    int32_t first;
    const std::vector<const uint8_t*>* forced_input;
    const std::vector<const uint8_t*>* forced_glu;
    const int32_t* tokens;  // of the block
  };

  void load_resident();
  void check_tokens(std::span<const int32_t> tokens) const;
  void embed(std::span<const int32_t> tokens, float* x);
  void fill_angles(int32_t first, int32_t n_tokens);
  KvHead kv_head(int32_t layer, int32_t head) const;
  void attention(int32_t layer, const float* x, int32_t n_tokens, float* out);
  void add_branch(float* branch, const float* norm, int32_t n_tokens);
  void normalise(const float* weight, int32_t n_tokens);
  void run_layers(int32_t n_tokens, const Block* block);
  void run_each_layer(int32_t n_tokens, const Block* block);
  void run_head(const float* x, int32_t n_tokens, float* logits);
  ReaderCounters flash_total() const;

  std::unique_ptr<Model> model_;
  DecoderOptions options_;
  const Kernels* kernels_;
  ThreadPool pool_;
  Projector projector_;
  std::unique_ptr<FlashReader> flash_;
  Arena embedding_buffer_;                         // before its reader: freed after its reads are drained
  std::unique_ptr<FlashReader> embedding_reader_;  // untied: rows must not queue behind the weights
  std::unique_ptr<GluMlp> mlp_;

  int32_t n_past_ = 0;
  uint64_t n_steps_ = 0;
  int64_t hidden_p_ = 0, q_p_ = 0, kv_p_ = 0, vocab_p_ = 0;  // padded widths
  Arena kv_;
  Arena scratch_;
  float *x_ = nullptr, *normed_ = nullptr, *branch_ = nullptr, *q_ = nullptr, *k_ = nullptr, *v_ = nullptr,
        *attended_ = nullptr, *scores_ = nullptr, *logits_ = nullptr, *angles_ = nullptr;
  Ledger ledger_;
  ReaderCounters flash_start_;
};

}  // namespace dipper
