// ONNX Runtime over the caller's memory: inputs and outputs are bound where they are, and weights are mapped.
//
// A session is configured as the Python package's (mmdit_deploy/runtime/ort.py), so that both give the same bits.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <set>

#include "backend.h"
#include "json.h"
#include "mmdit/error.h"

namespace mmdit {
namespace {

// Sessions keep it alive: statics of a program may hold engines until the end.
std::shared_ptr<Ort::Env> environment() {
  static const auto shared = std::make_shared<Ort::Env>(ORT_LOGGING_LEVEL_ERROR, "mmdit");
  return shared;
}

ONNXTensorElementDataType element_type(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case DType::float16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case DType::bfloat16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case DType::boolean:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
  }
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

const char* provider_of(const Target& target) { return target.gpu ? "CUDAExecutionProvider" : "CPUExecutionProvider"; }

MachineError failed(const std::string& what, const std::string& said) {
  return MachineError("ONNX Runtime " + Ort::GetVersionString() + " " + what, quote(said, 600),
                      "check that the bundle fits this version (mmdit-inspect BUNDLE)");
}

void add_cuda(Ort::SessionOptions& options, int device) {
  OrtCUDAProviderOptionsV2* cuda = nullptr;
  Ort::ThrowOnError(Ort::GetApi().CreateCUDAProviderOptions(&cuda));
  const std::unique_ptr<OrtCUDAProviderOptionsV2, decltype(Ort::GetApi().ReleaseCUDAProviderOptions)> owner(
      cuda, Ort::GetApi().ReleaseCUDAProviderOptions);
  const std::string index = std::to_string(device);
  const char *key = "device_id", *value = index.c_str();
  Ort::ThrowOnError(Ort::GetApi().UpdateCUDAProviderOptions(cuda, &key, &value, 1));
  options.AppendExecutionProvider_CUDA_V2(*cuda);
}

Ort::SessionOptions session_options(const BackendOptions& wanted) {
  Ort::SessionOptions options;
  options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_ERROR);
  // Q/DQ are to be computed as they are written: what ONNX Runtime makes of them on CPU fails to load with FP8, and
  // for INT4 weights rounds the input to INT8, which nobody planned.
  options.AddConfigEntry("session.disable_quant_qdq", "1");
  if (wanted.threads > 0) options.SetIntraOpNumThreads(wanted.threads);
  // Its threads leave the cores when a run is over: spinning, they would make the other's run longer.
  if (wanted.in_turn) options.AddConfigEntry("session.force_spinning_stop", "1");
  if (wanted.gpu) {
    options.AddConfigEntry("session.record_ep_graph_assignment_info", "1");
    add_cuda(options, wanted.gpu->index());
  }
  return options;
}

#if ORT_API_VERSION >= 24
// That the provider got the model, and not the CPU for want of kernels. Beside these operators, ONNX Runtime puts
// nodes on the CPU on purpose.
void check_assignment(const Ort::Session& session, const Target& target) {
  static const std::set<std::string> model = {"Attention",
                                              "BiasGelu",
                                              "FastGelu",
                                              "FusedGemm",
                                              "FusedMatMul",
                                              "Gelu",
                                              "Gemm",
                                              "LayerNormalization",
                                              "MatMul",
                                              "MultiHeadAttention",
                                              "Softmax",
                                              "RMSNormalization",
                                              "SkipLayerNormalization",
                                              "SimplifiedLayerNormalization",
                                              "SkipSimplifiedLayerNormalization"};
  std::set<std::string> elsewhere;
  for (const auto& subgraph : session.GetEpGraphAssignmentInfo())
    if (std::string(subgraph.GetEpName()) != provider_of(target))
      for (const auto& node : subgraph.GetNodes())
        if (model.count(node.GetOperatorType())) elsewhere.insert(node.GetOperatorType());
  if (elsewhere.empty()) return;
  std::string names;
  for (const std::string& name : elsewhere) names += (names.empty() ? "" : ", ") + name;
  throw MachineError("the target " + target.name + " runs the model on " + provider_of(target) + " or not at all",
                     "ONNX Runtime has no kernel there for some " + names,
                     "install a newer ONNX Runtime, or export with --fp16");
}
#else
void check_assignment(const Ort::Session&, const Target&) {}  // these headers cannot ask (before 1.24)
#endif

// The graph's inputs or outputs against the contract's: names, types, ranks and fixed sizes.
template <typename TypeOf>
void check_tensors(const char* what, const std::vector<std::string>& names, const TypeOf& type_of,
                   const std::vector<TensorSpec>& specs) {
  const auto refuse = [what](const std::string& received) {
    throw BundleError(std::string("the graph's ") + what + " are the contract's", received,
                      "copy the bundle again, or export it again");
  };
  if (names.size() != specs.size()) refuse(std::to_string(names.size()) + " of them");
  for (std::size_t i = 0; i < names.size(); ++i) {
    const auto spec = std::find_if(specs.begin(), specs.end(), [&](const auto& s) { return s.name == names[i]; });
    if (spec == specs.end()) refuse(quote(names[i]));
    const Ort::TypeInfo type = type_of(i);  // it owns what follows
    if (type.GetONNXType() != ONNX_TYPE_TENSOR) refuse(quote(names[i]) + " is no tensor");
    const auto info = type.GetTensorTypeAndShapeInfo();
    const std::vector<std::int64_t> shape = info.GetShape();
    bool same = info.GetElementType() == element_type(spec->dtype) && shape.size() == spec->axes.size();
    for (std::size_t k = 0; same && k < shape.size(); ++k)
      same = shape[k] < 0 || !spec->axes[k].name.empty() || shape[k] == spec->axes[k].size;
    if (!same) refuse(quote(names[i]) + " of shape " + to_string(shape) + ", or of another type");
  }
}

class OrtBackend : public Backend {
 public:
  OrtBackend(const std::filesystem::path& graph, const Contract& contract, const BackendOptions& options)
      : environment_(environment()),
        gpu_(options.gpu),
        memory_(gpu_ ? Ort::MemoryInfo("Cuda", OrtDeviceAllocator, gpu_->index(), OrtMemTypeDefault)
                     : Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault)),
        session_(*environment_, graph.c_str(), session_options(options)) {
    if (gpu_) check_assignment(session_, options.target);
    Ort::AllocatorWithDefaultOptions strings;
    std::vector<std::string> inputs, outputs;
    for (std::size_t i = 0; i < session_.GetInputCount(); ++i)
      inputs.emplace_back(session_.GetInputNameAllocated(i, strings).get());
    for (std::size_t i = 0; i < session_.GetOutputCount(); ++i)
      outputs.emplace_back(session_.GetOutputNameAllocated(i, strings).get());
    check_tensors("inputs", inputs, [this](std::size_t i) { return session_.GetInputTypeInfo(i); }, contract.inputs);
    check_tensors(
        "outputs", outputs, [this](std::size_t i) { return session_.GetOutputTypeInfo(i); }, contract.outputs);
  }

  void run(const Inputs& inputs, const Outputs& outputs, const Sizes&, void* stream) override {
    if (gpu_) gpu_->synchronize(stream);  // ONNX Runtime has a stream of its own
    try {
      Ort::IoBinding binding(session_);
      for (const auto& [name, tensor] : inputs) {
        // Bound as an input, it is only read.
        binding.BindInput(name.c_str(), value(tensor.dtype, tensor.shape, const_cast<void*>(tensor.data)));
      }
      for (const auto& [name, tensor] : outputs)
        binding.BindOutput(name.c_str(), value(tensor.dtype, tensor.shape, tensor.data));
      session_.Run(Ort::RunOptions{nullptr}, binding);
      binding.SynchronizeOutputs();
    } catch (const Ort::Exception& error) {
      throw failed("runs the graph", error.what());
    }
  }

 private:
  Ort::Value value(DType dtype, const Shape& shape, void* data) const {
    return Ort::Value::CreateTensor(memory_, data, element_count(shape) * item_size(dtype), shape.data(), shape.size(),
                                    element_type(dtype));
  }

  std::shared_ptr<Ort::Env> environment_;
  std::shared_ptr<Gpu> gpu_;
  Ort::MemoryInfo memory_;
  Ort::Session session_;
};

}  // namespace

void check_onnxruntime(const Target& target) {
  // Before anything of it is called: an older library than the headers gives no functions at all.
  if (!OrtGetApiBase()->GetApi(ORT_API_VERSION))
    throw MachineError("ONNX Runtime is at least the version whose headers the library was built with, 1." +
                           std::to_string(ORT_API_VERSION),
                       OrtGetApiBase()->GetVersionString(), "install a newer ONNX Runtime");
  std::vector<std::string> providers;
  try {
    providers = Ort::GetAvailableProviders();
  } catch (const Ort::Exception& error) {
    throw failed("names its execution providers", error.what());
  }
  if (std::find(providers.begin(), providers.end(), provider_of(target)) == providers.end())
    throw MachineError("the target " + target.name + " runs on ONNX Runtime's " + provider_of(target),
                       "this ONNX Runtime has none", "on a machine with an NVIDIA GPU: link ONNX Runtime's GPU build");
}

std::unique_ptr<Backend> open_onnxruntime(const std::filesystem::path& graph, const Contract& contract,
                                          const BackendOptions& options) {
  check_onnxruntime(options.target);
  try {
    return std::make_unique<OrtBackend>(graph, contract, options);
  } catch (const Ort::Exception& error) {
    throw failed("loads the graph", error.what());
  }
}

}  // namespace mmdit
