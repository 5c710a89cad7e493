// Views of tensors in memory that the caller owns: contiguous, the last axis fastest.
#ifndef MMDIT_TENSOR_H
#define MMDIT_TENSOR_H

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "mmdit/api.h"

namespace mmdit {

enum class DType { float32, float16, bfloat16, boolean };

using Shape = std::vector<std::int64_t>;

struct ConstTensor {
  DType dtype = DType::float32;
  Shape shape;
  const void* data = nullptr;
};

struct Tensor {
  DType dtype = DType::float32;
  Shape shape;
  void* data = nullptr;

  operator ConstTensor() const { return {dtype, shape, data}; }
};

using Inputs = std::map<std::string, ConstTensor>;
using Outputs = std::map<std::string, Tensor>;

// Bytes of one element.
MMDIT_API std::size_t item_size(DType dtype) noexcept;
// torch's name of a type, as contracts have it: "float32", "float16", "bfloat16", "bool".
MMDIT_API const char* name_of(DType dtype) noexcept;
// Elements of a shape without negative sizes.
MMDIT_API std::size_t element_count(const Shape& shape) noexcept;
// "[2, 256, 64]"
MMDIT_API std::string to_string(const Shape& shape);

}  // namespace mmdit

#endif
