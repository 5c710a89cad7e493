// A receipt says that every file of a bundle had the SHA-256 that its manifest lists, so that none is hashed again.
//
// It lies in the user's cache folder, not in the bundle: that may be read-only, and whoever sends one must not be able
// to send a receipt with it. It holds the manifest's SHA-256, and of each file the device, inode, size, time of change
// of the content and time of change of the inode: the last cannot be set back, where the file system keeps it (FAT and
// some network file systems do not: use Verify::always there). A copied, restored or edited file has others, and all
// files are hashed again. It is no defence against those who may write to the user's cache folder.
#ifndef MMDIT_SRC_RECEIPT_H
#define MMDIT_SRC_RECEIPT_H

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>

#include "files.h"

namespace mmdit {

using Identities = std::map<std::string, FileIdentity>;

// The time, as files have it.
std::int64_t now_ns();

class Receipt {
 public:
  // `folder`: empty for ~/.cache/mmdit-deploy/verified, or where XDG_CACHE_HOME says.
  Receipt(const std::filesystem::path& folder, const std::filesystem::path& bundle, std::string manifest_sha256);

  // Whether the files are those that were hashed.
  bool holds(const Identities& files) const;
  // Writes it, whole or not at all, unless a file changed just before `begun_ns`, when hashing began. A folder that
  // cannot be written to is no error: files are hashed again next time.
  void leave(const Identities& files, std::int64_t begun_ns) const;

 private:
  std::string text(const Identities& files) const;

  std::filesystem::path file_;  // empty where the user has no home
  std::string manifest_sha256_;
};

}  // namespace mmdit

#endif
