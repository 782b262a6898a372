// The two passes of rounding to int8, over a run of values.

namespace fastast {
namespace FASTAST_ISA {
namespace {

// max |x|, or NaN if there is one.
template <class T>
Accumulate<T> peak_of(const T* x, int64_t n) {
  using A = Accumulate<T>;
  Vec<A> most = {}, odd = {};
  A rest = 0;
  for_each_lane<A>(
      n,
      [&](int64_t i) {
        const Vec<A> v = load(x + i);
        const Vec<A> size = v < 0 ? -v : v;
        most = size > most ? size : most;
        odd += v * 0;  // NaN where v is, or is not finite
      },
      [&](int64_t i) {
        const A v = to_acc(x[i]);
        const A size = v < 0 ? -v : v;
        rest = size > rest || v != v ? size : rest;
      });
  for (int64_t i = 0; i < lanes<A>; ++i) {
    rest = most[i] > rest ? most[i] : rest;
    if (odd[i] != odd[i]) rest = odd[i];
  }
  return rest;
}

// x times factor, to the nearest integer in 8 bits, which it has to fit into.
template <class T>
void round_run(const T* x, int64_t n, Accumulate<T> factor, int8_t* out) {
  using A = Accumulate<T>;
  using Lane = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  // Adding this leaves the nearest integer in the low bits.
  const A magic = sizeof(A) == 8 ? static_cast<A>(0x1.8p52) : static_cast<A>(0x1.8p23);
  for_each_lane<A>(
      n, [&](int64_t i) { store_bytes(out + i, load(x + i) * splat<A>(factor) + splat<A>(magic)); },
      [&](int64_t i) {
        const A rounded = to_acc(x[i]) * factor + magic;
        Lane bits;
        std::memcpy(&bits, &rounded, sizeof bits);
        out[i] = static_cast<int8_t>(bits);
      });
}

}  // namespace
}  // namespace FASTAST_ISA
}  // namespace fastast
