// Python face of the flash reader, the read plan and the DRAM probe. For probes, benchmarks and tests: the engine reads
// natively.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "arena.hpp"
#include "dram_probe.hpp"
#include "errors.hpp"
#include "flash_reader.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using dipper::FlashReader;
using dipper::ReadBackend;
using dipper::ReadRange;

using Offsets = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ReadRows = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

ReadBackend backend_of(const std::string& name) {
  if (name == "auto") return ReadBackend::kAuto;
  if (name == "io_uring") return ReadBackend::kIoUring;
  if (name == "pread") return ReadBackend::kPread;
  throw dipper::ConfigError("Unknown back end \"" + name + "\": give auto, io_uring or pread.");
}

// A reader with its own aligned buffer. The mutex makes it one owner at a time for Python's threads.
class PyReader {
 public:
  PyReader(const std::string& path, const std::string& backend, int depth, bool direct)
      : depth_(static_cast<uint64_t>(depth)), reader_(path, {backend_of(backend), depth, direct}) {}

  const FlashReader& reader() const { return reader_; }

  nb::bytes read(uint64_t offset, uint64_t bytes) {
    if (bytes == 0) return nb::bytes("", 0);
    if (bytes > (uint64_t{1} << 30)) {
      throw dipper::ConfigError("read of " + std::to_string(bytes) + " bytes: at most 1 GiB at once.");
    }
    nb::bytes result = nb::steal<nb::bytes>(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(bytes)));
    if (!result.is_valid()) throw nb::python_error();
    char* const destination = PyBytes_AS_STRING(result.ptr());
    // The lock is taken without the GIL and dropped before it comes back, or two threads could wait for each other.
    const nb::gil_scoped_release release;
    const std::lock_guard lock(mutex_);
    dipper::ReadPlan plan;
    uint8_t* const staging = room_for(bytes + 2 * uint64_t{FlashReader::alignment()});
    plan_reads({&offset, 1}, static_cast<uint32_t>(bytes), FlashReader::alignment(), 1 << 20, staging, plan);
    reader_.wait(reader_.submit(plan.ranges) + plan.ranges.size());
    std::memcpy(destination, staging + plan.staging_offset[0], bytes);
    return result;
  }

  double read_batch(const Offsets& offsets, uint32_t bytes, const std::optional<ReadRows>& out) {
    const size_t n = offsets.shape(0);
    if (out && (out->shape(0) != n || out->shape(1) != bytes)) {
      throw dipper::ConfigError("out has shape [" + std::to_string(out->shape(0)) + ", " +
                                std::to_string(out->shape(1)) + "], but the reads need [" + std::to_string(n) + ", " +
                                std::to_string(bytes) + "].");
    }
    const uint64_t* const offset = offsets.data();
    uint8_t* const rows = out ? out->data() : nullptr;
    const nb::gil_scoped_release release;
    const std::lock_guard lock(mutex_);
    // Without `out` nobody looks at the bytes: reads land in twice as many places as can be in flight, as in an engine
    // that uses its staging again; never in more than 64 MiB.
    const uint64_t n_window = std::clamp<uint64_t>((uint64_t{64} << 20) / std::max(bytes, 1u), 1, 2 * depth_);
    const uint64_t n_places = out ? n : std::min<uint64_t>(n, n_window);
    uint8_t* const buffer = room_for(n_places * bytes);
    std::vector<ReadRange> ranges(n);
    for (size_t i = 0; i < n; ++i) ranges[i] = {offset[i], bytes, buffer + i % n_places * bytes};
    const auto begin = std::chrono::steady_clock::now();
    reader_.wait(reader_.submit(ranges) + n);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    if (rows != nullptr) std::memcpy(rows, buffer, n * bytes);
    return seconds;
  }

 private:
  uint8_t* room_for(uint64_t bytes) {
    if (bytes > buffer_.bytes()) {
      buffer_ = {};  // never both at once
      buffer_ = dipper::Arena(bytes);
    }
    return buffer_.data();
  }

  const uint64_t depth_;
  std::mutex mutex_;
  dipper::Arena buffer_;  // before the reader: freed after its reads are drained
  FlashReader reader_;
};

nb::dict plan_to_dict(const Offsets& offsets, uint32_t record_bytes, uint32_t alignment, uint32_t max_bytes) {
  dipper::ReadPlan plan;
  // Only differences to the start of staging are told, so any aligned address but null does as its start.
  uint8_t* const staging = reinterpret_cast<uint8_t*>(uintptr_t{1} << 30);
  plan_reads({offsets.data(), offsets.shape(0)}, record_bytes, alignment, max_bytes, staging, plan);
  nb::list ranges;
  for (const ReadRange& r : plan.ranges)
    ranges.append(nb::make_tuple(r.offset, r.bytes, static_cast<uint64_t>(r.dst - staging)));
  nb::list staging_offset, n_ranges_needed;
  for (const uint32_t o : plan.staging_offset) staging_offset.append(o);
  for (const uint32_t k : plan.n_ranges_needed) n_ranges_needed.append(k);
  nb::dict result;
  result["ranges"] = ranges;
  result["staging_offset"] = staging_offset;
  result["n_ranges_needed"] = n_ranges_needed;
  result["staging_bytes"] = plan.staging_bytes;
  return result;
}

}  // namespace

void bind_reader(nb::module_& m) {
  nb::class_<PyReader>(m, "FlashReader", "Batched aligned reads of one file: io_uring, else a pool of pread threads.")
      .def(nb::init<const std::string&, const std::string&, int, bool>(), "path"_a, "backend"_a = "auto",
           "depth"_a = 64, "direct"_a = true,
           "backend: auto | io_uring | pread. depth: reads in flight. direct: try O_DIRECT.\n\n"
           "Raises FlashError when the path cannot be read, ConfigError for a back end that is not to be had.")
      .def_prop_ro(
          "backend",
          [](const PyReader& r) { return r.reader().backend() == ReadBackend::kIoUring ? "io_uring" : "pread"; },
          "The back end in use.")
      .def_prop_ro(
          "backend_note", [](const PyReader& r) { return r.reader().backend_note(); },
          "Why io_uring was not taken, or \"\".")
      .def_prop_ro(
          "direct", [](const PyReader& r) { return r.reader().direct(); },
          "Whether reads bypass the page cache (O_DIRECT).")
      .def_prop_ro(
          "direct_note", [](const PyReader& r) { return r.reader().direct_note(); },
          "Why O_DIRECT was not taken, or \"\".")
      .def_prop_ro(
          "file_bytes", [](const PyReader& r) { return r.reader().file_bytes(); }, "Size of the file in bytes.")
      .def_prop_ro(
          "counters",
          [](const PyReader& r) {
            const dipper::ReaderCounters c = r.reader().counters();
            nb::dict counters;
            counters["reads"] = c.reads;
            counters["bytes"] = c.bytes;
            return counters;
          },
          "{'reads': requests given to the kernel, 'bytes': bytes asked of it}.")
      .def("read", &PyReader::read, "offset"_a, "bytes"_a,
           "The bytes at any offset, through reads widened to 4096. Raises FlashError (EIO, short read); the reader "
           "then "
           "refuses further work.")
      .def("read_batch", &PyReader::read_batch, "offsets"_a, "bytes"_a, "out"_a = nb::none(),
           "Reads `bytes` at every offset (uint64, multiples of 4096) as one batch; returns its seconds. "
           "out: uint8 [n, bytes], filled after the clock has stopped.");
  m.def("plan_reads", &plan_to_dict, "offsets"_a, "record_bytes"_a, "alignment"_a = 4096, "max_bytes"_a = 1 << 20,
        "Records at ascending offsets -> {'ranges': [(offset, bytes, position in staging)], 'staging_offset': of each "
        "record, "
        "'n_ranges_needed': of each record, 'staging_bytes'}.");
  m.def("max_staging_bytes", &dipper::max_staging_bytes, "n_records"_a, "record_bytes"_a, "region_bytes"_a,
        "alignment"_a = 4096, "Most staging bytes that any n_records of a region can need.");
  m.def("max_run_bytes", &dipper::max_run_bytes, "n_units"_a, "run_cost"_a, "unit_bytes"_a, "region_bytes"_a,
        "alignment"_a = 4096, "Most staging bytes that runs of units for the cost of n_units single reads can need.");
  m.def("dram_read_gbps", &dipper::dram_read_gbps, "n_threads"_a, "bytes"_a, "seconds"_a = 0.4,
        nb::call_guard<nb::gil_scoped_release>(),
        "DRAM read bandwidth in GB/s (1e9 bytes): n_threads read a buffer of `bytes` for about `seconds`; the median "
        "pass.");
}
