#include "trace_writer.hpp"

#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "errors.hpp"

namespace dipper {

TraceWriter::TraceWriter(const std::string& path, const std::string& header_json, bool with_scores)
    : path_(path), with_scores_(with_scores), file_(std::fopen(path.c_str(), "wb")) {
  if (file_ == nullptr) throw ConfigError("cannot write the trace " + path + ": " + std::strerror(errno));
  const uint32_t version = 2;
  const auto length = static_cast<uint32_t>(header_json.size());
  put("DIPTRACE", 8);
  put(&version, 4);
  put(&length, 4);
  put(header_json.data(), header_json.size());
}

TraceWriter::~TraceWriter() {
  if (file_ != nullptr) std::fclose(file_);
}

void TraceWriter::finish() {
  const bool flushed = std::fflush(file_) == 0 && fsync(fileno(file_)) == 0;
  const int error = errno;
  const bool closed = std::fclose(std::exchange(file_, nullptr)) == 0;
  if (!flushed || !closed) {
    throw FlashError("the trace " + path_ + " could not be written: " + std::strerror(flushed ? errno : error) +
                     "; free space or write it elsewhere");
  }
}

void TraceWriter::put(const void* data, size_t bytes) {
  if (bytes != 0 && std::fwrite(data, 1, bytes, file_) != bytes) {
    throw FlashError("the trace " + path_ + " could not be written: " + std::strerror(errno) +
                     "; free space or write it elsewhere");
  }
}

void TraceWriter::write(const Frame& f) {
  uint64_t flash_bytes = 0;
  for (const ReadRange& r : f.reads) flash_bytes += r.bytes;
  const size_t n_scores = with_scores_ ? f.scores.size() : 0;
  const uint32_t head[8] = {
      static_cast<uint32_t>(f.phase),        f.position,
      static_cast<uint32_t>(f.token),        f.region,
      static_cast<uint32_t>(f.mask.size()),  static_cast<uint32_t>(f.mask.size() - f.misses.size()),
      static_cast<uint32_t>(f.reads.size()), static_cast<uint32_t>(n_scores)};
  const uint64_t bytes[2] = {flash_bytes, f.useful_bytes};
  put(head, sizeof head);
  put(bytes, sizeof bytes);
  put(f.mask.data(), f.mask.size_bytes());
  std::vector<uint8_t> hit(f.mask.size(), 1);
  for (size_t i = 0, m = 0; i < f.mask.size() && m < f.misses.size(); ++i) {
    if (f.mask[i] == f.misses[m]) {
      hit[i] = 0;
      ++m;
    }
  }
  put(hit.data(), hit.size());
  for (const ReadRange& r : f.reads) {
    put(&r.offset, sizeof r.offset);
    put(&r.bytes, sizeof r.bytes);
  }
  std::vector<float> magnitude(n_scores);
  for (size_t i = 0; i < n_scores; ++i) {
    magnitude[i] = std::fabs(f.scores[i]) * (f.factors != nullptr ? f.factors[i] : 1.0f);
  }
  put(magnitude.data(), magnitude.size() * sizeof(float));
}

}  // namespace dipper
