// Memory that a kernel is given, and a row's that it asks for. Included after vec.h, by code of one
// instruction set.
#pragma once

namespace fastast {
namespace FASTAST_ISA {
namespace {

FASTAST_INLINE int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Parts that begin on lines of their own; from null only their sizes are counted.
class Arena {
 public:
  explicit Arena(unsigned char* memory) : next_(memory) {}
  template <class E>
  E* take(int64_t n) {
    E* part = reinterpret_cast<E*>(next_);
    next_ += up_to(n * static_cast<int64_t>(sizeof(E)), 64);
    return part;
  }
  int64_t used(const unsigned char* memory) const { return next_ - memory; }

 private:
  unsigned char* next_;
};

// Room for one row of d values, from a line of the cache on; a range of rows shares it.
template <class A>
struct RowBuffer {
  explicit RowBuffer(int64_t d)
      : data(static_cast<A*>(std::aligned_alloc(64, (d * sizeof(A) + 63) / 64 * 64))) {}
  ~RowBuffer() { std::free(data); }
  RowBuffer(const RowBuffer&) = delete;
  A* data;
};

}  // namespace
}  // namespace FASTAST_ISA
}  // namespace fastast
