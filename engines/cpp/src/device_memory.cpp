#include "device_memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "mmdit/error.h"

namespace mmdit {

std::shared_ptr<void> device_memory(const std::shared_ptr<Gpu>& gpu, std::size_t bytes) {
  if (gpu) return gpu->allocate(bytes);
  // As ONNX Runtime's own tensors: at a multiple of 64 bytes.
  const std::size_t rounded = std::max<std::size_t>(bytes / 64 + (bytes % 64 != 0), 1) * 64;
  void* const memory = rounded < bytes ? nullptr : std::aligned_alloc(64, rounded);
  if (!memory)
    throw MachineError("there is memory for a tensor", std::to_string(bytes) + " bytes asked for", "free some");
  return {memory, std::free};
}

std::shared_ptr<void> device_memory_on(const std::shared_ptr<Gpu>& gpu, std::size_t bytes, void* stream) {
  if (!gpu) return device_memory(gpu, bytes);
  return {gpu->allocate_on(bytes, stream), [gpu, stream](void* memory) { gpu->free_on(memory, stream); }};
}

void copy_on_device(const std::shared_ptr<Gpu>& gpu, void* to, const void* from, std::size_t bytes, void* stream) {
  if (gpu) {
    gpu->copy(to, from, bytes, stream);
  } else {
    std::memcpy(to, from, bytes);
  }
}

}  // namespace mmdit
