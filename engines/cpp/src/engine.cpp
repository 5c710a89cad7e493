#include "mmdit/engine.h"

#include <algorithm>
#include <set>
#include <utility>
#include <vector>

#include "device_memory.h"
#include "engine_parts.h"
#include "mmdit/buffer.h"

namespace mmdit {
namespace {

constexpr std::int64_t MAX_STEPS = 1000000;

std::size_t bytes_of(const ConstTensor& tensor) { return element_count(tensor.shape) * item_size(tensor.dtype); }

// What Engine::condition takes: a model's conditioning inputs, with timesteps [steps, batch].
Contract schedule_contract(const Contract& contract) {
  Contract schedule;
  schedule.ranges = contract.ranges;
  schedule.ranges["steps"] = {1, 1, MAX_STEPS};
  for (TensorSpec spec : contract.inputs) {
    if (!is_conditioning(spec.name)) continue;
    if (spec.name == "timestep") spec.axes.insert(spec.axes.begin(), Axis{"steps", 0});
    schedule.inputs.push_back(std::move(spec));
  }
  return schedule;
}

template <typename Tensors>
void check_device(const Gpu* gpu, const std::string& target, const Tensors& tensors) {
  if (!gpu) return;
  // The runtime takes an address for one of its device: a wrong one ends the process.
  for (const auto& [name, tensor] : tensors)
    if (!gpu->owns(tensor.data))
      throw ContractError(
          name + " is on the device that this " + target + " engine runs on: GPU " + std::to_string(gpu->index()),
          "other memory", "copy it there");
}

}  // namespace

struct Conditioning::Table {
  enum class Life { schedule, call };  // of one call: its memory comes and goes in the order of the stream's work
  Life life = Life::schedule;
  std::vector<Inputs> steps;                  // what each reads in the place of the conditioning inputs
  std::vector<std::shared_ptr<void>> memory;  // that they point into
  std::shared_ptr<const char> of;             // the key of the engine that made it

  char* allocate(const std::shared_ptr<Gpu>& gpu, std::size_t bytes, void* stream) {
    memory.push_back(life == Life::call ? device_memory_on(gpu, bytes, stream) : device_memory(gpu, bytes));
    return static_cast<char*>(memory.back().get());
  }
  // A tensor so many times, one after another.
  char* copies(const std::shared_ptr<Gpu>& gpu, const ConstTensor& tensor, std::size_t times, void* stream) {
    const std::size_t bytes = bytes_of(tensor);
    char* const start = allocate(gpu, bytes * times, stream);
    for (std::size_t i = 0; i < times; ++i) copy_on_device(gpu, start + i * bytes, tensor.data, bytes, stream);
    return start;
  }
};

struct Engine::State {
  std::unique_ptr<Bundle> bundle;
  Target target;
  std::shared_ptr<Gpu> gpu;
  EngineParts parts;
  Contract schedule;
  // Names the engine: its address is no other's as long as a table holds it.
  const std::shared_ptr<const char> key = std::make_shared<const char>('\0');

  // Runs a step that was checked.
  void step(Inputs inputs, const Outputs& outputs, const Sizes& sizes, void* stream) const {
    parts.step->run(inputs, outputs, sizes, stream);
  }

  void check_stream(void* stream) const {
    if (stream && !gpu) throw UsageError("a stream is the GPU's", "one for " + target.name, "pass none on the CPU");
  }

  Conditioning::Table tabulate(const Inputs& inputs, const Sizes& sizes, void* stream) const;
  Conditioning::Table tabulate_rows(const Inputs& inputs, std::int64_t steps, void* stream) const;
  Conditioning::Table tabulate_split(const Inputs& inputs, std::int64_t steps, std::int64_t batch, void* stream,
                                     Conditioning::Table::Life life) const;
};

Conditioning::Table Engine::State::tabulate(const Inputs& inputs, const Sizes& sizes, void* stream) const {
  const std::int64_t steps = sizes.at("steps");
  Conditioning::Table table =
      bundle->split ? tabulate_split(inputs, steps, sizes.at("batch"), stream, Conditioning::Table::Life::schedule)
                    : tabulate_rows(inputs, steps, stream);
  table.of = key;
  return table;
}

// An engine in one piece reads the conditioning inputs themselves: a step is a row of the timesteps, and the rest.
Conditioning::Table Engine::State::tabulate_rows(const Inputs& inputs, std::int64_t steps, void* stream) const {
  Conditioning::Table table;
  table.steps.resize(static_cast<std::size_t>(steps));
  for (const auto& [name, tensor] : inputs) {
    const char* const copy = table.copies(gpu, tensor, 1, stream);
    const bool by_step = name == "timestep";
    const Shape shape(tensor.shape.begin() + by_step, tensor.shape.end());
    const std::size_t row = by_step ? bytes_of({tensor.dtype, shape, nullptr}) : 0;
    for (std::size_t s = 0; s < table.steps.size(); ++s) table.steps[s][name] = {tensor.dtype, shape, copy + s * row};
  }
  return table;
}

// A split engine makes the modulation tensors of all steps: as many steps in one call as its batch has room for.
Conditioning::Table Engine::State::tabulate_split(const Inputs& inputs, std::int64_t steps, std::int64_t batch,
                                                  void* stream, Conditioning::Table::Life life) const {
  const Contract& contract = bundle->split->conditioning;
  const TensorSpec& made = contract.outputs[0];
  const std::int64_t at_once = std::clamp<std::int64_t>(contract.ranges.at("batch").max / batch, 1, steps);
  Conditioning::Table table;
  table.life = life;
  const auto row = static_cast<std::int64_t>(bytes_of({made.dtype, made.shape({{"batch", batch}}), nullptr}));
  char* const modulation = table.allocate(gpu, static_cast<std::size_t>(row * steps), stream);

  Inputs call;  // the first at_once steps: row s · batch + b
  for (const auto& [name, tensor] : inputs) {
    Shape shape = tensor.shape;
    if (name == "timestep") {
      shape.erase(shape.begin());
      call[name] = {tensor.dtype, shape, tensor.data};
      continue;
    }
    call[name] = {tensor.dtype, shape, table.copies(gpu, tensor, static_cast<std::size_t>(at_once), stream)};
  }
  const auto* timesteps = static_cast<const float*>(call.at("timestep").data);
  for (std::int64_t first = 0; first < steps; first += at_once) {
    const std::int64_t rows = std::min(at_once, steps - first) * batch;
    for (auto& [name, tensor] : call) tensor.shape[0] = rows;
    call["timestep"].data = timesteps + first * batch;
    const Outputs into = {{made.name, {made.dtype, made.shape({{"batch", rows}}), modulation + first * row}}};
    parts.conditioning->run(call, into, contract.check(call), stream);
  }
  for (std::int64_t s = 0; s < steps; ++s)
    table.steps.push_back({{made.name, {made.dtype, made.shape({{"batch", batch}}), modulation + s * row}}});
  return table;
}

Conditioning::Conditioning(std::unique_ptr<Table> table) : table_(std::move(table)) {}
Conditioning::~Conditioning() = default;
Conditioning::Conditioning(Conditioning&&) noexcept = default;
Conditioning& Conditioning::operator=(Conditioning&&) noexcept = default;
std::size_t Conditioning::steps() const noexcept { return table_->steps.size(); }

Engine::Engine(std::unique_ptr<State> state) : state_(std::move(state)) {}
Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

Engine Engine::load(const std::filesystem::path& bundle, const Options& options) {
  auto state = std::make_unique<State>();
  if (options.target != "auto") parse_target(options.target);  // before gigabytes are hashed
  state->bundle = open_bundle(bundle, options.verify, options.receipts);
  state->target = choose_target(*state->bundle, options.target, options.device);
  if (state->target.gpu)
    state->gpu = Gpu::open(options.device, "the target " + state->target.name + " needs an NVIDIA GPU");
  state->parts = load_parts(*state->bundle,
                            {state->target, state->gpu, options.threads, options.specialize, options.runtime_cache});
  state->schedule = schedule_contract(state->bundle->contract);
  return Engine(std::move(state));
}

void Engine::run(const Inputs& inputs, const Outputs& outputs, void* stream) const {
  const State& state = *state_;
  const Contract& contract = state.bundle->contract;
  const Sizes sizes = contract.check(inputs);
  contract.check_outputs(outputs, inputs, sizes);
  state.check_stream(stream);
  check_device(state.gpu.get(), state.target.name, inputs);
  check_device(state.gpu.get(), state.target.name, outputs);
  if (!state.bundle->split) return state.step(inputs, outputs, sizes, stream);
  Inputs once, rest;
  for (const auto& [name, tensor] : inputs) (is_conditioning(name) ? once : rest).insert({name, tensor});
  Shape& timesteps = once.at("timestep").shape;
  timesteps.insert(timesteps.begin(), 1);  // a schedule of one step
  const Conditioning::Table table =
      state.tabulate_split(once, 1, sizes.at("batch"), stream, Conditioning::Table::Life::call);
  rest.insert(table.steps[0].begin(), table.steps[0].end());
  state.step(rest, outputs, sizes, stream);
}

Conditioning Engine::condition(const Inputs& inputs, void* stream) const {
  const Sizes sizes = state_->schedule.check(inputs);
  if (!sizes.count("steps") || !sizes.count("batch"))
    throw UsageError("a schedule is one of timesteps", "a model that reads none", "run(…) with all inputs");
  state_->check_stream(stream);
  check_device(state_->gpu.get(), state_->target.name, inputs);
  auto table = std::make_unique<Conditioning::Table>(state_->tabulate(inputs, sizes, stream));
  if (state_->gpu) state_->gpu->synchronize(stream);  // steps may run on other streams
  return Conditioning(std::move(table));
}

void Engine::run(const Inputs& inputs, const Conditioning& conditioning, std::size_t step, const Outputs& outputs,
                 void* stream) const {
  const State& state = *state_;
  if (conditioning.table_->of != state.key)
    throw ContractError("a step's conditioning is made by the engine that is called", "another engine's",
                        "conditioning = engine.condition(…)");
  if (step >= conditioning.steps())
    throw ContractError("a step is one of the conditioning's " + std::to_string(conditioning.steps()),
                        std::to_string(step), "count from 0");
  Inputs all = inputs;
  for (const auto& [name, tensor] : conditioning.table_->steps[step])
    if (!all.insert({name, tensor}).second)
      throw ContractError("what the conditioning holds is no input besides", name, "pass one of them");
  const Contract& contract = state.bundle->split ? state.bundle->split->trunk : state.bundle->contract;
  const Sizes sizes = contract.check(all);
  contract.check_outputs(outputs, all, sizes);
  state.check_stream(stream);
  check_device(state.gpu.get(), state.target.name, inputs);
  check_device(state.gpu.get(), state.target.name, outputs);
  state.step(std::move(all), outputs, sizes, stream);
}

Buffer::Buffer(const Engine& engine, std::size_t bytes)
    : gpu_(engine.state_->gpu), memory_(device_memory(gpu_, bytes)), bytes_(bytes) {}

const Contract& Engine::contract() const noexcept { return state_->bundle->contract; }
const std::string& Engine::name() const noexcept { return state_->bundle->name; }
const std::string& Engine::target() const noexcept { return state_->target.name; }
bool Engine::on_gpu() const noexcept { return state_->gpu != nullptr; }
int Engine::device() const noexcept { return state_->gpu ? state_->gpu->index() : 0; }
double Engine::time_scale() const noexcept { return state_->bundle->time_scale; }
double Engine::verify_seconds() const noexcept { return state_->bundle->verify_seconds; }

}  // namespace mmdit
