#!/bin/sh
# Calls Zig's Clang with flags meant for Apple's: Zig names the oldest macOS and -march differently, and its linker
# crashes at -bundle.
target=aarch64-macos
for flag; do
    shift
    case $flag in
    -mmacosx-version-min=*) target=aarch64-macos.${flag#*=} ;;
    -march=armv8.2-a+*) set -- "$@" "-mcpu=generic+v8_2a+${flag#*+}" ;;
    -bundle) set -- "$@" -dynamiclib ;;
    *) set -- "$@" "$flag" ;;
    esac
done
exec "$PYTHON" -m ziglang c++ -target "$target" "$@"
