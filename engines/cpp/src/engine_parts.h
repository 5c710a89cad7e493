// The loaded parts of an engine, and how a call goes through them.
//
//     whole:  inputs ─► whole ─► sample
//     split:  timestep, pooled, guidance ─► conditioning ─► modulation ─┐
//             the other inputs ─────────────────────────────────────────┴─► trunk ─► sample
#ifndef MMDIT_SRC_ENGINE_PARTS_H
#define MMDIT_SRC_ENGINE_PARTS_H

#include <memory>
#include <string>

#include "backend.h"
#include "bundle.h"

namespace mmdit {

struct EngineParts {
  std::unique_ptr<Backend> conditioning;  // null for an engine in one piece
  std::unique_ptr<Backend> step;          // the whole model, or the trunk
};

// The target that a call of Engine::load means: the one it names, or of `auto` the first that this machine can run.
// Throws as Engine::load does.
Target choose_target(const Bundle& bundle, const std::string& wanted, int device);

// Loads a bundle's engine. `gpu` is null on the CPU.
EngineParts load_parts(const Bundle& bundle, const BackendOptions& options);

}  // namespace mmdit

#endif
