// Rectified flow on the CPU: schedules, Euler steps and guidance, to the bit as mmdit_deploy.sampling has them.
//
//     x ← x + (σ_next - σ) · v(x, σ)                       for each pair of neighbours in the schedule
//     v = v_without + scale · (v_with - v_without)         classifier-free guidance
//
// The latent stays in fp32 whatever the model's type. Build what calls this without -ffast-math.
#ifndef MMDIT_FLOW_H
#define MMDIT_FLOW_H

#include <cstddef>
#include <optional>
#include <vector>

#include "mmdit/api.h"
#include "mmdit/tensor.h"

namespace mmdit {

struct Schedule {
  int steps = 28;                  // calls of the model, two at once with guidance
  double shift = 3.0;              // towards noise; 1 for none (arXiv:2403.03206, equation 23)
  std::optional<double> last;      // the last call's noise level before the shift; none: SD3's. FLUX: 1 / steps
  std::optional<double> terminal;  // stretch the levels such that the last call has this one (Qwen-Image: 0.02)
};

// Noise levels [steps + 1], falling from 1 to 0. Throws UsageError: a number is out of its range.
MMDIT_API std::vector<float> noise_levels(const Schedule& schedule);
// A noise level on the scale that a model takes: 0 to 1000 / time_scale (Engine::time_scale).
MMDIT_API float timestep_of(float sigma, double time_scale) noexcept;

// One Euler step of `count` elements, in fp32: x + (sigma_next - sigma) · velocity, into x.
MMDIT_API void euler_step(float* x, const float* velocity, std::size_t count, float sigma, float sigma_next) noexcept;
// The guided velocity, into `without`.
MMDIT_API void guide(float* without, const float* with, std::size_t count, double scale) noexcept;

// Between fp32 and an engine's type: to the nearest, ties to even. Throws UsageError for bool.
MMDIT_API void from_float(const float* values, std::size_t count, DType dtype, void* into);
MMDIT_API void to_float(const void* values, std::size_t count, DType dtype, float* into);

}  // namespace mmdit

#endif
