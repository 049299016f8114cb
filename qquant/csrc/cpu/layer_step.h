// What a decoder layer does to bfloat16 numbers between its linears, bit for bit as torch's own operators compute it one
// after another: each result is rounded to bfloat16 before the next step reads it. Nothing here knows of torch.

#pragma once

#include <cstdint>

namespace qquant {

// Half-rotation RoPE of `heads` vectors of `size` numbers side by side, in place:
//   x * cos + (-second half of x, first half of x) * sin
void rotate(std::uint16_t* states, const std::uint16_t* cos, const std::uint16_t* sin, std::int64_t heads,
            std::int64_t size);

// The same in float32 and rounded once, of the first 2 * `half` numbers of each vector, by tables of `half` numbers:
//   (first * cos - second * sin, second * cos + first * sin)
// where the second product is not rounded before it is added, as in torch's addcmul.
void rotate_wide(std::uint16_t* states, const float* cos, const float* sin, std::int64_t heads, std::int64_t size,
                 std::int64_t half);

// out = silu(gate) * up; out may be either of them.
void silu_product(const std::uint16_t* gate, const std::uint16_t* up, std::uint16_t* out, std::int64_t count);

// to += from
void add_to(std::uint16_t* to, const std::uint16_t* from, std::int64_t count);

}  // namespace qquant
