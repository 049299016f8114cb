// The door between torch and the kernels of the Int8 KV cache: plain structs and C functions, known to both sides.
// ops_cuda.cpp, the kernels and the tests' harness all include it. Strides count elements.

#pragma once

#include "launch.h"

// One half of a cache, keys or values: codes [B, H, T, D] uint8 with the last stride 1, scale and zero [B, H, T]
// float16.
struct QqCache {
  uint8_t* codes;
  uint16_t* scale;
  uint16_t* zero;
  int64_t codes_stride[3];
  int64_t scale_stride[3];
  int64_t zero_stride[3];
};

// states [B, H, L, D] into `cache` from token `at` on.
struct QqAppend {
  QqCache cache;
  const void* states;
  int64_t states_stride[3];
  int64_t batch, heads, length, dim, at;
  int32_t dtype;  // QqDtype of states
};

// out [B, H, T, D], contiguous.
struct QqDequantize {
  QqCache cache;
  void* out;
  int64_t batch, heads, tokens, dim;
  int32_t dtype;  // QqDtype of out
};

// query [B, heads, L, Dk] and out [B, heads, L, Dv], contiguous and of one dtype; mask [B, heads, L, T] bytes, or null
// for causal at the end; workspace of qq_kv_attention_workspace bytes.
struct QqAttention {
  QqCache keys, values;
  const void* query;
  const uint8_t* mask;
  int64_t mask_stride[4];
  void* out;
  float* workspace;
  int64_t batch, heads, kv_heads, length, tokens, key_dim, value_dim;
  int32_t dtype;
  int32_t splits;  // of qq_kv_attention_splits, or any other count from 1 on
  float scaling;
};

QQ_LAUNCHER int qq_kv_append(const QqAppend* args, void* stream);
QQ_LAUNCHER int qq_kv_dequantize(const QqDequantize* args, void* stream);
QQ_LAUNCHER int qq_kv_attention(const QqAttention* args, void* stream);

// Into how many parts the tokens are cut, each a block's work. Depends on nothing but the shape and the number of
// multiprocessors, so that one shape always gives one sequence of sums.
QQ_LAUNCHER int32_t qq_kv_attention_splits(const QqAttention* args, int32_t multiprocessors);

// Bytes of workspace for args->splits.
QQ_LAUNCHER int64_t qq_kv_attention_workspace(const QqAttention* args);
