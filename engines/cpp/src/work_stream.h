// The stream that a TensorRT engine's work is enqueued on, call after call. The host waits for none of it, but after an error.
#ifndef MMDIT_SRC_WORK_STREAM_H
#define MMDIT_SRC_WORK_STREAM_H

#include <cstdint>
#include <memory>
#include <utility>

#include "cuda.h"

namespace mmdit {

// It is the caller's own, unless that is CUDA's default stream: there, TensorRT waits for the device around each call
// (IExecutionContext::enqueueV3). Work then goes to a stream beside it, which waits for the default stream, and which
// the default stream waits for.
class WorkStream {
 public:
  explicit WorkStream(std::shared_ptr<Gpu> gpu)
      : gpu_(std::move(gpu)), own_(gpu_->make_stream()), caller_ready_(gpu_->make_event()), done_(gpu_->make_event()) {}

  // Calls enqueue(stream). Calls of one engine share its memory for activations: each waits for the one before,
  // whatever its stream. A handle does not name a stream: a destroyed stream's may be another's later, and
  // CU_STREAM_PER_THREAD is another stream in each thread.
  template <typename Enqueue>
  void run(void* caller, const Enqueue& enqueue) {
    const bool is_default = reinterpret_cast<std::uintptr_t>(caller) <= 1;  // null, or CU_STREAM_LEGACY
    void* const work = is_default ? own_.get() : caller;
    if (is_default) {
      gpu_->record(caller_ready_.get(), caller);
      gpu_->wait(work, caller_ready_.get());
    }
    if (used_) gpu_->wait(work, done_.get());
    const Finish finish{*this, work, is_default ? &caller : nullptr};
    enqueue(work);
  }

 private:
  // Also after an error: what was enqueued before it still runs.
  struct Finish {
    WorkStream& stream;
    void* work;
    void* const* caller;  // where it is not the stream worked on
    ~Finish() {
      try {
        stream.gpu_->record(stream.done_.get(), work);
        stream.used_ = true;
        if (caller) stream.gpu_->wait(*caller, stream.done_.get());
      } catch (const std::exception&) {  // the GPU has failed; the next call says so
      }
    }
  };

  std::shared_ptr<Gpu> gpu_;
  std::shared_ptr<void> own_, caller_ready_, done_;
  bool used_ = false;
};

}  // namespace mmdit

#endif
