// The C API: exceptions end here, and become a status and a description.
#include "mmdit_engine.h"

#include <algorithm>
#include <cstddef>
#include <exception>
#include <new>
#include <utility>
#include <vector>

#include "mmdit/engine.h"

struct mmdit_error {
  mmdit_status status;
  std::string message, rule, received, fix;
};

struct mmdit_conditioning {
  mmdit::Conditioning table;
};

namespace {

// A contract's tensor as C has it.
struct Spec {
  std::vector<const char*> axes;
  std::vector<int64_t> sizes;
  mmdit_tensor_spec spec;

  explicit Spec(const mmdit::TensorSpec& tensor) {
    for (const mmdit::Axis& axis : tensor.axes) {
      axes.push_back(axis.name.empty() ? nullptr : axis.name.c_str());
      sizes.push_back(axis.size);
    }
    spec = {tensor.name.c_str(), static_cast<int>(tensor.dtype), static_cast<int>(axes.size()), axes.data(),
            sizes.data()};
  }
  Spec(const Spec&) = delete;  // it points into itself; a moved one's memory stays where it is
  Spec(Spec&&) = default;
};

}  // namespace

struct mmdit_engine {
  mmdit::Engine engine;
  std::vector<Spec> inputs, outputs;

  explicit mmdit_engine(mmdit::Engine loaded) : engine(std::move(loaded)) {
    for (const mmdit::TensorSpec& spec : engine.contract().inputs) inputs.emplace_back(spec);
    for (const mmdit::TensorSpec& spec : engine.contract().outputs) outputs.emplace_back(spec);
  }
};

namespace {

mmdit_status describe(mmdit_status status, const mmdit::Error& error, mmdit_error** into) noexcept {
  try {
    if (into) *into = new mmdit_error{status, error.what(), error.rule(), error.received(), error.fix()};
  } catch (const std::bad_alloc&) {  // a status without a description
  }
  return status;
}

mmdit_status describe(mmdit_status status, const char* rule, const char* received, const char* fix,
                      mmdit_error** into) noexcept {
  try {
    return describe(status, mmdit::Error(rule, received, fix), into);
  } catch (const std::bad_alloc&) {
    return status;
  }
}

// Runs a function; an exception becomes a status, and *into its description (null where there is no memory for one).
template <typename Function>
mmdit_status guarded(mmdit_error** into, const Function& function) noexcept {
  if (into) *into = nullptr;
  try {
    try {
      function();
      return MMDIT_OK;
    } catch (const mmdit::UsageError& error) {
      return describe(MMDIT_USAGE_ERROR, error, into);
    } catch (const mmdit::BundleError& error) {
      return describe(MMDIT_BUNDLE_ERROR, error, into);
    } catch (const mmdit::ContractError& error) {
      return describe(MMDIT_CONTRACT_ERROR, error, into);
    } catch (const mmdit::MachineError& error) {
      return describe(MMDIT_MACHINE_ERROR, error, into);
    } catch (const std::bad_alloc&) {
      return describe(MMDIT_MACHINE_ERROR, "there is memory for the engine", "none is left", "free some", into);
    } catch (const std::exception& error) {
      return describe(MMDIT_INTERNAL_ERROR, "every error is one of the library's own", error.what(), "report it", into);
    }
  } catch (...) {
    return MMDIT_INTERNAL_ERROR;
  }
}

const char* text_or_empty(const char* text) { return text ? text : ""; }

void require(bool holds, const char* rule, const char* received) {
  if (!holds) throw mmdit::UsageError(rule, received, "see mmdit_engine.h");
}

mmdit::Options options_of(const mmdit_options* given) {
  mmdit::Options options;
  if (!given) return options;
  require(given->struct_size == sizeof(mmdit_options), "struct_size is sizeof(mmdit_options)", "another size");
  require(given->verify >= MMDIT_VERIFY_ALWAYS && given->verify <= MMDIT_VERIFY_NEVER, "verify is an mmdit_verify",
          "another number");
  require(given->specialize >= MMDIT_SPECIALIZE_LAZY && given->specialize <= MMDIT_SPECIALIZE_NONE,
          "specialize is an mmdit_specialize", "another number");
  if (given->target) options.target = given->target;
  options.device = given->device;
  options.verify = static_cast<mmdit::Verify>(given->verify);
  options.receipts = text_or_empty(given->receipts);
  options.threads = given->threads;
  options.specialize = static_cast<mmdit::Specialize>(given->specialize);
  options.runtime_cache = text_or_empty(given->runtime_cache);
  return options;
}

template <typename Map>
Map tensors_of(const mmdit_tensor* tensors, std::size_t count) {
  require(tensors || !count, "tensors are an array", "a null pointer");
  Map map;
  for (std::size_t i = 0; i < count; ++i) {
    const mmdit_tensor& tensor = tensors[i];
    require(tensor.name, "a tensor has a name", "a null pointer");
    require(tensor.dtype >= MMDIT_FLOAT32 && tensor.dtype <= MMDIT_BOOL, "a tensor has an mmdit_dtype", tensor.name);
    require(tensor.rank >= 0 && (tensor.shape || !tensor.rank), "a tensor has a shape", tensor.name);
    const bool added = map.insert({tensor.name,
                                   {static_cast<mmdit::DType>(tensor.dtype),
                                    mmdit::Shape(tensor.shape, tensor.shape + tensor.rank), tensor.data}})
                           .second;
    require(added, "a tensor is named once", tensor.name);
  }
  return map;
}

mmdit_status spec_at(const std::vector<Spec>& specs, std::size_t index, mmdit_tensor_spec* into) {
  if (index >= specs.size() || !into) return MMDIT_USAGE_ERROR;
  *into = specs[index].spec;
  return MMDIT_OK;
}

}  // namespace

extern "C" {

mmdit_status mmdit_engine_load(const char* bundle, const mmdit_options* options, mmdit_engine** engine,
                               mmdit_error** error) {
  return guarded(error, [&] {
    require(bundle && engine, "a bundle and a place for the engine are given", "a null pointer");
    *engine = nullptr;
    *engine = new mmdit_engine(mmdit::Engine::load(bundle, options_of(options)));
  });
}

void mmdit_engine_free(mmdit_engine* engine) { delete engine; }

mmdit_status mmdit_engine_run(const mmdit_engine* engine, const mmdit_tensor* inputs, size_t input_count,
                              const mmdit_tensor* outputs, size_t output_count, void* stream, mmdit_error** error) {
  return guarded(error, [&] {
    require(engine, "there is an engine", "a null pointer");
    engine->engine.run(tensors_of<mmdit::Inputs>(inputs, input_count),
                       tensors_of<mmdit::Outputs>(outputs, output_count), stream);
  });
}

mmdit_status mmdit_engine_condition(const mmdit_engine* engine, const mmdit_tensor* inputs, size_t input_count,
                                    void* stream, mmdit_conditioning** conditioning, mmdit_error** error) {
  return guarded(error, [&] {
    require(engine && conditioning, "an engine and a place for the conditioning are given", "a null pointer");
    *conditioning = nullptr;
    *conditioning =
        new mmdit_conditioning{engine->engine.condition(tensors_of<mmdit::Inputs>(inputs, input_count), stream)};
  });
}

mmdit_status mmdit_engine_run_step(const mmdit_engine* engine, const mmdit_tensor* inputs, size_t input_count,
                                   const mmdit_conditioning* conditioning, size_t step, const mmdit_tensor* outputs,
                                   size_t output_count, void* stream, mmdit_error** error) {
  return guarded(error, [&] {
    require(engine && conditioning, "an engine and its conditioning are given", "a null pointer");
    engine->engine.run(tensors_of<mmdit::Inputs>(inputs, input_count), conditioning->table, step,
                       tensors_of<mmdit::Outputs>(outputs, output_count), stream);
  });
}

void mmdit_conditioning_free(mmdit_conditioning* conditioning) { delete conditioning; }

const char* mmdit_engine_name(const mmdit_engine* engine) { return engine->engine.name().c_str(); }
const char* mmdit_engine_target(const mmdit_engine* engine) { return engine->engine.target().c_str(); }
int mmdit_engine_on_gpu(const mmdit_engine* engine) { return engine->engine.on_gpu(); }
double mmdit_engine_time_scale(const mmdit_engine* engine) { return engine->engine.time_scale(); }
size_t mmdit_engine_input_count(const mmdit_engine* engine) { return engine->inputs.size(); }
size_t mmdit_engine_output_count(const mmdit_engine* engine) { return engine->outputs.size(); }

mmdit_status mmdit_engine_input(const mmdit_engine* engine, size_t index, mmdit_tensor_spec* spec) {
  return spec_at(engine->inputs, index, spec);
}

mmdit_status mmdit_engine_output(const mmdit_engine* engine, size_t index, mmdit_tensor_spec* spec) {
  return spec_at(engine->outputs, index, spec);
}

mmdit_status mmdit_engine_range(const mmdit_engine* engine, const char* axis, int64_t* min, int64_t* opt,
                                int64_t* max) {
  return guarded(nullptr, [&] {
    const mmdit::Ranges& ranges = engine->engine.contract().ranges;
    const auto found = ranges.find(text_or_empty(axis));
    require(found != ranges.end() && min && opt && max, "the axis is one of the contract's", text_or_empty(axis));
    *min = found->second.min;
    *opt = found->second.opt;
    *max = found->second.max;
  });
}

mmdit_status mmdit_error_status(const mmdit_error* error) { return error ? error->status : MMDIT_OK; }
const char* mmdit_error_message(const mmdit_error* error) { return error ? error->message.c_str() : ""; }
const char* mmdit_error_rule(const mmdit_error* error) { return error ? error->rule.c_str() : ""; }
const char* mmdit_error_received(const mmdit_error* error) { return error ? error->received.c_str() : ""; }
const char* mmdit_error_fix(const mmdit_error* error) { return error ? error->fix.c_str() : ""; }
void mmdit_error_free(mmdit_error* error) { delete error; }

}  // extern "C"
