#include <nanobind/nanobind.h>

void bind_cache(nanobind::module_&) {}
