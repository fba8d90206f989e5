// The Python module _core: one bind_* function per native module, and the mapping of native errors to dipper.errors.
#include <nanobind/nanobind.h>

#include "errors.hpp"

namespace nb = nanobind;

void bind_cache(nb::module_& m);
void bind_reader(nb::module_& m);
void bind_kernels(nb::module_& m);
void bind_decoder(nb::module_& m);

NB_MODULE(_core, m) {
  m.doc() = "Native core of dipper: selection, column cache, flash reader, kernels, decoder.";
  m.attr("code_sha256") = DIPPER_CODE_SHA256;
  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    const auto raise = [](const char* type, const char* what) {
      nb::object cls = nb::module_::import_("dipper.errors").attr(type);
      PyErr_SetString(cls.ptr(), what);
    };
    try {
      std::rethrow_exception(p);
    } catch (const dipper::ConfigError& e) {
      raise("ConfigError", e.what());
    } catch (const dipper::BundleError& e) {
      raise("BundleError", e.what());
    } catch (const dipper::FlashError& e) {
      raise("FlashError", e.what());
    }
  });
  bind_cache(m);
  bind_reader(m);
  bind_kernels(m);
  bind_decoder(m);
}
