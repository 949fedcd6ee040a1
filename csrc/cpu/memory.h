// Workspaces of the CPU kernels.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

namespace danet {

// DANET_DEBUG_POISON=1 fills every workspace and result with NaN before use, so that a read of unwritten memory shows.
inline bool poison_memory() {
  static const bool poison = [] {
    const char* value = std::getenv("DANET_DEBUG_POISON");
    return value != nullptr && value[0] == '1';
  }();
  return poison;
}

// Bytes of all ones: NaN in every floating dtype.
void poison(void* data, int64_t bytes);

// Uninitialised memory for `count` elements, on a 64-byte boundary so that results do not depend on where it lies.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count = 0) : data_(allocate(count)) {}
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };

  static T* allocate(int64_t count) {
    if (count == 0) return nullptr;
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    void* data = std::aligned_alloc(64, static_cast<size_t>(bytes));
    if (data == nullptr) throw std::bad_alloc();
    if (poison_memory()) poison(data, bytes);
    return static_cast<T*>(data);
  }

  std::unique_ptr<T, Free> data_;
};

}  // namespace danet
