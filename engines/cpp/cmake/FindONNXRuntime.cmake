# ONNX Runtime's headers and library, wherever they are: Debian's libonnxruntime-dev, Microsoft's archives, or the pip
# wheel's library beside headers of the same or an earlier version.
#
#   ONNXRUNTIME_ROOT         where to look first
#   ONNXRUNTIME_INCLUDE_DIR  the folder of onnxruntime_cxx_api.h
#   ONNXRUNTIME_LIBRARY      the file, whatever its name: the wheel has libonnxruntime.so.1.31.1 alone
#
# Gives the target ONNXRuntime::ONNXRuntime.
find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_cxx_api.h
  HINTS ${ONNXRUNTIME_ROOT}
  PATH_SUFFIXES include onnxruntime include/onnxruntime include/onnxruntime/core/session)
find_library(ONNXRUNTIME_LIBRARY onnxruntime HINTS ${ONNXRUNTIME_ROOT} PATH_SUFFIXES lib)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(ONNXRuntime REQUIRED_VARS ONNXRUNTIME_LIBRARY ONNXRUNTIME_INCLUDE_DIR)

if(ONNXRuntime_FOUND AND NOT TARGET ONNXRuntime::ONNXRuntime)
  set(location ${ONNXRUNTIME_LIBRARY})
  get_filename_component(folder ${ONNXRUNTIME_LIBRARY} DIRECTORY)
  # Programs ask for it by its soname. Where no file is called so, links are made in the build folder, also to what
  # ONNX Runtime looks for beside itself.
  string(REGEX REPLACE "(\\.so\\.[0-9]+)\\.[0-9.]+$" "\\1" soname ${ONNXRUNTIME_LIBRARY})
  if(NOT EXISTS ${soname})
    get_filename_component(soname ${soname} NAME)
    set(links ${CMAKE_BINARY_DIR}/onnxruntime)
    set(location ${links}/${soname})
    file(MAKE_DIRECTORY ${links})
    file(CREATE_LINK ${ONNXRUNTIME_LIBRARY} ${location} SYMBOLIC)
    file(GLOB providers ${folder}/libonnxruntime_providers_*.so)
    foreach(provider IN LISTS providers)
      get_filename_component(provider_name ${provider} NAME)
      file(CREATE_LINK ${provider} ${links}/${provider_name} SYMBOLIC)
    endforeach()
  endif()
  add_library(ONNXRuntime::ONNXRuntime SHARED IMPORTED)
  set_target_properties(ONNXRuntime::ONNXRuntime PROPERTIES
    IMPORTED_LOCATION ${location}
    INTERFACE_INCLUDE_DIRECTORIES ${ONNXRUNTIME_INCLUDE_DIR})
endif()
mark_as_advanced(ONNXRUNTIME_INCLUDE_DIR ONNXRUNTIME_LIBRARY)
