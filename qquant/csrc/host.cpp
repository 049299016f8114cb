// What the processor under us can do: its instruction sets, its cache, and the rate at which one thread reads memory.
// No quantization kernel and no torch lives here, so that this module builds wherever a C++17 compiler is.

#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <time.h>
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#ifndef QQUANT_FLAGS
#define QQUANT_FLAGS "unknown"
#endif

#if (defined(__GNUC__) || defined(__clang__)) && (defined(__x86_64__) || defined(__i386__))
#define QQ_X86 1
#define QQ_TARGET(isa) __attribute__((target(isa)))
#define QQ_INLINE inline __attribute__((always_inline))
#else
#define QQ_X86 0
#define QQ_INLINE inline
#endif

namespace py = pybind11;

namespace {

// Name of each instruction set that a kernel of ours may dispatch on -> does this processor have it.
py::dict cpu_features() {
  py::dict found;
#if QQ_X86
  __builtin_cpu_init();
  found["avx2"] = bool(__builtin_cpu_supports("avx2"));
  found["fma"] = bool(__builtin_cpu_supports("fma"));
  found["avx512f"] = bool(__builtin_cpu_supports("avx512f"));
  found["avx512_vnni"] = bool(__builtin_cpu_supports("avx512vnni"));
  found["avx512_bf16"] = bool(__builtin_cpu_supports("avx512bf16"));
#endif
  return found;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = std::string("gcc ") + __VERSION__;
#elif defined(_MSC_VER)
  info["compiler"] = "msvc " + std::to_string(_MSC_VER);
#else
  info["compiler"] = "unknown";
#endif
  info["flags"] = QQUANT_FLAGS;
  info["cplusplus"] = static_cast<long>(__cplusplus);
  info["pybind11"] = std::to_string(PYBIND11_VERSION_MAJOR) + "." + std::to_string(PYBIND11_VERSION_MINOR);
  return info;
}

// Bytes of the last-level cache as the C library reports it; 0 where it does not.
std::size_t last_level_cache_bytes() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  const long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return bytes > 0 ? static_cast<std::size_t>(bytes) : 0;
#else
  return 0;
#endif
}

// Seconds this thread has spent on a core. Waiting for memory counts, waiting behind other processes does not, so a busy
// machine still shows what one thread can reach.
double thread_seconds() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
  timespec now{};
  if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now) == 0) return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
#endif
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Sum of count 64-bit words; count is a multiple of kLanes. Independent partial sums, so that the compiler vectorizes
// the loop for whatever instruction set the caller below is compiled for and additions never wait for one another.
constexpr std::size_t kLanes = 32;

QQ_INLINE std::uint64_t sum_words(const std::uint64_t* words, std::size_t count) {
  std::uint64_t partial[kLanes] = {};
  for (std::size_t i = 0; i < count; i += kLanes)
    for (std::size_t lane = 0; lane < kLanes; ++lane) partial[lane] += words[i + lane];
  std::uint64_t total = 0;
  for (const std::uint64_t value : partial) total += value;
  return total;
}

std::uint64_t sum_portable(const std::uint64_t* words, std::size_t count) { return sum_words(words, count); }

#if QQ_X86
QQ_TARGET("avx2") std::uint64_t sum_avx2(const std::uint64_t* words, std::size_t count) {
  return sum_words(words, count);
}
#endif

using Sum = std::uint64_t (*)(const std::uint64_t*, std::size_t);

Sum pick_sum() {
#if QQ_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) return sum_avx2;
#endif
  return sum_portable;
}

constexpr std::size_t kLargePage = std::size_t{1} << 21;

// Asks Linux to back whole large pages inside [address, address + bytes) as such; other systems choose by themselves.
void prefer_large_pages(std::uintptr_t address, std::size_t bytes) {
#if defined(__linux__)
  const std::uintptr_t begin = (address + kLargePage - 1) / kLargePage * kLargePage;
  const std::uintptr_t end = (address + bytes) / kLargePage * kLargePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish; refusal costs speed
#else
  (void)address, (void)bytes;
#endif
}

// A buffer of count words in large pages where Linux grants them: with small ones the page tables are the limit, not the
// memory. Aligned to a large page; freed by the deleter.
struct AlignedDelete {
  void operator()(std::uint64_t* words) const { ::operator delete[](words, std::align_val_t{kAlignment}); }
  static constexpr std::size_t kAlignment = kLargePage;
};

std::unique_ptr<std::uint64_t[], AlignedDelete> allocate_words(std::size_t count) {
  const std::size_t bytes = count * sizeof(std::uint64_t);
  void* raw = ::operator new[](bytes, std::align_val_t{AlignedDelete::kAlignment});
  prefer_large_pages(reinterpret_cast<std::uintptr_t>(raw), bytes);
  return std::unique_ptr<std::uint64_t[], AlignedDelete>(static_cast<std::uint64_t*>(raw));
}

// Best rate, in 1e9 bytes per second, at which this thread sums a buffer of the given size, over passes that together
// last about `seconds` (never fewer than three). The caller picks a buffer larger than the last-level cache.
double read_bandwidth(std::size_t bytes, double seconds) {
  const std::size_t count = bytes / sizeof(std::uint64_t) / kLanes * kLanes;
  if (count == 0) throw py::value_error("bytes must be at least 256, got " + std::to_string(bytes));
  double best = 0.0;
  volatile std::uint64_t sink = 0;
  {
    py::gil_scoped_release unlocked;
    const auto words = allocate_words(count);
    for (std::size_t i = 0; i < count; ++i) words[i] = i;  // touches every page, so that none is the shared zero page
    const Sum sum = pick_sum();
    double spent = 0.0;
    for (int pass = 0; pass < 3 || spent < seconds; ++pass) {
      const double start = thread_seconds();
      sink = sink + sum(words.get(), count);
      const double took = std::max(thread_seconds() - start, 1e-9);
      spent += took;
      best = std::max(best, 1e-9 * double(count * sizeof(std::uint64_t)) / took);
    }
  }
  return best;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "What the processor can do: instruction sets, cache size, large pages, read bandwidth of one thread.";
  m.def("cpu_features", &cpu_features, "Instruction set -> bool; empty on processors other than x86.");
  m.def("build_info", &build_info, "Compiler, flags and C++ standard this module was built with.");
  m.def("last_level_cache_bytes", &last_level_cache_bytes, "Size of the last-level cache in bytes; 0 if unknown.");
  m.def("prefer_large_pages", &prefer_large_pages, py::arg("address"), py::arg("bytes"),
        "Asks Linux for large pages inside this stretch of fresh memory; elsewhere does nothing.");
  m.def("read_bandwidth", &read_bandwidth, py::arg("bytes"), py::arg("seconds") = 0.2,
        "Best GB/s (1e9 bytes) at which one thread reads a buffer of `bytes`, in thread CPU time. Releases the GIL.");
}
