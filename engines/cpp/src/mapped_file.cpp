#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "mmdit/error.h"

namespace mmdit {

MappedFile::MappedFile(const std::filesystem::path& file) {
  const int fd = ::open(file.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
  struct stat status = {};
  if (fd >= 0 && ::fstat(fd, &status) == 0 && status.st_size > 0) {
    size_ = static_cast<std::size_t>(status.st_size);
    data_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd, 0);
  }
  const std::string why = fd >= 0 && status.st_size == 0 ? "empty" : std::generic_category().message(errno);
  if (fd >= 0) ::close(fd);
  if (!data_ || data_ == MAP_FAILED)
    throw BundleError("every file of a bundle must be readable", file.string() + ": " + why,
                      "check its permissions and the disk");
}

MappedFile::~MappedFile() { ::munmap(data_, size_); }

}  // namespace mmdit
