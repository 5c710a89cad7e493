// A call of the model of test_tensorrt.py, as a program of CUDA's makes it: what is enqueued and not waited for, and
// later a look at what came of it.
#ifndef TESTS_CALL_H
#define TESTS_CALL_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "fake.h"
#include "fake_memory.h"
#include "mmdit/buffer.h"
#include "mmdit/engine.h"

using Values = std::map<std::string, std::vector<float>>;

// What a segment makes of its inputs, computed without any runtime.
inline void segment(Values& values, const std::vector<std::string>& inputs,
                    const std::map<std::string, std::size_t>& outputs) {
  double total = 0;
  for (const std::string& name : inputs) total += fake::read(name, values.at(name).data(), values.at(name).size());
  for (const auto& [name, count] : outputs) {
    values[name].resize(count);
    fake::write(name, total, values[name].data(), count);
  }
}

class Call {
 public:
  // `offset`: bytes from an address that TensorRT takes to the one that it is given.
  Call(const mmdit::Engine& engine, std::int64_t batch, std::int64_t tokens, std::size_t offset = 0)
      : batch_(batch), offset_(offset), schedule_(engine, static_cast<std::size_t>(batch) * STEPS * sizeof(float)) {
    const auto b = static_cast<std::size_t>(batch), n = static_cast<std::size_t>(tokens);
    add(engine, "hidden_states", {batch, tokens, 4});
    add(engine, "timestep", {batch});
    Values values = host_;
    segment(values, {"timestep"}, {{"modulation", b * 3}});
    segment(values, {"hidden_states", "modulation"}, {{"h", b * n * 8}, {"c", b * 3}});
    segment(values, {"h"}, {{"tap", b * n * 8}, {"g", b * n * 8}});
    segment(values, {"g", "c", "tap", "hidden_states"}, {{"sample", b * n * 4}});
    expected_ = {{"sample", values.at("sample")}, {"tap", values.at("tap")}};
    for (const auto& [name, numbers] : expected_) {
      const mmdit::Buffer& buffer =
          buffers_.emplace(name, mmdit::Buffer(engine, numbers.size() * sizeof(float) + offset_)).first->second;
      outputs_[name] = view(buffer, {batch, tokens, name == "tap" ? 8 : 4});
    }
    spoil(nullptr);
  }

  // Enqueues an upload of the inputs, and a call.
  void start(const mmdit::Engine& engine, void* stream) {
    for (const auto& [name, tensor] : inputs_) upload(name, stream);
    engine.run(inputs_, outputs_, stream);
  }
  // The same by the last step of a schedule, whose table is made on another stream.
  void start_step(const mmdit::Engine& engine, void* table_stream, void* stream) {
    std::vector<float> times(static_cast<std::size_t>(batch_) * STEPS, 0.25f);
    std::copy(host_.at("timestep").begin(), host_.at("timestep").end(), times.end() - batch_);
    fake::upload(schedule_.data(), times.data(), schedule_.size(), table_stream);
    table_ = engine.condition({{"timestep", {mmdit::DType::float32, {STEPS, batch_}, schedule_.data()}}}, table_stream);
    start_step_again(engine, stream);
  }
  void start_step_again(const mmdit::Engine& engine, void* stream) {
    mmdit::Inputs rest = inputs_;
    rest.erase("timestep");
    upload("hidden_states", stream);
    engine.run(rest, *table_, STEPS - 1, outputs_, stream);
  }
  void drop_table() { table_.reset(); }

  // Uploads the inputs so that they are there for any stream.
  void upload_now() {
    for (const auto& [name, values] : host_) {
      const std::vector<char> bytes = askew(values);
      buffers_.at(name).upload(bytes.data(), bytes.size());
    }
  }
  // Enqueues a call over inputs that are there.
  void start_uploaded(const mmdit::Engine& engine, void* stream) { engine.run(inputs_, outputs_, stream); }

  // Reads the outputs back on the call's stream: whether they are right. Inputs and outputs are NaNs afterwards.
  bool finish(void* stream) {
    bool same = true;
    for (const auto& [name, numbers] : expected_) {
      std::vector<float> result(numbers.size() + offset_ / sizeof(float));
      buffers_.at(name).download(result.data(), result.size() * sizeof(float), stream);
      for (std::size_t i = 0; i < numbers.size(); ++i)
        same = same && std::abs(result[i + offset_ / sizeof(float)] - numbers[i]) < 1e-4f;
    }
    spoil(stream);
    return same;
  }

  mmdit::Inputs inputs_;
  mmdit::Outputs outputs_;

 private:
  static constexpr int STEPS = 3;

  void add(const mmdit::Engine& engine, const std::string& name, const mmdit::Shape& shape) {
    std::vector<float>& values = host_[name];
    for (std::size_t i = 0; i < mmdit::element_count(shape); ++i) values.push_back(static_cast<float>(i % 5) / 5);
    const mmdit::Buffer buffer(engine, values.size() * sizeof(float) + offset_);
    inputs_[name] = view(buffers_.emplace(name, buffer).first->second, shape);
  }
  mmdit::Tensor view(const mmdit::Buffer& buffer, const mmdit::Shape& shape) const {
    return {mmdit::DType::float32, shape, static_cast<char*>(buffer.data()) + offset_};
  }
  std::vector<char> askew(const std::vector<float>& values) const {
    std::vector<char> bytes(values.size() * sizeof(float) + offset_);
    std::memcpy(bytes.data() + offset_, values.data(), values.size() * sizeof(float));
    return bytes;
  }
  void upload(const std::string& name, void* stream) const {
    const std::vector<char> bytes = askew(host_.at(name));
    fake::upload(buffers_.at(name).data(), bytes.data(), bytes.size(), stream);
  }
  static void fill(const mmdit::Buffer& buffer, void* stream) {
    const std::vector<float> nothing(buffer.size() / sizeof(float), std::numeric_limits<float>::quiet_NaN());
    buffer.upload(nothing.data(), buffer.size(), stream);
  }
  void spoil(void* stream) const {
    for (const auto& [name, buffer] : buffers_) fill(buffer, stream);
    fill(schedule_, stream);
  }

  std::int64_t batch_;
  std::size_t offset_;
  Values host_, expected_;
  std::map<std::string, mmdit::Buffer> buffers_;
  mmdit::Buffer schedule_;
  std::optional<mmdit::Conditioning> table_;
};

#endif
