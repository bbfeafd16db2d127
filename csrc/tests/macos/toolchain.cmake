# Builds for macOS on Apple silicon on any machine, with Zig's copy of Clang and of macOS's headers (the Python package
# ziglang) in place of Apple's. PYTHON is the Python that has it. The result is for looking at: nothing here can run it.
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_CXX_COMPILER "${CMAKE_CURRENT_LIST_DIR}/zig_clang.sh")
set(CMAKE_CXX_FLAGS_INIT "-F${CMAKE_CURRENT_LIST_DIR}")  # finds Accelerate.framework
set(CMAKE_CXX_ARCHIVE_CREATE "$ENV{PYTHON} -m ziglang ar qc <TARGET> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_FINISH "")
# Linux has no such tools for a Mac's files, and the build needs no result of theirs.
set(CMAKE_INSTALL_NAME_TOOL true)
set(CMAKE_STRIP true)
