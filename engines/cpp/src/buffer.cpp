#include "mmdit/buffer.h"

#include <cstring>

#include "device_memory.h"
#include "mmdit/error.h"

namespace mmdit {
namespace {

void check_fits(std::size_t bytes, std::size_t size) {
  if (bytes > size)
    throw UsageError("a buffer of " + std::to_string(size) + " bytes holds what is copied",
                     std::to_string(bytes) + " bytes", "make it larger");
}

}  // namespace

void Buffer::upload(const void* from, std::size_t bytes, void* stream) const {
  check_fits(bytes, bytes_);
  if (!gpu_) {
    std::memcpy(data(), from, bytes);
    return;
  }
  gpu_->upload(data(), from, bytes, stream);
  gpu_->synchronize(stream);
}

void Buffer::download(void* to, std::size_t bytes, void* stream) const {
  check_fits(bytes, bytes_);
  if (!gpu_) {
    std::memcpy(to, data(), bytes);
    return;
  }
  gpu_->download(to, data(), bytes, stream);
  gpu_->synchronize(stream);
}

}  // namespace mmdit
