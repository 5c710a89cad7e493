// What every runtime does for an Engine. A back end that this build lacks is a file of refusals (left_out.cpp).
#ifndef MMDIT_SRC_BACKEND_H
#define MMDIT_SRC_BACKEND_H

#include <filesystem>
#include <memory>
#include <vector>

#include "cuda.h"
#include "mmdit/engine.h"
#include "records.h"
#include "target.h"

namespace mmdit {

// One graph, or a chain of engine files, loaded on one device.
class Backend {
 public:
  virtual ~Backend() = default;
  // Runs once. Everything was checked; inputs are not written to. May be called from several threads.
  virtual void run(const Inputs& inputs, const Outputs& outputs, const Sizes& sizes, void* stream) = 0;
};

// What to load it from, and how.
struct BackendOptions {
  Target target;
  std::shared_ptr<Gpu> gpu;  // null on the CPU
  int threads = 0;
  Specialize specialize = Specialize::lazy;
  std::filesystem::path runtime_cache;
  bool in_turn = false;  // another engine's runs come between this one's
};

// Whether the runtime is there, and has the target's device: throws MachineError if not. Nothing is deserialized.
void check_onnxruntime(const Target& target);
void check_tensorrt(const Target& target);

// Throw MachineError: it does not load. BundleError: its tensors are not the contract's, or the record's.
std::unique_ptr<Backend> open_onnxruntime(const std::filesystem::path& graph, const Contract& contract,
                                          const BackendOptions& options);
std::unique_ptr<Backend> open_tensorrt(const EngineRecord& record, const std::vector<std::filesystem::path>& files,
                                       const BackendOptions& options);

// The version of TensorRT that is loaded, as a manifest has it: "1.7.1.116".
std::string tensorrt_version();

}  // namespace mmdit

#endif
