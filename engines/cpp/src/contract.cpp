#include "mmdit/contract.h"

#include <algorithm>
#include <functional>
#include <sstream>

#include "mmdit/error.h"

namespace mmdit {
namespace {

std::int64_t axis_size(const std::string& axis, const Sizes& sizes) {
  if (auto found = sizes.find(axis); found != sizes.end()) return found->second;
  std::int64_t sum = 0;
  for (std::size_t start = 0; start <= axis.size();) {
    const std::size_t end = std::min(axis.find(" + ", start), axis.size());
    const auto part = sizes.find(axis.substr(start, end - start));
    if (part == sizes.end())
      throw ContractError("the size of each axis follows from the inputs", "none for " + axis,
                          "export the bundle again");
    sum += part->second;
    start = end + 3;
  }
  return sum;
}

std::string shown(const std::vector<Axis>& axes) {
  std::string text = "[";
  for (const Axis& axis : axes) {
    if (text.size() > 1) text += ", ";
    text += axis.name.empty() ? std::to_string(axis.size) : axis.name;
  }
  return text + "]";
}

template <typename Map>
void check_names(const char* what, const std::vector<TensorSpec>& expected, const Map& received) {
  std::string names, missing, unknown;
  for (const TensorSpec& spec : expected) {
    names += (names.empty() ? "" : ", ") + spec.name;
    if (!received.count(spec.name)) missing += " " + spec.name;
  }
  for (const auto& [name, tensor] : received) {
    const auto is_it = [&name = name](const TensorSpec& spec) { return spec.name == name; };
    if (std::none_of(expected.begin(), expected.end(), is_it)) unknown += " " + name;
  }
  if (!missing.empty() || !unknown.empty())
    throw ContractError(std::string("the ") + what + " are " + names, "missing:" + missing + "; unknown:" + unknown,
                        "pass exactly these names");
}

void check_memory(const std::string& name, DType dtype, const Shape& shape, const void* data) {
  if (data == nullptr && element_count(shape) > 0)
    throw ContractError(name + " has memory", "a null pointer", "pass the address of its first element");
  if (reinterpret_cast<std::uintptr_t>(data) % item_size(dtype))
    throw ContractError(name + " lies at a multiple of its elements' size", "an address that is none", "align it");
}

// What has been learnt of the symbolic axes, and from which tensor.
struct SeenSizes {
  Sizes sizes;
  std::map<std::string, std::string> seen_in;

  void add(const std::string& axis, std::int64_t size, const std::string& tensor, const Range& allowed) {
    const auto [found, added] = sizes.emplace(axis, size);
    if (!added) {
      if (found->second == size) return;
      throw ContractError(
          axis + " is one size in all tensors",
          std::to_string(found->second) + " in " + seen_in[axis] + ", " + std::to_string(size) + " in " + tensor,
          "make them equal");
    }
    seen_in[axis] = tensor;
    if (size < allowed.min || size > allowed.max) throw outside(axis, size, tensor, allowed);
  }

  static ContractError outside(const std::string& axis, std::int64_t size, const std::string& tensor, const Range& r) {
    std::ostringstream fix;
    std::string option = axis;
    std::replace(option.begin(), option.end(), '_', '-');
    fix << "export with --" << option << " " << std::min(r.min, size) << ":" << r.opt << ":" << std::max(r.max, size);
    return ContractError(
        axis + " must be " + std::to_string(r.min) + " to " + std::to_string(r.max) + " in this engine",
        std::to_string(size) + " (" + tensor + ")",
        size < 1          ? "pass at least one"
        : axis == "steps" ? "make several conditionings"  // the export has no such option
                          : fix.str());
  }
};

}  // namespace

Shape TensorSpec::shape(const Sizes& sizes) const {
  Shape result;
  for (const Axis& axis : axes) result.push_back(axis.name.empty() ? axis.size : axis_size(axis.name, sizes));
  return result;
}

Sizes Contract::check(const Inputs& received) const {
  check_names("inputs", inputs, received);
  SeenSizes seen;
  for (const TensorSpec& spec : inputs) {
    const ConstTensor& tensor = received.at(spec.name);
    if (tensor.dtype != spec.dtype)
      throw ContractError(spec.name + " is " + name_of(spec.dtype), name_of(tensor.dtype),
                          std::string("convert it to ") + name_of(spec.dtype));
    if (tensor.shape.size() != spec.axes.size())
      throw ContractError(spec.name + " has the axes " + shown(spec.axes), "shape " + to_string(tensor.shape),
                          "reshape it");
    for (std::size_t i = 0; i < spec.axes.size(); ++i) {
      const Axis& axis = spec.axes[i];
      if (!axis.name.empty()) {
        seen.add(axis.name, tensor.shape[i], spec.name, ranges.at(axis.name));
      } else if (tensor.shape[i] != axis.size) {
        throw ContractError(spec.name + " has the axes " + shown(spec.axes), "shape " + to_string(tensor.shape),
                            "its axis " + std::to_string(i) + " must be " + std::to_string(axis.size));
      }
    }
    check_memory(spec.name, tensor.dtype, tensor.shape, tensor.data);
  }
  return seen.sizes;
}

void Contract::check_outputs(const Outputs& given, const Inputs& read, const Sizes& sizes) const {
  check_names("outputs", outputs, given);
  struct Span {
    std::uintptr_t begin, end;
    const std::string* name;
  };
  std::vector<Span> spans;
  const auto span = [](const std::string& name, const void* data, std::size_t count, DType dtype) {
    const auto begin = reinterpret_cast<std::uintptr_t>(data);
    return Span{begin, begin + count * item_size(dtype), &name};
  };
  for (const auto& [name, tensor] : read)
    spans.push_back(span(name, tensor.data, element_count(tensor.shape), tensor.dtype));
  for (const TensorSpec& spec : outputs) {
    const auto found = given.find(spec.name);
    const Tensor& tensor = found->second;
    const Shape expected = spec.shape(sizes);
    if (tensor.dtype != spec.dtype || tensor.shape != expected)
      throw ContractError(
          "the output " + spec.name + " is " + name_of(spec.dtype) + " " + to_string(expected) + " for these inputs",
          std::string(name_of(tensor.dtype)) + " " + to_string(tensor.shape), "pass a tensor like that");
    check_memory(spec.name, tensor.dtype, tensor.shape, tensor.data);
    const Span mine = span(found->first, tensor.data, element_count(tensor.shape), tensor.dtype);
    for (const Span& other : spans)
      if (mine.begin < other.end && other.begin < mine.end)
        throw ContractError("an output has memory of its own, for inputs are never written to",
                            spec.name + " overlaps " + *other.name, "pass other memory for one of them");
    spans.push_back(mine);
  }
}

}  // namespace mmdit
