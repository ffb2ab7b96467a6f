// The few macros that the core's tests need: a fresh machine has a compiler and nothing else.
//
//     TEST(wake_before_park) {
//       CHECK(ready);
//       CHECK_EQ(count, 12);
//       CHECK_THROWS(f(), std::bad_alloc);
//     }
//
// Files of tests are compiled together (tests/runtime/test_cpp_core.py): names are the program's.
// A failed check is printed with its place and values and ends its test.  Checks may be used on the
// test's own thread only: let other threads count, and check the counts.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace torch_spheres::testing {

struct Failed {};

struct Case {
  const char* file;
  const char* name;
  void (*body)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Register {
  Register(const char* file, const char* name, void (*body)()) {
    cases().push_back({file, name, body});
  }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  std::cout << file << ":" << line << ": " << what << std::endl;
  throw Failed{};
}

/// How often a test repeats something: `count` times, or as many times more as the environment's
/// TORCH_SPHERES_TEST_EFFORT says, which `pytest --long` sets.
inline int rounds(int count) {
  static const int effort = [] {
    const char* text = std::getenv("TORCH_SPHERES_TEST_EFFORT");
    return text == nullptr ? 1 : std::max(1, std::atoi(text));
  }();
  return count * effort;
}

template <typename A, typename B>
void check_equal(const A& a, const B& b, const char* text, const char* file, int line) {
  if (a == b) return;
  std::ostringstream message;
  message << text << ": " << a << " != " << b;
  fail(file, line, message.str());
}

/// Runs the tests whose names, or the names of whose files, contain argv[1], or all; returns 0 if
/// some ran and none failed.
inline int run_all_tests(int argc, char** argv) {
  int ran = 0;
  int failed = 0;
  for (const Case& test : cases()) {
    if (argc > 1 && !std::strstr(test.name, argv[1]) && !std::strstr(test.file, argv[1])) continue;
    const auto start = std::chrono::steady_clock::now();
    const char* result = "ok  ";
    try {
      test.body();
    } catch (const Failed&) {
      result = "FAIL";
    } catch (const std::exception& error) {
      std::cout << test.name << ": unexpected exception: " << error.what() << std::endl;
      result = "FAIL";
    }
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    ++ran;
    failed += std::strcmp(result, "FAIL") == 0;
    std::printf("%s %8.1f ms  %s\n", result, took.count(), test.name);
    std::fflush(stdout);
  }
  std::printf("%d tests, %d failed\n", ran, failed);
  return ran > 0 && failed == 0 ? 0 : 1;
}

}  // namespace torch_spheres::testing

#define TEST(name)                                                                              \
  static void test_##name();                                                                    \
  static const torch_spheres::testing::Register register_##name{__FILE__, #name, &test_##name}; \
  static void test_##name()
#define CHECK(condition)                                                            \
  do {                                                                              \
    if (!(condition)) torch_spheres::testing::fail(__FILE__, __LINE__, #condition); \
  } while (false)
#define CHECK_EQ(a, b) \
  torch_spheres::testing::check_equal((a), (b), #a " == " #b, __FILE__, __LINE__)
#define CHECK_THROWS(expression, Type)                                                       \
  do {                                                                                       \
    bool caught_it = false;                                                                  \
    try {                                                                                    \
      (void)(expression);                                                                    \
    } catch (const Type&) {                                                                  \
      caught_it = true;                                                                      \
    }                                                                                        \
    if (!caught_it) {                                                                        \
      torch_spheres::testing::fail(__FILE__, __LINE__, #expression " did not throw " #Type); \
    }                                                                                        \
  } while (false)
