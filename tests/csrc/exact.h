// Buffers for programs that run kernels under sanitizers: each ends where its last element does.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace exact {

// A heap block of exactly `count` elements, which begins `skip` elements after an address that is a multiple of 64.
template <class T>
class Exact {
 public:
  explicit Exact(std::int64_t count, std::int64_t skip = 0, int fill = 0xa5) : count_(count), skip_(skip) {
    const std::size_t bytes = std::size_t(count + skip) * sizeof(T);
    void* block = nullptr;
    if (posix_memalign(&block, 64, bytes == 0 ? 1 : bytes) != 0) std::abort();
    std::memset(block, fill, bytes);
    block_.reset(static_cast<T*>(block));
  }
  T* data() const { return block_.get() + skip_; }
  T& operator[](std::int64_t i) const { return data()[i]; }
  std::int64_t count() const { return count_; }
  bool same(const Exact& other) const {
    return std::memcmp(data(), other.data(), std::size_t(count_) * sizeof(T)) == 0;
  }

 private:
  struct Free {
    void operator()(T* block) const { std::free(block); }
  };
  std::int64_t count_, skip_;
  std::unique_ptr<T, Free> block_;
};

}  // namespace exact
