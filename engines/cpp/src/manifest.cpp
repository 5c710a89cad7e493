#include "manifest.h"

#include <algorithm>

#include "files.h"
#include "mmdit/error.h"

namespace mmdit {
namespace {

// A split model's engines take the modulation table: who knows format 1 only would take its trunk for the whole.
constexpr std::int64_t WHOLE = 1, SPLIT = 2;
constexpr std::size_t MAX_BYTES = 16000000;
const char* const REMEDY = "copy the bundle again, or export it again";

// The code point at `i`, which moves behind it. The text is UTF-8: the parser saw to that.
std::uint32_t code_point(std::string_view text, std::size_t& i) {
  const auto byte = [&](std::size_t at) { return static_cast<std::uint32_t>(static_cast<unsigned char>(text[at])); };
  const std::uint32_t first = byte(i);
  const std::size_t length = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  std::uint32_t point = length == 1 ? first : first & (0xffu >> (length + 1));
  for (std::size_t k = 1; k < length && i + k < text.size(); ++k) point = point << 6 | (byte(i + k) & 0x3f);
  i += length;
  return point;
}

// Control and formatting characters, odd spaces, and private ones: a name with them looks like another.
bool unprintable(std::uint32_t point) {
  static constexpr std::uint32_t ranges[][2] = {
      {0x00, 0x1f},     {0x7f, 0xa0},     {0xad, 0xad},       {0x1680, 0x1680}, {0x2000, 0x200f},
      {0x2028, 0x202f}, {0x205f, 0x206f}, {0x3000, 0x3000},   {0xe000, 0xf8ff}, {0xfeff, 0xfeff},
      {0xfff0, 0xfffb}, {0xfffe, 0xffff}, {0xe0000, 0x10ffff}};
  return std::any_of(std::begin(ranges), std::end(ranges),
                     [point](const auto& range) { return range[0] <= point && point <= range[1]; });
}

// Why a name is no relative path with forward slashes that means the same on every machine; empty where it is one.
std::string unportable(const std::string& name) {
  if (name == "manifest.json") return "the manifest itself";
  if (name.find('\\') != std::string::npos) return "a backslash";
  for (std::size_t i = 0; i < name.size();)
    if (unprintable(code_point(name, i))) return "an unprintable character";
  if (name.front() == '/') return "an absolute path";
  for (std::size_t start = 0; start <= name.size();) {
    const std::size_t end = std::min(name.find('/', start), name.size());
    const std::string part = name.substr(start, end - start);
    if (part.empty() || part == "." || part == "..") return "a path with an empty part, . or ..";
    start = end + 1;
  }
  return "";
}

BundleError malformed(const std::string& path, const std::string& received) {
  return BundleError(path + " lists relative paths, each with a size in bytes and a SHA-256 in lower-case hex",
                     received, REMEDY);
}

bool is_sha256(const std::string& text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

FileRecord file_record(const std::string& path, const std::string& name, const Json& entry) {
  const std::string reason = name.empty() ? "an empty path" : unportable(name);
  if (!reason.empty()) throw malformed(path, "the file " + quote(name, 200) + " (" + reason + ")");
  const auto* fields = entry.as<Json::Object>();
  const Json *size = entry.find("size"), *hash = entry.find("sha256");
  if (!fields || fields->size() != 2 || !size || !hash)
    throw malformed(path, quote(name) + " without just a size and a sha256");
  const auto* bytes = size->as<std::int64_t>();
  if (!bytes || *bytes < 0) throw malformed(path, quote(name) + " with the size " + shown(*size));
  const auto* hex = hash->as<std::string>();
  if (!hex || !is_sha256(*hex)) throw malformed(path, quote(name) + " with the sha256 " + shown(*hash));
  return {static_cast<std::uint64_t>(*bytes), *hex};
}

}  // namespace

Manifest parse_manifest(std::string_view text, const std::string& path) {
  Manifest manifest{parse_json_object(text, path, REMEDY), {}, sha256(text)};
  const Json* format = manifest.document.find("format");
  const auto* version = format ? format->as<std::int64_t>() : nullptr;
  if (!version || (*version != WHOLE && *version != SPLIT))
    throw BundleError(path + " must have format 1 or 2, the ones that this version reads",
                      "format " + (format ? shown(*format) : "missing"),
                      "use the version of mmdit-deploy that wrote the bundle, or export it again");
  const Json* split = manifest.document.find("split");
  const bool is_split = split && !split->is_null();
  if (*version != (is_split ? SPLIT : WHOLE))
    throw BundleError(path + " has format 2 if the model is split, and else 1",
                      "format " + shown(*format) + (is_split ? " with" : " without") + " a split", REMEDY);
  const Json* files = manifest.document.find("files");
  const auto* entries = files ? files->as<Json::Object>() : nullptr;
  if (!entries) throw malformed(path, std::string("files is ") + (files ? "not an object" : "missing"));
  for (const auto& [name, entry] : *entries) manifest.files.emplace(name, file_record(path, name, entry));
  return manifest;
}

Manifest read_manifest(const std::filesystem::path& directory) {
  const std::filesystem::path path = directory / "manifest.json";
  const std::string text = read_small_file(path, MAX_BYTES, "a bundle is a directory with a manifest.json",
                                           "name a directory that mmdit-export wrote");
  return parse_manifest(text, path.string());
}

}  // namespace mmdit
