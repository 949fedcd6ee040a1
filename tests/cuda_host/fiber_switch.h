// Switching between stacks.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)

// Save what a function must preserve, with the stack pointer in *from, and go on where `to` was saved.
extern "C" void danet_switch_stack(void** from, void* to);

asm(R"(
.text
.globl danet_switch_stack
.type danet_switch_stack, @function
danet_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size danet_switch_stack, .-danet_switch_stack
)");

// A stack on which danet_switch_stack enters `function`, which never returns.
inline void* new_stack(char* memory, size_t bytes, void (*function)()) {
  auto** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(memory) + bytes - 64) & ~uintptr_t{15});
  *--top = nullptr;  // where a return address would be: the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(function);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  return top;
}

#else

#include <ucontext.h>

#include <new>

inline void danet_switch_stack(void** from, void* to) {
  ucontext_t here;  // lives on the stack that is left, until somebody comes back to it
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

inline void* new_stack(char* memory, size_t bytes, void (*function)()) {
  auto* context = new (memory) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = memory + sizeof(ucontext_t);
  context->uc_stack.ss_size = bytes - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, function, 0);
  return context;
}

#endif
