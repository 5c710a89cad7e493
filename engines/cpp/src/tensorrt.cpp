// TensorRT and TensorRT-RTX engines over the caller's GPU memory, on the caller's stream. One source: which of the two
// it is, the headers say.
//
// A model that was cut into segments runs as one. All segments and profiles share one workspace for activations, so
// calls take turns; what passes between segments lives in the stream's order until its last reader is enqueued.
#include <NvInferRuntime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>

#include "backend.h"
#include "chain.h"
#include "json.h"
#include "mapped_file.h"
#include "mmdit/error.h"
#include "rtx.h"
#include "work_stream.h"

namespace mmdit {
namespace {

namespace trt = nvinfer1;

#if defined(TRT_MAJOR_RTX)
const char* const FLAVOUR = "TensorRT-RTX";
#else
const char* const FLAVOUR = "TensorRT";
#endif
// "The pointer must have at least 256-byte alignment" (NvInferRuntime.h, setTensorAddress).
constexpr std::uintptr_t ALIGNMENT = 256;

// Keeps what TensorRT says is wrong, for the message of the error that follows. TensorRT calls it from any thread.
class Log : public trt::ILogger {
 public:
  void log(Severity severity, char const* message) noexcept override {
    if (severity > Severity::kERROR) return;
    try {
      const std::lock_guard<std::mutex> guard(lock_);
      said_ = (said_ + " | " + message).substr(0, 600);
    } catch (const std::exception&) {  // no memory for a message
    }
  }
  // What was said since this was last asked, the cause first.
  std::string last() {
    const std::lock_guard<std::mutex> guard(lock_);
    std::string said = said_.empty() ? "it gave no reason" : said_.substr(3);
    said_.clear();
    return said;
  }

 private:
  std::mutex lock_;
  std::string said_;
};

MachineError failed(Log& log, const std::string& what) {
  return MachineError(std::string(FLAVOUR) + " " + what, quote(log.last(), 600),
                      "check the GPU's free memory and its driver (nvidia-smi)");
}

BundleError unlike_record(const SegmentRecord& record, const std::string& received) {
  return BundleError(record.file + " has the tensors that the manifest says", received, "export the bundle again");
}

trt::Dims dims_of(const Shape& shape) {
  trt::Dims dims = {};
  dims.nbDims = static_cast<std::int32_t>(shape.size());  // read_specs refuses more than there is room for
  std::copy(shape.begin(), shape.end(), dims.d);
  return dims;
}

Shape shape_of(const trt::Dims& dims) { return {dims.d, dims.d + std::max(dims.nbDims, 0)}; }

bool same_type(trt::DataType type, DType dtype) {
  switch (dtype) {
    case DType::float32:
      return type == trt::DataType::kFLOAT;
    case DType::float16:
      return type == trt::DataType::kHALF;
    case DType::bfloat16:
      return type == trt::DataType::kBF16;
    case DType::boolean:
      return type == trt::DataType::kBOOL;
  }
  return false;
}

// The engine reads and writes the addresses that it is given: its tensors must be those of the record.
void check_tensors(const trt::ICudaEngine& engine, const SegmentRecord& record) {
  std::map<std::string, std::pair<const TensorSpec*, trt::TensorIOMode>> expected;
  for (const TensorSpec& spec : record.inputs) expected[spec.name] = {&spec, trt::TensorIOMode::kINPUT};
  for (const TensorSpec& spec : record.outputs) expected[spec.name] = {&spec, trt::TensorIOMode::kOUTPUT};
  const std::int32_t count = engine.getNbIOTensors();
  if (count != static_cast<std::int32_t>(expected.size()))
    throw unlike_record(record, std::to_string(count) + " tensors");
  for (std::int32_t i = 0; i < count; ++i) {
    const char* const name = engine.getIOTensorName(i);
    const auto found = expected.find(name);
    if (found == expected.end()) throw unlike_record(record, quote(name));
    const auto& [spec, mode] = found->second;
    if (engine.getTensorLocation(name) != trt::TensorLocation::kDEVICE)
      throw unlike_record(record, quote(name) + " is in the host's memory");
    if (engine.getTensorIOMode(name) != mode || !same_type(engine.getTensorDataType(name), spec->dtype) ||
        engine.getTensorShape(name).nbDims != static_cast<std::int32_t>(spec->axes.size()))
      throw unlike_record(record, quote(name) + " of another type or rank, or read where it should be written");
  }
}

struct Segment {
  const SegmentRecord* record;
  std::unique_ptr<trt::ICudaEngine> engine;
  std::unique_ptr<trt::IRuntimeConfig> config;
};

// An execution context of one segment, at one profile.
class Context {
 public:
  Context(const SegmentRecord& record, std::unique_ptr<trt::IExecutionContext> execution)
      : record_(&record), execution_(std::move(execution)) {}

  // Sets shapes, where they changed, and addresses.
  void bind(const std::map<std::string, void*>& addresses, const Sizes& sizes) {
    if (sizes != sizes_) {
      sizes_.clear();
      for (const TensorSpec& spec : record_->inputs)
        if (!execution_->setInputShape(spec.name.c_str(), dims_of(spec.shape(sizes))))
          throw unlike_record(*record_, spec.name + " of shape " + to_string(spec.shape(sizes)) + " is refused");
      for (const TensorSpec& spec : record_->outputs) {
        // It writes as much as it says, whatever memory it is given.
        const Shape shape = shape_of(execution_->getTensorShape(spec.name.c_str()));
        if (shape != spec.shape(sizes))
          throw unlike_record(*record_,
                              spec.name + " is " + to_string(shape) + ", not " + to_string(spec.shape(sizes)));
      }
      sizes_ = sizes;
    }
    for (const auto* specs : {&record_->inputs, &record_->outputs})
      for (const TensorSpec& spec : *specs)
        if (!execution_->setTensorAddress(spec.name.c_str(), addresses.at(spec.name)))
          throw unlike_record(*record_, "the address of " + spec.name + " is refused");
  }
  bool enqueue(void* stream) { return execution_->enqueueV3(static_cast<cudaStream_t>(stream)); }

 private:
  const SegmentRecord* record_;
  std::unique_ptr<trt::IExecutionContext> execution_;
  Sizes sizes_;  // that it was bound to; empty for none
};

// The tensors of one call: the caller's memory, and memory of the stream's for what lies between segments.
class Live {
 public:
  Live(const Gpu& gpu, void* stream) : gpu_(gpu), stream_(stream) {}
  ~Live() {
    for (const auto& [name, memory] : made_) gpu_.free_on(memory, stream_);
  }
  Live(const Live&) = delete;
  Live& operator=(const Live&) = delete;

  void* make(const std::string& name, std::size_t bytes) {
    void* const memory = gpu_.allocate_on(bytes, stream_);
    made_[name] = memory;
    return addresses[name] = memory;
  }
  void drop(const std::string& name) {
    if (const auto found = made_.find(name); found != made_.end()) {
      gpu_.free_on(found->second, stream_);
      made_.erase(found);
    }
  }

  std::map<std::string, void*> addresses;

 private:
  const Gpu& gpu_;
  void* stream_;
  std::map<std::string, void*> made_;
};

class TensorRTBackend : public Backend {
 public:
  TensorRTBackend(const EngineRecord& record, const std::vector<std::filesystem::path>& files,
                  const BackendOptions& options)
      : record_(record), gpu_(options.gpu), last_read_(last_read(record.segments)), stream_(gpu_) {
    const Gpu::Current current(*gpu_);
    runtime_.reset(trt::createInferRuntime(log_));
    if (!runtime_) throw failed(log_, "makes a runtime");
    for (std::size_t i = 0; i < files.size(); ++i) load(record_.segments[i], files[i], options);
    std::int64_t bytes = 1;
    for (const Segment& segment : segments_) bytes = std::max(bytes, segment.engine->getDeviceMemorySizeV2());
    workspace_bytes_ = bytes;
    workspace_ = gpu_->allocate(static_cast<std::size_t>(bytes));
    // What cannot run for lack of memory fails here, and not at the first call.
    stream_.run(nullptr, [this](void* stream) { chain(0, stream); });
  }

  ~TensorRTBackend() override {
    try {
      const Gpu::Current current(*gpu_);
      gpu_->synchronize();
      kernels_.save();
      // What was made of something goes before it; a context that outlives the runtime cache ends the process.
      chains_.clear();
      segments_.clear();
      kernels_ = {};
      runtime_.reset();
    } catch (const Error&) {  // the driver is gone, and all it held with it
    }
  }

  void run(const Inputs& inputs, const Outputs& outputs, const Sizes& sizes, void* stream) override {
    const std::size_t profile = choose_profile(record_.profiles, sizes);
    const std::lock_guard<std::mutex> guard(lock_);
    const Gpu::Current current(*gpu_);
    stream_.run(stream, [&](void* work) { enqueue(chain(profile, work), inputs, outputs, sizes, work); });
  }

 private:
  using Chain = std::vector<Context>;

  void load(const SegmentRecord& record, const std::filesystem::path& path, const BackendOptions& options) {
    const MappedFile file(path);
    Segment segment{
        &record, std::unique_ptr<trt::ICudaEngine>(runtime_->deserializeCudaEngine(file.data(), file.size())), nullptr};
    if (!segment.engine)
      throw MachineError(std::string(FLAVOUR) + " " + tensorrt_version() + " loads " + record.file,
                         quote(log_.last(), 600), "export the bundle again, on this machine");
    check_tensors(*segment.engine, record);
    segment.config.reset(segment.engine->createRuntimeConfig());
    if (!segment.config) throw failed(log_, "configures " + record.file);
    segment.config->setExecutionContextAllocationStrategy(trt::ExecutionContextAllocationStrategy::kUSER_MANAGED);
    kernels_.configure(*segment.config, options.specialize, options.runtime_cache);
    segments_.push_back(std::move(segment));
  }

  // The contexts that calls of a profile run.
  Chain& chain(std::size_t profile, void* stream) {
    if (const auto found = chains_.find(profile); found != chains_.end()) return found->second;
    Chain made;
    try {
      for (const Segment& segment : segments_) made.emplace_back(*segment.record, context(segment, profile, stream));
    } catch (const Error&) {
      gpu_->synchronize(stream);  // the profiles of those that were made are still on their way to the GPU
      throw;
    }
    kernels_.save();  // most are compiled when a context is made; a killed process keeps these
    return chains_.emplace(profile, std::move(made)).first->second;
  }

  std::unique_ptr<trt::IExecutionContext> context(const Segment& segment, std::size_t profile, void* stream) {
    std::unique_ptr<trt::IExecutionContext> execution(segment.engine->createExecutionContext(segment.config.get()));
    if (!execution) throw failed(log_, "makes an execution context of " + segment.record->file);
    execution->setDeviceMemoryV2(workspace_.get(), workspace_bytes_);
    if (!execution->setOptimizationProfileAsync(static_cast<std::int32_t>(profile), static_cast<cudaStream_t>(stream)))
      throw failed(log_, "selects profile " + std::to_string(profile) + " of " + segment.record->file);
    return execution;
  }

  void enqueue(Chain& chain, const Inputs& inputs, const Outputs& outputs, const Sizes& sizes, void* stream) {
    Live live(*gpu_, stream);
    for (const auto& [name, tensor] : inputs) {
      // An address that TensorRT only reads, or one of a copy, where it cannot take the caller's.
      live.addresses[name] = const_cast<void*>(tensor.data);
      if (!aligned(tensor.data)) gpu_->copy(live.make(name, bytes_of(tensor)), tensor.data, bytes_of(tensor), stream);
    }
    std::set<std::string> beside;  // outputs that are written to memory of ours first
    for (const auto& [name, tensor] : outputs) {
      live.addresses[name] = tensor.data;
      if (!aligned(tensor.data)) live.make(name, bytes_of(tensor)), beside.insert(name);
    }
    for (std::size_t i = 0; i < chain.size(); ++i) {
      const SegmentRecord& record = record_.segments[i];
      for (const TensorSpec& spec : record.outputs)
        if (!live.addresses.count(spec.name)) live.make(spec.name, bytes_of({spec.dtype, spec.shape(sizes), nullptr}));
      chain[i].bind(live.addresses, sizes);
      if (!chain[i].enqueue(stream)) throw failed(log_, "enqueues " + record.file);
      for (const std::string& name : last_read_[i])
        if (!outputs.count(name)) live.drop(name);
    }
    for (const std::string& name : beside)
      gpu_->copy(outputs.at(name).data, live.addresses.at(name), bytes_of(outputs.at(name)), stream);
  }

  static bool aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % ALIGNMENT == 0; }
  static std::size_t bytes_of(const ConstTensor& tensor) {
    return element_count(tensor.shape) * item_size(tensor.dtype);
  }

  const EngineRecord record_;
  std::shared_ptr<Gpu> gpu_;
  const std::vector<std::vector<std::string>> last_read_;
  std::mutex lock_;
  Log log_;  // TensorRT needs it as long as anything that it made
  std::unique_ptr<trt::IRuntime> runtime_;
  CompiledKernels kernels_;
  std::vector<Segment> segments_;
  std::shared_ptr<void> workspace_;
  std::int64_t workspace_bytes_ = 0;
  std::map<std::size_t, Chain> chains_;
  WorkStream stream_;
};

}  // namespace

void check_tensorrt(const Target& target) {
  if (target.flavour != FLAVOUR)
    throw MachineError("the target " + target.name + " runs in " + target.flavour,
                       std::string("this build of the library is for ") + FLAVOUR,
                       "build it with " + target.flavour + "'s headers and library (engines/cpp/README.md)");
}

std::string tensorrt_version() {
  return std::to_string(getInferLibMajorVersion()) + "." + std::to_string(getInferLibMinorVersion()) + "." +
         std::to_string(getInferLibPatchVersion()) + "." + std::to_string(getInferLibBuildVersion());
}

std::unique_ptr<Backend> open_tensorrt(const EngineRecord& record, const std::vector<std::filesystem::path>& files,
                                       const BackendOptions& options) {
  check_tensorrt(options.target);
  return std::make_unique<TensorRTBackend>(record, files, options);
}

}  // namespace mmdit
