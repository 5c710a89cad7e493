// What lies in a bundle's directory, and the SHA-256 of many files at once.
#ifndef MMDIT_SRC_FILES_H
#define MMDIT_SRC_FILES_H

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace mmdit {

// What stat says of a file: as long as all of it stays the same, so do the bytes. ctime cannot be set
// back, where the file system keeps it.
struct FileIdentity {
  std::uint64_t device = 0, inode = 0, size = 0;
  std::int64_t mtime_ns = 0, ctime_ns = 0;

  bool operator==(const FileIdentity& other) const;
};

// Everything below a directory, by path relative to it with forward slashes; links are not followed.
struct Listing {
  std::map<std::string, FileIdentity> regular;
  std::map<std::string, std::string> other;  // what each is that is neither a regular file nor a directory
};

// Throws BundleError: the directory cannot be read.
Listing list_files(const std::filesystem::path& directory);

// A whole file of at most `limit` bytes; `what` is the rule that a larger or unreadable one, or a link, breaks.
// Throws BundleError.
std::string read_small_file(const std::filesystem::path& file, std::size_t limit, const std::string& what,
                            const std::string& fix);

// The SHA-256, in lower-case hex.
std::string sha256(std::string_view bytes);

struct Hashed {
  std::string sha256;
  FileIdentity identity;  // the same before and after it was read
};

// Hashes files on as many threads as there are cores, the largest first.
// Throws BundleError: one cannot be read, is a link, or changed meanwhile.
std::map<std::string, Hashed> hash_files(const std::filesystem::path& directory, const std::vector<std::string>& names);

}  // namespace mmdit

#endif
