// The functions of CUDA's driver that the library calls, over the fake GPU's streams and memory. At the end, what was
// not freed is printed.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

#include "fake_memory.h"
#include "fake_streams.h"

namespace {

using Address = unsigned long long;

constexpr int INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, INVALID_HANDLE = 400;

struct Gpu {
  std::mutex lock;
  std::set<void*> streams;
  std::map<void*, fake::Mark> events;
  int contexts = 0;

  Gpu() { fake::pending(), fake::allocations(); }  // these end after this
  ~Gpu() {
    std::printf("left: %zu allocations, %zu streams, %zu events, %d contexts, %zu operations\n", fake::allocations(),
                streams.size(), events.size(), contexts, fake::pending());
  }
};

Gpu& gpu() {
  static Gpu the_gpu;
  return the_gpu;
}

thread_local int current = 0;  // contexts on this thread's stack

int with_context() { return current > 0 ? 0 : INVALID_CONTEXT; }
void* at(Address address) { return reinterpret_cast<void*>(address); }

int allocate(Address* into, std::size_t bytes, bool promised) {
  if (bytes > (std::size_t{1} << 32)) return OUT_OF_MEMORY;
  *into = reinterpret_cast<Address>(fake::reserve(bytes, promised));
  return with_context();
}

// A stream that the driver knows: one of its own, the default one, or the program's (small numbers).
int known(void* stream) {
  const std::lock_guard<std::mutex> guard(gpu().lock);
  return reinterpret_cast<Address>(stream) < 100 || gpu().streams.count(stream) ? with_context() : INVALID_HANDLE;
}

// What `work` enqueues on a stream, or the refusal.
template <typename Work>
int on(void* stream, const Work& work) {
  const int refusal = known(stream);
  if (!refusal) work();
  return refusal;
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
int cuCtxPushCurrent_v2(void* context) { return ++current, context == &gpu() ? 0 : INVALID_CONTEXT; }
int cuCtxPopCurrent_v2(void**) { return --current, 0; }
int cuCtxSynchronize() { return fake::finish_all(), with_context(); }

int cuStreamSynchronize(void* stream) {
  return on(stream, [&] { fake::finish(stream); });
}
int cuStreamCreate(void** stream, unsigned flags) {
  const std::lock_guard<std::mutex> guard(gpu().lock);
  gpu().streams.insert(*stream = std::malloc(16));
  return flags == 1 ? with_context() : INVALID_VALUE;
}
int cuStreamDestroy_v2(void* stream) {
  const std::lock_guard<std::mutex> guard(gpu().lock);
  if (!gpu().streams.erase(stream)) return INVALID_HANDLE;
  fake::forget(stream);
  std::free(stream);
  return 0;
}

int cuEventCreate(void** event, unsigned flags) {
  const std::lock_guard<std::mutex> guard(gpu().lock);
  gpu().events[*event = std::malloc(16)] = {};
  return flags == 2 ? with_context() : INVALID_VALUE;
}
int cuEventDestroy_v2(void* event) {
  const std::lock_guard<std::mutex> guard(gpu().lock);
  if (!gpu().events.erase(event)) return INVALID_HANDLE;
  std::free(event);
  return 0;
}
int cuEventRecord(void* event, void* stream) {
  return on(stream, [&] {
    const fake::Mark mark = fake::mark(stream);
    const std::lock_guard<std::mutex> guard(gpu().lock);
    gpu().events.at(event) = mark;
  });
}
int cuStreamWaitEvent(void* stream, void* event, unsigned) {
  return on(stream, [&] {
    const std::lock_guard<std::mutex> guard(gpu().lock);
    fake::wait(stream, gpu().events.at(event));
  });
}

int cuMemAlloc_v2(Address* memory, std::size_t bytes) { return allocate(memory, bytes, false); }
int cuMemFree_v2(Address memory) {
  if (!fake::is_start(at(memory))) return INVALID_VALUE;
  fake::finish_all();  // as the driver does
  fake::go(at(memory));
  return with_context();
}
int cuMemAllocAsync(Address* memory, std::size_t bytes, void* stream) {
  const int refusal = allocate(memory, bytes, true);
  return refusal ? refusal : on(stream, [&] { fake::enqueue(stream, [start = at(*memory)] { fake::come(start); }); });
}
int cuMemFreeAsync(Address memory, void* stream) {
  if (!fake::is_start(at(memory))) return INVALID_VALUE;
  return on(stream, [&] { fake::enqueue(stream, [start = at(memory)] { fake::go(start); }); });
}
int cuMemcpyDtoDAsync_v2(Address to, Address from, std::size_t bytes, void* stream) {
  return on(stream, [&] { fake::copy(at(to), at(from), bytes, stream); });
}
int cuMemcpyHtoDAsync_v2(Address to, const void* from, std::size_t bytes, void* stream) {
  return on(stream, [&] { fake::upload(at(to), from, bytes, stream); });
}
int cuMemcpyDtoHAsync_v2(void* to, Address from, std::size_t bytes, void* stream) {
  return on(stream, [&] { fake::download(to, at(from), bytes, stream); });
}
int cuPointerGetAttribute(void* value, int attribute, Address pointer) {
  if (!fake::is_known(at(pointer))) return INVALID_VALUE;
  *static_cast<int*>(value) = attribute == 2 ? 2 : 0;  // device memory, of GPU 0
  return 0;
}
int cuGetErrorName(int, const char** name) { return *name = "CUDA_ERROR_FAKE", 0; }
}
