// What every launcher of these kernels shares with its callers: names of the dtypes and how a launcher is exported.
//
// Needs neither torch nor CUDA headers. A launcher returns the launch's error code, 0 for none; what it launched may
// still be running. The caller has checked shapes; a launcher checks only what decides which kernel is right.

#pragma once

#include <cstdint>

enum QqDtype : int32_t { kQqFloat32 = 0, kQqFloat16 = 1, kQqBfloat16 = 2 };

#define QQ_LAUNCHER extern "C"
