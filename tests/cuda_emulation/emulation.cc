// The fibers, barriers and memory of emulated_device.h, and the card that is emulated.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "emulated_device.h"

namespace emulation {

uint3_ thread, block, threads;

namespace {

constexpr size_t STACK = 128 * 1024, GUARD = 4096;
constexpr unsigned char GUARD_BYTE = 0x5a;

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool inside;
};

struct Fiber {
  jmp_buf state;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
  std::vector<std::vector<Copy>> copies;  // groups; the last one is not committed
};

struct Warp {
  void* operands[32];
  Together together = nullptr;
  int arrived = 0, generation = 0;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<unsigned char> memory;
size_t memory_bytes;
jmp_buf scheduler;
const std::function<void()>* body;
int present, waiting, barrier_generation, progress;
bool any_now, any_last, backwards;
char message[200];  // of a mistake, or empty
int card[4] = {4, 227 * 1024, 9, 0};  // multiprocessors, shared memory of a block, compute capability

void enter() {
  (*body)();
  fibers[present].done = true;
  progress++;
  longjmp(scheduler, 1);
}

void report(const char* what) {
  std::snprintf(message, sizeof message, "block %u, thread %u: %s", block.x, thread.x, what);
}

// Gives way to other fibers.
void yield() {
  if (!_setjmp(fibers[present].state)) longjmp(scheduler, 1);
}

void resume(int index) {
  Fiber& fiber = fibers[index];
  present = index;
  thread.x = index;
  if (_setjmp(scheduler)) return;
  if (fiber.started) longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

}  // namespace

void fail(const char* what) {
  report(what);
  longjmp(scheduler, 1);
}

unsigned char* shared(size_t* bytes) {
  *bytes = memory_bytes;
  return memory.data();
}

void warp(Together together, void* operands) {
  Warp& w = warps[present / 32];
  if (w.arrived && w.together != together) fail("the lanes of a warp are at different instructions");
  w.together = together;
  w.operands[present % 32] = operands;
  progress++;
  const int generation = w.generation;
  if (++w.arrived == 32) {
    together(w.operands);
    w.arrived = 0;
    w.generation++;
    return;
  }
  while (w.generation == generation) yield();
}

bool barrier(bool any) {
  any_now = any_now || any;
  progress++;
  const int generation = barrier_generation;
  if (++waiting == (int)fibers.size()) {
    any_last = any_now;
    any_now = false;
    waiting = 0;
    barrier_generation++;
  } else
    while (barrier_generation == generation) yield();
  return any_last;
}

void copy_async(void* to, const void* from, int bytes, bool inside) {
  auto& groups = fibers[present].copies;
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({to, from, bytes, inside});
}

void copy_commit() { fibers[present].copies.emplace_back(); }

void copy_wait(int left) {
  auto& groups = fibers[present].copies;
  while ((int)groups.size() - 1 > left) {
    for (const Copy& c : groups.front()) c.inside ? std::memcpy(c.to, c.from, c.bytes) : std::memset(c.to, 0, c.bytes);
    groups.erase(groups.begin());
  }
}

namespace {

void start_block(size_t shared_bytes) {
  memory.assign(shared_bytes + GUARD, 0xff);
  std::fill(memory.begin() + shared_bytes, memory.end(), GUARD_BYTE);
  warps.assign((fibers.size() + 31) / 32, {});
  waiting = 0;
  any_now = false;
  for (Fiber& fiber : fibers) {
    if (!fiber.stack) fiber.stack.reset(new char[STACK]);
    fiber.started = fiber.done = false;
    fiber.copies.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, STACK};
    makecontext(&fiber.context, enter, 0);
  }
}

// A warp goes on while its lanes do, in either order.
void run_warp(int index) {
  for (int before = -1; before != progress;) {
    before = progress;
    for (int l = 0; l < 32; l++) {
      const int fiber = 32 * index + (backwards ? 31 - l : l);
      if (fiber < (int)fibers.size() && !fibers[fiber].done) resume(fiber);
      if (message[0]) return;
    }
  }
}

}  // namespace

cudaError_t run(int blocks, int block_threads, size_t shared_bytes, const std::function<void()>& kernel) {
  body = &kernel;
  memory_bytes = shared_bytes;
  threads.x = block_threads;
  message[0] = 0;
  if ((int)shared_bytes > card[1]) report("more shared memory than the card has");
  if ((int)fibers.size() != block_threads) fibers = std::vector<Fiber>(block_threads);
  for (block.x = 0; block.x < (unsigned)blocks && !message[0]; block.x++) {
    start_block(shared_bytes);
    auto left = [] { return std::any_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return !f.done; }); };
    while (left() && !message[0]) {
      progress = 0;
      for (int w = 0; w < (int)warps.size(); w++) run_warp(backwards ? (int)warps.size() - 1 - w : w);
      if (!progress) report("threads wait for others that do not come");
    }
    for (size_t i = shared_bytes; i < memory.size() && !message[0]; i++)
      if (memory[i] != GUARD_BYTE) report("shared memory was written past its end");
  }
  return message[0] ? 1 : cudaSuccess;
}

}  // namespace emulation

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = emulation::card[attribute];
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return emulation::message; }

// Chooses the card, and whether threads run from the last to the first, which shows results that depend on an order.
extern "C" void emulate(int multiprocessors, int shared_bytes, int major, int minor, int backwards) {
  const int values[] = {multiprocessors, shared_bytes, major, minor};
  std::copy(values, values + 4, emulation::card);
  emulation::backwards = backwards;
}
