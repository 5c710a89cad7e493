#include "engine_parts.h"

#include <algorithm>
#include <stdexcept>

#include "mmdit/error.h"

namespace mmdit {
namespace {

int preference(const std::string& target) { return target == "ort-cpu" ? 2 : target == "ort-cuda" ? 1 : 0; }

const EngineEntry& entry_of(const Bundle& bundle, const std::string& target) {
  std::string names;
  for (const EngineEntry& entry : bundle.engines) {
    if (entry.target == target) return entry;
    names += (names.empty() ? "" : ", ") + quote(entry.target, 40);
  }
  throw MachineError("the bundle " + quote(bundle.name) + " has engines for " + names, target,
                     "mmdit-export … --target " + target);
}

// What a target's entry describes: the whole model; or the trunk, and then the conditioning.
struct Part {
  std::string name;  // for messages
  const Json* json;
  const Contract* contract;
};

std::vector<Part> parts_of(const Bundle& bundle, const EngineEntry& entry) {
  const std::string name = quote(entry.target, 40);
  if (!bundle.split) return {{name, entry.json, &bundle.contract}};
  const Json* conditioning = entry.json->find("conditioning");
  if (!conditioning) throw malformed_bundle(bundle.path, name + ": a split model without its conditioning");
  return {{name, entry.json, &bundle.split->trunk},
          {name + " (conditioning)", conditioning, &bundle.split->conditioning}};
}

EngineRecord record_of(const Bundle& bundle, const Part& part, const Target& target) {
  try {
    EngineRecord record = read_engine(*part.json, target.runtime == Runtime::tensorrt, *part.contract);
    if (record.flavour != target.flavour) throw Malformed{"an engine of " + quote(record.flavour)};
    return record;
  } catch (const Malformed& error) {
    throw malformed_bundle(bundle.path, part.name + ": " + error.what);
  }
}

// "10.14.1.48.post1" holds TensorRT 10.14.1.48.
std::string release(const std::string& version) {
  return version.substr(0, std::min(version.find('+'), version.find(".post")));
}

// An engine runs on the GPUs and in the very version that it was built for. Found out before it is deserialized.
void check_fits(const EngineRecord& record, const Target& target, const Gpu& gpu) {
  std::string needed;
  for (const std::string& capability : record.capabilities)
    needed += (needed.empty() ? "" : ", ") + quote(capability, 20);
  if (std::find(record.capabilities.begin(), record.capabilities.end(), gpu.capability()) == record.capabilities.end())
    throw MachineError("the engine " + target.name + " runs on compute capability " + needed,
                       gpu.name() + ", which has " + gpu.capability(), "mmdit-export … --target for this GPU");
  const std::string installed = tensorrt_version();
  if (release(record.version) != installed)
    throw MachineError("the engine " + target.name + " runs in " + target.flavour + " " + quote(record.version, 40) +
                           ", which built it, and in no other",
                       target.flavour + " " + installed, "export the bundle again, with --force, or use that version");
}

std::shared_ptr<Gpu> gpu_for(const Target& target, int device) {
  return target.gpu ? Gpu::open(device, "the target " + target.name + " needs an NVIDIA GPU") : nullptr;
}

// All that can be found out without deserializing anything.
void check_runnable(const Bundle& bundle, const EngineEntry& entry, int device) {
  const Target target = parse_target(entry.target);
  std::vector<EngineRecord> records;
  for (const Part& part : parts_of(bundle, entry)) records.push_back(record_of(bundle, part, target));
  if (target.runtime == Runtime::onnxruntime) {
    check_onnxruntime(target);
    gpu_for(target, device);
    return;
  }
  check_tensorrt(target);
  const std::shared_ptr<Gpu> gpu = gpu_for(target, device);
  for (const EngineRecord& record : records) check_fits(record, target, *gpu);
}

std::unique_ptr<Backend> open(const Bundle& bundle, const Part& part, const BackendOptions& options) {
  const EngineRecord record = record_of(bundle, part, options.target);
  if (options.target.runtime == Runtime::onnxruntime)
    return open_onnxruntime(bundle.file(record.graph), *part.contract, options);
  check_tensorrt(options.target);
  check_fits(record, options.target, *options.gpu);
  std::vector<std::filesystem::path> files;
  for (const SegmentRecord& segment : record.segments) files.push_back(bundle.file(segment.file));
  return open_tensorrt(record, files, options);
}

}  // namespace

Target choose_target(const Bundle& bundle, const std::string& wanted, int device) {
  if (bundle.engines.empty())
    throw BundleError("only an engine can be run", quote(bundle.name) + ", a bundle of graphs alone (--graph-only)",
                      "export it without --graph-only");
  if (wanted != "auto") {
    const Target target = parse_target(wanted);
    check_runnable(bundle, entry_of(bundle, target.name), device);
    return target;
  }
  std::vector<EngineEntry> entries = bundle.engines;
  std::stable_sort(entries.begin(), entries.end(), [](const EngineEntry& a, const EngineEntry& b) {
    return preference(a.target) < preference(b.target);
  });
  std::string names, refusals, fixes;
  for (const EngineEntry& entry : entries) {
    try {
      check_runnable(bundle, entry, device);
      return parse_target(entry.target);
    } catch (const MachineError& error) {
      refusals += (refusals.empty() ? "" : "; ") + entry.target + ": " + error.received();
      if (fixes.find(error.fix()) == std::string::npos) fixes += (fixes.empty() ? "" : "; or: ") + error.fix();
    } catch (const UsageError& error) {  // a later version may know more targets
      refusals += (refusals.empty() ? "" : "; ") + quote(entry.target, 40) + ": no target";
    }
    names += (names.empty() ? "" : ", ") + quote(entry.target, 40);
  }
  throw MachineError("a bundle needs an engine that this machine can run, and " + quote(bundle.name) + " has " + names,
                     refusals, fixes.empty() ? "mmdit-export … --target ort-cpu" : fixes);
}

EngineParts load_parts(const Bundle& bundle, const BackendOptions& options) {
  const std::vector<Part> described = parts_of(bundle, entry_of(bundle, options.target.name));
  EngineParts parts;
  BackendOptions of_step = options;
  of_step.in_turn = described.size() > 1;
  if (bundle.split) {
    BackendOptions its_own = of_step;  // each part writes its cache whole: one file for both would hold one's kernels
    if (!its_own.runtime_cache.empty()) its_own.runtime_cache += ".conditioning";
    parts.conditioning = open(bundle, described[1], its_own);
  }
  parts.step = open(bundle, described[0], of_step);
  return parts;
}

}  // namespace mmdit
