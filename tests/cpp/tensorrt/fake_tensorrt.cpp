// A TensorRT that computes `fake` (fake.h) of each segment, in the order of the fake GPU's streams, on the addresses
// and shapes that it was given: a wrong address, one that was freed too early, a shape that was not set, or another
// call in the same workspace at the same time gives wrong numbers or a line about it.
//
// An "engine file" says its tensors in lines: in|out NAME AXIS…, all fp32. FAKE_TRT names what is to fail.
#include <NvInferRuntime.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "fake.h"
#include "fake_memory.h"
#include "fake_streams.h"
#include "unused_methods.h"  // generated: classes whose methods all end the process

namespace {

using namespace nvinfer1;

bool fails(const char* what) {
  const char* const named = std::getenv("FAKE_TRT");
  return named && !std::strcmp(named, what);
}

struct Binding {
  std::string name;
  bool input;
  std::vector<std::string> axes;
};

std::vector<Binding> parse(std::string const& text) {
  std::vector<Binding> bindings;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string mode, axis;
    Binding binding;
    words >> mode >> binding.name;
    binding.input = mode == "in";
    while (words >> axis) binding.axes.push_back(axis);
    bindings.push_back(binding);
  }
  return bindings;
}

constexpr std::size_t WORKSPACE = 4096;

struct Values {
  std::string name;
  float* start;
  std::size_t count;
  bool there(char const* who) const { return fake::usable(start, count * sizeof(float), (who + name).c_str()); }
};

// One run of a segment: all that it was given when it was enqueued.
struct Work {
  std::vector<Values> inputs, outputs;
  void* workspace;

  double total() const {
    double sum = 0;
    for (Values const& input : inputs)
      if (input.there("reading ")) sum += fake::read(input.name, input.start, input.count);
    return sum;
  }
  // It runs for a while: it reads its inputs more than once, and keeps what it has in the workspace.
  void begin() const {
    if (!fake::usable(workspace, WORKSPACE, "a segment's begin")) return;
    std::memset(workspace, 0xee, WORKSPACE);
    double const sum = total();
    std::memcpy(workspace, &sum, sizeof sum);
  }
  void end() const {
    if (!fake::usable(workspace, WORKSPACE, "a segment's end")) return;
    double sum = 0;
    std::memcpy(&sum, workspace, sizeof sum);
    for (Values const& output : outputs)
      if (output.there("writing ")) fake::write(output.name, (sum + total()) / 2, output.start, output.count);
  }
};

// What a context's enqueued work needs of it.
struct InFlight {
  std::atomic<int> operations{0};
  std::atomic<bool> has_profile{false};
};

class Context final : public IExecutionContext, public unused::VExecutionContext {
 public:
  explicit Context(std::vector<Binding> const& bindings) : bindings_(bindings) { mImpl = this; }
  ~Context() override {
    if (in_flight_->operations) fake::wrong("an execution context ends before its work");
  }
  void setDeviceMemoryV2(void* memory, int64_t size) noexcept override {
    workspace_ = memory;
    workspace_size_ = size;
  }
  bool setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept override {
    static std::atomic<int> calls{0};
    if (stream == nullptr || fails("profile") || (fails("second profile") && calls++ > 0)) return false;
    profile_ = profile;
    enqueue(stream, [flight = in_flight_] { flight->has_profile = true; });
    return true;
  }
  bool setInputShape(char const* name, Dims const& dims) noexcept override {
    Binding const& binding = find(name);
    if (!binding.input || dims.nbDims != static_cast<int32_t>(binding.axes.size()) || fails("shape")) return false;
    for (int32_t i = 0; i < dims.nbDims; ++i) sizes_[binding.axes[i]] = dims.d[i];
    return true;
  }
  Dims getTensorShape(char const* name) const noexcept override {
    Dims dims = {};
    for (std::string const& axis : find(name).axes) {
      auto const size = sizes_.find(axis);
      dims.d[dims.nbDims++] = std::isdigit(axis[0]) ? std::stol(axis) : size == sizes_.end() ? -1 : size->second;
    }
    if (fails("record")) dims.d[0] += 1;
    return dims;
  }
  bool setTensorAddress(char const* name, void* data) noexcept override {
    addresses_[name] = static_cast<float*>(data);
    return reinterpret_cast<std::uintptr_t>(data) % 256 == 0;
  }
  bool enqueueV3(cudaStream_t stream) noexcept override {
    static std::atomic<int> calls{0};
    if (fails("enqueue") || (fails("second enqueue") && calls++ > 0)) return false;
    if (profile_ < 0 || stream == nullptr || workspace_size_ < static_cast<int64_t>(WORKSPACE)) return false;
    Work work = {{}, {}, workspace_};
    for (Binding const& binding : bindings_)
      (binding.input ? work.inputs : work.outputs)
          .push_back({binding.name, addresses_.at(binding.name), count(binding)});
    enqueue(stream, [work, flight = in_flight_] {
      if (!flight->has_profile) fake::wrong("a segment runs before its profile is set");
      work.begin();
    });
    enqueue(stream, [work] { work.end(); });
    return true;
  }

 private:
  template <typename Operation>
  void enqueue(cudaStream_t stream, Operation const& operation) {
    ++in_flight_->operations;
    fake::enqueue(stream, [operation, flight = in_flight_] {
      operation();
      --flight->operations;
    });
  }
  Binding const& find(std::string const& name) const {
    for (Binding const& binding : bindings_)
      if (binding.name == name) return binding;
    std::abort();
  }
  std::size_t count(Binding const& binding) const {
    Dims const dims = getTensorShape(binding.name.c_str());
    std::size_t product = 1;
    for (int32_t i = 0; i < dims.nbDims; ++i) product *= static_cast<std::size_t>(dims.d[i]);
    return product;
  }

  std::vector<Binding> bindings_;
  std::map<std::string, int64_t> sizes_;
  std::map<std::string, float*> addresses_;
  void* workspace_ = nullptr;
  int64_t workspace_size_ = 0;
  int32_t profile_ = -1;
  std::shared_ptr<InFlight> in_flight_ = std::make_shared<InFlight>();
};

class Config final : public IRuntimeConfig, public unused::VRuntimeConfig {
 public:
  Config() { mImpl = this; }
  void setExecutionContextAllocationStrategy(ExecutionContextAllocationStrategy strategy) noexcept override {
    strategy_ = strategy;
  }
  ExecutionContextAllocationStrategy strategy_ = ExecutionContextAllocationStrategy::kSTATIC;
};

class Engine final : public ICudaEngine, public unused::VCudaEngine {
 public:
  explicit Engine(std::string const& text) : bindings_(parse(text)) { mImpl = this; }
  int32_t getNbIOTensors() const noexcept override { return static_cast<int32_t>(bindings_.size()); }
  char const* getIOTensorName(int32_t i) const noexcept override { return bindings_[i].name.c_str(); }
  TensorLocation getTensorLocation(char const*) const noexcept override {
    return fails("host") ? TensorLocation::kHOST : TensorLocation::kDEVICE;
  }
  TensorIOMode getTensorIOMode(char const* name) const noexcept override {
    return find(name).input ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
  }
  DataType getTensorDataType(char const*) const noexcept override { return DataType::kFLOAT; }
  Dims getTensorShape(char const* name) const noexcept override {
    Dims dims = {};
    dims.nbDims = static_cast<int32_t>(find(name).axes.size());
    return dims;
  }
  int64_t getDeviceMemorySizeV2() const noexcept override { return static_cast<int64_t>(WORKSPACE); }
  IRuntimeConfig* createRuntimeConfig() noexcept override { return new Config; }
  IExecutionContext* createExecutionContextWithRuntimeConfig(IRuntimeConfig*) noexcept override {
    return fails("context") ? nullptr : new Context(bindings_);
  }

 private:
  Binding const& find(std::string const& name) const {
    for (Binding const& binding : bindings_)
      if (binding.name == name) return binding;
    std::abort();
  }
  std::vector<Binding> bindings_;
};

class Runtime final : public IRuntime, public unused::VRuntime {
 public:
  explicit Runtime(ILogger& logger) : logger_(logger) { mImpl = this; }
  ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override {
    if (fails("load")) {
      logger_.log(ILogger::Severity::kERROR, "the file is broken");
      logger_.log(ILogger::Severity::kINFO, "and the weather is fine");
      return nullptr;
    }
    return new Engine(std::string(static_cast<char const*>(blob), size));
  }

 private:
  ILogger& logger_;
};

}  // namespace

extern "C" {
void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept {
  if (version != NV_TENSORRT_VERSION || fails("runtime")) return nullptr;
  return static_cast<IRuntime*>(new Runtime(*static_cast<ILogger*>(logger)));
}
int32_t getInferLibMajorVersion() noexcept { return 11; }
int32_t getInferLibMinorVersion() noexcept { return 1; }
int32_t getInferLibPatchVersion() noexcept { return 0; }
int32_t getInferLibBuildVersion() noexcept { return 106; }
}
