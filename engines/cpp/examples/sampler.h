// The flow sampler over an engine: a velocity for each step, guided or not, and Euler steps from noise to the latent.
#ifndef MMDIT_EXAMPLES_SAMPLER_H
#define MMDIT_EXAMPLES_SAMPLER_H

#include <map>
#include <string>
#include <vector>

#include "mmdit/buffer.h"
#include "mmdit/engine.h"
#include "npy.h"

// What the text encoders and the position grid give, by input name: all but hidden_states and timestep.
using Prompt = std::map<std::string, npy::Array>;

// A batch of the engine's, with its prompt: the inputs on the device, and the whole schedule's conditioning.
class Batch {
 public:
  // `sigmas`: noise levels [steps + 1]. Throws mmdit::UsageError or ContractError: an input is missing or not as the
  // contract has it.
  Batch(const mmdit::Engine& engine, const Prompt& prompt, const std::vector<float>& sigmas);

  // The velocity at step `step` of latents [batch, tokens, channels] in fp32.
  void velocity(const std::vector<float>& latents, std::int64_t tokens, std::size_t step, std::vector<float>& result);

 private:
  const mmdit::Engine& engine_;
  std::int64_t size_;
  std::map<std::string, mmdit::Buffer> memory_;
  mmdit::Inputs inputs_;
  std::vector<mmdit::Conditioning> conditioning_;  // one
};

struct Guidance {
  double scale = 1;
  bool two_calls = false;  // half the memory of one call of twice the batch
};

// Samples from noise [batch, tokens, channels]. With guidance, `prompt` has twice the batch: rows without the prompt,
// then the same with it. Returns the latent, in place of the noise.
void sample(const mmdit::Engine& engine, const Prompt& prompt, const Guidance* guidance,
            const std::vector<float>& sigmas, const mmdit::Shape& shape, std::vector<float>& latent);

#endif
