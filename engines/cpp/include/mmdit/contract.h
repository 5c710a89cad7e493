// The I/O contract of an engine: tensor names, dtypes, symbolic axes and their ranges, as the manifest has them.
#ifndef MMDIT_CONTRACT_H
#define MMDIT_CONTRACT_H

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "mmdit/api.h"
#include "mmdit/tensor.h"

namespace mmdit {

// Sizes by symbolic axis: "batch", "img_tokens", "txt_tokens".
using Sizes = std::map<std::string, std::int64_t>;

// Sizes that an axis may have: from min to max, tuned for opt.
struct Range {
  std::int64_t min = 1, opt = 1, max = 1;

  bool operator==(const Range& other) const { return min == other.min && opt == other.opt && max == other.max; }
};
using Ranges = std::map<std::string, Range>;

// A symbolic axis by its name, or a sum of names ("img_tokens + txt_tokens"); a fixed one has no name, but a size.
struct Axis {
  std::string name;
  std::int64_t size = 0;

  bool operator==(const Axis& other) const { return name == other.name && size == other.size; }
};

struct TensorSpec {
  std::string name;
  std::vector<Axis> axes;
  DType dtype = DType::float32;

  MMDIT_API Shape shape(const Sizes& sizes) const;
  bool operator==(const TensorSpec& other) const {
    return name == other.name && axes == other.axes && dtype == other.dtype;
  }
};

struct Contract {
  std::vector<TensorSpec> inputs, outputs;
  Ranges ranges;

  // Checks the inputs before any runtime sees them, and returns the size of each symbolic axis.
  // Throws ContractError: names the tensor or axis, the rule, what was received, and the fix.
  MMDIT_API Sizes check(const Inputs& received) const;
  // Checks that every output is there, as the inputs' sizes make it, and overlaps no other tensor.
  MMDIT_API void check_outputs(const Outputs& outputs, const Inputs& inputs, const Sizes& sizes) const;
};

}  // namespace mmdit

#endif
