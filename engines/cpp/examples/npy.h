// NumPy's .npy files: float32, float16 and bool arrays, the last axis fastest.
#ifndef MMDIT_EXAMPLES_NPY_H
#define MMDIT_EXAMPLES_NPY_H

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "mmdit/tensor.h"

namespace npy {

struct Array {
  mmdit::DType dtype = mmdit::DType::float32;
  mmdit::Shape shape;
  std::vector<char> data;

  std::size_t count() const { return mmdit::element_count(shape); }
};

// Both throw mmdit::UsageError: it is no such file, or holds other bytes than its header says.
Array read(const std::filesystem::path& file);
Array parse(std::string_view content, const std::string& name);

// Throws mmdit::UsageError: it cannot be written.
void write(const std::filesystem::path& file, const mmdit::Shape& shape, const std::vector<float>& values);

}  // namespace npy

#endif
