#include "receipt.h"

#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <system_error>
#include <utility>

namespace mmdit {
namespace fs = std::filesystem;
namespace {

// A file that is written to twice within one tick of the file system's clock has the same times: one that has just
// been changed when hashing begins gets no receipt yet.
constexpr std::int64_t SETTLED_NS = 2000000000;

fs::path default_folder() {
  // Relative paths in it are to be ignored (XDG Base Directory Specification).
  if (const char* named = ::getenv("XDG_CACHE_HOME"); named && fs::path(named).is_absolute())
    return fs::path(named) / "mmdit-deploy" / "verified";
  if (const char* home = ::getenv("HOME"); home && fs::path(home).is_absolute())
    return fs::path(home) / ".cache" / "mmdit-deploy" / "verified";
  return {};
}

bool make_folder(const fs::path& folder) {
  std::error_code error;
  if (fs::is_directory(folder, error)) return true;
  fs::create_directories(folder.parent_path(), error);
  return ::mkdir(folder.c_str(), 0700) == 0 || fs::is_directory(folder, error);
}

}  // namespace

std::int64_t now_ns() {
  timespec now = {};
  ::clock_gettime(CLOCK_REALTIME, &now);
  return std::int64_t{now.tv_sec} * 1000000000 + now.tv_nsec;
}

Receipt::Receipt(const fs::path& folder, const fs::path& bundle, std::string manifest_sha256)
    : manifest_sha256_(std::move(manifest_sha256)) {
  const fs::path where = folder.empty() ? default_folder() : folder;
  if (!where.empty()) file_ = where / sha256(bundle.string());
}

std::string Receipt::text(const Identities& files) const {
  std::ostringstream text;
  text << "mmdit-deploy verified 1\nmanifest " << manifest_sha256_ << "\n";
  for (const auto& [name, id] : files)
    text << id.device << " " << id.inode << " " << id.size << " " << id.mtime_ns << " " << id.ctime_ns << " " << name
         << "\n";
  return text.str();
}

bool Receipt::holds(const Identities& files) const {
  if (file_.empty()) return false;
  std::ifstream stream(file_, std::ios::binary);
  const std::string expected = text(files);
  std::string found(expected.size() + 1, '\0');
  stream.read(found.data(), static_cast<std::streamsize>(found.size()));
  found.resize(static_cast<std::size_t>(std::max<std::streamsize>(stream.gcount(), 0)));
  return found == expected;
}

void Receipt::leave(const Identities& files, std::int64_t begun_ns) const {
  const auto is_new = [&](const auto& file) { return file.second.ctime_ns > begun_ns - SETTLED_NS; };
  if (file_.empty() || std::any_of(files.begin(), files.end(), is_new) || !make_folder(file_.parent_path())) return;
  std::string name = file_.string() + ".XXXXXX";
  const int fd = ::mkstemp(name.data());
  if (fd < 0) return;
  const std::string content = text(files);
  const bool written = ::write(fd, content.data(), content.size()) == static_cast<ssize_t>(content.size());
  if (::close(fd) || !written || ::rename(name.c_str(), file_.c_str())) ::unlink(name.c_str());
}

}  // namespace mmdit
