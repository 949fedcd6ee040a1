// What the sanitizers have to be told of fibers; nothing where none is on. ThreadSanitizer needs machine.cpp to be
// compiled without it: the machine's own memory is shared by all fibers.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
inline void leave_stack(void** fake, const void* to, size_t bytes) { __sanitizer_start_switch_fiber(fake, to, bytes); }
inline void enter_stack(void* fake, const void** from, size_t* bytes) {
  __sanitizer_finish_switch_fiber(fake, from, bytes);
}
#else
inline void leave_stack(void**, const void*, size_t) {}
inline void enter_stack(void*, const void**, size_t*) {}
#endif

#if defined(DANET_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
constexpr bool kFindsRaces = true;
inline void* current_fiber() { return __tsan_get_current_fiber(); }
inline void* create_fiber() { return __tsan_create_fiber(0); }
inline void destroy_fiber(void* fiber) { __tsan_destroy_fiber(fiber); }
inline void switch_fiber(void* fiber) { __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync); }
inline void release(void* event) { __tsan_release(event); }
inline void acquire(void* event) { __tsan_acquire(event); }
#else
constexpr bool kFindsRaces = false;
inline void* current_fiber() { return nullptr; }
inline void* create_fiber() { return nullptr; }
inline void destroy_fiber(void*) {}
inline void switch_fiber(void*) {}
inline void release(void*) {}
inline void acquire(void*) {}
#endif
