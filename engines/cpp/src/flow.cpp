// Compiled with -ffp-contract=off: a fused multiply-add rounds once where Python and torch round twice.
#include "mmdit/flow.h"

#include <cmath>
#include <cstring>

#include "mmdit/error.h"

namespace mmdit {
namespace {

constexpr double TRAINING_STEPS = 1000;  // of SD3's and FLUX's noise levels; the scale of timesteps

double shifted(double sigma, double shift) { return shift * sigma / (1 + (shift - 1) * sigma); }

void require(bool holds, const char* rule, double received, const char* fix) {
  if (!holds) throw UsageError(rule, std::to_string(received), fix);
}

// Evenly spaced from 1 to `last`, from both ends.
double spaced(int i, int steps, double last) {
  const double step = steps > 1 ? (last - 1) / (steps - 1) : 0;
  return i < steps / 2 || steps == 1 ? 1 + step * i : last - step * (steps - i - 1);
}

std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

std::uint16_t bfloat16_bits(float value) {
  if (std::isnan(value)) return 0x7fc0;
  const std::uint32_t bits = bits_of(value);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

std::uint16_t float16_bits(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<std::uint16_t>(sign | 0x7e00);   // NaN
  if (magnitude >= 0x477ff000) return static_cast<std::uint16_t>(sign | 0x7c00);  // rounds to 65520 or more
  if (magnitude < 0x38800000) {  // below 2⁻¹⁴: subnormal; the sum's last bits are the result, rounded by the hardware
    return static_cast<std::uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  }
  const std::uint32_t rounded = magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1);
  return static_cast<std::uint16_t>(sign | rounded >> 13);
}

float from_float16(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest < 0x400) return std::copysign(static_cast<float>(rest) * 0x1p-24f, float_of(sign | 0x3f800000));
  return float_of(sign | ((rest << 13) + 0x38000000));
}

template <typename Convert>
void store(const float* values, std::size_t count, void* into, const Convert& convert) {
  auto* const out = static_cast<std::uint16_t*>(into);
  for (std::size_t i = 0; i < count; ++i) out[i] = convert(values[i]);
}

}  // namespace

std::vector<float> noise_levels(const Schedule& schedule) {
  const int steps = schedule.steps;
  const double shift = schedule.shift;
  require(steps >= 1, "a sampler takes at least one step", steps, "e.g. 28");
  require(shift > 0 && std::isfinite(shift), "a shift is a positive number", shift, "3 for SD3, 1 for none");
  const double last = schedule.last.value_or(shifted(1 / TRAINING_STEPS, shift));
  require(last > 0 && last <= 1, "the last call's noise level is above 0, and at most 1", last, "e.g. 1 / steps");
  std::vector<double> sigmas;
  for (int i = 0; i < steps; ++i) sigmas.push_back(shifted(spaced(i, steps, last), shift));
  if (schedule.terminal) {
    const double terminal = *schedule.terminal;
    require(terminal > 0 && terminal < 1 && steps > 1,
            "a terminal noise level is between 0 and 1, and needs two steps or more", terminal, "leave it out");
    const double end = sigmas.back();
    for (double& sigma : sigmas) sigma = 1 - (1 - sigma) * (1 - terminal) / (1 - end);
  }
  std::vector<float> levels(sigmas.begin(), sigmas.end());  // fp64 until here: one rounding
  levels.push_back(0);
  return levels;
}

float timestep_of(float sigma, double time_scale) noexcept {
  return sigma * static_cast<float>(TRAINING_STEPS / time_scale);
}

void euler_step(float* x, const float* velocity, std::size_t count, float sigma, float sigma_next) noexcept {
  const auto dt = static_cast<float>(static_cast<double>(sigma_next) - static_cast<double>(sigma));
  for (std::size_t i = 0; i < count; ++i) x[i] = x[i] + dt * velocity[i];
}

void guide(float* without, const float* with, std::size_t count, double scale) noexcept {
  const auto factor = static_cast<float>(scale);
  for (std::size_t i = 0; i < count; ++i) without[i] = without[i] + factor * (with[i] - without[i]);
}

void from_float(const float* values, std::size_t count, DType dtype, void* into) {
  if (dtype == DType::float32) {
    std::memcpy(into, values, count * sizeof(float));
  } else if (dtype == DType::boolean) {
    throw UsageError("numbers are float32, float16 or bfloat16", "bool", "pass the mask itself");
  } else {
    store(values, count, into, dtype == DType::float16 ? float16_bits : bfloat16_bits);
  }
}

void to_float(const void* values, std::size_t count, DType dtype, float* into) {
  if (dtype == DType::float32) {
    std::memcpy(into, values, count * sizeof(float));
    return;
  }
  if (dtype == DType::boolean)
    throw UsageError("numbers are float32, float16 or bfloat16", "bool", "pass the mask itself");
  const auto* const bits = static_cast<const std::uint16_t*>(values);
  for (std::size_t i = 0; i < count; ++i)
    into[i] = dtype == DType::float16 ? from_float16(bits[i]) : float_of(static_cast<std::uint32_t>(bits[i]) << 16);
}

}  // namespace mmdit
