// What Python asks of the kernels: the instruction sets at hand, the room that keys and values take.
#include "kernels.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

namespace nb = nanobind;

void bind_kernels(nb::module_& m) {
  m.def("isas", &dipper::available_isas, "Instruction sets of this CPU that have kernels, best first.");
  m.def(
      "kv_position_bytes",
      [](const std::string& kv, int32_t head_dim) { return dipper::kv_position_bytes(dipper::kv_codes(kv), head_dim); },
      nb::arg("kv"), nb::arg("head_dim"), "Bytes of the keys and values of one position and head.");
  m.def("isa", [] { return dipper::available_isas().front(); }, "The instruction set that `auto` takes.");
}
