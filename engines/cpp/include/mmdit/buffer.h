// Memory on an engine's device, the host's or a GPU's, for programs that have no CUDA of their own.
#ifndef MMDIT_BUFFER_H
#define MMDIT_BUFFER_H

#include <cstddef>
#include <memory>

#include "mmdit/api.h"

namespace mmdit {

class Engine;
class Gpu;

// Freed with its last copy, after all work on the GPU. Copying one shares the memory.
class MMDIT_API Buffer {
 public:
  // Throws MachineError: there is no such memory left.
  Buffer(const Engine& engine, std::size_t bytes);

  void* data() const noexcept { return memory_.get(); }
  std::size_t size() const noexcept { return bytes_; }
  // Copy between the host's memory and this, in order with a GPU's stream; both return when it is done.
  void upload(const void* from, std::size_t bytes, void* stream = nullptr) const;
  void download(void* to, std::size_t bytes, void* stream = nullptr) const;

 private:
  std::shared_ptr<Gpu> gpu_;  // null for the host's
  std::shared_ptr<void> memory_;
  std::size_t bytes_;
};

}  // namespace mmdit

#endif
