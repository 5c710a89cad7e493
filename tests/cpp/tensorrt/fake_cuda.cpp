// A CUDA driver over the host's memory: what is enqueued is done at once, what is freed is gone, and one of each sort
// may be told to fail. At the end, what was not freed is printed.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace {

using Address = unsigned long long;

struct Gpu {
  std::mutex lock;
  std::map<Address, std::size_t> memory;
  std::set<void*> streams, events;
  int contexts = 0;

  ~Gpu() {
    std::printf("left: %zu allocations, %zu streams, %zu events, %d contexts\n", memory.size(), streams.size(),
                events.size(), contexts);
  }
};

Gpu& gpu() {
  static Gpu the_gpu;
  return the_gpu;
}

thread_local int current = 0;  // contexts on this thread's stack

int with_context() { return current > 0 ? 0 : 201; }  // CUDA_ERROR_INVALID_CONTEXT

int allocate(Address* into, std::size_t bytes) {
  if (bytes > (std::size_t{1} << 32)) return 2;  // CUDA_ERROR_OUT_OF_MEMORY
  void* const memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(memory, 0xff, bytes);  // NaNs: nobody reads what was not written
  const std::lock_guard<std::mutex> guard(gpu().lock);
  *into = reinterpret_cast<Address>(memory);
  gpu().memory[*into] = bytes;
  return with_context();
}

int release(Address memory) {
  const std::lock_guard<std::mutex> guard(gpu().lock);
  if (!gpu().memory.erase(memory)) return 1;  // CUDA_ERROR_INVALID_VALUE
  std::free(reinterpret_cast<void*>(memory));
  return with_context();
}

int make(std::set<void*>& of, void** into) {
  const std::lock_guard<std::mutex> guard(gpu().lock);
  *into = std::malloc(16);
  of.insert(*into);
  return with_context();
}

int destroy(std::set<void*>& of, void* one) {
  const std::lock_guard<std::mutex> guard(gpu().lock);
  if (!of.erase(one)) return 400;  // CUDA_ERROR_INVALID_HANDLE
  std::free(one);
  return 0;
}

// A stream that the driver knows: one of its own, the default one, or the program's (small numbers).
int known(void* stream) {
  const std::lock_guard<std::mutex> guard(gpu().lock);
  return reinterpret_cast<Address>(stream) < 100 || gpu().streams.count(stream) ? with_context() : 400;
}

}  // namespace

extern "C" {
int cuInit(unsigned) { return gpu().contexts, 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGet(int* device, int index) { return *device = 7 + index, 0; }
int cuDeviceGetName(char* name, int, int) { return std::strcpy(name, "Fake GPU"), 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) { return *value = attribute == 75 ? 8 : 9, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  ++gpu().contexts;
  *context = &gpu();
  return device == 7 ? 0 : 101;
}
int cuDevicePrimaryCtxRelease_v2(int) { return --gpu().contexts, 0; }
int cuCtxPushCurrent_v2(void* context) { return ++current, context == &gpu() ? 0 : 201; }
int cuCtxPopCurrent_v2(void**) { return --current, 0; }
int cuCtxSynchronize() { return with_context(); }
int cuStreamSynchronize(void* stream) { return known(stream); }
int cuStreamCreate(void** stream, unsigned flags) { return flags == 1 ? make(gpu().streams, stream) : 1; }
int cuStreamDestroy_v2(void* stream) { return destroy(gpu().streams, stream); }
int cuStreamWaitEvent(void* stream, void* event, unsigned) { return gpu().events.count(event) ? known(stream) : 400; }
int cuEventCreate(void** event, unsigned flags) { return flags == 2 ? make(gpu().events, event) : 1; }
int cuEventDestroy_v2(void* event) { return destroy(gpu().events, event); }
int cuEventRecord(void* event, void* stream) { return gpu().events.count(event) ? known(stream) : 400; }
int cuMemAlloc_v2(Address* memory, std::size_t bytes) { return allocate(memory, bytes); }
int cuMemFree_v2(Address memory) { return release(memory); }
int cuMemAllocAsync(Address* memory, std::size_t bytes, void*) { return allocate(memory, bytes); }
int cuMemFreeAsync(Address memory, void*) { return release(memory); }
int cuMemcpyDtoDAsync_v2(Address to, Address from, std::size_t bytes, void* stream) {
  std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
  return known(stream);
}
int cuMemcpyHtoDAsync_v2(Address to, const void* from, std::size_t bytes, void* stream) {
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return known(stream);
}
int cuMemcpyDtoHAsync_v2(void* to, Address from, std::size_t bytes, void* stream) {
  std::memcpy(to, reinterpret_cast<void*>(from), bytes);
  return known(stream);
}
int cuPointerGetAttribute(void* value, int attribute, Address pointer) {
  const std::lock_guard<std::mutex> guard(gpu().lock);
  auto found = gpu().memory.upper_bound(pointer);
  if (found == gpu().memory.begin() || pointer >= (--found)->first + found->second) return 1;
  *static_cast<int*>(value) = attribute == 2 ? 2 : 0;  // device memory, of GPU 0
  return 0;
}
int cuGetErrorName(int, const char** name) { return *name = "CUDA_ERROR_FAKE", 0; }
}
