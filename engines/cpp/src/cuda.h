// The CUDA driver, opened when a GPU is asked for: no build needs CUDA, and a program runs where there is none.
//
// The runtime API's streams (cudaStream_t) are the driver's, and a device's primary context is what both work in.
#ifndef MMDIT_SRC_CUDA_H
#define MMDIT_SRC_CUDA_H

#include <cstddef>
#include <memory>
#include <string>

namespace mmdit {

// One GPU. All throw MachineError where the driver refuses.
class Gpu : public std::enable_shared_from_this<Gpu> {
 public:
  // Throws MachineError: there is no driver, or no such GPU. `rule` says what needs it.
  static std::shared_ptr<Gpu> open(int index, const std::string& rule);

  int index() const { return index_; }
  const std::string& name() const { return name_; }
  const std::string& capability() const { return capability_; }  // "8.9"

  void synchronize(void* stream) const;
  void synchronize() const;
  // Memory that is freed when the last reference goes, after all work on the GPU. It keeps the GPU's context.
  std::shared_ptr<void> allocate(std::size_t bytes) const;
  // Memory in a stream's order: work that is enqueued after this call may use it, until `free_on`.
  void* allocate_on(std::size_t bytes, void* stream) const;
  void free_on(void* memory, void* stream) const noexcept;
  void copy(void* to, const void* from, std::size_t bytes, void* stream) const;
  void upload(void* to, const void* host, std::size_t bytes, void* stream) const;
  void download(void* host, const void* from, std::size_t bytes, void* stream) const;
  // Whether an address is in this GPU's memory.
  bool owns(const void* address) const;

  // A stream besides the default one, and an event without a time: freed with the last reference.
  std::shared_ptr<void> make_stream() const;
  std::shared_ptr<void> make_event() const;
  void record(void* event, void* stream) const;
  void wait(void* stream, void* event) const;

  // The GPU's context, current on this thread for as long as this lives.
  class Current {
   public:
    explicit Current(const Gpu& gpu);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

   private:
    const Gpu& gpu_;
  };

  ~Gpu();
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

 private:
  Gpu() = default;
  int index_ = 0, device_ = 0;
  void* context_ = nullptr;
  std::string name_, capability_;
};

}  // namespace mmdit

#endif
