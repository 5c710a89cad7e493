// The refusals of a build without the TensorRT back end.
#include "backend.h"
#include "mmdit/error.h"

namespace mmdit {

void check_tensorrt(const Target& target) {
  throw MachineError("the target " + target.name + " runs in " + target.flavour,
                     "this build of the library has no TensorRT back end",
                     "build it with " + target.flavour + "'s headers and library (engines/cpp/README.md)");
}

std::unique_ptr<Backend> open_tensorrt(const EngineRecord&, const std::vector<std::filesystem::path>&,
                                       const BackendOptions& options) {
  check_tensorrt(options.target);
  return nullptr;
}

std::string tensorrt_version() { return ""; }

}  // namespace mmdit
