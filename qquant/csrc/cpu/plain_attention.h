// One new token's attention over keys and values that are bfloat16 and not quantized. Scores, softmax and sums in
// float32, the result rounded once. Nothing here knows of torch.

#pragma once

#include <cstdint>

namespace qquant {

// A cache's keys or values: [batch][heads][tokens][size], elements of one token side by side.
struct PlainStates {
  const std::uint16_t* data;
  std::int64_t batch, head, token;  // strides in elements
  std::int64_t size;
};

struct PlainAttention {
  std::int64_t batch, kv_heads, group, tokens;  // group: query heads per KV head
  const std::uint16_t* query;                   // [batch][kv_heads * group][keys.size]
  std::int64_t query_batch, query_head;         // strides in elements
  PlainStates keys, values;
  const std::uint8_t* mask;            // [batch][heads][tokens], nonzero where a key is seen; null: all are
  std::int64_t mask_batch, mask_head;  // strides, 0 where one mask serves all
  float scaling;
  std::uint16_t* out;  // [batch][kv_heads * group][values.size]

  std::int64_t tasks() const { return batch * kv_heads; }
};

// Whether there is a kernel for this processor; others have torch's.
bool plain_attention_is_here();

// Tasks first to last - 1, each one KV head of one sequence with its query heads. A head that sees no key gives zeros.
void attend_plain(const PlainAttention& problem, std::int64_t first, std::int64_t last);

}  // namespace qquant
