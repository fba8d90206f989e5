#include <nanobind/nanobind.h>

void bind_reader(nanobind::module_&) {}
