#include "cuda.h"

#include <dlfcn.h>

#include "mmdit/error.h"

namespace mmdit {
namespace {

using Result = int;  // CUresult; 0 is success

// The part of cuda.h that is used, by its names and types: CUdevice is an int, CUdeviceptr a 64-bit address, and
// contexts, streams and events are pointers.
struct Driver {
  using Address = unsigned long long;
  Result (*init)(unsigned);
  Result (*device_count)(int*);
  Result (*device_get)(int*, int);
  Result (*device_name)(char*, int, int);
  Result (*device_attribute)(int*, int, int);
  Result (*retain)(void**, int);
  Result (*release)(int);
  Result (*push)(void*);
  Result (*pop)(void**);
  Result (*synchronize)();
  Result (*stream_synchronize)(void*);
  Result (*stream_create)(void**, unsigned);
  Result (*stream_destroy)(void*);
  Result (*stream_wait)(void*, void*, unsigned);
  Result (*event_create)(void**, unsigned);
  Result (*event_destroy)(void*);
  Result (*event_record)(void*, void*);
  Result (*allocate)(Address*, std::size_t);
  Result (*free)(Address);
  Result (*allocate_async)(Address*, std::size_t, void*);
  Result (*free_async)(Address, void*);
  Result (*copy_async)(Address, Address, std::size_t, void*);
  Result (*upload_async)(Address, const void*, std::size_t, void*);
  Result (*download_async)(void*, Address, std::size_t, void*);
  Result (*pointer_attribute)(void*, int, Address);
  Result (*error_name)(Result, const char**);
  std::string missing;  // why there is no driver
};

constexpr int CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76;  // CUdevice_attribute
constexpr int POINTER_MEMORY_TYPE = 2, POINTER_ORDINAL = 9;  // CUpointer_attribute
constexpr unsigned DEVICE_MEMORY = 2;                        // CUmemorytype
constexpr unsigned STREAM_NON_BLOCKING = 1, EVENT_NO_TIMING = 2;

template <typename Function>
void find(void* library, const char* name, Function& function, std::string& missing) {
  function = reinterpret_cast<Function>(::dlsym(library, name));
  if (!function && missing.empty()) missing = std::string("libcuda.so.1 has no ") + name;
}

Driver open_driver() {
  Driver d = {};
  void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    d.missing = "no libcuda.so.1";
    return d;
  }
  find(library, "cuInit", d.init, d.missing);
  find(library, "cuDeviceGetCount", d.device_count, d.missing);
  find(library, "cuDeviceGet", d.device_get, d.missing);
  find(library, "cuDeviceGetName", d.device_name, d.missing);
  find(library, "cuDeviceGetAttribute", d.device_attribute, d.missing);
  find(library, "cuDevicePrimaryCtxRetain", d.retain, d.missing);
  find(library, "cuDevicePrimaryCtxRelease_v2", d.release, d.missing);
  find(library, "cuCtxPushCurrent_v2", d.push, d.missing);
  find(library, "cuCtxPopCurrent_v2", d.pop, d.missing);
  find(library, "cuCtxSynchronize", d.synchronize, d.missing);
  find(library, "cuStreamSynchronize", d.stream_synchronize, d.missing);
  find(library, "cuStreamCreate", d.stream_create, d.missing);
  find(library, "cuStreamDestroy_v2", d.stream_destroy, d.missing);
  find(library, "cuStreamWaitEvent", d.stream_wait, d.missing);
  find(library, "cuEventCreate", d.event_create, d.missing);
  find(library, "cuEventDestroy_v2", d.event_destroy, d.missing);
  find(library, "cuEventRecord", d.event_record, d.missing);
  find(library, "cuMemAlloc_v2", d.allocate, d.missing);
  find(library, "cuMemFree_v2", d.free, d.missing);
  find(library, "cuMemAllocAsync", d.allocate_async, d.missing);
  find(library, "cuMemFreeAsync", d.free_async, d.missing);
  find(library, "cuMemcpyDtoDAsync_v2", d.copy_async, d.missing);
  find(library, "cuMemcpyHtoDAsync_v2", d.upload_async, d.missing);
  find(library, "cuMemcpyDtoHAsync_v2", d.download_async, d.missing);
  find(library, "cuPointerGetAttribute", d.pointer_attribute, d.missing);
  find(library, "cuGetErrorName", d.error_name, d.missing);
  if (d.missing.empty() && d.init(0)) d.missing = "cuInit fails: the driver finds no GPU";
  return d;
}

const Driver& driver() {
  static const Driver opened = open_driver();
  return opened;
}

void check(Result result, const char* what) {
  if (result == 0) return;
  const char* name = nullptr;
  driver().error_name(result, &name);
  throw MachineError(std::string("CUDA ") + what, name ? name : std::to_string(result),
                     "check the GPU's free memory and its driver (nvidia-smi)");
}

Driver::Address address(const void* pointer) { return reinterpret_cast<Driver::Address>(pointer); }

MachineError no_gpu(const std::string& rule, const std::string& received) {
  return MachineError(rule, received, "run it on a machine with such a GPU; or: mmdit-export … --target ort-cpu");
}

}  // namespace

std::shared_ptr<Gpu> Gpu::open(int index, const std::string& rule) {
  const Driver& d = driver();
  if (!d.missing.empty()) throw no_gpu(rule, d.missing);
  int count = 0;
  check(d.device_count(&count), "counts GPUs");
  if (index < 0 || index >= count) throw no_gpu(rule, "GPU " + std::to_string(index) + " of " + std::to_string(count));
  std::shared_ptr<Gpu> gpu(new Gpu);
  gpu->index_ = index;
  check(d.device_get(&gpu->device_, index), "finds the GPU");
  char name[256] = {};
  int major = 0, minor = 0;
  check(d.device_name(name, sizeof name - 1, gpu->device_), "names the GPU");
  check(d.device_attribute(&major, CAPABILITY_MAJOR, gpu->device_), "says the GPU's capability");
  check(d.device_attribute(&minor, CAPABILITY_MINOR, gpu->device_), "says the GPU's capability");
  gpu->name_ = name;
  gpu->capability_ = std::to_string(major) + "." + std::to_string(minor);
  check(d.retain(&gpu->context_, gpu->device_), "makes the GPU's context");
  return gpu;
}

Gpu::~Gpu() {
  if (context_) driver().release(device_);
}

Gpu::Current::Current(const Gpu& gpu) : gpu_(gpu) { check(driver().push(gpu_.context_), "selects the GPU"); }

Gpu::Current::~Current() {
  void* popped = nullptr;
  driver().pop(&popped);
}

void Gpu::synchronize(void* stream) const {
  const Current current(*this);
  check(driver().stream_synchronize(stream), "waits for a stream");
}

void Gpu::synchronize() const {
  const Current current(*this);
  check(driver().synchronize(), "waits for the GPU");
}

std::shared_ptr<void> Gpu::allocate(std::size_t bytes) const {
  const Current current(*this);
  Driver::Address memory = 0;
  check(driver().allocate(&memory, bytes ? bytes : 1), ("has " + std::to_string(bytes) + " bytes").c_str());
  return {reinterpret_cast<void*>(memory), [gpu = shared_from_this()](void* p) {
            try {
              const Current now(*gpu);
              driver().synchronize();  // what was enqueued may still use it
              driver().free(address(p));
            } catch (const MachineError&) {  // the process ends, and the driver with it
            }
          }};
}

void* Gpu::allocate_on(std::size_t bytes, void* stream) const {
  const Current current(*this);
  Driver::Address memory = 0;
  check(driver().allocate_async(&memory, bytes ? bytes : 1, stream),
        ("has " + std::to_string(bytes) + " bytes").c_str());
  return reinterpret_cast<void*>(memory);
}

void Gpu::free_on(void* memory, void* stream) const noexcept {
  try {
    const Current current(*this);
    driver().free_async(address(memory), stream);
  } catch (const MachineError&) {  // the process ends, and the driver with it
  }
}

void Gpu::copy(void* to, const void* from, std::size_t bytes, void* stream) const {
  const Current current(*this);
  check(driver().copy_async(address(to), address(from), bytes, stream), "copies");
}

void Gpu::upload(void* to, const void* host, std::size_t bytes, void* stream) const {
  const Current current(*this);
  check(driver().upload_async(address(to), host, bytes, stream), "copies to the GPU");
}

void Gpu::download(void* host, const void* from, std::size_t bytes, void* stream) const {
  const Current current(*this);
  check(driver().download_async(host, address(from), bytes, stream), "copies from the GPU");
}

bool Gpu::owns(const void* pointer) const {
  const Current current(*this);
  unsigned type = 0;
  int ordinal = -1;
  return driver().pointer_attribute(&type, POINTER_MEMORY_TYPE, address(pointer)) == 0 && type == DEVICE_MEMORY &&
         driver().pointer_attribute(&ordinal, POINTER_ORDINAL, address(pointer)) == 0 && ordinal == index_;
}

std::shared_ptr<void> Gpu::make_stream() const {
  const Current current(*this);
  void* stream = nullptr;
  check(driver().stream_create(&stream, STREAM_NON_BLOCKING), "makes a stream");
  return {stream, [](void* s) { driver().stream_destroy(s); }};
}

std::shared_ptr<void> Gpu::make_event() const {
  const Current current(*this);
  void* event = nullptr;
  check(driver().event_create(&event, EVENT_NO_TIMING), "makes an event");
  return {event, [](void* e) { driver().event_destroy(e); }};
}

void Gpu::record(void* event, void* stream) const {
  const Current current(*this);
  check(driver().event_record(event, stream), "records an event");
}

void Gpu::wait(void* stream, void* event) const {
  const Current current(*this);
  check(driver().stream_wait(stream, event, 0), "waits for an event");
}

}  // namespace mmdit
