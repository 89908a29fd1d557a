# The fork: upstream llama.cpp, verified and patched in the build tree, with ggml-tq inside.

set(LLAMA_CPP_DIR "" CACHE PATH "use this llama.cpp checkout instead of the pinned source package")
set(GGML_TQ_CACHE_DIR "${CMAKE_BINARY_DIR}/download" CACHE PATH "where the fetched upstream archive is kept")

find_package(Python3 3.10 REQUIRED COMPONENTS Interpreter)

set(fork_dir     ${PROJECT_SOURCE_DIR}/ggml-tq/fork)
set(upstream_dir ${CMAKE_BINARY_DIR}/llama.cpp)

# run again when the pin, a patch or the script changes
file(GLOB fork_inputs CONFIGURE_DEPENDS ${fork_dir}/patches/*.patch)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
    ${fork_inputs} ${fork_dir}/upstream.lock ${PROJECT_SOURCE_DIR}/scripts/upstream.py)

set(from_checkout "")
if (LLAMA_CPP_DIR)
    set(from_checkout --llama-cpp ${LLAMA_CPP_DIR})
endif()
execute_process(
    COMMAND ${Python3_EXECUTABLE} ${PROJECT_SOURCE_DIR}/scripts/upstream.py prepare
            --out ${upstream_dir} --cache ${GGML_TQ_CACHE_DIR} ${from_checkout}
    RESULT_VARIABLE failed)
if (failed)
    message(FATAL_ERROR "upstream llama.cpp could not be prepared (see the message above)")
endif()

# the two lines that the patches put into upstream's CMakeLists call these
function(ggml_tq_add_to target)
    set(sources ${GGML_TQ_SOURCES} ${GGML_TQ_DIR}/fork/hooks/ggml-tq-traits.c)
    target_sources(${target} PRIVATE ${sources})
    target_include_directories(${target} PUBLIC
        $<BUILD_INTERFACE:${GGML_TQ_DIR}/include> $<BUILD_INTERFACE:${GGML_TQ_DIR}/fork/hooks>)
    ggml_tq_set_flags(${target})
    set_source_files_properties(${GGML_TQ_DIR}/fork/hooks/ggml-tq-traits.c TARGET_DIRECTORY ${target} PROPERTIES COMPILE_OPTIONS "${GGML_TQ_FLAGS}")
endfunction()

# called by ggml-cuda's CMakeLists, which compiles with -use_fast_math; the encoder must not
function(ggml_tq_cuda_add_to target)
    set(sources)
    foreach(name decode encode fuse ops)
        list(APPEND sources ${GGML_TQ_DIR}/cuda/tq-${name}.cu)
    endforeach()
    file(GLOB attention ${GGML_TQ_DIR}/cuda/tq-attention.cu ${GGML_TQ_DIR}/cuda/template-instances/*.cu)
    target_sources(${target} PRIVATE ${sources} ${attention})
    target_include_directories(${target} PRIVATE ${CMAKE_CURRENT_SOURCE_DIR} ${GGML_TQ_DIR}/cuda ${GGML_TQ_DIR}/src)
    set_source_files_properties(${sources} TARGET_DIRECTORY ${target}
        PROPERTIES COMPILE_OPTIONS "-fmad=false;-ftz=false;-prec-div=true;-prec-sqrt=true")
endfunction()

function(llama_tq_add_to target)
    target_sources(${target} PRIVATE ${GGML_TQ_DIR}/fork/hooks/llama-tq.cpp ${GGML_TQ_DIR}/fork/hooks/llama-tq-center.cpp)
endfunction()

# upstream's options: what this project builds, nothing that it would download
set(BUILD_SHARED_LIBS    OFF CACHE BOOL "build shared libraries")
set(GGML_RPC             ON  CACHE BOOL "ggml: use RPC")
set(LLAMA_BUILD_COMMON   ON  CACHE BOOL "" FORCE)
set(LLAMA_BUILD_TOOLS    ON  CACHE BOOL "" FORCE)
set(LLAMA_BUILD_SERVER   ON  CACHE BOOL "" FORCE)
set(LLAMA_BUILD_TESTS    ON  CACHE BOOL "" FORCE)
set(LLAMA_BUILD_EXAMPLES OFF CACHE BOOL "" FORCE)
set(LLAMA_BUILD_APP      OFF CACHE BOOL "" FORCE)
set(LLAMA_BUILD_UI       OFF CACHE BOOL "llama: build the embedded Web UI for server")
set(LLAMA_USE_PREBUILT_UI OFF CACHE BOOL "llama: use prebuilt UI from HF Bucket when available")
set(LLAMA_OPENSSL        OFF CACHE BOOL "llama: use openssl to support HTTPS")

if (LLAMA_CPP_DIR)
    set(LLAMA_BUILD_COMMIT "checkout+ggml-tq")
else()
    file(READ ${fork_dir}/upstream.lock lock)
    string(JSON LLAMA_BUILD_COMMIT GET "${lock}" commit)
    string(SUBSTRING ${LLAMA_BUILD_COMMIT} 0 9 LLAMA_BUILD_COMMIT)
    set(LLAMA_BUILD_COMMIT "${LLAMA_BUILD_COMMIT}+ggml-tq")
endif()
# upstream would ask git about its directory and be told about ours, and rebuild at each commit
set(ENV{GIT_CEILING_DIRECTORIES} ${CMAKE_BINARY_DIR})

add_subdirectory(${upstream_dir} ${CMAKE_BINARY_DIR}/upstream EXCLUDE_FROM_ALL)

add_subdirectory(ggml-tq/tools)

set(GGML_TQ_PROGRAMS
    llama-cli llama-completion llama-server llama-perplexity llama-bench llama-batched-bench ggml-rpc-server
    test-backend-ops test-quantize-fns test-save-load-state llama-tq-capture
    CACHE STRING "the fork's programs and tests to build")
add_custom_target(fork ALL DEPENDS ${GGML_TQ_PROGRAMS})
