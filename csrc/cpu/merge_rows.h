// Merging, summing and gathering rows: see Kernels in kernels.h. Included by kernels_<isa>.cpp
// only.
//
// Each token is read once and each row written once; sums are fp32 (fp64 for fp64) in the ascending
// order of a row's tokens, so the result is the same bit for bit whatever the thread count.
namespace fastast {
namespace FASTAST_ISA {
namespace {

FASTAST_INLINE float size_of(const float* size, int64_t token) {
  return size == nullptr ? 1.0f : size[token];
}

// row[0, width) = mean of columns [from, from + width) of x (+ residual) over the tokens of row i,
// weighted by size. A token that is alone in its row is copied, not multiplied and divided.
// Returns the row's size.
template <class T>
float mean_of_tokens(const T* x, const T* residual, const float* size, Sources sources, int64_t i,
                     int64_t d, int64_t from, int64_t width, Accumulate<T>* row) {
  using A = Accumulate<T>;
  const int64_t first = sources.first(i), last = sources.last(i);
  const bool alone = last == first + 1;
  if (first == last)
    for (int64_t k = 0; k < width; ++k) row[k] = 0;
  float total = 0;
  for (int64_t s = first; s < last; ++s) {
    const int64_t token = sources.token(s);
    const float weight = size_of(size, token);
    const A w = alone ? 1 : weight;
    total += weight;
    const T* a = x + token * d + from;
    const T* b = residual == nullptr ? nullptr : residual + token * d + from;
    const auto add = [&](auto value, auto value_at) {
      if (s == first)
        for_each_lane<A>(
            width, [&](int64_t k) { store(row + k, value(k) * w); },
            [&](int64_t k) { row[k] = value_at(k) * w; });
      else
        for_each_lane<A>(
            width, [&](int64_t k) { store(row + k, load(row + k) + value(k) * w); },
            [&](int64_t k) { row[k] += value_at(k) * w; });
    };
    if (b == nullptr)
      add([&](int64_t k) { return load(a + k); }, [&](int64_t k) { return to_acc(a[k]); });
    else
      add([&](int64_t k) { return load(a + k) + load(b + k); },
          [&](int64_t k) { return to_acc(a[k]) + to_acc(b[k]); });
  }
  if (!alone && total > 0) {
    const A scale = A(1) / A(total);
    for (int64_t k = 0; k < width; ++k) row[k] *= scale;
  }
  return total;
}

template <class T>
FASTAST_INLINE void store_row(const Accumulate<T>* row, int64_t width, T* out) {
  using A = Accumulate<T>;
  for_each_pair<A>(
      width,
      [&](int64_t k, auto count) {
        Vec<A> v[count.value];
        for (int i = 0; i < count.value; ++i) v[i] = load(row + k + i * lanes<A>);
        store(out + k, v);
      },
      [&](int64_t k) { from_acc(row[k], out + k); });
}

template <class T>
void merge_rows(const T* x, const float* size, Sources sources, int64_t d, int64_t begin,
                int64_t end, T* out, float* size_out) {
  using A = Accumulate<T>;
  constexpr int64_t chunk = 1024;  // columns of a row that are summed on the stack at a time
  alignas(64) A row[chunk];
  for (int64_t i = begin; i < end; ++i) {
    const int32_t first = sources.offsets[i];
    if (sources.offsets[i + 1] == first + 1) {
      const int64_t token = sources.tokens[first];
      std::memcpy(out + i * d, x + token * d, d * sizeof(T));
      size_out[i] = size_of(size, token);
      continue;
    }
    size_out[i] = 0;
    for (int64_t from = 0; from < d; from += chunk) {
      const int64_t width = d - from < chunk ? d - from : chunk;
      size_out[i] = mean_of_tokens<T>(x, nullptr, size, sources, i, d, from, width, row);
      store_row<T>(row, width, out + i * d + from);
    }
  }
}

template <class T>
void sum_rows(const T* x, Sources sources, int64_t d, int64_t begin, int64_t end, T* out) {
  using A = Accumulate<T>;
  constexpr int64_t chunk = 1024;
  alignas(64) A row[chunk];
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t from = 0; from < d; from += chunk) {
      const int64_t width = d - from < chunk ? d - from : chunk;
      for (int64_t k = 0; k < width; ++k) row[k] = 0;
      for (int32_t s = sources.offsets[i]; s < sources.offsets[i + 1]; ++s) {
        const T* a = x + sources.tokens[s] * d + from;
        for_each_lane<A>(
            width, [&](int64_t k) { store(row + k, load(row + k) + load(a + k)); },
            [&](int64_t k) { row[k] += to_acc(a[k]); });
      }
      store_row<T>(row, width, out + i * d + from);
    }
  }
}

// out[0, d) = row * scale.
template <class T>
FASTAST_INLINE void scale_row(const T* row, Accumulate<T> scale, int64_t d, T* out) {
  using A = Accumulate<T>;
  for_each_lane<A>(
      d, [&](int64_t k) { store(out + k, load(row + k) * scale); },
      [&](int64_t k) { from_acc(to_acc(row[k]) * scale, out + k); });
}

template <class T>
void gather_rows(const T* rows, const int32_t* assignment, const float* size, const float* size_out,
                 int64_t d, int64_t begin, int64_t end, T* out) {
  for (int64_t j = begin; j < end; ++j) {
    const int64_t i = assignment[j];
    if (i < 0)
      std::memset(out + j * d, 0, d * sizeof(T));
    else if (size_out == nullptr || size_of(size, j) == size_out[i])
      std::memcpy(out + j * d, rows + i * d, d * sizeof(T));
    else
      scale_row<T>(rows + i * d, Accumulate<T>(size_of(size, j)) / size_out[i], d, out + j * d);
  }
}

}  // namespace
}  // namespace FASTAST_ISA
}  // namespace fastast
