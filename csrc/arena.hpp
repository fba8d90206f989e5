// Anonymous memory that the budget accounts for, zeroed, freed as a whole. From 1 MiB up it starts at a huge-page
// boundary and asks for huge pages: fewer TLB misses, and a 64 KiB read into it is one physical segment instead of 16
// (half its CPU time).
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

namespace dipper {

class Arena {
 public:
  Arena() = default;
  explicit Arena(size_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    constexpr size_t kHugePage = size_t{2} << 20;
    const bool huge = bytes >= kHugePage / 2;
    mapped_bytes_ = bytes + (huge ? kHugePage : 0);  // address space alone: what lies outside is never touched
    void* p = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mapped_ = static_cast<uint8_t*>(p);
    data_ = mapped_;
    if (!huge) return;
    data_ += (kHugePage - reinterpret_cast<uintptr_t>(mapped_) % kHugePage) % kHugePage;
#ifdef MADV_HUGEPAGE
    madvise(data_, bytes, MADV_HUGEPAGE);  // refused on some systems, where small pages do
#endif
  }
  Arena(Arena&& other) noexcept { swap(other); }
  Arena& operator=(Arena&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Arena() {
    if (mapped_ != nullptr) munmap(mapped_, mapped_bytes_);
  }

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  float* floats() const { return reinterpret_cast<float*>(data_); }

 private:
  void swap(Arena& other) noexcept {
    std::swap(mapped_, other.mapped_);
    std::swap(mapped_bytes_, other.mapped_bytes_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

  uint8_t* mapped_ = nullptr;
  size_t mapped_bytes_ = 0;
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace dipper
