// The refusals of a build without the ONNX Runtime back end.
#include "backend.h"
#include "mmdit/error.h"

namespace mmdit {

void check_onnxruntime(const Target& target) {
  throw MachineError("the target " + target.name + " runs on ONNX Runtime",
                     "this build of the library has no ONNX Runtime back end",
                     "build it with ONNX Runtime's headers and library (engines/cpp/README.md)");
}

std::unique_ptr<Backend> open_onnxruntime(const std::filesystem::path&, const Contract&,
                                          const BackendOptions& options) {
  check_onnxruntime(options.target);
  return nullptr;
}

}  // namespace mmdit
