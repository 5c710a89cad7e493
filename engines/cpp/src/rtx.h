// What TensorRT-RTX has beyond TensorRT: it compiles kernels when an execution context is made, and again for each new
// shape, and can keep them. It checks a cache itself before it takes anything from it.
#ifndef MMDIT_SRC_RTX_H
#define MMDIT_SRC_RTX_H

#include <NvInferRuntime.h>

#include <filesystem>

#include "mmdit/engine.h"

#if defined(TRT_MAJOR_RTX)
#include <unistd.h>

#include <atomic>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <system_error>

#include "files.h"
#endif

namespace mmdit {

#if defined(TRT_MAJOR_RTX)

// The runtime cache that all segments share, and its file.
class CompiledKernels {
 public:
  void configure(nvinfer1::IRuntimeConfig& config, Specialize specialize, const std::filesystem::path& file) {
    using Strategy = nvinfer1::DynamicShapesKernelSpecializationStrategy;
    config.setDynamicShapesKernelSpecializationStrategy(specialize == Specialize::lazy    ? Strategy::kLAZY
                                                        : specialize == Specialize::eager ? Strategy::kEAGER
                                                                                          : Strategy::kNONE);
    if (file.empty()) return;
    if (!cache_) {
      file_ = file;
      cache_.reset(config.createRuntimeCache());
      std::ifstream stream(file_, std::ios::binary);
      const std::string content((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
      if (cache_ && !content.empty() && cache_->deserialize(content.data(), content.size())) written_ = sha256(content);
    }
    if (cache_) config.setRuntimeCache(*cache_);
  }

  // Writes the file, whole or not at all, if there are new kernels. A disk that cannot be written to is no error.
  void save() {
    if (!cache_) return;
    const std::unique_ptr<nvinfer1::IHostMemory> content(cache_->serialize());
    if (!content) return;
    const std::string digest = sha256({static_cast<const char*>(content->data()), content->size()});
    if (digest == written_) return;
    static std::atomic<unsigned> files{0};  // several engines and processes may write at once
    const std::filesystem::path beside =
        file_.string() + "." + std::to_string(::getpid()) + "-" + std::to_string(files++) + ".partial";
    std::ofstream stream(beside, std::ios::binary);
    stream.write(static_cast<const char*>(content->data()), static_cast<std::streamsize>(content->size()));
    stream.close();
    std::error_code error;
    if (stream) std::filesystem::rename(beside, file_, error);
    if (stream && !error) {
      written_ = digest;
    } else {
      std::filesystem::remove(beside, error);
    }
  }

 private:
  std::filesystem::path file_;
  std::unique_ptr<nvinfer1::IRuntimeCache> cache_;
  std::string written_;  // the SHA-256 of what the file holds
};

#else

// TensorRT compiles nothing at run time.
class CompiledKernels {
 public:
  void configure(nvinfer1::IRuntimeConfig&, Specialize, const std::filesystem::path&) {}
  void save() {}
};

#endif

}  // namespace mmdit

#endif
