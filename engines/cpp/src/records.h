// What a manifest says of tensors and engines, as data. All of it is untrusted until it was read here.
#ifndef MMDIT_SRC_RECORDS_H
#define MMDIT_SRC_RECORDS_H

#include <string>
#include <vector>

#include "json.h"
#include "mmdit/contract.h"

namespace mmdit {

// Something in a manifest is not as we write it; whoever reads the manifest makes a BundleError of it.
struct Malformed {
  std::string what;
};

// One engine file of TensorRT: a run of the model's calls.
struct SegmentRecord {
  std::string file;
  std::vector<TensorSpec> inputs, outputs;
};

// One graph, or a chain of engine files.
struct EngineRecord {
  std::string graph;                      // the ONNX file; what ONNX Runtime runs
  std::string flavour, version;           // TensorRT's; empty of ONNX Runtime
  std::vector<std::string> capabilities;  // "8.9"
  std::vector<Ranges> profiles;           // the runtime takes the first that holds a call
  std::vector<SegmentRecord> segments;    // in the order in which they run
};

// All throw Malformed.
const Json& field(const Json& object, const char* name);
const std::string& text_field(const Json& object, const char* name);
Contract read_contract(const Json& json);
// `tensorrt`: whether it has segments, which are then a chain from the contract's inputs to its outputs.
EngineRecord read_engine(const Json& json, bool tensorrt, const Contract& contract);

}  // namespace mmdit

#endif
