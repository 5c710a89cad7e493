// Opens a bundle again and again, each time with another broken manifest, and reads as many broken .npy headers.
//
//     mutate BUNDLE NPY COUNT SEED
//
// Each must give an engine, or an mmdit::Error: anything else ends the process. Prints how many of which there were.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <string>
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
                                         "(",
                                         ")",
                                         "'descr': '<f4', ",
                                         "True",
                                         "<f8",
                                         "99999999999"};
// Where a manifest says what the runtime believes.
const std::vector<std::string> ANCHORS = {"\"contract\"",   "\"engines\"", "\"files\"",  "\"split\"",
                                          "\"ranges\"",     "\"format\"",  "\"inputs\"", "\"sha256\"",
                                          "\"time_scale\"", "'shape'",     "\x93NUMPY"};

std::size_t place(const std::string& text, Random& random) {
  if (random() % 4) {
    const std::size_t anchor = text.find(ANCHORS[random() % ANCHORS.size()]);
    if (anchor != std::string::npos) return std::min(anchor + random() % 400, text.size() - 1);
  }
  return random() % text.size();
}

std::string mutated(std::string text, Random& random) {
  for (std::size_t changes = 1 + random() % 4; changes && !text.empty(); --changes) {
    const std::size_t at = place(text, random), length = std::min<std::size_t>(random() % 40, text.size() - at);
    switch (random() % 7) {
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
      default:
        if (random() % 8 == 0) text.resize(at);
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

template <typename Function>
std::string outcome(const Function& function) {
  try {
    function();
    return "well";
  } catch (const mmdit::BundleError&) {
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
    ++manifests[outcome([&] { run(mmdit::Engine::load(bundle, options)); })];
    ++headers[outcome([&] { npy::parse(mutated(array, random), "array"); })];
  }
  std::ofstream(bundle + "/manifest.json", std::ios::binary) << manifest;
  for (const auto& [what, times] : manifests) std::printf("manifest %s %d\n", what.c_str(), times);
  for (const auto& [what, times] : headers) std::printf("npy %s %d\n", what.c_str(), times);
}
