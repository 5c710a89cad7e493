// A runtime on one kind of device, by its name: ort-cpu, ort-cuda, trt, rtx:sm86+sm89.
#ifndef MMDIT_SRC_TARGET_H
#define MMDIT_SRC_TARGET_H

#include <string>

namespace mmdit {

enum class Runtime { onnxruntime, tensorrt };

struct Target {
  std::string name;
  Runtime runtime = Runtime::onnxruntime;
  bool gpu = false;
  std::string flavour;  // TensorRT's: "TensorRT" or "TensorRT-RTX"
};

// Throws UsageError.
Target parse_target(const std::string& name);

}  // namespace mmdit

#endif
