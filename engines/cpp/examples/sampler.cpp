#include "sampler.h"

#include <algorithm>
#include <cstring>

#include "mmdit/flow.h"

namespace {

const mmdit::TensorSpec& spec_of(const mmdit::Engine& engine, const std::string& name) {
  for (const mmdit::TensorSpec& spec : engine.contract().inputs)
    if (spec.name == name) return spec;
  throw mmdit::UsageError("an input is one of the contract's", name, "remove " + name + ".npy");
}

// The array as the contract's type.
npy::Array converted(const npy::Array& array, mmdit::DType dtype) {
  if (array.dtype == dtype) return array;
  std::vector<float> values(array.count());
  mmdit::to_float(array.data.data(), array.count(), array.dtype, values.data());
  npy::Array result{dtype, array.shape, std::vector<char>(array.count() * mmdit::item_size(dtype))};
  mmdit::from_float(values.data(), values.size(), dtype, result.data.data());
  return result;
}

// The axis that a batch is along, or the rank where there is none.
std::size_t batch_axis(const mmdit::TensorSpec& spec) {
  const auto is_batch = [](const mmdit::Axis& axis) { return axis.name == "batch"; };
  return static_cast<std::size_t>(std::find_if(spec.axes.begin(), spec.axes.end(), is_batch) - spec.axes.begin());
}

// The first or second half of the batch.
npy::Array half_of(const npy::Array& array, std::size_t axis, bool second) {
  if (axis >= array.shape.size()) return array;
  if (array.shape[axis] % 2)
    throw mmdit::UsageError("guidance takes inputs for twice the batch: rows without the prompt, then with it",
                            "shape " + mmdit::to_string(array.shape), "stack both");
  npy::Array result{array.dtype, array.shape, {}};
  result.shape[axis] /= 2;
  const auto before =
      mmdit::element_count({array.shape.begin(), array.shape.begin() + static_cast<std::ptrdiff_t>(axis)});
  const std::size_t part = array.data.size() / std::max<std::size_t>(2 * before, 1);
  for (std::size_t i = 0; i < before; ++i) {
    const char* const from = array.data.data() + (2 * i + second) * part;
    result.data.insert(result.data.end(), from, from + part);
  }
  return result;
}

Prompt half_of(const mmdit::Engine& engine, const Prompt& prompt, bool second) {
  Prompt half;
  for (const auto& [name, array] : prompt) half[name] = half_of(array, batch_axis(spec_of(engine, name)), second);
  return half;
}

std::int64_t batch_of(const mmdit::Engine& engine, const Prompt& prompt) {
  for (const auto& [name, array] : prompt)
    if (const std::size_t axis = batch_axis(spec_of(engine, name)); axis < array.shape.size()) return array.shape[axis];
  throw mmdit::UsageError("a prompt has an input with a batch", "none", "add encoder_hidden_states.npy");
}

}  // namespace

Batch::Batch(const mmdit::Engine& engine, const Prompt& prompt, const std::vector<float>& sigmas)
    : engine_(engine), size_(batch_of(engine, prompt)) {
  npy::Array timesteps{mmdit::DType::float32, {static_cast<std::int64_t>(sigmas.size()) - 1, size_}, {}};
  std::vector<float> values;
  for (std::size_t s = 0; s + 1 < sigmas.size(); ++s)
    values.insert(values.end(), static_cast<std::size_t>(size_), mmdit::timestep_of(sigmas[s], engine.time_scale()));
  timesteps.data.resize(values.size() * sizeof(float));
  std::memcpy(timesteps.data.data(), values.data(), timesteps.data.size());

  mmdit::Inputs schedule;
  const auto put = [&](const std::string& name, const npy::Array& array) {
    const mmdit::Buffer& buffer = memory_.emplace(name, mmdit::Buffer(engine, array.data.size())).first->second;
    buffer.upload(array.data.data(), array.data.size());
    const bool once = name == "timestep" || name == "pooled_projections" || name == "guidance";
    (once ? schedule : inputs_)[name] = {array.dtype, array.shape, buffer.data()};
  };
  put("timestep", timesteps);
  for (const auto& [name, array] : prompt) put(name, converted(array, spec_of(engine, name).dtype));
  conditioning_.push_back(engine.condition(schedule));
}

void Batch::velocity(const std::vector<float>& latents, std::int64_t tokens, std::size_t step,
                     std::vector<float>& result) {
  const mmdit::TensorSpec &in = spec_of(engine_, "hidden_states"), &out = engine_.contract().outputs[0];
  const mmdit::Sizes sizes = {{"batch", size_}, {"img_tokens", tokens}};
  const mmdit::Shape in_shape = in.shape(sizes), out_shape = out.shape(sizes);
  const std::size_t count = mmdit::element_count(out_shape);
  if (latents.size() != mmdit::element_count(in_shape) || in_shape != out_shape)
    throw mmdit::ContractError("a velocity has the shape of the latent, " + mmdit::to_string(in_shape),
                               mmdit::to_string(out_shape), "sample a model that returns as many channels as it takes");
  const std::size_t in_bytes = count * mmdit::item_size(in.dtype), out_bytes = count * mmdit::item_size(out.dtype);
  const mmdit::Buffer& x = memory_.try_emplace("hidden_states", engine_, in_bytes).first->second;
  const mmdit::Buffer& v = memory_.try_emplace("sample", engine_, out_bytes).first->second;
  std::vector<char> host(std::max(in_bytes, out_bytes));
  mmdit::from_float(latents.data(), count, in.dtype, host.data());
  x.upload(host.data(), in_bytes);
  inputs_["hidden_states"] = {in.dtype, in_shape, x.data()};
  engine_.run(inputs_, conditioning_[0], step, {{out.name, {out.dtype, out_shape, v.data()}}});
  v.download(host.data(), out_bytes);
  result.resize(count);
  mmdit::to_float(host.data(), count, out.dtype, result.data());
}

void sample(const mmdit::Engine& engine, const Prompt& prompt, const Guidance* guidance,
            const std::vector<float>& sigmas, const mmdit::Shape& shape, std::vector<float>& latent) {
  if (engine.contract().outputs.size() != 1 || shape.size() != 3)
    throw mmdit::UsageError("a latent of tokens [batch, tokens, channels] is sampled with a model of one output",
                            "noise of shape " + mmdit::to_string(shape), "export without further outputs");
  if (const std::int64_t rows = batch_of(engine, prompt); rows != shape[0] * (guidance ? 2 : 1))
    throw mmdit::UsageError("the prompt has a row for each sample, with guidance two",
                            std::to_string(rows) + " for noise of shape " + mmdit::to_string(shape),
                            "stack the rows without the prompt and those with it");
  std::vector<Batch> batches;
  if (guidance && guidance->two_calls) {
    batches.emplace_back(engine, half_of(engine, prompt, false), sigmas);
    batches.emplace_back(engine, half_of(engine, prompt, true), sigmas);
  } else {
    batches.emplace_back(engine, prompt, sigmas);
  }
  const bool in_one = guidance && !guidance->two_calls;
  std::vector<float> velocity, with, twice;
  for (std::size_t step = 0; step + 1 < sigmas.size(); ++step) {
    if (in_one) {
      twice = latent;
      twice.insert(twice.end(), latent.begin(), latent.end());
      batches[0].velocity(twice, shape[1], step, velocity);
      with.assign(velocity.begin() + static_cast<std::ptrdiff_t>(latent.size()), velocity.end());
    } else {
      batches[0].velocity(latent, shape[1], step, velocity);
      if (guidance) batches[1].velocity(latent, shape[1], step, with);
    }
    if (guidance) mmdit::guide(velocity.data(), with.data(), latent.size(), guidance->scale);
    mmdit::euler_step(latent.data(), velocity.data(), latent.size(), sigmas[step], sigmas[step + 1]);
  }
}
