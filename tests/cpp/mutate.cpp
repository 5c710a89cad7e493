// Opens a bundle again and again, each time with another broken manifest, and reads as many broken .npy headers.
//
//     mutate BUNDLE NPY COUNT SEED
//
// Each must give an engine, or an mmdit::Error: anything else ends the process. Prints how many of which there were,
// and how many BundleErrors were about the record of an engine.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "mmdit/engine.h"
#include "npy.h"

namespace {

using Random = std::mt19937_64;

std::string read(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

const std::vector<std::string> TOKENS = {"{",
                                         "}",
                                         "[",
                                         "]",
                                         ":",
                                         ",",
                                         "\"",
                                         "null",
                                         "true",
                                         "-1",
                                         "0",
                                         "1e999",
                                         "9223372036854775808",
                                         "1000000001",
                                         "0.5",
                                         "\\ud800",
                                         "\\u0000",
                                         "\xff",
                                         "\xef\xbb\xbf",
                                         "../",
                                         "/",
                                         "\"batch\"",
                                         "\"img_tokens + txt_tokens\"",
                                         " + ",
                                         "\"float16\"",
                                         "\"size\"",
                                         "\"split\": {}, ",
                                         "\"engines\": {}, ",
                                         "\"segments\": [], ",
                                         "\"profiles\": [{}], ",
                                         "\"TensorRT\"",
                                         "\"hidden_states\"",
                                         "(",
                                         ")",
                                         "'descr': '<f4', ",
                                         "True",
                                         "<f8",
                                         "99999999999"};
// Where a manifest says what the runtime believes.
const std::vector<std::string> ANCHORS = {
    "\"contract\"",   "\"engines\"", "\"files\"",        "\"split\"",    "\"ranges\"",   "\"format\"",
    "\"inputs\"",     "\"outputs\"", "\"sha256\"",       "\"rtx:sm89\"", "\"profiles\"", "\"segments\"",
    "\"time_scale\"", "\"flavour\"", "\"conditioning\"", "'shape'",      "\x93NUMPY"};
// What a program asks for: mostly whatever runs.
const std::vector<std::string> TARGETS = {"auto", "auto", "ort-cpu", "rtx:sm89"};

std::size_t place(const std::string& text, Random& random) {
  if (random() % 4) {
    const std::string& wanted = ANCHORS[random() % ANCHORS.size()];
    std::size_t anchor = text.find(wanted, random() % text.size());
    if (anchor == std::string::npos) anchor = text.find(wanted);
    if (anchor != std::string::npos) return std::min(anchor + random() % 400, text.size() - 1);
  }
  return random() % text.size();
}

// Where the JSON string that begins at a place or after it lies, with its quotes; nothing where there is none.
std::string_view string_after(std::string_view text, std::size_t at) {
  std::size_t begin = text.find('"', at);
  while (begin != text.npos && text.find_first_of(",:]}", begin) == begin + 1)
    begin = text.find('"', begin + 1);  // an end
  const std::size_t end = begin == text.npos ? text.npos : text.find('"', begin + 1);
  return end == text.npos ? std::string_view() : text.substr(begin, end + 1 - begin);
}

std::string mutated(std::string text, Random& random) {
  for (std::size_t changes = 1 + random() % 4; changes && !text.empty(); --changes) {
    const std::size_t at = place(text, random), length = std::min<std::size_t>(random() % 40, text.size() - at);
    switch (random() % 10) {
      case 0:
        text[at] = static_cast<char>(text[at] ^ 1 << random() % 8);
        break;
      case 1:
        text[at] = static_cast<char>(random());
        break;
      case 2:
        text.erase(at, length);
        break;
      case 3:
        text.insert(at, text.substr(at, length));
        break;
      case 4:
        text.replace(at, 1, TOKENS[random() % TOKENS.size()]);
        break;
      case 5:  // a number becomes another
        if (const std::size_t digit = text.find_first_of("0123456789", at); digit != std::string::npos)
          text[digit] = static_cast<char>('0' + random() % 10);
        break;
      case 6:
        if (random() % 8 == 0) text.resize(at);
        break;
      default: {  // a string becomes another, so that it is still JSON
        const std::string_view old = string_after(text, at), other = string_after(text, place(text, random));
        if (!old.empty() && !other.empty()) text.replace(old.data() - text.data(), old.size(), std::string(other));
      }
    }
  }
  return text;
}

// Runs the engine at its smallest sizes, where these are small: a contract that was believed must be one that runs.
void run(const mmdit::Engine& engine) {
  mmdit::Sizes sizes;
  for (const auto& [axis, range] : engine.contract().ranges) sizes[axis] = range.min;
  std::map<std::string, std::vector<char>> memory;
  const auto bytes = [&](const mmdit::TensorSpec& spec) -> std::vector<char>& {
    const std::size_t size = mmdit::element_count(spec.shape(sizes)) * mmdit::item_size(spec.dtype);
    if (size > 1000000) throw mmdit::UsageError("a run is small", std::to_string(size), "");
    return memory[spec.name] = std::vector<char>(size);
  };
  mmdit::Inputs inputs;
  mmdit::Outputs outputs;
  for (const mmdit::TensorSpec& spec : engine.contract().inputs)
    inputs[spec.name] = {spec.dtype, spec.shape(sizes), bytes(spec).data()};
  for (const mmdit::TensorSpec& spec : engine.contract().outputs)
    outputs[spec.name] = {spec.dtype, spec.shape(sizes), bytes(spec).data()};
  engine.run(inputs, outputs);
}

int records = 0;  // BundleErrors about one

template <typename Function>
std::string outcome(const Function& function) {
  try {
    function();
    return "well";
  } catch (const mmdit::BundleError& error) {
    records += error.received().rfind("'rtx:sm89'", 0) == 0;
    return "BundleError";
  } catch (const mmdit::ContractError&) {
    return "ContractError";
  } catch (const mmdit::UsageError&) {
    return "UsageError";
  } catch (const mmdit::MachineError&) {
    return "MachineError";
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const std::string bundle = argv[1], manifest = read(bundle + "/manifest.json"), array = read(argv[2]);
  const int count = std::atoi(argv[3]);
  Random random(std::strtoull(argv[4], nullptr, 10));
  mmdit::Options options;
  options.verify = mmdit::Verify::never;
  options.threads = 1;
  std::map<std::string, int> manifests, headers;
  for (int i = 0; i < count; ++i) {
    std::ofstream(bundle + "/manifest.json", std::ios::binary) << mutated(manifest, random);
    options.target = TARGETS[random() % TARGETS.size()];
    ++manifests[outcome([&] { run(mmdit::Engine::load(bundle, options)); })];
    ++headers[outcome([&] { npy::parse(mutated(array, random), "array"); })];
  }
  std::ofstream(bundle + "/manifest.json", std::ios::binary) << manifest;
  for (const auto& [what, times] : manifests) std::printf("manifest %s %d\n", what.c_str(), times);
  std::printf("record BundleError %d\n", records);
  for (const auto& [what, times] : headers) std::printf("npy %s %d\n", what.c_str(), times);
}
