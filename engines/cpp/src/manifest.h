// manifest.json: what a bundle is, and the size and SHA-256 of every file in it. Not signed: it finds corruption,
// not attackers.
#ifndef MMDIT_SRC_MANIFEST_H
#define MMDIT_SRC_MANIFEST_H

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>

#include "json.h"

namespace mmdit {

struct FileRecord {
  std::uint64_t size = 0;
  std::string sha256;
};

struct Manifest {
  Json document;
  std::map<std::string, FileRecord> files;  // by path relative to the bundle
  std::string sha256;                       // of the manifest itself
};

// Throws BundleError: there is none, or it is too large, no JSON, of an unknown format or one for other bundles, or
// lists something other than relative portable paths with a size and a SHA-256 each.
Manifest read_manifest(const std::filesystem::path& directory);
// The same of text that was read; `path` names it in messages.
Manifest parse_manifest(std::string_view text, const std::string& path);

}  // namespace mmdit

#endif
