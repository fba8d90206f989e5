// The whole test framework: CHECK prints what failed and where; check_result() is what main returns.
#pragma once

#include <cstdio>
#include <string>

inline int& n_failed_checks() {
  static int n = 0;
  return n;
}

#define CHECK(condition)                                                          \
  do {                                                                            \
    if (!(condition)) {                                                           \
      std::fprintf(stderr, "%s:%d: CHECK(%s)\n", __FILE__, __LINE__, #condition); \
      ++n_failed_checks();                                                        \
    }                                                                             \
  } while (false)

// The expression throws `type` and its message contains `text`.
#define CHECK_THROWS(expression, type, text)                                                       \
  do {                                                                                             \
    std::string seen = "nothing thrown";                                                           \
    try {                                                                                          \
      (void)(expression);                                                                          \
    } catch (const type& e) {                                                                      \
      seen = e.what();                                                                             \
    }                                                                                              \
    if (seen.find(text) == std::string::npos) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: expected \"%s\" in: %s\n", __FILE__, __LINE__, #expression, \
                   std::string(text).c_str(), seen.c_str());                                       \
      ++n_failed_checks();                                                                         \
    }                                                                                              \
  } while (false)

inline int check_result() {
  if (n_failed_checks() == 0) std::puts("ok");
  return n_failed_checks() == 0 ? 0 : 1;
}
