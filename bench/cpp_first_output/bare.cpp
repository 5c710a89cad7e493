// bare GRAPH BATCH IMG_TOKENS TXT_TOKENS: the first output by ONNX Runtime alone, with nothing checked.
#include <onnxruntime_cxx_api.h>

#include <map>

#include "feed.h"

int main(int, char** argv) {
  const auto begun = std::chrono::steady_clock::now();
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "bare");
  Ort::SessionOptions options;
  options.AddConfigEntry("session.disable_quant_qdq", "1");
  Ort::Session session(env, argv[1], options);
  const double loaded = seconds_since(begun);
  Ort::AllocatorWithDefaultOptions strings;
  const auto memory_info = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  std::map<std::string, std::vector<float>> memory;
  Ort::IoBinding binding(session);
  const auto bind = [&](const std::string& name, const Ort::TypeInfo& type, bool input) {
    const auto info = type.GetTensorTypeAndShapeInfo();
    std::vector<std::int64_t> shape = info.GetShape();
    std::vector<const char*> axes(shape.size());
    info.GetSymbolicDimensions(axes.data(), axes.size());
    std::size_t count = 1;
    for (std::size_t i = 0; i < shape.size(); ++i) {
      if (shape[i] < 0) shape[i] = size_of(axes[i], argv);
      count *= static_cast<std::size_t>(shape[i]);
    }
    std::vector<float>& values = memory[name] = input ? feed(name, count) : std::vector<float>(count);
    Ort::Value value = Ort::Value::CreateTensor<float>(memory_info, values.data(), count, shape.data(), shape.size());
    if (input) {
      binding.BindInput(name.c_str(), value);
    } else {
      binding.BindOutput(name.c_str(), value);
    }
  };
  for (std::size_t i = 0; i < session.GetInputCount(); ++i)
    bind(session.GetInputNameAllocated(i, strings).get(), session.GetInputTypeInfo(i), true);
  const std::string out = session.GetOutputNameAllocated(0, strings).get();
  bind(out, session.GetOutputTypeInfo(0), false);
  session.Run(Ort::RunOptions{nullptr}, binding);
  report(loaded, seconds_since(begun), 0, memory[out]);
}
