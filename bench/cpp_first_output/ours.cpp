// ours BUNDLE BATCH IMG_TOKENS TXT_TOKENS always|never: the first output by this library.
#include <cstring>
#include <map>

#include "feed.h"
#include "mmdit/engine.h"

int main(int, char** argv) {
  const auto begun = std::chrono::steady_clock::now();
  mmdit::Options options;
  options.target = "ort-cpu";
  options.verify = std::strcmp(argv[5], "always") ? mmdit::Verify::never : mmdit::Verify::always;
  const mmdit::Engine engine = mmdit::Engine::load(argv[1], options);
  const double loaded = seconds_since(begun);
  std::map<std::string, std::vector<float>> memory;
  mmdit::Inputs inputs;
  mmdit::Sizes sizes;
  for (const char* axis : {"batch", "img_tokens", "txt_tokens"}) sizes[axis] = size_of(axis, argv);
  for (const mmdit::TensorSpec& spec : engine.contract().inputs) {
    const mmdit::Shape shape = spec.shape(sizes);
    memory[spec.name] = feed(spec.name, mmdit::element_count(shape));
    inputs[spec.name] = {spec.dtype, shape, memory[spec.name].data()};
  }
  const mmdit::TensorSpec& out = engine.contract().outputs[0];
  std::vector<float> output(mmdit::element_count(out.shape(sizes)));
  engine.run(inputs, {{out.name, {out.dtype, out.shape(sizes), output.data()}}});
  report(loaded, seconds_since(begun), engine.verify_seconds(), output);
}
