// A file as read-only memory: its gigabytes never are the process's own.
#ifndef MMDIT_SRC_MAPPED_FILE_H
#define MMDIT_SRC_MAPPED_FILE_H

#include <cstddef>
#include <filesystem>

namespace mmdit {

class MappedFile {
 public:
  // Throws BundleError: it cannot be read, is a link, or is empty.
  explicit MappedFile(const std::filesystem::path& file);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const void* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace mmdit

#endif
