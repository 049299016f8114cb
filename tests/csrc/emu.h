// Runs CUDA kernels on a CPU, one fiber per CUDA thread, so that their indexing, masks, tails, barriers and arithmetic
// can be tested without a GPU. It proves nothing about speed, about races that need true concurrency, or about PTX.
//
// A fiber runs until it meets a barrier or a warp exchange and goes on when all that belong to it have come. Whatever a
// GPU leaves undefined ends the launch with a message here: a barrier that part of a block reaches, a lane that others
// wait for and that has left, an address outside of emu_alloc's memory, and what the compiler's sanitizer traps, such
// as a misaligned vector. Shared memory is poisoned before every block. Blocks run one after another, so kernels that
// wait for other blocks never end here, and are reported.

#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emu {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStack = size_t{1} << 17;
constexpr size_t kMaxShared = 99 * 1024;  // what every GPU since compute capability 8.0 has
constexpr uint8_t kPoison = 0xC5;         // as float, half and bfloat a large negative number; as a code 197
constexpr int kMaxWords = 8;

// What the lanes of one exchange have laid down, one row per lane.
using Shared = const uint32_t (*)[kMaxWords];

// Lanes of one warp that exchange words under one mask. Two buffers: a lane that is through may lay down its words of
// the next exchange while others still read this one's.
struct Meeting {
  const char* what = nullptr;
  uint32_t arrived = 0;
  uint32_t generation = 0;
  uint32_t words[2][kWarp][kMaxWords];
};

template <int kBytes>
struct alignas(kBytes) Bytes {
  uint8_t byte[kBytes];
};

struct Fiber {
  std::vector<std::function<void()>> started;             // asynchronous copies of no group yet
  std::deque<std::vector<std::function<void()>>> groups;  // those that nobody has waited for
  ucontext_t start;
  jmp_buf here;
  dim3 index;
  bool begun = false, done = false;
  const uint32_t* gate = nullptr;  // a generation counter; the fiber may go on when it no longer reads `seen`
  uint32_t seen = 0;
  const char* waits_for = "";
};

struct Machine {
  dim3 grid, block, block_index;
  std::function<void()> kernel;
  std::vector<Fiber> fibers;
  std::vector<std::map<uint32_t, Meeting>> warps;
  uint32_t at_barrier = 0, barrier_generation = 0;
  int current = 0;
  bool reversed = false;  // which way round threads are run; a right kernel does not care
  jmp_buf scheduler;
  sigjmp_buf failed;
  char* stacks = nullptr;
  std::string message;
  int error = 0;
};

inline Machine& machine() {
  static Machine m;
  return m;
}

alignas(16) inline unsigned char shared_bytes[kMaxShared];

inline Fiber& self() { return machine().fibers[size_t(machine().current)]; }
inline int thread_number() { return machine().current; }
inline int lane() { return machine().current % kWarp; }

inline std::string where() {
  const Machine& m = machine();
  return "block (" + std::to_string(m.block_index.x) + ", " + std::to_string(m.block_index.y) + ", " +
         std::to_string(m.block_index.z) + ") thread " + std::to_string(m.current) + ": ";
}

[[noreturn]] inline void fail(const std::string& what) {
  machine().message = where() + what;
  siglongjmp(machine().failed, 1);
}

// Hands the processor back until *gate has moved on from `seen`.
inline void wait(const uint32_t* gate, uint32_t seen, const char* what) {
  Fiber& me = self();
  me.gate = gate;
  me.seen = seen;
  me.waits_for = what;
  if (_setjmp(me.here) == 0) _longjmp(machine().scheduler, 1);
}

// Lays down this lane's words, waits for all lanes of the mask to do so, and returns what every lane laid down.
inline Shared exchange(uint32_t mask, const char* what, const uint32_t* words, int count) {
  Machine& m = machine();
  const int warp = m.current / kWarp, mine = lane();
  if (!(mask >> mine & 1u)) fail(std::string(what) + " is called by a lane that its mask does not name");
  for (int other = 0; other < kWarp; ++other) {
    if (!(mask >> other & 1u)) continue;
    const size_t thread = size_t(warp * kWarp + other);
    if (thread >= m.fibers.size() || m.fibers[thread].done)
      fail(std::string(what) + ": the mask names lane " + std::to_string(other) + ", which has left or never was");
  }
  Meeting& meeting = m.warps[size_t(warp)][mask];
  if (meeting.arrived == 0) meeting.what = what;
  if (std::strcmp(meeting.what, what) != 0) fail(std::string("lanes meet in ") + meeting.what + " and " + what);
  const uint32_t generation = meeting.generation;
  auto& buffer = meeting.words[generation % 2];
  std::memcpy(buffer[mine], words, size_t(count) * sizeof(uint32_t));
  meeting.arrived |= 1u << mine;
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    wait(&meeting.generation, generation, what);
  }
  return buffer;
}

inline void block_barrier() {
  Machine& m = machine();
  for (const Fiber& fiber : m.fibers)
    if (fiber.done) fail("__syncthreads is reached by a part of the block; another part has left");
  const uint32_t generation = m.barrier_generation;
  if (++m.at_barrier == m.fibers.size()) {
    m.at_barrier = 0;
    ++m.barrier_generation;
  } else {
    wait(&m.barrier_generation, generation, "__syncthreads");
  }
}

inline void fiber_main() {
  machine().kernel();
  self().done = true;
  _longjmp(machine().scheduler, 1);
}

inline void resume(Fiber& fiber, int number) {
  Machine& m = machine();
  m.current = number;
  if (_setjmp(m.scheduler) != 0) return;  // the fiber waits, or is done
  if (fiber.begun) _longjmp(fiber.here, 1);
  fiber.begun = true;
  setcontext(&fiber.start);
}

// Runs all threads of one block to their end.
inline void run_block() {
  Machine& m = machine();
  const size_t threads = size_t(m.block.x) * m.block.y * m.block.z;
  std::memset(shared_bytes, kPoison, kMaxShared);
  m.fibers.assign(threads, Fiber());
  m.warps.assign((threads + kWarp - 1) / kWarp, {});
  m.at_barrier = 0;
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.index =
        dim3(unsigned(i) % m.block.x, unsigned(i) / m.block.x % m.block.y, unsigned(i) / m.block.x / m.block.y);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = m.stacks + i * kStack;
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
  }
  for (bool live = true; live;) {
    live = false;
    bool moved = false;
    for (size_t i = 0; i < threads; ++i) {
      const size_t number = m.reversed ? threads - 1 - i : i;
      Fiber& fiber = m.fibers[number];
      if (fiber.done) continue;
      live = true;
      if (fiber.begun && *fiber.gate == fiber.seen) continue;
      moved = true;
      resume(fiber, int(number));
    }
    if (live && !moved) {
      for (size_t i = 0; i < threads; ++i)
        if (!m.fibers[i].done) {
          m.current = int(i);
          fail(std::string(m.fibers[i].waits_for) + " is never reached by all that it waits for");
        }
    }
  }
}

inline void on_signal(int number, siginfo_t* info, void*) {
  char text[96];
  std::snprintf(text, sizeof(text),
                number == SIGILL ? "trapped by the sanitizer" : "touches address %p, which is not its own",
                info->si_addr);
  fail(text);
}

// Runs a grid. What goes wrong is kept for last_error() and message().
inline void launch(dim3 grid, dim3 block, size_t shared, std::function<void()> kernel) {
  Machine& m = machine();
  const size_t threads = size_t(block.x) * block.y * block.z;
  m.message.clear();
  m.error = 1;
  if (threads == 0 || threads > kMaxThreads || shared > kMaxShared || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.y > 65535 || grid.z > 65535) {
    m.message = "a launch of this grid, block or shared memory fails";
    return;
  }
  if (m.stacks == nullptr)
    m.stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  m.grid = grid;
  m.block = block;
  m.kernel = std::move(kernel);
  struct sigaction action = {}, old[3];
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  const int signals[3] = {SIGSEGV, SIGBUS, SIGILL};
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &action, &old[i]);
  if (sigsetjmp(m.failed, 1) == 0) {
    for (m.block_index.z = 0; m.block_index.z < grid.z; ++m.block_index.z)
      for (m.block_index.y = 0; m.block_index.y < grid.y; ++m.block_index.y)
        for (m.block_index.x = 0; m.block_index.x < grid.x; ++m.block_index.x) run_block();
    m.error = 0;
  }
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &old[i], nullptr);
}

inline int last_error() {
  const int error = machine().error;
  machine().error = 0;
  return error;
}

}  // namespace emu

#define QQ_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream), emu::launch((grid), (block), size_t(shared_bytes), [=] { kernel(__VA_ARGS__); }))
#define QQ_SHARED_DYN(type, name) type* const name = reinterpret_cast<type*>(emu::shared_bytes)
#define QQ_ALLOW_SHARED(kernel, shared_bytes) static_cast<void>(kernel)
#define QQ_LAST_ERROR() emu::last_error()

#include "emu_builtins.h"
