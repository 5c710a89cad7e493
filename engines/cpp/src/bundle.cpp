#include "bundle.h"

#include <algorithm>
#include <cctype>
#include <chrono>
#include <system_error>

#include "mmdit/error.h"
#include "receipt.h"

namespace mmdit {
namespace fs = std::filesystem;
namespace {

const char* const REMEDY = "copy the bundle again, or export it again";

BundleError broken(const fs::path& file, const std::string& expected, const std::string& found,
                   const std::string& fix = REMEDY) {
  return BundleError(file.string() + " must be " + expected + ", as the manifest says", found, fix);
}

void check_presence(const Bundle& bundle, const Listing& listing) {
  for (const auto& [name, record] : bundle.manifest.files) {
    const fs::path path = bundle.path / name;
    for (fs::path part = name; !part.empty(); part = part.parent_path()) {  // itself, or a directory on the way to it
      const auto other = listing.other.find(part.generic_string());
      if (other != listing.other.end())
        throw broken(path, "a regular file", (bundle.path / part).string() + " is " + other->second,
                     "copy the bundle with its files, not links to them");
    }
    const auto found = listing.regular.find(name);
    if (found == listing.regular.end())
      throw broken(path, "a file of " + std::to_string(record.size) + " bytes", "no such file");
    if (found->second.size != record.size)
      throw broken(path, std::to_string(record.size) + " bytes", std::to_string(found->second.size) + " bytes");
  }
}

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// Whether a runtime may pick a file up by itself, or take it for one of ours.
bool is_loadable(std::string name) {
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
  return ends_with(name, ".onnx") || ends_with(name, ".safetensors") || name.substr(0, name.find('/')) == "engines";
}

void check_unlisted(const Bundle& bundle, const Listing& listing) {
  std::string stray;
  const auto look = [&](const std::string& name) {
    if (name != "manifest.json" && !bundle.manifest.files.count(name) && is_loadable(name)) stray += " " + quote(name);
  };
  for (const auto& [name, identity] : listing.regular) look(name);
  for (const auto& [name, kind] : listing.other) look(name);
  if (!stray.empty())
    throw BundleError(
        "every graph, weights and engine file in " + bundle.path.string() + " must be listed in its manifest",
        "not listed:" + stray.substr(0, 600), "remove them, or export the bundle again");
}

Identities check_content(const Bundle& bundle) {
  std::vector<std::string> names;
  for (const auto& [name, record] : bundle.manifest.files) names.push_back(name);
  Identities identities;
  for (const auto& [name, hashed] : hash_files(bundle.path, names)) {
    const FileRecord& expected = bundle.manifest.files.at(name);
    if (hashed.sha256 != expected.sha256 || hashed.identity.size != expected.size)
      throw broken(bundle.path / name, "a file with the SHA-256 " + expected.sha256, hashed.sha256);
    identities[name] = hashed.identity;
  }
  return identities;
}

void check_hashes(Bundle& bundle, const Listing& listing, Verify verify, const fs::path& receipts) {
  if (verify == Verify::never) return;
  const auto begun = std::chrono::steady_clock::now();
  if (verify == Verify::always) {
    check_content(bundle);
  } else {
    Identities found;
    for (const auto& [name, record] : bundle.manifest.files) found[name] = listing.regular.at(name);
    const Receipt receipt(receipts, bundle.path, bundle.manifest.sha256);
    if (!receipt.holds(found)) {
      const std::int64_t hashing_begun = now_ns();
      receipt.leave(check_content(bundle), hashing_begun);
    }
  }
  bundle.verify_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
}

double read_time_scale(const Json& spec) {
  const Json* scale = spec.find("time_scale");
  if (!scale) return 1;  // a manifest of before there was one
  const double value = scale->as<double>()         ? *scale->as<double>()
                       : scale->as<std::int64_t>() ? static_cast<double>(*scale->as<std::int64_t>())
                                                   : 0;
  if (!(value > 0)) throw Malformed{"time_scale is " + shown(*scale)};
  return value;
}

const Json& object_field(const Json& document, const char* name, bool may_be_empty) {
  const Json& value = field(document, name);
  const auto* object = value.as<Json::Object>();
  if (!object || (object->empty() && !may_be_empty)) throw Malformed{std::string(name) + " is " + shown(value)};
  return value;
}

void check_weights(const Json& weights) {
  const bool* random = field(weights, "random").as<bool>();
  // A seed beyond 64 bits is read as a double: nothing here computes with it.
  const auto is_number = [](const Json& json) { return json.as<std::int64_t>() || json.as<double>(); };
  if (!random || !field(weights, "origin").as<std::string>() || (*random && !is_number(field(weights, "seed"))))
    throw Malformed{"weights"};
}

const TensorSpec* named(const std::vector<TensorSpec>& specs, const std::string& name) {
  const auto found = std::find_if(specs.begin(), specs.end(), [&](const TensorSpec& s) { return s.name == name; });
  return found == specs.end() ? nullptr : &*found;
}

// That the trunk reads what the conditioning makes, and both together what the whole model reads.
Split read_split(const Json& json, const Contract& whole) {
  Split split{read_contract(field(json, "conditioning")), read_contract(field(json, "trunk"))};
  const std::vector<TensorSpec>&parts = split.conditioning.inputs, &made = split.conditioning.outputs;
  if (made.size() != 1 || made[0].axes.size() != 2 || made[0].axes[0].name != "batch" || !made[0].axes[1].name.empty())
    throw Malformed{"the conditioning makes something other than a table of a row for each sample"};
  for (const TensorSpec& spec : parts)
    if (spec.axes[0].name != "batch" || spec.axes.size() > 2 || (spec.axes.size() == 2 && !spec.axes[1].name.empty()))
      throw Malformed{"the conditioning reads " + quote(spec.name) + ", which has no row for each sample"};
  if (!named(parts, "timestep") || named(parts, "timestep")->axes.size() != 1 ||
      named(parts, "timestep")->dtype != DType::float32)
    throw Malformed{"the conditioning reads no timestep"};
  if (split.trunk.outputs != whole.outputs || split.trunk.inputs.size() + parts.size() != whole.inputs.size() + 1)
    throw Malformed{"the split's parts are not the whole"};
  for (const TensorSpec& spec : split.trunk.inputs) {
    if (is_conditioning(spec.name)) throw Malformed{"the trunk reads " + quote(spec.name)};
    const TensorSpec* other = spec.name == made[0].name ? &made[0] : named(whole.inputs, spec.name);
    if (!other || !(*other == spec)) throw Malformed{"the trunk reads " + quote(spec.name)};
  }
  for (const TensorSpec& spec : parts) {
    const TensorSpec* other = named(whole.inputs, spec.name);
    if (!other || !(*other == spec) || named(split.trunk.inputs, spec.name) || !is_conditioning(spec.name))
      throw Malformed{"the conditioning reads " + quote(spec.name)};
  }
  if (!named(split.trunk.inputs, made[0].name) || named(whole.inputs, made[0].name))
    throw Malformed{"the trunk does not read what the conditioning makes"};
  return split;
}

}  // namespace

bool is_conditioning(const std::string& input) {
  return input == "timestep" || input == "pooled_projections" || input == "guidance";
}

BundleError malformed_bundle(const fs::path& bundle, const std::string& received) {
  return BundleError((bundle / "manifest.json").string() +
                         " must have a name, a spec, a contract, a precision, weights, engines and outputs",
                     received, REMEDY);
}

fs::path Bundle::file(const std::string& wanted) const {
  if (!manifest.files.count(wanted))
    throw BundleError("an engine's files are listed in the manifest of " + path.string(), quote(wanted), REMEDY);
  return path / wanted;
}

void read_fields(Bundle& bundle) {
  const Json& document = bundle.manifest.document;
  try {
    bundle.name = text_field(document, "name");
    text_field(document, "precision");
    bundle.time_scale = read_time_scale(object_field(document, "spec", false));
    bundle.contract = read_contract(object_field(document, "contract", false));
    if (!bundle.contract.ranges.count("batch")) throw Malformed{"a contract without a batch"};
    check_weights(object_field(document, "weights", false));
    if (!field(document, "outputs").as<Json::Array>()) throw Malformed{"outputs is no array"};
    for (const auto& [target, entry] : *object_field(document, "engines", true).as<Json::Object>()) {
      text_field(entry, "graph");
      bundle.engines.push_back({target, &entry});
    }
    const Json* split = document.find("split");
    if (split && !split->is_null()) bundle.split = read_split(*split, bundle.contract);
  } catch (const Malformed& error) {
    throw malformed_bundle(bundle.path, error.what);
  }
}

std::unique_ptr<Bundle> open_bundle(const fs::path& directory, Verify verify, const fs::path& receipts) {
  std::error_code error;
  auto bundle = std::make_unique<Bundle>();
  bundle->path = fs::canonical(directory, error);
  if (error || !fs::is_directory(bundle->path, error))
    throw BundleError("a bundle is a directory with a manifest.json",
                      directory.string() + (error ? " (" + error.message() + ")" : " is a file"),
                      "name a directory that mmdit-export wrote");
  bundle->manifest = read_manifest(bundle->path);
  const Listing listing = list_files(bundle->path);
  check_presence(*bundle, listing);
  check_unlisted(*bundle, listing);
  check_hashes(*bundle, listing, verify, receipts);
  read_fields(*bundle);
  return bundle;
}

}  // namespace mmdit
