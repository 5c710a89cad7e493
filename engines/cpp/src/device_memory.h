// Memory of an engine's device: a GPU's, or the host's where that is null.
#ifndef MMDIT_SRC_DEVICE_MEMORY_H
#define MMDIT_SRC_DEVICE_MEMORY_H

#include <cstddef>
#include <memory>

#include "cuda.h"

namespace mmdit {

// Throws MachineError: there is none left.
std::shared_ptr<void> device_memory(const std::shared_ptr<Gpu>& gpu, std::size_t bytes);
// On a GPU, in a stream's order: what is enqueued later there may use it, and what was enqueued there when its last
// reference goes still may. The host waits for nothing.
std::shared_ptr<void> device_memory_on(const std::shared_ptr<Gpu>& gpu, std::size_t bytes, void* stream);
// On a GPU it is enqueued, not waited for.
void copy_on_device(const std::shared_ptr<Gpu>& gpu, void* to, const void* from, std::size_t bytes, void* stream);

}  // namespace mmdit

#endif
