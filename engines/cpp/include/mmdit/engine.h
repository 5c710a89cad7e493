// A bundle as a callable: named tensors in, named tensors out.
//
//     mmdit::Engine engine = mmdit::Engine::load("dist/sd3-fp16");
//     engine.run({{"hidden_states", x}, …}, {{"sample", velocity}});
//
// Every error is an mmdit::Error (error.h). mmdit_engine.h has what is in this file for C, without exceptions.
#ifndef MMDIT_ENGINE_H
#define MMDIT_ENGINE_H

#include <cstddef>
#include <filesystem>
#include <memory>
#include <string>

#include "mmdit/api.h"
#include "mmdit/contract.h"
#include "mmdit/error.h"
#include "mmdit/tensor.h"

namespace mmdit {

// When the SHA-256 of every file is compared with the manifest, before anything is deserialized: an engine file is
// executable code. `once` leaves a receipt in the user's cache folder, and trusts it as long as the manifest and every
// file's device, inode, size and times stay the same. Presence, kind and size of all files are checked in any case.
enum class Verify { always, once, never };

// Of TensorRT-RTX: when kernels for a new shape are compiled: in the background, with slower ones until then; before
// that shape's first run; never.
enum class Specialize { lazy, eager, none };

struct Options {
  std::string target = "auto";  // e.g. "ort-cpu"; auto: the first of TensorRT, ort-cuda, ort-cpu that runs here
  int device = 0;               // the GPU, of GPU targets
  Verify verify = Verify::always;
  std::filesystem::path receipts;  // where `once` keeps its receipts; empty: ~/.cache/mmdit-deploy/verified
  int threads = 0;                 // of ONNX Runtime on CPU, within an operator; 0: one a core
  Specialize specialize = Specialize::lazy;
  // TensorRT-RTX's compiled kernels, kept in this file, and a split engine's beside it in *.conditioning; empty: none.
  std::filesystem::path runtime_cache;
};

class Buffer;
class Engine;

// A schedule's conditioning, made once by Engine::condition: what each step reads of timestep, guidance and pooled
// text. Only that engine takes it. Several threads may use it.
class MMDIT_API Conditioning {
 public:
  std::size_t steps() const noexcept;
  ~Conditioning();
  Conditioning(Conditioning&&) noexcept;
  Conditioning& operator=(Conditioning&&) noexcept;

 private:
  friend class Engine;
  struct Table;
  explicit Conditioning(std::unique_ptr<Table> table);
  std::unique_ptr<Table> table_;
};

class MMDIT_API Engine {
 public:
  // Opens a bundle's engine. Throws BundleError (it is not whole), UsageError (no such target), MachineError (the
  // bundle lacks the engine, or it cannot run here).
  static Engine load(const std::filesystem::path& bundle, const Options& options = {});

  // Runs one step. Inputs and outputs are the contract's, all of them, in the device's memory: device() says which.
  // Inputs are never written to.
  //
  // `stream` is a CUstream or cudaStream_t of the GPU; null is the default one, and the only one on a CPU. TensorRT
  // enqueues and returns, whole or split. ONNX Runtime waits for the stream, and returns when the outputs are there.
  //
  // Several threads may run one engine: ONNX Runtime's calls run side by side, TensorRT's take turns.
  //
  // Throws ContractError before anything runs, MachineError if the runtime fails.
  void run(const Inputs& inputs, const Outputs& outputs, void* stream = nullptr) const;

  // What does not depend on the latent, for a whole schedule at once. Inputs: `timestep` [steps, batch], and those of
  // `pooled_projections` [batch, width] and `guidance` [batch] that the contract has. They are copied.
  Conditioning condition(const Inputs& inputs, void* stream = nullptr) const;
  // Runs step `step` (from 0) with all other inputs.
  void run(const Inputs& inputs, const Conditioning& conditioning, std::size_t step, const Outputs& outputs,
           void* stream = nullptr) const;

  const Contract& contract() const noexcept;
  const std::string& name() const noexcept;    // of the model
  const std::string& target() const noexcept;  // e.g. "ort-cpu"
  bool on_gpu() const noexcept;                // whether tensors are in a GPU's memory
  int device() const noexcept;                 // that GPU's index; 0 on the CPU
  double time_scale() const noexcept;          // timesteps are noise levels · 1000 / time_scale
  double verify_seconds() const noexcept;      // that load took to hash files

  ~Engine();
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;

 private:
  friend class Buffer;
  struct State;
  explicit Engine(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace mmdit

#endif
