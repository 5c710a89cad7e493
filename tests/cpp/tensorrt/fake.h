// What a fake engine computes: every output depends on every input, on its name, and on the place.
#ifndef TESTS_FAKE_H
#define TESTS_FAKE_H

#include <cstddef>
#include <cstdio>
#include <string>

namespace fake {

inline double read(const std::string& name, const float* values, std::size_t count) {
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) sum += static_cast<double>(values[i]) * static_cast<double>(1 + i % 3);
  return sum / static_cast<double>(count) * static_cast<double>(1 + name.size());
}

inline void write(const std::string& name, double total, float* values, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i)
    values[i] = static_cast<float>(static_cast<double>(i) / static_cast<double>(count) + total / 8 +
                                   static_cast<double>(name.size()) / 16);
}

// Says what a GPU would not say, but go wrong of.
inline void wrong(const std::string& what) { std::printf("wrong: %s\n", what.c_str()); }

}  // namespace fake

#endif
