// Prints what mmdit/flow.h computes, bit by bit, for a test to compare with PyTorch:
//
//     flow-values levels < LINES     STEPS SHIFT LAST TERMINAL TIME_SCALE a line, in hexadecimal floats, nan for none
//     flow-values round DTYPE < FP32 float16 or bfloat16 of each, and back
#include <cmath>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include "mmdit/error.h"
#include "mmdit/flow.h"

namespace {

void print_levels() {
  int steps;
  double shift, last, terminal, scale;
  while (std::scanf("%d %la %la %la %la", &steps, &shift, &last, &terminal, &scale) == 5) {
    mmdit::Schedule schedule{steps, shift, std::nullopt, std::nullopt};
    if (!std::isnan(last)) schedule.last = last;
    if (!std::isnan(terminal)) schedule.terminal = terminal;
    try {
      for (const float level : mmdit::noise_levels(schedule))
        std::printf("%a:%a ", static_cast<double>(level), static_cast<double>(mmdit::timestep_of(level, scale)));
      std::printf("\n");
    } catch (const mmdit::UsageError& error) {
      std::printf("UsageError %s\n", error.rule().c_str());
    }
  }
}

void print_rounded(mmdit::DType dtype) {
  const std::string input((std::istreambuf_iterator<char>(std::cin)), std::istreambuf_iterator<char>());
  std::vector<float> values(input.size() / sizeof(float));
  std::memcpy(values.data(), input.data(), values.size() * sizeof(float));
  std::vector<char> rounded(values.size() * 2);
  mmdit::from_float(values.data(), values.size(), dtype, rounded.data());
  mmdit::to_float(rounded.data(), values.size(), dtype, values.data());
  std::cout.write(rounded.data(), static_cast<std::streamsize>(rounded.size()));
  std::cout.write(reinterpret_cast<const char*>(values.data()),
                  static_cast<std::streamsize>(values.size() * sizeof(float)));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && !std::strcmp(argv[1], "levels")) return print_levels(), 0;
  if (argc == 3)
    return print_rounded(std::strcmp(argv[2], "float16") ? mmdit::DType::bfloat16 : mmdit::DType::float16), 0;
  return 2;
}
