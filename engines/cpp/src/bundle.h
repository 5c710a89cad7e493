// A bundle is checked, file by file, before anything in it is deserialized.
#ifndef MMDIT_SRC_BUNDLE_H
#define MMDIT_SRC_BUNDLE_H

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "files.h"
#include "manifest.h"
#include "mmdit/engine.h"
#include "records.h"

namespace mmdit {

// Whether an input does not depend on the latent, so that a whole schedule's is known before the first step.
bool is_conditioning(const std::string& input);

// The two parts of a model whose conditioning is a graph of its own.
struct Split {
  Contract conditioning, trunk;
};

// What the manifest has for one target: not yet looked at beyond its graph.
struct EngineEntry {
  std::string target;
  const Json* json;
};

struct Bundle {
  std::filesystem::path path;  // absolute and without links: a link moved later cannot mix two bundles
  Manifest manifest;
  std::string name;
  double time_scale = 1;
  Contract contract;
  std::optional<Split> split;
  std::vector<EngineEntry> engines;  // in the manifest's order; they point into the manifest
  double verify_seconds = 0;

  Bundle() = default;
  Bundle(const Bundle&) = delete;  // for these pointers
  Bundle& operator=(const Bundle&) = delete;

  // The path of a file that the manifest lists. Throws BundleError.
  std::filesystem::path file(const std::string& name) const;
};

// Throws BundleError: it does not exist, its manifest is broken, or a file is missing, changed, no regular file, or
// where a runtime would load it without its being listed.
std::unique_ptr<Bundle> open_bundle(const std::filesystem::path& directory, Verify verify,
                                    const std::filesystem::path& receipts);

// Reads a bundle's fields out of its manifest; no file is looked at.
void read_fields(Bundle& bundle);

// The error for a manifest that is not as we write it.
BundleError malformed_bundle(const std::filesystem::path& bundle, const std::string& received);

}  // namespace mmdit

#endif
