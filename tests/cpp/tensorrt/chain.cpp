// Runs the chain of test_tensorrt.py on the fake GPU, in every way that an engine may be called:
//
//     chain BUNDLE
//
// Prints what went wrong; the last line says how many calls were right.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <optional>
#include <thread>
#include <vector>

#include "fake.h"
#include "mmdit/buffer.h"
#include "mmdit/engine.h"

namespace {

using Values = std::map<std::string, std::vector<float>>;

int right = 0, wrong = 0;

void check(const char* what, bool holds) {
  ++(holds ? right : wrong);
  if (!holds) std::printf("wrong: %s\n", what);
}

// What a segment makes of its inputs, computed without any runtime.
void segment(Values& values, const std::vector<std::string>& inputs, const std::vector<std::string>& outputs,
             const std::map<std::string, std::size_t>& counts) {
  double total = 0;
  for (const std::string& name : inputs) total += fake::read(name, values.at(name).data(), values.at(name).size());
  for (const std::string& name : outputs) {
    values[name].resize(counts.at(name));
    fake::write(name, total, values[name].data(), counts.at(name));
  }
}

// A call of one shape. `offset`: bytes from an address that TensorRT takes to the one that it is given.
class Call {
 public:
  Call(const mmdit::Engine& engine, std::int64_t batch, std::int64_t tokens, std::size_t offset)
      : batch_(batch), tokens_(tokens), offset_(offset) {
    const auto b = static_cast<std::size_t>(batch), n = static_cast<std::size_t>(tokens);
    add(engine, "hidden_states", {batch, tokens, 4});
    add(engine, "timestep", {batch});
    Values values = host_;
    segment(values, {"timestep"}, {"modulation"}, {{"modulation", b * 3}});
    segment(values, {"hidden_states", "modulation"}, {"h", "c"}, {{"h", b * n * 8}, {"c", b * 3}});
    segment(values, {"h"}, {"tap", "g"}, {{"tap", b * n * 8}, {"g", b * n * 8}});
    segment(values, {"g", "c", "tap", "hidden_states"}, {"sample"}, {{"sample", b * n * 4}});
    expected_ = {{"sample", values.at("sample")}, {"tap", values.at("tap")}};
    for (const auto& [name, numbers] : expected_)
      out_.emplace(name, mmdit::Buffer(engine, numbers.size() * sizeof(float) + offset_));
  }

  // Runs it, by a step of a schedule where `conditioning` is given.
  bool run(const mmdit::Engine& engine, void* stream, bool by_step) {
    const mmdit::Outputs outputs = {{"sample", view(out_.at("sample"), {batch_, tokens_, 4})},
                                    {"tap", view(out_.at("tap"), {batch_, tokens_, 8})}};
    for (const auto& [name, buffer] : out_) {
      const std::vector<char> nothing(buffer.size());
      buffer.upload(nothing.data(), nothing.size(), stream);
    }
    if (by_step) {
      // Three steps in one table; this call's is the last.
      std::vector<float> times(static_cast<std::size_t>(batch_) * 3, 0.25f);
      std::copy(host_.at("timestep").begin(), host_.at("timestep").end(), times.begin() + 2 * batch_);
      const mmdit::Buffer schedule(engine, times.size() * sizeof(float));
      schedule.upload(times.data(), schedule.size());
      const mmdit::Conditioning table =
          engine.condition({{"timestep", {mmdit::DType::float32, {3, batch_}, schedule.data()}}}, stream);
      mmdit::Inputs rest = inputs_;
      rest.erase("timestep");
      engine.run(rest, table, 2, outputs, stream);
    } else {
      engine.run(inputs_, outputs, stream);
    }
    bool same = true;
    for (const auto& [name, numbers] : expected_) {
      std::vector<float> result(numbers.size() + offset_ / sizeof(float));
      out_.at(name).download(result.data(), result.size() * sizeof(float), stream);
      for (std::size_t i = 0; i < numbers.size(); ++i)
        same = same && std::abs(result[i + offset_ / sizeof(float)] - numbers[i]) < 1e-4f;
    }
    return same;
  }

  mmdit::Inputs inputs_;

 private:
  mmdit::Tensor view(const mmdit::Buffer& buffer, const mmdit::Shape& shape) const {
    return {mmdit::DType::float32, shape, static_cast<char*>(buffer.data()) + offset_};
  }
  void add(const mmdit::Engine& engine, const std::string& name, const mmdit::Shape& shape) {
    std::vector<float>& values = host_[name];
    for (std::size_t i = 0; i < mmdit::element_count(shape); ++i) values.push_back(static_cast<float>(i % 5) / 5);
    const mmdit::Buffer& buffer =
        in_.emplace(name, mmdit::Buffer(engine, values.size() * sizeof(float) + offset_)).first->second;
    std::vector<char> bytes(buffer.size());
    std::memcpy(bytes.data() + offset_, values.data(), values.size() * sizeof(float));
    buffer.upload(bytes.data(), bytes.size());
    inputs_[name] = view(buffer, shape);
  }

  std::int64_t batch_, tokens_;
  std::size_t offset_;
  Values host_, expected_;
  std::map<std::string, mmdit::Buffer> in_, out_;
};

template <typename Refusal, typename Function>
bool refuses(const Function& function) {
  try {
    function();
  } catch (const Refusal&) {
    return true;
  }
  return false;
}

void run_all(const mmdit::Engine& engine) {
  int numbers[2];
  void* const one = reinterpret_cast<void*>(std::uintptr_t{16});  // streams of the caller's
  void* const other = reinterpret_cast<void*>(std::uintptr_t{17});
  Call small(engine, 2, 5, 0), large(engine, 3, 40, 0), askew(engine, 2, 5, 4);
  check("a call on the default stream", small.run(engine, nullptr, false));
  check("a call on a stream", small.run(engine, one, false));
  check("a call of another shape and profile on another stream", large.run(engine, other, false));
  check("the first shape again", small.run(engine, one, false));
  check("addresses that TensorRT does not take", askew.run(engine, one, false));
  check("a step of a schedule", small.run(engine, one, true));
  check("a step of a schedule at another profile", large.run(engine, nullptr, true));
  check("a step at addresses that TensorRT does not take", askew.run(engine, other, true));
  mmdit::Inputs host = small.inputs_;
  host["timestep"].data = numbers;
  check("memory of the host is refused", refuses<mmdit::ContractError>([&] {
          mmdit::Buffer sample(engine, 160), tap(engine, 320);
          engine.run(host, {{"sample", {mmdit::DType::float32, {2, 5, 4}, sample.data()}},
                            {"tap", {mmdit::DType::float32, {2, 5, 8}, tap.data()}}});
        }));
  check("sizes that no profile holds together are refused",
        refuses<mmdit::ContractError>([&] { Call(engine, 4, 5, 0).run(engine, one, false); }));
  std::vector<std::thread> threads;
  std::vector<int> same(4);
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      Call call(engine, 2 + t % 2, t % 2 ? 40 : 5 + t, static_cast<std::size_t>(t) * 4);
      for (int i = 0; i < 20; ++i)
        same[t] += call.run(engine, reinterpret_cast<void*>(std::uintptr_t(20 + t)), i % 3 == 0);
    });
  for (std::thread& thread : threads) thread.join();
  for (const int count : same) check("calls of four threads", count == 20);
}

}  // namespace

int main(int, char** argv) {
  try {
    mmdit::Options options;
    options.target = "trt";
    run_all(mmdit::Engine::load(argv[1], options));
  } catch (const mmdit::BundleError& error) {
    std::printf("BundleError: %s\n", error.what());
  } catch (const mmdit::MachineError& error) {
    std::printf("MachineError: %s\n", error.what());
  }
  std::printf("%d right, %d wrong\n", right, wrong);
}
