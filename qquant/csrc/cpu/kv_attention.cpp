// The driver of decode attention: which chunks a task visits, online softmax across them, and the merge of splits.
// Arithmetic on vectors is behind AttentionKernels; no instruction set is named here but to choose one.

#include "kv_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

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
  return {kv / a.kv_heads, kv % a.kv_heads,
          first,           std::min<std::int64_t>(kTileRows, a.rows() - first),
          split * size,    std::min(a.tokens, (split + 1) * size)};
}

struct AlignedDelete {
  void operator()(std::int8_t* bytes) const { ::operator delete[](bytes, std::align_val_t{kLine}); }
};

// What a thread needs beside the caches: one allocation, cut into arrays on lines of their own.
class Scratch {
 public:
  Scratch(const Attention& a, std::int64_t rows) {
    sums_stride = round_up(a.values.size, kLine);
    query_bytes = query_stride(a.keys.size);
    const std::int64_t widest = round_up(std::max(a.keys.size, a.values.size), kLine);
    for (int pass = 0; pass < 2; ++pass) {  // the first only counts
      used_ = 0;
      plain = take<float>(widest);
      query = take<std::int8_t>(rows * query_bytes);
      weights = take<std::int8_t>(std::max(rows * fixed_bytes(kExact), fixed_bytes(kChunk)));
      scores = take<std::int32_t>(std::max<std::int64_t>(rows * kExact, kChunk));
      sums = take<float>(rows * sums_stride);
      packed = take<std::int8_t>(kLine * kExact);
      if (pass == 0) memory_.reset(static_cast<std::int8_t*>(::operator new[](used_, std::align_val_t{kLine})));
    }
  }

  std::int64_t sums_stride, query_bytes;
  float* plain;          // one row, as float32
  std::int8_t* query;    // [rows, query_bytes]
  std::int8_t* weights;  // [rows, fixed_bytes(kExact)], or one row of a chunk
  std::int32_t* scores;  // [rows, kExact], or likewise
  float* sums;           // [rows, sums_stride]
  std::int8_t* packed;   // kLine columns of a chunk's values in an order of the kernel's own
  Row state[kTileRows];
  const std::uint8_t* seen[kTileRows];  // per row, from the chunk's first token on; null: no mask
  std::int64_t visible[kTileRows];      // without a mask: tokens of the chunk that the row sees
  ChunkNumbers numbers;

 private:
  template <class T>
  T* take(std::int64_t count) {
    T* place = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_.get() + used_);
    used_ += round_up(count * std::int64_t(sizeof(T)), kLine);
    return place;
  }

  std::unique_ptr<std::int8_t[], AlignedDelete> memory_;
  std::int64_t used_ = 0;
};

const std::uint8_t* vector_at(const Codes& codes, const Task& task, std::int64_t token) {
  return codes.data + task.batch * codes.batch + task.head * codes.head + token * codes.token;
}

const std::uint16_t* numbers_at(const Numbers& numbers, const Task& task, std::int64_t token) {
  return numbers.data + task.batch * numbers.batch + task.head * numbers.head + token;
}

constexpr std::int64_t kPage = 4096;

// Asks for one line in every `step` bytes of what will be read soon. Every line only at beginnings: once a stretch is
// being read in order, the processor's own prefetching is faster than this.
void fetch(const void* data, std::int64_t bytes, std::int64_t step) {
#if defined(__GNUC__) || defined(__clang__)
  for (std::int64_t b = 0; b < bytes; b += step) __builtin_prefetch(static_cast<const char*>(data) + b);
#else
  (void)data, (void)bytes, (void)step;
#endif
}

constexpr std::int64_t kBeginning = 24 * kLine;  // as many lines as a core has on their way at a time

// Rounds the queries of a task to fixed point and clears what is summed over its chunks.
void begin_task(const Attention& a, const AttentionKernels& kernels, const Task& task, Scratch& s) {
  const std::int64_t size = a.keys.size, bytes = bytes_of(a.dtype);
  // A head so large that int32 would overflow gets fewer steps.
  const std::int64_t room = std::numeric_limits<std::int32_t>::max() / (255 * std::max<std::int64_t>(size, 1));
  const float largest = float(std::min<std::int64_t>(kLargest, room));
  for (std::int64_t r = 0; r < task.rows; ++r) {
    const std::int64_t row = task.first_row + r, head = task.head * a.group + row / a.length;
    const std::int64_t offset = task.batch * a.query_batch + head * a.query_head + row % a.length * a.query_row;
    // NaN where a query is not finite: its row must not look healthy.
    float top = kernels.load(static_cast<const char*>(a.query) + offset * bytes, size, a.dtype, s.plain);
    // The usual NaN, whose lowest bits are zero: kernels count on that where they add to exponents.
    if (std::isnan(top)) top = std::numeric_limits<float>::quiet_NaN();
    const float inverse = top > 0.0f ? largest / top : 0.0f;
    const std::int32_t sum =
        kernels.to_fixed(s.plain, size, std::isfinite(inverse) ? inverse : 0.0f, s.query + r * s.query_bytes);
    s.state[r] = {top / largest * (a.scaling * kLog2E), float(sum), kNothing, 0.0f, 0.0f, 0.0f, 0.0f};
  }
  std::memset(s.sums, 0, std::size_t(task.rows * s.sums_stride) * sizeof(float));
}

bool any(const std::uint8_t* bytes, std::int64_t count) {
  std::uint8_t found = 0;
  for (std::int64_t i = 0; i < count; ++i) found |= bytes[i];
  return found != 0;
}

// Sets what each row sees of `count` tokens from `token` on; false when no row sees any of them.
bool look(const Attention& a, const Task& task, std::int64_t token, std::int64_t count, Scratch& s) {
  bool found = false;
  for (std::int64_t r = 0; r < task.rows; ++r) {
    const std::int64_t row = task.first_row + r, head = task.head * a.group + row / a.length, query = row % a.length;
    const std::int64_t limit = a.mask != nullptr ? count : a.tokens - a.length + query + 1 - token;
    s.visible[r] = std::clamp<std::int64_t>(limit, 0, count);
    s.seen[r] = nullptr;
    if (a.mask != nullptr)
      s.seen[r] = a.mask + task.batch * a.mask_batch + head * a.mask_head + query * a.mask_row + token;
    found = found || (a.mask != nullptr ? any(s.seen[r], count) : s.visible[r] > 0);
  }
  return found;
}

// The chunk after the current one, in this task or the next; count is 0 after the last.
struct Next {
  Task task;
  std::int64_t token, count;
};

void attend_chunk(const Attention& a, const AttentionKernels& kernels, const Task& task, std::int64_t token,
                  std::int64_t count, const Next& next, Scratch& s) {
  if (!look(a, task, token, count, s)) return;
  kernels.widen(numbers_at(a.k_scale, task, token), count, s.numbers.k_scale);
  kernels.widen(numbers_at(a.k_zero, task, token), count, s.numbers.k_zero);
  kernels.widen(numbers_at(a.v_scale, task, token), count, s.numbers.v_scale);
  kernels.widen(numbers_at(a.v_zero, task, token), count, s.numbers.v_zero);

  const std::uint8_t *keys = vector_at(a.keys, task, token), *values = vector_at(a.values, task, token);
  const std::uint8_t* const next_keys = vector_at(a.keys, next.task, next.token);
  for (const Numbers* numbers : {&a.k_scale, &a.k_zero, &a.v_scale, &a.v_zero})
    fetch(numbers_at(*numbers, next.task, next.token), next.count * std::int64_t(sizeof(std::uint16_t)), kLine);
  // The addresses of many pages are looked up at a time here, and one by one once the products reach them.
  fetch(next_keys, next.count * a.keys.token, kPage);
  fetch(vector_at(a.values, next.task, next.token), next.count * a.values.token, kPage);
  kernels.score(s.query, task.rows, keys, a.keys.token, count, a.keys.size, s.scores,
                a.values.token == a.values.size ? values : keys);
  fetch(values, std::min(kBeginning, count * a.values.token), kLine);
  kernels.weigh(s.scores, s.numbers, s.seen, s.visible, count, task.rows, s.state, s.weights);
  kernels.accumulate(s.weights, s.state, task.rows, values, a.values.token, count, a.values.size, s.sums, s.sums_stride,
                     s.packed, next.count > 0 && a.keys.token == a.keys.size ? next_keys : values);
  fetch(next_keys, std::min(kBeginning, next.count * a.keys.token), kLine);
}

// Divides by the total and stores a row; a row that saw nothing gives zeros.
void finish_row(const Attention& a, const AttentionKernels& kernels, float* sums, float total, std::int64_t row_index) {
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  for (std::int64_t d = 0; d < a.values.size; ++d) sums[d] *= inverse;
  kernels.store(sums, a.values.size, a.dtype,
                static_cast<char*>(a.out) + row_index * a.values.size * bytes_of(a.dtype));
}

// Index of a tile's first row among all rows of the result, [B, heads, length]: rows of one KV head are neighbours.
std::int64_t first_row_of_tile(const Attention& a, std::int64_t tile) {
  return tile / a.tiles() * a.rows() + tile % a.tiles() * kTileRows;
}

}  // namespace

const AttentionKernels& attention_kernels() {
#if QQ_X86
  if (isa() >= Isa::avx512_vnni) return kAttentionAvx512;
  if (isa() >= Isa::avx2) return kAttentionAvx2;
#endif
  return kAttentionPortable;
}

void attend(const Attention& a, const AttentionKernels& kernels, std::int64_t begin, std::int64_t end, float* partial) {
  Scratch s(a, a.tile_rows());
  for (std::int64_t index = begin; index < end; ++index) {
    const Task task = task_of(a, index);
    begin_task(a, kernels, task, s);
    const std::int64_t chunk = task.rows == 1 ? kernels.chunk_of_one : kExact;
    for (std::int64_t token = task.first_token; token < task.last_token; token += chunk) {
      const bool last = token + chunk >= task.last_token;
      Next next{last && index + 1 < end ? task_of(a, index + 1) : task, token + chunk, 0};
      if (last) next.token = next.task.first_token;
      if (!last || index + 1 < end) next.count = std::min(chunk, next.task.last_token - next.token);
      attend_chunk(a, kernels, task, token, std::min(chunk, task.last_token - token), next, s);
    }
    for (std::int64_t r = 0; r < task.rows; ++r) {
      float* sums = s.sums + r * s.sums_stride;
      if (a.splits() == 1) {
        finish_row(a, kernels, sums, s.state[r].total, first_row_of_tile(a, index) + r);
        continue;
      }
      float* kept = partial + (index * a.tile_rows() + r) * a.partial_row();
      std::copy_n(sums, a.values.size, kept);
      kept[a.values.size] = s.state[r].peak;
      kept[a.values.size + 1] = s.state[r].total;
    }
  }
}

void merge_splits(const Attention& a, const AttentionKernels& kernels, const float* partial) {
  std::vector<float> sums(std::size_t(a.values.size));
  for (std::int64_t tile = 0; tile < a.tasks() / a.splits(); ++tile) {
    const std::int64_t rows = std::min<std::int64_t>(kTileRows, a.rows() - tile % a.tiles() * kTileRows);
    for (std::int64_t r = 0; r < rows; ++r) {
      const auto part = [&](std::int64_t split) {
        return partial + ((tile * a.splits() + split) * a.tile_rows() + r) * a.partial_row();
      };
      float peak = kNothing, total = 0.0f;
      for (std::int64_t split = 0; split < a.splits(); ++split) peak = std::max(peak, part(split)[a.values.size]);
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (std::int64_t split = 0; split < a.splits(); ++split) {
        const float* from = part(split);
        const float share = std::exp2(from[a.values.size] - peak);
        total += share * from[a.values.size + 1];
        for (std::int64_t d = 0; d < a.values.size; ++d) sums[std::size_t(d)] += share * from[d];
      }
      finish_row(a, kernels, sums.data(), total, first_row_of_tile(a, tile) + r);
    }
  }
}

}  // namespace qquant
