// Several threads share one engine, each with shapes of its own, while another opens and closes engines of the bundle:
//
//     threads BUNDLE THREADS CALLS [race]
//
// Every result must be, bit by bit, that of the same call made alone. With `race`, the threads also count in a number
// that nothing guards: a sanitizer must see it.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "mmdit/engine.h"
#include "mmdit/flow.h"

namespace {

// The inputs of one shape, and what the engine makes of them.
class Call {
 public:
  Call(const mmdit::Engine& engine, int kind) {
    mmdit::Sizes sizes;
    for (const auto& [axis, range] : engine.contract().ranges) sizes[axis] = std::min(range.min + kind % 5, range.max);
    for (const mmdit::TensorSpec& spec : engine.contract().inputs) {
      const mmdit::Shape shape = spec.shape(sizes);
      std::vector<float> values(mmdit::element_count(shape));
      for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>((i * 37 + 11 * kind) % 64) / 64.0f;
      std::vector<char>& memory = memory_[spec.name];
      memory.resize(values.size() * mmdit::item_size(spec.dtype));
      mmdit::from_float(values.data(), values.size(), spec.dtype, memory.data());
      inputs_[spec.name] = {spec.dtype, shape, memory.data()};
    }
    spec_ = engine.contract().outputs[0];
    shape_ = spec_.shape(sizes);
  }

  std::vector<char> run(const mmdit::Engine& engine, bool by_step) const {
    std::vector<char> result(mmdit::element_count(shape_) * mmdit::item_size(spec_.dtype));
    const mmdit::Outputs outputs = {{spec_.name, {spec_.dtype, shape_, result.data()}}};
    if (!by_step) {
      engine.run(inputs_, outputs);
      return result;
    }
    mmdit::Inputs once, rest = inputs_;
    for (const char* name : {"timestep", "pooled_projections", "guidance"})
      if (const auto found = rest.find(name); found != rest.end()) once.insert(rest.extract(found));
    once.at("timestep").shape.insert(once.at("timestep").shape.begin(), 1);
    engine.run(rest, engine.condition(once), 0, outputs);
    return result;
  }

 private:
  std::map<std::string, std::vector<char>> memory_;
  mmdit::Inputs inputs_;
  mmdit::TensorSpec spec_;
  mmdit::Shape shape_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  const bool race = argc > 4;
  const int thread_count = std::atoi(argv[2]), call_count = std::atoi(argv[3]);
  const mmdit::Engine engine = mmdit::Engine::load(argv[1]);
  std::vector<Call> calls;
  std::vector<std::vector<char>> alone;
  for (int kind = 0; kind < 5; ++kind) {
    calls.emplace_back(engine, kind);
    alone.push_back(calls.back().run(engine, false));
  }
  std::atomic<int> mismatches{0}, done{0};
  int unguarded = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < thread_count; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < call_count; ++i, ++done) {
        const auto kind = static_cast<std::size_t>(i + t) % calls.size();
        if (calls[kind].run(engine, i % 2) != alone[kind]) ++mismatches;
        if (race) ++unguarded;
      }
    });
  threads.emplace_back([&] {
    for (int i = 0; i < 3; ++i) mmdit::Engine::load(argv[1]);
  });
  for (std::thread& thread : threads) thread.join();
  std::printf("%d calls, %d mismatches\n", done.load(), mismatches.load());
  return mismatches ? 1 : 0;
}
