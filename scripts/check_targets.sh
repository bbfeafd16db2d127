#!/bin/sh
# Builds csrc/ in every way that it must build, and runs csrc/tests/test_kernels.cpp from each build: by GCC, by Clang
# with libc++ (as on macOS), for 64-bit Arm under emulation (the NEON kernels), with the AVX-512 kernels emulated by
# SIMDe, and with the address, undefined-behaviour and thread sanitizers. Builds for this machine's processor also run
# csrc/tests/test_products.cpp, with a plain CBLAS, whose calls are the same as Accelerate's. For macOS on Apple silicon
# it builds everything, the Python module and the calls of Accelerate included, and runs nothing. Runs from any
# directory; the exit status is 1 if a build or a test fails. The tests of one build run while the next is built.
#
#   scripts/check_targets.sh [NAME...]     names: asan arm tsan avx512 clang gcc macos; all if none is given
#
# macos needs a Python with the packages ziglang and pybind11: python3, or the one that the variable PYTHON names.
set -u
PYTHON=$("${PYTHON:-python3}" -c "import sys; print(sys.executable)")  # an absolute path
export PYTHON
cd "$(dirname "$0")/.."

need() {  # need PROGRAM PACKAGE: succeeds if the program is installed
    command -v "$1" >/dev/null && return 0
    echo "$name: $1 was not found: apt install $2" >&2
    return 1
}

need_module() {  # need_module PACKAGE: succeeds if the Python package is installed
    "$PYTHON" -c "import $1" 2>/dev/null && return 0
    echo "$name: the Python package $1 was not found: $PYTHON -m pip install $1" >&2
    return 1
}

compile() {  # compile CMAKE-OPTIONS...
    build=build/check/$name
    mkdir -p "$build"
    cmake -S . -B "$build" -DMLXGPT_BUILD_TESTS=ON -DMLXGPT_WERROR=ON "$@" >"$build/log" 2>&1 &&
        cmake --build "$build" -j "$(getconf _NPROCESSORS_ONLN)" >>"$build/log" 2>&1 || { cat "$build/log"; return 1; }
}

check() {  # check EMULATOR CMAKE-OPTIONS...: builds, and starts the tests in the background
    emulator=$1
    shift
    compile -DMLXGPT_BLAS=cblas "$@" || return 1
    run_tests >"$build/log" 2>&1 &
    running="$running $name:$!"
}

run_tests() {
    for test in "$build"/test_kernels "$build"/test_products; do
        [ -e "$test" ] || continue  # without a BLAS there is no test_products
        $emulator "$test" $part || return 1
    done
}

failed=
running=
for name in ${@:-asan arm tsan avx512 clang gcc macos}; do
    part=
    case $name in
    gcc) need g++ g++ && check "" -DCMAKE_CXX_COMPILER=g++ ;;
    clang)
        need clang++ "clang libc++-dev libc++abi-dev" &&
            check "" -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_CXX_FLAGS=-stdlib=libc++
        ;;
    arm)
        part=quick
        need aarch64-linux-gnu-g++ g++-aarch64-linux-gnu && need qemu-aarch64 qemu-user &&
            check "qemu-aarch64 -L /usr/aarch64-linux-gnu" -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
                -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DMLXGPT_BLAS=none
        ;;
    avx512)
        if [ -e /usr/include/simde/x86/avx512.h ]; then
            # GCC 12 stops with an internal error in SIMDe's structs.
            need clang++ clang && check "" -DCMAKE_CXX_COMPILER=clang++ -DMLXGPT_EMULATE_AVX512=ON
        else
            echo "$name: SIMDe was not found: apt install libsimde-dev" >&2
            false
        fi
        ;;
    asan)  # without optimization the build takes a fifth of the time, and the tests only a minute more
        part=quick
        need g++ g++ && check "" -DCMAKE_CXX_COMPILER=g++ -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-g1 \
            "-DCMAKE_CXX_FLAGS=-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
        ;;
    tsan)
        part=threads  # one thread has no races
        need g++ g++ && check "env MLXGPT_NUM_THREADS=4" -DCMAKE_CXX_COMPILER=g++ -DCMAKE_BUILD_TYPE=Debug \
            "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g1" -DCMAKE_CXX_FLAGS=-fsanitize=thread
        ;;
    macos)  # SKBUILD adds the Python module; it is compiled with the headers of $PYTHON
        need_module ziglang && need_module pybind11 &&
            compile -DCMAKE_TOOLCHAIN_FILE="$PWD/csrc/tests/macos/toolchain.cmake" -DSKBUILD=ON \
                -DSKBUILD_PROJECT_VERSION=0 -DPython_EXECUTABLE="$PYTHON" \
                -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" && echo "$name: passed"
        ;;
    *) echo "check_targets.sh: $name is none of asan, arm, tsan, avx512, clang, gcc, macos" >&2; exit 2 ;;
    esac
    if [ $? != 0 ]; then
        echo "$name: FAILED"
        failed=1
    fi
done
for tests in $running; do
    name=${tests%:*}
    if wait "${tests#*:}"; then
        echo "$name: passed"
    else
        cat "build/check/$name/log"
        echo "$name: FAILED"
        failed=1
    fi
done
exit ${failed:-0}
