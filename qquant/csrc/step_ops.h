// Attention of one new token as layer_ops.cpp calls it, without torch's dispatcher.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace qquant {

// As plain_attention.py describes the operator.
torch::stable::Tensor decode_attention(const torch::stable::Tensor& query, const torch::stable::Tensor& key,
                                       const torch::stable::Tensor& value,
                                       const std::optional<torch::stable::Tensor>& mask, double scaling);

}  // namespace qquant
