// Fibres: functions on stacks of their own, that a scheduler switches to and that switch back to it.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__) || defined(SENET_HOST_UCONTEXT)
#include <ucontext.h>
#endif

#pragma GCC visibility push(hidden)  // each library has its own, however many a process loads
namespace senet::cuda::host {

constexpr size_t kStackBytes = 256 << 10;

#if defined(__x86_64__) && !defined(SENET_HOST_UCONTEXT)

struct Context {
  void* stack_pointer = nullptr;
};

// swapcontext makes a system call each time, for the signal mask, and takes many times as long. Saved is what a callee
// has to preserve: six registers and the two control words of floating point.
// noipa: the compiler can't see from the body that all other registers change.
__attribute__((naked, noinline, noipa)) inline void switch_context(Context* /*from*/, Context* /*to*/) {
  asm(R"(
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    subq $8, %rsp
    stmxcsr (%rsp)
    fnstcw 4(%rsp)
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    ldmxcsr (%rsp)
    fldcw 4(%rsp)
    addq $8, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
  )");
}

// What switch_context pops: the control words of whoever launches (flushing of denormals is among them), six
// registers, the entry, and the return address of the entry, which never returns. A stack is 16-byte aligned at calls.
inline void prepare(Context& context, char* stack, void (*entry)()) {
  auto* words = reinterpret_cast<uint64_t*>(stack + kStackBytes) - 9;
  for (int i = 0; i < 9; ++i) words[i] = 0;
  uint32_t control = 0;
  asm volatile("stmxcsr %0" : "=m"(control));
  words[0] = control;
  asm volatile("fnstcw %0" : "=m"(control));
  words[0] |= static_cast<uint64_t>(control & 0xffffu) << 32;
  words[7] = reinterpret_cast<uint64_t>(entry);
  context.stack_pointer = words;
}

#else

struct Context {
  ucontext_t registers;
};

inline void switch_context(Context* from, Context* to) { swapcontext(&from->registers, &to->registers); }

inline void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = kStackBytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
}

#endif

inline Context scheduler_context;
// Where AddressSanitizer finds the scheduler's stack.
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_bytes = 0;

class Fibre {
 public:
  // From the scheduler. The entry begins with entered() and ends with leave(true).
  void start(void (*entry)()) {
    if (stack_ == nullptr) stack_ = new_stack();
    fake_stack_ = nullptr;
    prepare(context_, stack_, entry);
  }

  // From the scheduler, until the fibre leaves.
  void resume() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_, kStackBytes);
#endif
    switch_context(&scheduler_context, &context_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  static void entered() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  }

  // Back to the scheduler, until it resumes this fibre.
  void leave([[maybe_unused]] bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, scheduler_stack, scheduler_stack_bytes);
#endif
    switch_context(&context_, &scheduler_context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_stack, &scheduler_stack_bytes);
#endif
  }

 private:
  // Only touched pages take memory; those below the stack fault. Kept for the fibres of later launches.
  static char* new_stack() {
    constexpr size_t kFence = 64 << 10;
    void* pages =
        mmap(nullptr, kFence + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages, kFence, PROT_NONE) != 0) {
      std::perror("no memory for a stack");
      std::abort();
    }
    return static_cast<char*>(pages) + kFence;
  }

  Context context_;
  char* stack_ = nullptr;
  void* fake_stack_ = nullptr;
};

}  // namespace senet::cuda::host
#pragma GCC visibility pop
