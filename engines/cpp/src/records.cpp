#include "records.h"

#include <algorithm>
#include <map>
#include <set>

namespace mmdit {
namespace {

constexpr std::int64_t MAX_SIZE = 1000000000;  // of an axis: products of a few stay within 64 bits only if checked
constexpr std::size_t MAX_RANK = 8;            // TensorRT's Dims::MAX_DIMS

const Json::Array& array_field(const Json& object, const char* name) {
  if (const auto* array = field(object, name).as<Json::Array>()) return *array;
  throw Malformed{std::string(name) + " is no array"};
}

std::int64_t axis_length(const Json& json, std::int64_t least) {
  const auto* size = json.as<std::int64_t>();
  if (!size || *size < least || *size > MAX_SIZE) throw Malformed{"the size " + shown(json)};
  return *size;
}

Ranges read_ranges(const Json& json) {
  const auto* object = json.as<Json::Object>();
  if (!object || object->empty()) throw Malformed{"ranges are by axis"};
  Ranges ranges;
  for (const auto& [axis, sizes] : *object) {
    const auto* three = sizes.as<Json::Array>();
    if (axis.empty()) throw Malformed{"the range of an axis without a name"};  // an axis without one has a fixed size
    if (!three || three->size() != 3) throw Malformed{"the range of " + quote(axis) + " is no [min, opt, max]"};
    const Range range{axis_length((*three)[0], 1), axis_length((*three)[1], 1), axis_length((*three)[2], 1)};
    if (range.min > range.opt || range.opt > range.max) throw Malformed{"the range of " + quote(axis) + " falls"};
    ranges[axis] = range;
  }
  return ranges;
}

DType read_dtype(const std::string& name) {
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16, DType::boolean})
    if (name == name_of(dtype)) return dtype;
  throw Malformed{"the dtype " + quote(name)};
}

Axis read_axis(const Json& json, const Ranges& ranges, bool sums) {
  const auto* name = json.as<std::string>();
  if (!name) return {"", axis_length(json, 1)};
  for (std::size_t start = 0; start <= name->size();) {
    const std::size_t end = std::min(sums ? name->find(" + ", start) : std::string::npos, name->size());
    if (!ranges.count(name->substr(start, end - start)))
      throw Malformed{"the axis " + quote(*name) + " without a range"};
    start = end + 3;
  }
  return {*name, 0};
}

// No tensor within the ranges has more bytes than an address reaches: sizes are multiplied freely after this.
void check_bytes(const TensorSpec& spec, const Ranges& ranges) {
  double bytes = 4;
  for (const Axis& axis : spec.axes) {
    double size = static_cast<double>(axis.size);
    if (!axis.name.empty()) {
      size = 0;
      for (const auto& [name, range] : ranges)
        if (axis.name.find(name) != std::string::npos) size += static_cast<double>(range.max);
    }
    bytes *= size;
  }
  if (bytes > 1e17) throw Malformed{"the tensor " + quote(spec.name) + " has " + std::to_string(bytes) + " bytes"};
}

std::vector<TensorSpec> read_specs(const Json& json, const char* name, const Ranges& ranges, bool sums) {
  std::vector<TensorSpec> specs;
  std::set<std::string> names;
  for (const Json& entry : array_field(json, name)) {
    TensorSpec spec{text_field(entry, "name"), {}, read_dtype(text_field(entry, "dtype"))};
    for (const Json& axis : array_field(entry, "axes")) spec.axes.push_back(read_axis(axis, ranges, sums));
    if (spec.axes.empty() || spec.axes.size() > MAX_RANK)
      throw Malformed{quote(spec.name) + " has no or too many axes"};
    if (!names.insert(spec.name).second) throw Malformed{"the tensor " + quote(spec.name) + " twice"};
    check_bytes(spec, ranges);
    specs.push_back(std::move(spec));
  }
  if (specs.empty()) throw Malformed{std::string("no ") + name};
  return specs;
}

// Addresses are taken by these names: what a segment reads was written before, so.
void check_chain(const EngineRecord& engine, const Contract& contract) {
  std::map<std::string, TensorSpec> known;
  for (const TensorSpec& spec : contract.inputs) known[spec.name] = spec;
  const auto is_known = [&](const TensorSpec& spec) {
    const auto found = known.find(spec.name);
    return found != known.end() && found->second == spec;
  };
  for (const SegmentRecord& segment : engine.segments) {
    for (const TensorSpec& spec : segment.inputs)
      if (!is_known(spec))
        throw Malformed{quote(segment.file) + " reads " + quote(spec.name) + ", which nothing before it writes so"};
    for (const TensorSpec& spec : segment.outputs)
      if (!known.emplace(spec.name, spec).second)
        throw Malformed{quote(segment.file) + " writes " + quote(spec.name) + " again"};
  }
  for (const TensorSpec& spec : contract.outputs)
    if (!is_known(spec)) throw Malformed{"no segment writes " + quote(spec.name) + " as the contract has it"};
}

}  // namespace

const Json& field(const Json& object, const char* name) {
  if (const Json* found = object.find(name)) return *found;
  throw Malformed{std::string("no ") + name};
}

const std::string& text_field(const Json& object, const char* name) {
  const auto* text = field(object, name).as<std::string>();
  if (!text || text->empty()) throw Malformed{std::string(name) + " is " + shown(field(object, name))};
  return *text;
}

Contract read_contract(const Json& json) {
  Contract contract;
  contract.ranges = read_ranges(field(json, "ranges"));
  contract.inputs = read_specs(json, "inputs", contract.ranges, false);
  contract.outputs = read_specs(json, "outputs", contract.ranges, true);
  for (const TensorSpec& output : contract.outputs)
    for (const TensorSpec& input : contract.inputs)
      if (input.name == output.name) throw Malformed{quote(input.name) + " is both input and output"};
  return contract;
}

EngineRecord read_engine(const Json& json, bool tensorrt, const Contract& contract) {
  EngineRecord engine;
  engine.graph = text_field(json, "graph");
  if (!tensorrt) return engine;
  engine.flavour = text_field(json, "flavour");
  engine.version = text_field(json, "version");
  for (const Json& capability : array_field(json, "capabilities")) {
    if (!capability.as<std::string>()) throw Malformed{"the capability " + shown(capability)};
    engine.capabilities.push_back(*capability.as<std::string>());
  }
  for (const Json& profile : array_field(json, "profiles")) {
    engine.profiles.push_back(read_ranges(profile));
    for (const auto& [axis, range] : contract.ranges)
      if (!engine.profiles.back().count(axis)) throw Malformed{"a profile without a range for " + quote(axis)};
  }
  for (const Json& segment : array_field(json, "segments"))
    engine.segments.push_back({text_field(segment, "file"), read_specs(segment, "inputs", contract.ranges, true),
                               read_specs(segment, "outputs", contract.ranges, true)});
  if (engine.profiles.empty() || engine.segments.empty()) throw Malformed{"no profiles or no segments"};
  check_chain(engine, contract);
  return engine;
}

}  // namespace mmdit
