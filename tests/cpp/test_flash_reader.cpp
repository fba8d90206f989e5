// Reader and plan: contents, order, failures, on both back ends. Files are made in the current directory.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "check.hpp"
#include "errors.hpp"
#include "flash_reader.hpp"

namespace {

using namespace dipper;

constexpr uint32_t kPage = FlashReader::alignment();

struct Free {
  void operator()(uint8_t* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<uint8_t, Free>;
Buffer aligned_buffer(size_t bytes) {
  Buffer buffer(static_cast<uint8_t*>(std::aligned_alloc(kPage, bytes)));
  std::memset(buffer.get(), 0xEE, bytes);
  return buffer;
}

// A file of known contents: word i is a mix of i.
uint64_t word_at(uint64_t i) { return (i + 1) * 0x9E3779B97F4A7C15ull; }
class TestFile {
 public:
  explicit TestFile(size_t bytes)
      : path_("flash_reader_test_" + std::to_string(::getpid()) + "_" + std::to_string(bytes) + ".bin") {
    std::vector<uint64_t> words((bytes + 7) / 8);
    for (size_t i = 0; i < words.size(); ++i) words[i] = word_at(i);
    std::ofstream(path_, std::ios::binary)
        .write(reinterpret_cast<const char*>(words.data()), static_cast<std::streamsize>(bytes));
    const int fd = ::open(path_.c_str(), O_RDONLY);
    ::fsync(fd);
    ::close(fd);
  }
  ~TestFile() { std::filesystem::remove(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

bool holds(const ReadRange& r) {
  for (uint64_t i = 0; i < r.bytes / 8; ++i) {
    uint64_t word;
    std::memcpy(&word, r.dst + 8 * i, 8);
    if (word != word_at(r.offset / 8 + i)) return false;
  }
  return true;
}

constexpr size_t kFileBytes = size_t{8} << 20;

std::vector<ReadRange> random_ranges(std::mt19937_64& rng, size_t n, uint32_t max_pages, uint8_t* dst) {
  std::vector<ReadRange> ranges;
  for (size_t i = 0; i < n; ++i) {
    const uint32_t bytes = static_cast<uint32_t>(1 + rng() % max_pages) * kPage;
    const uint64_t offset = rng() % ((kFileBytes - bytes) / kPage + 1) * kPage;
    ranges.push_back({offset, bytes, dst});
    dst += bytes;
  }
  return ranges;
}

void test_contents(const ReaderOptions& options, const std::string& path) {
  FlashReader reader(path, options);
  CHECK(reader.file_bytes() == kFileBytes);
  CHECK(reader.backend() == options.backend);
  CHECK(reader.direct() == reader.direct_note().empty());
  std::mt19937_64 rng(7);
  constexpr size_t n = 300;
  const Buffer buffer = aligned_buffer(n * 16 * kPage);
  uint64_t n_submitted = 0;
  uint64_t n_bytes = 0;
  for (int round = 0; round < 4; ++round) {
    std::memset(buffer.get(), 0, n * 16 * kPage);
    const std::vector<ReadRange> ranges = random_ranges(rng, n, 16, buffer.get());
    for (const ReadRange& r : ranges) n_bytes += r.bytes;
    CHECK(reader.submit(std::span(ranges).first(n / 2)) == n_submitted);
    CHECK(reader.submit(std::span(ranges).last(n / 2)) == n_submitted + n / 2);
    n_submitted += n;
    if (round % 2 == 0) {
      reader.wait(n_submitted - 10);
      CHECK(reader.completed() >= n_submitted - 10);
    } else {
      while (reader.completed() < n_submitted) reader.poll();
    }
    reader.wait(n_submitted);
    CHECK(std::all_of(ranges.begin(), ranges.end(), holds));
  }
  CHECK(reader.completed() == n_submitted);
  CHECK(reader.counters().reads == n_submitted);
  CHECK(reader.counters().bytes == n_bytes);
  CHECK(reader.submit({}) == n_submitted);
  reader.wait(n_submitted);
}

// A second thread follows completed() and looks at each range as soon as its ticket is under it.
void test_follower(const ReaderOptions& options, const std::string& path) {
  FlashReader reader(path, options);
  std::mt19937_64 rng(8);
  constexpr size_t n = 500;
  const Buffer buffer = aligned_buffer(n * 4 * kPage);
  const std::vector<ReadRange> ranges = random_ranges(rng, n, 4, buffer.get());
  std::atomic<size_t> n_wrong{0};
  std::thread follower([&] {
    for (uint64_t seen = 0; seen < n;) {
      const uint64_t now = reader.completed();
      if (now < seen) ++n_wrong;
      for (; seen < now; ++seen) n_wrong += holds(ranges[seen]) ? 0 : 1;
      std::this_thread::yield();
    }
  });
  reader.submit(ranges);
  reader.wait(n);
  follower.join();
  CHECK(n_wrong == 0);
}

void test_destroyed_in_flight(const ReaderOptions& options, const std::string& path) {
  std::mt19937_64 rng(9);
  const Buffer buffer = aligned_buffer(200 * 16 * kPage);
  FlashReader reader(path, options);
  reader.submit(random_ranges(rng, 200, 16, buffer.get()));  // the reader goes first, the buffer after it
}

void test_short_read(const ReaderOptions& options) {
  const TestFile file(10 * kPage + 100);
  FlashReader reader(file.path(), options);
  const Buffer buffer = aligned_buffer(16 * kPage);
  const ReadRange good[] = {{0, 8 * kPage, buffer.get()}};
  reader.submit(good);
  reader.wait(1);
  CHECK(holds(good[0]));
  const ReadRange past[] = {{8 * kPage, 4 * kPage, buffer.get()}};
  reader.submit(past);
  CHECK_THROWS(reader.wait(2), FlashError,
               "Reading " + file.path() +
                   " failed at offset 32768 (16384 bytes): short read, 8292 bytes came and the file ends at 41060. "
                   "The file is cut or not padded: pack the model again.");
  CHECK(reader.failed());
  CHECK(reader.completed() == 1);
  CHECK_THROWS(reader.submit(good), FlashError, "short read, 8292 bytes");
  CHECK_THROWS(reader.wait(1), FlashError, "short read");
  FlashReader beyond(file.path(), options);
  const ReadRange far[] = {{64 * kPage, kPage, buffer.get()}};
  beyond.submit(far);
  CHECK_THROWS(beyond.wait(1), FlashError, "offset 262144 (4096 bytes): short read, 0 bytes came");
}

// /proc/self/mem: addresses of this process are readable, address 4096 answers EIO; it refuses O_DIRECT.
void test_eio(const ReaderOptions& options) {
  FlashReader reader("/proc/self/mem", options);
  CHECK(!reader.direct());
  CHECK(reader.direct_note() == (options.direct ? "the file system refuses O_DIRECT" : "not asked for"));
  constexpr size_t n = 200;
  const Buffer source = aligned_buffer(n * kPage);
  const Buffer buffer = aligned_buffer(n * kPage);
  for (size_t i = 0; i < n * kPage; ++i) source.get()[i] = static_cast<uint8_t>(i * 31 >> 3);
  std::vector<ReadRange> ranges;
  for (size_t i = 0; i < n; ++i) {
    ranges.push_back({reinterpret_cast<uint64_t>(source.get()) + i * kPage, kPage, buffer.get() + i * kPage});
  }
  ranges[100].offset = 4096;
  const std::span all(ranges);
  reader.submit(all.first(50));
  reader.wait(50);
  CHECK(std::memcmp(source.get(), buffer.get(), 50 * kPage) == 0);
  reader.submit(all.subspan(50));
  CHECK_THROWS(reader.wait(n), FlashError,
               "Reading /proc/self/mem failed at offset 4096 (4096 bytes): Input/output error (errno 5). The device "
               "could not read this "
               "place: check the disk (dmesg), then fetch or pack the model again.");
  CHECK(reader.failed());
  CHECK(reader.completed() <= 100);
  const uint64_t completed = reader.completed();
  CHECK(std::memcmp(source.get(), buffer.get(), completed * kPage) == 0);
  reader.poll();
  CHECK(reader.completed() == completed);
  CHECK_THROWS(reader.submit(ranges), FlashError, "Input/output error");
}

void test_refusals(const std::string& path) {
  CHECK_THROWS(FlashReader("no/such/flash.bin", {}), FlashError,
               "Cannot open no/such/flash.bin for reading: No such file or directory (errno 2). Check the path and its "
               "permissions.");
  CHECK_THROWS(FlashReader(".", {}), FlashError,
               "Cannot read .: it is a directory; give a file such as its flash.bin.");
  CHECK_THROWS(FlashReader(path, {.depth = 0}), ConfigError,
               "depth is 0, but reads in flight must be between 1 and 4096.");
  CHECK_THROWS(FlashReader(path, {.depth = 5000}), ConfigError, "depth is 5000");
  FlashReader reader(path, {});
  const Buffer buffer = aligned_buffer(2 * kPage);
  const ReadRange ranges[] = {
      {512, kPage, buffer.get()}, {0, 100, buffer.get()}, {0, 0, buffer.get()}, {0, kPage, buffer.get() + 8}};
  for (const ReadRange& r : ranges)
    CHECK_THROWS(reader.submit({&r, 1}), ConfigError, "all three must be multiples of 4096, and bytes not 0.");
  CHECK_THROWS(reader.wait(1), ConfigError, "wait(1) would never end: only 0 reads were submitted.");
  CHECK(reader.counters().reads == 0);
}

void test_plan_random() {
  std::mt19937_64 rng(11);
  for (int round = 0; round < 3000; ++round) {
    const uint32_t record_bytes = 1 + static_cast<uint32_t>(rng() % (round % 3 == 0 ? 20000 : 3000));
    const uint64_t n_columns = 1 + rng() % 200;
    const uint64_t region = rng() % 1000 * kPage;
    const uint32_t max_bytes = kPage * static_cast<uint32_t>(1 + rng() % 16);
    const uint64_t one_in = 1 + rng() % 8;
    std::vector<uint64_t> offsets;
    for (uint64_t c = 0; c < n_columns; ++c) {
      if (rng() % one_in == 0) offsets.push_back(region + c * record_bytes);
    }
    const Buffer owner = aligned_buffer(kPage);
    uint8_t* const staging = owner.get();
    ReadPlan plan;
    plan_reads(offsets, record_bytes, kPage, max_bytes, staging, plan);
    uint64_t position = 0;
    for (size_t i = 0; i < plan.ranges.size(); ++i) {
      const ReadRange& r = plan.ranges[i];
      CHECK(r.offset % kPage == 0 && r.bytes % kPage == 0 && r.bytes > 0 && r.bytes <= max_bytes);
      CHECK(reinterpret_cast<uintptr_t>(r.dst) == reinterpret_cast<uintptr_t>(staging) + position);
      position += r.bytes;
      if (i == 0) continue;
      const ReadRange& before = plan.ranges[i - 1];
      CHECK(r.offset >= before.offset + before.bytes);
      if (r.offset == before.offset + before.bytes)
        CHECK(before.bytes == max_bytes);  // only a cut separates ranges that touch
    }
    CHECK(position == plan.staging_bytes);
    CHECK(plan.staging_bytes <= max_staging_bytes(offsets.size(), record_bytes, n_columns * record_bytes, kPage));
    CHECK(plan.staging_offset.size() == offsets.size() && plan.n_ranges_needed.size() == offsets.size());
    // Byte k of record i lies where some range of the first n_ranges_needed[i] puts it.
    for (size_t i = 0; i < offsets.size(); ++i) {
      for (const uint64_t k : {uint64_t{0}, uint64_t{record_bytes} / 2, uint64_t{record_bytes} - 1}) {
        bool found = false;
        for (uint32_t j = 0; j < plan.n_ranges_needed[i]; ++j) {
          const ReadRange& r = plan.ranges[j];
          const uint64_t at = offsets[i] + k;
          if (at < r.offset || at >= r.offset + r.bytes) continue;
          found = reinterpret_cast<uintptr_t>(r.dst) - reinterpret_cast<uintptr_t>(staging) + (at - r.offset) ==
                  plan.staging_offset[i] + k;
        }
        CHECK(found);
      }
    }
    if (n_failed_checks() > 0) return;
  }
}

void test_plan_by_hand() {
  ReadPlan plan;
  const uint64_t offsets[] = {4000, 4400, 16384, 20480, 40000};
  plan_reads(offsets, 400, kPage, 2 * kPage, nullptr, plan);
  // 4000..4400 crosses into the second page, 4400.. shares it; 16384 and 20480 touch; 40000 is alone.
  CHECK(plan.ranges.size() == 3);
  CHECK(plan.ranges[0].offset == 0 && plan.ranges[0].bytes == 8192);
  CHECK(plan.ranges[1].offset == 16384 && plan.ranges[1].bytes == 8192);
  CHECK(plan.ranges[2].offset == 36864 && plan.ranges[2].bytes == 4096);
  CHECK((plan.staging_offset == std::vector<uint32_t>{4000, 4400, 8192, 12288, 16384 + 3136}));
  CHECK((plan.n_ranges_needed == std::vector<uint32_t>{1, 1, 2, 2, 3}));
  CHECK(plan.staging_bytes == 20480);
  CHECK(max_staging_bytes(0, 400, 1 << 20, kPage) == 0);
  CHECK(max_staging_bytes(1, 400, 1 << 20, kPage) == 8192);
  CHECK(max_staging_bytes(1, 8192, 1 << 20, kPage) == 8192);
  CHECK(max_staging_bytes(1000, 400, 400 * 1000, kPage) == 98 * 4096);
  const uint64_t descending[] = {8192, 4096};
  CHECK_THROWS(plan_reads(descending, 1, kPage, kPage, nullptr, plan), ConfigError,
               "offsets must ascend, but 4096 follows 8192.");
  CHECK_THROWS(plan_reads(offsets, 400, kPage, 5000, nullptr, plan), ConfigError, "max_bytes 5000 a multiple of it");
  const uint64_t wide[] = {0, uint64_t{1} << 33};
  CHECK_THROWS(plan_reads(wide, 3u << 30, kPage, 1u << 30, nullptr, plan), ConfigError,
               "need more than 4 GiB of staging");
}

}  // namespace

int main() {
  test_plan_by_hand();
  test_plan_random();
  const TestFile file(kFileBytes);
  test_refusals(file.path());
  const FlashReader probe(file.path(), {});
  std::printf("auto: %s%s%s\n", probe.backend() == ReadBackend::kIoUring ? "io_uring" : "pread",
              probe.backend_note().empty() ? "" : ", ", probe.backend_note().c_str());
  for (const ReadBackend backend : {ReadBackend::kIoUring, ReadBackend::kPread}) {
    if (backend == ReadBackend::kIoUring && probe.backend() != backend) continue;
    for (const bool direct : {true, false}) {
      for (const int depth : {1, 5, 64, 256}) {
        const ReaderOptions options{backend, depth, direct};
        test_contents(options, file.path());
        test_follower(options, file.path());
        test_destroyed_in_flight(options, file.path());
        test_short_read(options);
        test_eio(options);
      }
    }
  }
  return check_result();
}
