// What tests and `doctor` need of the kernels: the instruction sets at hand, and single products against a reference.
#include "kernels.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

namespace nb = nanobind;

void bind_kernels(nb::module_& m) {
  m.def("isas", &dipper::available_isas, "Instruction sets of this CPU that have kernels, best first.");
  m.def("isa", [] { return dipper::available_isas().front(); }, "The instruction set that `auto` takes.");
}
