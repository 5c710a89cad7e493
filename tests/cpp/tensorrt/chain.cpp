// Runs the chain of test_tensorrt.py on the fake GPU, in every way that an engine may be called:
//
//     chain BUNDLE
//
// Prints what went wrong; the last line says how many checks were right.
#include <cstdint>
#include <cstdio>
#include <optional>
#include <thread>
#include <vector>

#include "call.h"
#include "fake_streams.h"
#include "mmdit/engine.h"

namespace {

constexpr int TIMES = 8;  // that each is tried: the GPU chooses another order each time

int right = 0, wrong = 0;

void check(const char* what, bool holds) {
  ++(holds ? right : wrong);
  if (!holds) std::printf("wrong: %s\n", what);
}

template <typename Function>
void check_often(const char* what, const Function& function) {
  bool holds = true;
  for (int i = 0; i < TIMES; ++i) holds = function() && holds;
  check(what, holds);
}

template <typename Refusal, typename Function>
bool refuses(const Function& function) {
  try {
    function();
  } catch (const Refusal&) {
    return true;
  }
  return false;
}

void* stream(std::uintptr_t number) { return reinterpret_cast<void*>(number); }

// The default stream by both its names, the thread's own, and streams of the caller's.
void* const DEFAULT = nullptr;
void* const LEGACY = stream(1);
void* const PER_THREAD = stream(2);
void* const ONE = stream(16);
void* const OTHER = stream(17);
const std::vector<void*> STREAMS = {DEFAULT, LEGACY, PER_THREAD, ONE};

void one_at_a_time(const mmdit::Engine& engine) {
  Call small(engine, 2, 5), large(engine, 3, 40), askew(engine, 2, 5, 4);
  const auto call = [&](Call& of, void* on) { return of.start(engine, on), of.finish(on); };
  const auto step = [&](Call& of, void* on) { return of.start_step(engine, on, on), of.finish(on); };
  for (void* const on : STREAMS) {
    check_often("a call", [&] { return call(small, on); });
    check_often("a call of another shape and profile", [&] { return call(large, on); });
    check_often("addresses that TensorRT does not take", [&] { return call(askew, on); });
    check_often("a step of a schedule", [&] { return step(small, on); });
    check_often("a step of a schedule at another profile", [&] { return step(large, on); });
    check_often("a step at addresses that TensorRT does not take", [&] { return step(askew, on); });
    check_often("a buffer's upload is there for any stream", [&] {
      small.upload_now();
      small.start_uploaded(engine, on);
      return small.finish(on);
    });
    check_often("a table that goes before its step has run", [&] {
      small.start_step(engine, on, on);
      small.drop_table();
      return small.finish(on);
    });
  }
}

// Calls that are enqueued one after another, and read back in the other order.
void one_after_another(const mmdit::Engine& engine) {
  Call first(engine, 3, 40), second(engine, 2, 5, 4), third(engine, 2, 7);
  for (void* const before : STREAMS)
    for (void* const after : {DEFAULT, PER_THREAD, ONE, OTHER}) {
      check_often("a call right after another", [&] {
        first.start(engine, before);
        second.start(engine, after);
        third.start(engine, before);
        const bool last = third.finish(before);
        const bool middle = second.finish(after);
        return first.finish(before) && middle && last;
      });
      check_often("a table made on one stream and used on another", [&] {
        second.start_step(engine, before, after);
        return second.finish(after);
      });
      check_often("such a table with calls under way", [&] {
        first.start(engine, OTHER);
        second.start_step(engine, before, after);
        third.start(engine, before);
        const bool same = third.finish(before);
        return second.finish(after) && first.finish(OTHER) && same;
      });
    }
  check_often("calls and steps wait for nothing", [&] {
    second.start_step(engine, DEFAULT, ONE);
    const int waits = fake::host_waits();
    first.start(engine, OTHER);
    third.start(engine, DEFAULT);
    bool none = fake::host_waits() == waits;
    none = second.finish(ONE) && none;
    const int before = fake::host_waits();
    second.start_step_again(engine, OTHER);
    none = fake::host_waits() == before && none;
    return second.finish(OTHER) && third.finish(DEFAULT) && first.finish(OTHER) && none;
  });
}

void refusals(const mmdit::Engine& engine) {
  int numbers[2];
  Call small(engine, 2, 5), misfit(engine, 4, 5);
  mmdit::Inputs host = small.inputs_;
  host["timestep"].data = numbers;
  check("memory of the host is refused", refuses<mmdit::ContractError>([&] { engine.run(host, small.outputs_, ONE); }));
  check("sizes that no profile holds together are refused",
        refuses<mmdit::ContractError>([&] { misfit.start(engine, ONE); }));
}

void four_threads(const mmdit::Engine& engine) {
  std::vector<std::thread> threads;
  std::vector<int> same(4);
  const std::vector<void*> own = {stream(20), stream(21), PER_THREAD, DEFAULT};
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      Call call(engine, 2 + t % 2, t % 2 ? 40 : 5 + t, static_cast<std::size_t>(t) * 4);
      for (int i = 0; i < 20; ++i) {
        if (i % 3 == 0) {
          call.start_step(engine, own[(t + i) % 2], own[t]);
        } else {
          call.start(engine, own[t]);
        }
        same[t] += call.finish(own[t]);
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (const int count : same) check("calls of four threads", count == 20);
}

mmdit::Engine load(const char* bundle) {
  mmdit::Options options;
  options.target = "trt";
  return mmdit::Engine::load(bundle, options);
}

// An engine that ends with work under way.
void ends(const char* bundle) {
  std::optional<mmdit::Engine> engine = load(bundle);
  Call call(*engine, 2, 5);
  call.start(*engine, ONE);
  engine.reset();
  check("an engine that goes before its call has run", call.finish(ONE));
}

}  // namespace

int main(int, char** argv) {
  try {
    {
      const mmdit::Engine engine = load(argv[1]);
      one_at_a_time(engine);
      one_after_another(engine);
      refusals(engine);
      four_threads(engine);
    }
    ends(argv[1]);
  } catch (const mmdit::BundleError& error) {
    std::printf("BundleError: %s\n", error.what());
  } catch (const mmdit::MachineError& error) {
    std::printf("MachineError: %s\n", error.what());
  }
  std::printf("%d right, %d wrong\n", right, wrong);
}
