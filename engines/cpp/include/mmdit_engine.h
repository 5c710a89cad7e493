/* The engine for C, and for whatever binds C. No exception crosses it: every function that can fail returns a status,
   and describes the error where it is asked to.

       mmdit_error* error = NULL;
       mmdit_engine* engine = NULL;
       if (mmdit_engine_load("dist/sd3-fp16", NULL, &engine, &error)) {
         fprintf(stderr, "%s\n", mmdit_error_message(error));
         mmdit_error_free(error);
       }
*/
#ifndef MMDIT_ENGINE_C_H
#define MMDIT_ENGINE_C_H

#include <stddef.h>
#include <stdint.h>

#include "mmdit/api.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What went wrong, by whose doing. */
typedef enum mmdit_status {
  MMDIT_OK = 0,
  MMDIT_USAGE_ERROR = 1,    /* the arguments contradict each other or name something that does not exist */
  MMDIT_BUNDLE_ERROR = 2,   /* a bundle is not whole, or not what its manifest says */
  MMDIT_CONTRACT_ERROR = 3, /* a tensor breaks the contract; nothing was run */
  MMDIT_MACHINE_ERROR = 4,  /* this machine or this build cannot do it, or has no memory left */
  MMDIT_INTERNAL_ERROR = 5  /* a defect of the library: please report it */
} mmdit_status;

typedef enum mmdit_dtype { MMDIT_FLOAT32 = 0, MMDIT_FLOAT16 = 1, MMDIT_BFLOAT16 = 2, MMDIT_BOOL = 3 } mmdit_dtype;
typedef enum mmdit_verify { MMDIT_VERIFY_ALWAYS = 0, MMDIT_VERIFY_ONCE = 1, MMDIT_VERIFY_NEVER = 2 } mmdit_verify;
typedef enum mmdit_specialize {
  MMDIT_SPECIALIZE_LAZY = 0,
  MMDIT_SPECIALIZE_EAGER = 1,
  MMDIT_SPECIALIZE_NONE = 2
} mmdit_specialize;

typedef struct mmdit_engine mmdit_engine;
typedef struct mmdit_conditioning mmdit_conditioning;
typedef struct mmdit_error mmdit_error;

/* As mmdit::Options. Set it to zero, then struct_size to sizeof: later versions add fields at the end. */
typedef struct mmdit_options {
  size_t struct_size;
  const char* target; /* NULL: auto */
  int device;
  int verify;                /* an mmdit_verify */
  const char* receipts;      /* NULL: the user's cache folder */
  int threads;               /* of ONNX Runtime on CPU; 0: one a core */
  int specialize;            /* an mmdit_specialize */
  const char* runtime_cache; /* NULL: none */
} mmdit_options;

/* A tensor in memory of the caller's: contiguous, the last axis fastest. An input is only read. */
typedef struct mmdit_tensor {
  const char* name;
  int dtype; /* an mmdit_dtype */
  int rank;
  const int64_t* shape;
  void* data;
} mmdit_tensor;

/* What the contract says of an input or output. It lives as long as the engine. */
typedef struct mmdit_tensor_spec {
  const char* name;
  int dtype;
  int rank;
  const char* const* axes; /* the name of each symbolic axis; NULL for a fixed one */
  const int64_t* sizes;    /* of each fixed axis; 0 for a symbolic one */
} mmdit_tensor_spec;

/* `options` may be NULL. On success *engine is to be freed; on failure *error, where `error` is not NULL. */
MMDIT_API mmdit_status mmdit_engine_load(const char* bundle, const mmdit_options* options, mmdit_engine** engine,
                                         mmdit_error** error);
MMDIT_API void mmdit_engine_free(mmdit_engine* engine);

/* Runs one step. `stream`: a CUstream or cudaStream_t, or NULL; see mmdit::Engine::run. */
MMDIT_API mmdit_status mmdit_engine_run(const mmdit_engine* engine, const mmdit_tensor* inputs, size_t input_count,
                                        const mmdit_tensor* outputs, size_t output_count, void* stream,
                                        mmdit_error** error);

/* A schedule's conditioning, and a step of it; see mmdit::Engine::condition. Free it before the engine. */
MMDIT_API mmdit_status mmdit_engine_condition(const mmdit_engine* engine, const mmdit_tensor* inputs,
                                              size_t input_count, void* stream, mmdit_conditioning** conditioning,
                                              mmdit_error** error);
MMDIT_API mmdit_status mmdit_engine_run_step(const mmdit_engine* engine, const mmdit_tensor* inputs, size_t input_count,
                                             const mmdit_conditioning* conditioning, size_t step,
                                             const mmdit_tensor* outputs, size_t output_count, void* stream,
                                             mmdit_error** error);
MMDIT_API void mmdit_conditioning_free(mmdit_conditioning* conditioning);

/* What the bundle says; strings live as long as the engine. */
MMDIT_API const char* mmdit_engine_name(const mmdit_engine* engine);
MMDIT_API const char* mmdit_engine_target(const mmdit_engine* engine);
MMDIT_API int mmdit_engine_on_gpu(const mmdit_engine* engine);
MMDIT_API double mmdit_engine_time_scale(const mmdit_engine* engine);
MMDIT_API size_t mmdit_engine_input_count(const mmdit_engine* engine);
MMDIT_API size_t mmdit_engine_output_count(const mmdit_engine* engine);
/* MMDIT_USAGE_ERROR beyond the last. */
MMDIT_API mmdit_status mmdit_engine_input(const mmdit_engine* engine, size_t index, mmdit_tensor_spec* spec);
MMDIT_API mmdit_status mmdit_engine_output(const mmdit_engine* engine, size_t index, mmdit_tensor_spec* spec);
/* The sizes that a symbolic axis may have. MMDIT_USAGE_ERROR: there is no such axis. */
MMDIT_API mmdit_status mmdit_engine_range(const mmdit_engine* engine, const char* axis, int64_t* min, int64_t* opt,
                                          int64_t* max);

/* The rule that was broken, what was received, and the fix; `message` has all three. */
MMDIT_API mmdit_status mmdit_error_status(const mmdit_error* error);
MMDIT_API const char* mmdit_error_message(const mmdit_error* error);
MMDIT_API const char* mmdit_error_rule(const mmdit_error* error);
MMDIT_API const char* mmdit_error_received(const mmdit_error* error);
MMDIT_API const char* mmdit_error_fix(const mmdit_error* error);
MMDIT_API void mmdit_error_free(mmdit_error* error);

#ifdef __cplusplus
}
#endif

#endif
