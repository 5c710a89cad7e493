#include "files.h"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "mmdit/error.h"

namespace mmdit {
namespace fs = std::filesystem;
namespace {

constexpr std::size_t CHUNK_BYTES = std::size_t{4} << 20;

std::string message(int error) { return std::generic_category().message(error); }

BundleError unreadable(const fs::path& file, const std::string& why) {
  return BundleError("every file of a bundle must be readable", file.string() + ": " + why,
                     "check its permissions and the disk");
}

FileIdentity identity_of(const struct stat& status) {
  const auto ns = [](const timespec& time) { return std::int64_t{time.tv_sec} * 1000000000 + time.tv_nsec; };
  return {static_cast<std::uint64_t>(status.st_dev), static_cast<std::uint64_t>(status.st_ino),
          static_cast<std::uint64_t>(status.st_size), ns(status.st_mtim), ns(status.st_ctim)};
}

class File {
 public:
  explicit File(const fs::path& path) : path_(path), fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW)) {
    if (fd_ < 0) throw unreadable(path, errno == ELOOP ? "a symbolic link" : message(errno));
  }
  ~File() { ::close(fd_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  struct stat status() const {
    struct stat status = {};
    if (::fstat(fd_, &status)) throw unreadable(path_, message(errno));
    return status;
  }
  // Bytes read; 0 at the end.
  std::size_t read(char* into, std::size_t room) const {
    for (;;) {
      const ssize_t count = ::read(fd_, into, room);
      if (count >= 0) return static_cast<std::size_t>(count);
      if (errno != EINTR) throw unreadable(path_, message(errno));
    }
  }

 private:
  fs::path path_;
  int fd_;
};

class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new(), &EVP_MD_CTX_free) {
    if (!context_ || !EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr)) fail();
  }
  void add(const void* bytes, std::size_t count) {
    if (!EVP_DigestUpdate(context_.get(), bytes, count)) fail();
  }
  std::string hex() {
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned int size = 0;
    if (!EVP_DigestFinal_ex(context_.get(), digest, &size)) fail();
    std::string text;
    for (unsigned int i = 0; i < size; ++i) {
      text += "0123456789abcdef"[digest[i] >> 4];
      text += "0123456789abcdef"[digest[i] & 15];
    }
    return text;
  }

 private:
  [[noreturn]] static void fail() {
    throw MachineError("OpenSSL computes SHA-256", "it failed", "check the OpenSSL installation (libcrypto)");
  }
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_;
};

Hashed hash_file(const fs::path& path, const std::atomic<bool>& stop) {
  const File file(path);
  const FileIdentity before = identity_of(file.status());
  const auto room = static_cast<std::size_t>(std::clamp<std::uint64_t>(before.size, 1, CHUNK_BYTES));
  const std::unique_ptr<char[]> chunk(new char[room]);
  Sha256 digest;
  while (const std::size_t count = stop ? 0 : file.read(chunk.get(), room)) digest.add(chunk.get(), count);
  const FileIdentity after = identity_of(file.status());
  if (!stop && !(after == before))
    throw BundleError("a bundle's files stay as they are", path.string() + " changed while it was read",
                      "load it again when nothing writes to it");
  return {digest.hex(), after};
}

}  // namespace

bool FileIdentity::operator==(const FileIdentity& other) const {
  return device == other.device && inode == other.inode && size == other.size && mtime_ns == other.mtime_ns &&
         ctime_ns == other.ctime_ns;
}

Listing list_files(const fs::path& directory) {
  Listing listing;
  std::error_code error;
  fs::recursive_directory_iterator entry(directory, error);
  for (; !error && entry != fs::recursive_directory_iterator(); entry.increment(error)) {
    struct stat status = {};
    if (::lstat(entry->path().c_str(), &status)) throw unreadable(entry->path(), message(errno));
    const std::string name = entry->path().lexically_relative(directory).generic_string();
    if (S_ISREG(status.st_mode)) {
      listing.regular[name] = identity_of(status);
    } else if (!S_ISDIR(status.st_mode)) {
      listing.other[name] = S_ISLNK(status.st_mode) ? "a symbolic link" : "a special file";
    }
  }
  if (error) throw unreadable(directory, error.message());
  return listing;
}

std::string read_small_file(const fs::path& path, std::size_t limit, const std::string& what, const std::string& fix) {
  struct stat found = {};
  if (::lstat(path.c_str(), &found)) throw BundleError(what, path.string() + " (" + message(errno) + ")", fix);
  if (!S_ISREG(found.st_mode)) throw BundleError(what, path.string() + " (a link or a special file)", fix);
  const File file(path);
  std::string content;
  content.resize(static_cast<std::size_t>(std::clamp<std::uint64_t>(identity_of(file.status()).size, 0, limit)) + 1);
  std::size_t filled = 0;
  while (const std::size_t count = file.read(content.data() + filled, content.size() - filled)) {
    filled += count;
    if (filled > limit)
      throw BundleError(path.string() + " has at most " + std::to_string(limit) + " bytes", "more of them", fix);
    if (filled == content.size()) content.resize(std::min(2 * filled, limit + 1));
  }
  content.resize(filled);
  return content;
}

std::string sha256(std::string_view bytes) {
  Sha256 digest;
  digest.add(bytes.data(), bytes.size());
  return digest.hex();
}

std::map<std::string, Hashed> hash_files(const fs::path& directory, const std::vector<std::string>& names) {
  std::vector<std::pair<std::uintmax_t, std::string>> queue;
  for (const std::string& name : names) {
    std::error_code error;
    const std::uintmax_t size = fs::file_size(directory / name, error);
    queue.emplace_back(error ? 0 : size, name);
  }
  std::sort(queue.rbegin(), queue.rend());
  std::map<std::string, Hashed> results;
  std::exception_ptr failure;
  std::mutex lock;
  std::atomic<std::size_t> next{0};
  std::atomic<bool> stop{false};  // nobody waits for gigabytes that no longer matter
  const auto work = [&] {
    for (std::size_t i; !stop && (i = next++) < queue.size();) {
      try {
        Hashed hashed = hash_file(directory / queue[i].second, stop);
        const std::lock_guard<std::mutex> guard(lock);
        results.emplace(queue[i].second, std::move(hashed));
      } catch (...) {
        const std::lock_guard<std::mutex> guard(lock);
        if (!failure) failure = std::current_exception();
        stop = true;
      }
    }
  };
  const std::size_t cores = std::max(1u, std::thread::hardware_concurrency());
  const std::size_t count = std::min(cores, queue.size());
  std::vector<std::thread> threads;
  threads.reserve(count);
  for (std::size_t i = 1; i < count; ++i) {
    try {
      threads.emplace_back(work);
    } catch (const std::exception&) {  // no more threads or memory here: those that there are do the work
      break;
    }
  }
  work();
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
  return results;
}

}  // namespace mmdit
