#include "target.h"

#include <set>

#include "json.h"
#include "mmdit/error.h"

namespace mmdit {
namespace {

UsageError unknown(const std::string& name) {
  return UsageError("a target is one of ort-cpu, ort-cuda, trt, rtx:sm89 (or rtx:sm86+sm89)", quote(name),
                    "name one of them, or auto");
}

// "rtx:sm89+sm86" as "rtx:sm86+sm89": one engine, one name.
std::string rtx_name(const std::string& name) {
  std::set<int> capabilities;
  for (std::size_t at = 4; at <= name.size();) {
    const std::size_t end = std::min(name.find('+', at), name.size());
    const std::string part = name.substr(at, end - at);
    if (part.size() < 4 || part.size() > 5 || part.substr(0, 2) != "sm" ||
        part.find_first_not_of("0123456789", 2) != std::string::npos)
      throw unknown(name);
    capabilities.insert(std::stoi(part.substr(2)));
    at = end + 1;
  }
  std::string ordered;
  for (const int capability : capabilities)
    ordered += (ordered.empty() ? "rtx:sm" : "+sm") + std::to_string(capability);
  return ordered;
}

}  // namespace

Target parse_target(const std::string& name) {
  if (name == "ort-cpu") return {name, Runtime::onnxruntime, false, ""};
  if (name == "ort-cuda") return {name, Runtime::onnxruntime, true, ""};
  if (name == "trt") return {name, Runtime::tensorrt, true, "TensorRT"};
  if (name.substr(0, 4) == "rtx:") return {rtx_name(name), Runtime::tensorrt, true, "TensorRT-RTX"};
  throw unknown(name);
}

}  // namespace mmdit
