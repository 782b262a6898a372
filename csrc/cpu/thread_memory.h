// A thread's memory from one call to the next, for what kernels pack (a head's keys and values, a
// match's tokens), whose pages would else be asked for and cleared at every layer. What is larger
// than kKept is given back. One user at a time.
#pragma once

#include <memory>

#include "common.h"

namespace fastast {

class ThreadMemory {
 public:
  static ThreadMemory& mine() {
    thread_local ThreadMemory memory;
    return memory;
  }
  unsigned char* get(int64_t bytes) {
    if (bytes > size_) {
      size_ = 0;
      memory_.reset(new Scratch<unsigned char>(bytes));
      size_ = bytes;
    }
    return memory_->get();
  }
  void give_back() {
    if (size_ <= kKept) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  static constexpr int64_t kKept = 4 << 20;
  std::unique_ptr<Scratch<unsigned char>> memory_;
  int64_t size_ = 0;
};

}  // namespace fastast
