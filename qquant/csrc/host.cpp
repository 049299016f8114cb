// What the processor under us can do: its instruction sets, its cache, and the rates at which one thread reads memory
// and multiplies.
// No quantization kernel and no torch lives here, so that this module builds wherever a C++17 compiler is.

#include <pybind11/pybind11.h>

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#include <immintrin.h>
#endif

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

// Gives Linux advice about the whole large pages inside [address, address + bytes); other systems choose by themselves.
// Advice is a wish: whether it was followed, and nothing but speed depends on it.
bool advise_large_pages(std::uintptr_t address, std::size_t bytes, int advice) {
#if defined(__linux__)
  const std::uintptr_t begin = (address + kLargePage - 1) / kLargePage * kLargePage;
  const std::uintptr_t end = (address + bytes) / kLargePage * kLargePage;
  return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, advice) == 0;
#else
  (void)address, (void)bytes, (void)advice;
  return false;
#endif
}

#if defined(__linux__)
constexpr int kHugePage = MADV_HUGEPAGE, kCollapse = 25;  // MADV_COLLAPSE, of Linux 6.1, which older headers lack
#else
constexpr int kHugePage = 0, kCollapse = 0;
#endif

void prefer_large_pages(std::uintptr_t address, std::size_t bytes) { advise_large_pages(address, bytes, kHugePage); }

bool gather_large_pages(std::uintptr_t address, std::size_t bytes) {
  prefer_large_pages(address, bytes);
  return advise_large_pages(address, bytes, kCollapse);
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

#if QQ_X86 && defined(__x86_64__)
constexpr int kSums = 12;  // independent ones, more than the latency of any of these instructions in cycles

// One instruction again and again on operands that lie in registers: what a product of matrices could at best reach.
// The instruction is written out as assembly, because a compiler would rightly drop sums that nobody reads; all
// registers hold zeros, since numbers too small to be normal would slow some processors down.
#define QQ_USED                                                                                                    \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",                                          \
  "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm30", "xmm31"
#define QQ_REPEAT(instruction)                                                                                     \
  for (std::int64_t i = 0; i < rounds; ++i) {                                                                      \
    __asm__ volatile(instruction " %%zmm30, %%zmm31, %%zmm0\n\t" instruction " %%zmm30, %%zmm31, %%zmm1\n\t"       \
                     instruction " %%zmm30, %%zmm31, %%zmm2\n\t" instruction " %%zmm30, %%zmm31, %%zmm3\n\t"       \
                     instruction " %%zmm30, %%zmm31, %%zmm4\n\t" instruction " %%zmm30, %%zmm31, %%zmm5\n\t"       \
                     instruction " %%zmm30, %%zmm31, %%zmm6\n\t" instruction " %%zmm30, %%zmm31, %%zmm7\n\t"       \
                     instruction " %%zmm30, %%zmm31, %%zmm8\n\t" instruction " %%zmm30, %%zmm31, %%zmm9\n\t"       \
                     instruction " %%zmm30, %%zmm31, %%zmm10\n\t" instruction " %%zmm30, %%zmm31, %%zmm11\n\t" ::    \
                         : QQ_USED);                                                                               \
  }

QQ_TARGET("avx512f") void repeat_float32(std::int64_t rounds) {
  __asm__ volatile("vzeroall\n\tvpxord %%zmm30, %%zmm30, %%zmm30\n\tvpxord %%zmm31, %%zmm31, %%zmm31" ::: QQ_USED);
  QQ_REPEAT("vfmadd231ps")
}
QQ_TARGET("avx512f,avx512bf16") void repeat_bfloat16(std::int64_t rounds) {
  __asm__ volatile("vzeroall\n\tvpxord %%zmm30, %%zmm30, %%zmm30\n\tvpxord %%zmm31, %%zmm31, %%zmm31" ::: QQ_USED);
  QQ_REPEAT("vdpbf16ps")
}
QQ_TARGET("avx512f,avx512vnni") void repeat_int8(std::int64_t rounds) {
  __asm__ volatile("vzeroall\n\tvpxord %%zmm30, %%zmm30, %%zmm30\n\tvpxord %%zmm31, %%zmm31, %%zmm31" ::: QQ_USED);
  QQ_REPEAT("vpdpbusd")
}
#undef QQ_REPEAT
#undef QQ_USED

// Best of five runs of about 4 ms each, in 1e9 multiply-adds per second.
double product_rate(void (*repeat)(std::int64_t), int per_instruction) {
  constexpr std::int64_t rounds = 1'000'000;
  double best = 0.0;
  for (int pass = 0; pass < 5; ++pass) {
    const double start = thread_seconds();
    repeat(rounds);
    best = std::max(best, 1e-9 * double(rounds * kSums * per_instruction) / std::max(thread_seconds() - start, 1e-9));
  }
  return best;
}
#endif

// Name of each kind of product that this processor has a 512-bit instruction for -> its highest rate in one thread.
py::dict product_rates() {
  py::dict found;
#if QQ_X86 && defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) found["float32"] = product_rate(repeat_float32, 16);
  if (__builtin_cpu_supports("avx512bf16")) found["bfloat16"] = product_rate(repeat_bfloat16, 32);
  if (__builtin_cpu_supports("avx512vnni")) found["int8"] = product_rate(repeat_int8, 64);
#endif
  return found;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "What the processor can do: instruction sets, cache size, large pages, read bandwidth of one thread.";
  m.def("cpu_features", &cpu_features, "Instruction set -> bool; empty on processors other than x86.");
  m.def("build_info", &build_info, "Compiler, flags and C++ standard this module was built with.");
  m.def("last_level_cache_bytes", &last_level_cache_bytes, "Size of the last-level cache in bytes; 0 if unknown.");
  m.def("prefer_large_pages", &prefer_large_pages, py::arg("address"), py::arg("bytes"),
        "Asks Linux for large pages inside this stretch of fresh memory; elsewhere does nothing.");
  m.def("gather_large_pages", &gather_large_pages, py::arg("address"), py::arg("bytes"),
        py::call_guard<py::gil_scoped_release>(),
        "Has Linux 6.1 and later put memory in use into large pages, two megabytes at a time, and says whether it did.");
  m.def("read_bandwidth", &read_bandwidth, py::arg("bytes"), py::arg("seconds") = 0.2,
        "Best GB/s (1e9 bytes) at which one thread reads a buffer of `bytes`, in thread CPU time. Releases the GIL.");
  m.def("product_rates", &product_rates,
        "Best 1e9 multiply-adds per second of one thread with operands in registers: float32, bfloat16, int8 -> rate; "
        "without those that this processor has no 512-bit instruction for. Takes some 60 ms.");
}
