// The driver of decode attention: which chunks a task visits, online softmax across them, and the merge of splits.
// Arithmetic on vectors is behind AttentionKernels; no instruction set is named here but to choose one.

#include "kv_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "isa.h"

namespace qquant {

namespace {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kNothing = std::numeric_limits<float>::lowest();  // peak before any score; finite, so peak - peak is 0

// One task: a tile of query rows of one KV head, and the tokens of one split.
struct Task {
  std::int64_t batch, head, first_row, rows, first_token, last_token;
};

Task task_of(const Attention& a, std::int64_t index) {
  const std::int64_t split = index % a.splits(), tile = index / a.splits() % a.tiles();
  const std::int64_t kv = index / a.splits() / a.tiles();
  const std::int64_t size = a.splits() == 1 ? a.tokens : kSplitTokens, first = tile * kTileRows;
  return {kv / a.kv_heads, kv % a.kv_heads, first, std::min<std::int64_t>(kTileRows, a.rows() - first), split * size,
          std::min(a.tokens, (split + 1) * size)};
}

struct AlignedDelete {
  void operator()(std::int8_t* bytes) const { ::operator delete[](bytes, std::align_val_t{kLine}); }
};

// What a thread needs beside the caches: one allocation, cut into arrays on lines of their own.
class Scratch {
 public:
  Scratch(const Attention& a, std::int64_t rows) {
    sums_stride = round_up(a.values.size, kLine);
    query_bytes = fixed_bytes(a.keys.size);
    const std::int64_t widest = round_up(std::max(a.keys.size, a.values.size), kLine);
    for (int pass = 0; pass < 2; ++pass) {
      used_ = 0;
      plain = take<float>(widest);
      query = take<std::int8_t>(rows * query_bytes);
      weights = take<std::int8_t>(rows * fixed_bytes(kChunk));
      scores = take<std::int32_t>(rows * kChunk);
      sums = take<float>(rows * sums_stride);
      packed = take<std::int8_t>(kLine * std::max<std::int64_t>(kChunk, widest));
      if (pass == 0) memory_.reset(static_cast<std::int8_t*>(::operator new[](used_, std::align_val_t{kLine})));
    }
  }

  std::int64_t sums_stride, query_bytes;
  float* plain;           // one row, as float32
  std::int8_t* query;     // [rows, query_bytes]
  std::int8_t* weights;   // [rows, fixed_bytes(kChunk)]
  std::int32_t* scores;   // [rows, kChunk]
  float* sums;            // [rows, sums_stride]
  std::int8_t* packed;    // codes of one pass in an order of the kernel's own
  Row state[kTileRows];
  const std::uint8_t* seen[kTileRows];  // per row, from the chunk's first token on; null: no mask
  std::int64_t visible[kTileRows];      // without a mask: tokens of the chunk that the row sees
  ChunkNumbers numbers;

 private:
  template <class T>
  T* take(std::int64_t count) {
    T* place = reinterpret_cast<T*>(memory_.get() + used_);
    used_ += round_up(count * std::int64_t(sizeof(T)), kLine);
    return place;
  }

  std::unique_ptr<std::int8_t[], AlignedDelete> memory_;
  std::int64_t used_ = 0;
};

const std::uint8_t* vector_at(const Codes& codes, const Task& task, std::int64_t token) {
  return codes.data + task.batch * codes.batch + task.head * codes.head + token * codes.token;
}

void widen(const AttentionKernels& kernels, const Numbers& numbers, const Task& task, std::int64_t token,
           std::int64_t count, float* out) {
  kernels.widen(numbers.data + task.batch * numbers.batch + task.head * numbers.head + token, count, out);
}

// Rounds the queries of a task to fixed point and clears what is summed over its chunks.
void begin_task(const Attention& a, const AttentionKernels& kernels, const Task& task, Scratch& s) {
  const std::int64_t size = a.keys.size, bytes = bytes_of(a.dtype);
  // A head so large that int32 would overflow gets fewer steps.
  const float largest =
      float(std::min<std::int64_t>(kLargest, std::numeric_limits<std::int32_t>::max() / (255 * std::max<std::int64_t>(size, 1))));
  for (std::int64_t r = 0; r < task.rows; ++r) {
    const std::int64_t row = task.first_row + r, head = task.head * a.group + row / a.length;
    const std::int64_t offset = task.batch * a.query_batch + head * a.query_head + row % a.length * a.query_row;
    kernels.load(static_cast<const char*>(a.query) + offset * bytes, size, a.dtype, s.plain);
    float top = 0.0f, poison = 0.0f;
    for (std::int64_t d = 0; d < size; ++d) {
      top = std::max(top, std::fabs(s.plain[d]));
      poison += s.plain[d] * 0.0f;  // NaN where anything is not finite: the row must not look healthy
    }
    const float inverse = top > 0.0f ? largest / top : 0.0f;
    std::int8_t* fixed = s.query + r * s.query_bytes;
    float offset_sum = 0.0f;
    kernels.to_fixed(s.plain, size, std::isfinite(inverse) ? inverse : 0.0f, fixed);
    offset_sum = kernels.sum_fixed(fixed, size);
    s.state[r] = {top / largest * a.scaling * kLog2E + poison, offset_sum, kNothing, 0.0f, 0.0f, 0.0f, 0.0f};
  }
  std::memset(s.sums, 0, std::size_t(task.rows * s.sums_stride) * sizeof(float));
}
