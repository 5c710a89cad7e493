// From noise to the latent of an image, from a bundle and .npy files:
//
//     mmdit-sample BUNDLE INPUTS -o latent.npy --steps 28 --shift 3 --guidance 4.5
//
// INPUTS is a folder: noise.npy [batch, tokens, channels], and a file for each other input of the contract but
// hidden_states and timestep: encoder_hidden_states.npy, pooled_projections.npy, img_ids.npy, … With guidance, those
// with a batch have twice the rows: without the prompt, then with it.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <optional>

#include "mmdit/engine.h"
#include "mmdit/flow.h"
#include "sampler.h"

namespace {

namespace fs = std::filesystem;

const char* const USAGE =
    "usage: mmdit-sample BUNDLE INPUTS -o LATENT.npy [--target TARGET] [--device N] [--verify always|once|never]\n"
    "                    [--steps N] [--shift S] [--last SIGMA] [--terminal SIGMA] [--guidance SCALE [--two-calls]]\n";

struct Arguments {
  fs::path bundle, inputs, output;
  mmdit::Options engine;
  mmdit::Schedule schedule;
  std::optional<Guidance> guidance;
  bool two_calls = false;
};

mmdit::UsageError wrong(const std::string& rule, const std::string& received) {
  return mmdit::UsageError(rule, received, "mmdit-sample --help");
}

double number(const std::string& option, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end) throw wrong(option + " takes a number", text);
  return value;
}

int whole_number(const std::string& option, const std::string& text) {
  const double value = number(option, text);
  if (!(value >= 0 && value < 1e6) || value != static_cast<int>(value))
    throw wrong(option + " takes a whole number", text);
  return static_cast<int>(value);
}

mmdit::Verify verify_of(const std::string& text) {
  if (text == "always") return mmdit::Verify::always;
  if (text == "once") return mmdit::Verify::once;
  if (text == "never") return mmdit::Verify::never;
  throw wrong("--verify is always, once or never", text);
}

Arguments parse(int argc, char** argv) {
  Arguments args;
  const std::map<std::string, std::function<void(const std::string&)>> options = {
      {"-o", [&](const std::string& text) { args.output = text; }},
      {"--target", [&](const std::string& text) { args.engine.target = text; }},
      {"--device", [&](const std::string& text) { args.engine.device = whole_number("--device", text); }},
      {"--verify", [&](const std::string& text) { args.engine.verify = verify_of(text); }},
      {"--steps", [&](const std::string& text) { args.schedule.steps = whole_number("--steps", text); }},
      {"--shift", [&](const std::string& text) { args.schedule.shift = number("--shift", text); }},
      {"--last", [&](const std::string& text) { args.schedule.last = number("--last", text); }},
      {"--terminal", [&](const std::string& text) { args.schedule.terminal = number("--terminal", text); }},
      {"--guidance", [&](const std::string& text) { args.guidance = Guidance{number("--guidance", text), false}; }},
  };
  int positional = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (const auto option = options.find(word); option != options.end()) {
      if (++i == argc) throw wrong(word + " takes a value", "none");
      option->second(argv[i]);
    } else if (word == "--two-calls") {
      args.two_calls = true;
    } else if (word.substr(0, 1) == "-" || positional == 2) {
      throw wrong("there is such an argument", word);
    } else {
      (positional++ ? args.inputs : args.bundle) = word;
    }
  }
  if (positional < 2 || args.output.empty()) throw wrong("BUNDLE, INPUTS and -o are given", "fewer");
  if (args.two_calls && !args.guidance) throw wrong("--two-calls is a way of guidance", "no --guidance");
  if (args.guidance) args.guidance->two_calls = args.two_calls;
  return args;
}

void run(const Arguments& args) {
  const mmdit::Engine engine = mmdit::Engine::load(args.bundle, args.engine);
  const npy::Array noise = npy::read(args.inputs / "noise.npy");
  std::vector<float> latent(noise.count());
  mmdit::to_float(noise.data.data(), noise.count(), noise.dtype, latent.data());
  Prompt prompt;
  for (const mmdit::TensorSpec& spec : engine.contract().inputs)
    if (spec.name != "hidden_states" && spec.name != "timestep")
      prompt[spec.name] = npy::read(args.inputs / (spec.name + ".npy"));
  const std::vector<float> sigmas = mmdit::noise_levels(args.schedule);
  sample(engine, prompt, args.guidance ? &*args.guidance : nullptr, sigmas, noise.shape, latent);
  npy::write(args.output, noise.shape, latent);
  std::printf("%s on %s: %d steps, %s\n", engine.name().c_str(), engine.target().c_str(), args.schedule.steps,
              args.output.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && !std::strcmp(argv[1], "--help")) return std::fputs(USAGE, stdout) < 0;
  try {
    run(parse(argc, argv));
    return 0;
  } catch (const mmdit::MachineError& error) {
    std::fprintf(stderr, "mmdit-sample: %s\n", error.what());
    return 3;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "mmdit-sample: %s\n", error.what());
    return 2;
  }
}
