# TensorRT's or TensorRT-RTX's headers and library. Which of the two it is, NvInferVersion.h says.
#
#   TENSORRT_ROOT         where to look first
#   TENSORRT_INCLUDE_DIR  the folder of NvInferRuntime.h
#   TENSORRT_LIBRARY      the file: libnvinfer.so, or libtensorrt_rtx.so
#
# Its headers include cuda_runtime_api.h, of the CUDA toolkit; nothing of CUDA is linked. Gives TensorRT::TensorRT.
find_path(TENSORRT_INCLUDE_DIR NvInferRuntime.h
  HINTS ${TENSORRT_ROOT}
  PATH_SUFFIXES include)
set(_tensorrt_name nvinfer)
if(TENSORRT_INCLUDE_DIR AND EXISTS ${TENSORRT_INCLUDE_DIR}/NvInferVersion.h)
  file(STRINGS ${TENSORRT_INCLUDE_DIR}/NvInferVersion.h _tensorrt_rtx REGEX "^#define[ \t]+TRT_MAJOR_RTX[ \t]")
  if(_tensorrt_rtx)
    set(_tensorrt_name tensorrt_rtx)
  endif()
endif()
find_library(TENSORRT_LIBRARY NAMES ${_tensorrt_name} HINTS ${TENSORRT_ROOT} PATH_SUFFIXES lib lib64)
find_path(TENSORRT_CUDA_INCLUDE_DIR cuda_runtime_api.h
  HINTS ${CUDAToolkit_ROOT} ENV CUDA_PATH
  PATHS /usr/local/cuda
  PATH_SUFFIXES include)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRT
  REQUIRED_VARS TENSORRT_LIBRARY TENSORRT_INCLUDE_DIR TENSORRT_CUDA_INCLUDE_DIR)

if(TensorRT_FOUND AND NOT TARGET TensorRT::TensorRT)
  add_library(TensorRT::TensorRT SHARED IMPORTED)
  set_target_properties(TensorRT::TensorRT PROPERTIES
    IMPORTED_LOCATION ${TENSORRT_LIBRARY}
    INTERFACE_INCLUDE_DIRECTORIES "${TENSORRT_INCLUDE_DIR};${TENSORRT_CUDA_INCLUDE_DIR}")
endif()
mark_as_advanced(TENSORRT_INCLUDE_DIR TENSORRT_LIBRARY TENSORRT_CUDA_INCLUDE_DIR)
