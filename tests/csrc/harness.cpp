// What Python's ctypes needs beside the kernels of csrc/cuda, which are compiled into the same library: memory with
// guards around it, the order threads run in, and what went wrong.

#include "emu.h"

#include "../../qquant/csrc/cuda/kv_launch.h"
#include "faults.h"

namespace {

constexpr size_t kAlignment = 16;  // of a buffer's first byte, as far as a kernel may rely on it

size_t page() { return size_t(sysconf(_SC_PAGESIZE)); }

// Whole pages for a buffer, at least one.
size_t pages_for(size_t bytes) { return (bytes / page() + (bytes % page() != 0 || bytes == 0)) * page(); }

}  // namespace

QQ_LAUNCHER const char* emu_message() { return emu::machine().message.c_str(); }

QQ_LAUNCHER void emu_reverse(int reversed) { emu::machine().reversed = reversed != 0; }

// `bytes` of poisoned memory between two inaccessible pages, ending at the second or fewer than 16 bytes before it.
QQ_LAUNCHER void* emu_alloc(size_t bytes) {
  const size_t usable = pages_for(bytes);
  auto* all = static_cast<uint8_t*>(mmap(nullptr, usable + 2 * page(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(all + page(), usable, PROT_READ | PROT_WRITE);
  std::memset(all + page(), emu::kPoison, usable);
  return all + page() + (usable - bytes) / kAlignment * kAlignment;
}

// Gives a buffer back; whether the bytes around it that no guard page covers are still poison.
QQ_LAUNCHER int emu_free(void* buffer, size_t bytes) {
  const size_t usable = pages_for(bytes);
  auto* first = reinterpret_cast<uint8_t*>(reinterpret_cast<uintptr_t>(buffer) / page() * page());
  if (bytes == 0) first = static_cast<uint8_t*>(buffer) - usable;
  const auto* begin = static_cast<uint8_t*>(buffer);
  bool intact = true;
  for (const uint8_t* p = first; p < begin; ++p) intact = intact && *p == emu::kPoison;
  for (const uint8_t* p = begin + bytes; p < first + usable; ++p) intact = intact && *p == emu::kPoison;
  munmap(first - page(), usable + 2 * page());
  return intact;
}
