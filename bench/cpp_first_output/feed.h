// The inputs of both programs: numbers of a pattern, the same for the same name and size.
#ifndef BENCH_FEED_H
#define BENCH_FEED_H

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

// A size of an axis: BATCH, IMG_TOKENS and TXT_TOKENS are the programs' arguments 2 to 4.
inline std::int64_t size_of(const std::string& axis, char** argv) {
  return std::stoll(argv[axis == "batch" ? 2 : axis == "img_tokens" ? 3 : 4]);
}

inline std::vector<float> feed(const std::string& name, std::size_t count) {
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = static_cast<float>((i * 37 + name.size()) % 64) / 64.0f;
  return values;
}

inline double seconds_since(std::chrono::steady_clock::time_point begun) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
}

// One line of JSON: seconds from the start of main, and a sum that tells whether both computed the same.
inline void report(double loaded, double first, double hashing, const std::vector<float>& output) {
  double sum = 0;
  for (const float value : output) sum += value;
  std::printf("{\"loaded\": %.6f, \"first_output\": %.6f, \"hashing\": %.6f, \"sum\": %.17g}\n", loaded, first, hashing,
              sum);
}

#endif
