// Arenas: alignment, zeroes, moves.
#include <algorithm>

#include "arena.hpp"
#include "check.hpp"

using dipper::Arena;

int main() {
  CHECK(Arena().bytes() == 0 && Arena(0).data() == nullptr);
  for (const size_t bytes : {size_t{1}, size_t{5000}, size_t{3} << 20}) {
    const Arena arena(bytes);
    CHECK(arena.bytes() == bytes);
    CHECK(reinterpret_cast<uintptr_t>(arena.data()) % (bytes < size_t{1} << 20 ? 4096 : size_t{2} << 20) == 0);
    CHECK(std::all_of(arena.data(), arena.data() + bytes, [](uint8_t b) { return b == 0; }));
  }
  Arena a(100);
  a.data()[99] = 7;
  Arena b(std::move(a));
  CHECK(b.data()[99] == 7 && b.bytes() == 100);
  a = std::move(b);
  CHECK(a.data()[99] == 7 && b.bytes() == 0);
  return check_result();
}
