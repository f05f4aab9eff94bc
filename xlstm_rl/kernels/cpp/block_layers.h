// The layers around the cells for one step of a few rows, feature by feature: [features, rows], rows in the vector.
//
// In this layout every weight is read as torch stores it, one number for a whole vector of rows, so that nothing has
// to be packed and no packed copy can go stale; norms and products need no sums across a vector.
#pragma once

#include "matmul.h"
#include "parallel.h"

namespace xlstm {

// [features, width] with width a multiple of the vector width.
template <class T> struct Features {
  T* data;
  int64_t width;
  Features at(int64_t feature) const { return {data + feature * width, width}; }
  Rows<const T> right() const { return {data, width}; }
  operator Rows<T>() const { return {data, width}; }
};

// From `rows` rows of a tensor to features, zeros in the rows beyond.
template <class T> void gather(const T* from, int64_t row_stride, int64_t rows, int64_t features, Features<T> to) {
  if (rows < to.width)
    for (int64_t f = 0; f < features; f++) std::fill(to.data + f * to.width + rows, to.at(f + 1).data, T(0));
  transpose(rows, features, from, row_stride, to.data, to.width);
}
template <class T> void scatter(Features<T> from, int64_t rows, int64_t features, T* to, int64_t row_stride) {
  transpose(features, rows, from.data, from.width, to, row_stride);
}

// function(old value, feature) for every vector of every feature.
template <class T, class Function> INLINE void transform(Features<T> x, int64_t features, const Function& function) {
  for (int64_t f = 0; f < features; f++)
    for (int64_t b = 0; b < x.width; b += WIDTH<T>) {
      T* at = x.data + f * x.width + b;
      store(at, function(load(at), f, b));
    }
}

// to = weight x + bias, or to += weight x + bias; weight [out, in].
template <class T>
void linear(const T* weight, const T* bias, int64_t out, int64_t in, Features<T> x, Features<T> to, bool add = false) {
  multiply<T>(out, to.width, in, {weight, in, 1}, x.right(), to, add);
  if (bias) transform(to, out, [&](Vec<T> y, int64_t f, int64_t) { return y + bias[f]; });
}

// Layer norm over `features` features, without weight; `factors`, if wanted, are what the centred features were scaled
// with. `x` and `to` may be one.
template <class T> void normalize(Features<T> x, T epsilon, int64_t features, Features<T> to, T* factors = nullptr) {
  for (int64_t b = 0; b < x.width; b += WIDTH<T>) {
    Vec<T> mean{}, variance{};
    for (int64_t f = 0; f < features; f++) mean += load(x.data + f * x.width + b);
    mean /= T(features);
    for (int64_t f = 0; f < features; f++) {
      Vec<T> d = load(x.data + f * x.width + b) - mean;
      variance += d * d;
    }
    T deviation[WIDTH<T>];
    store(deviation, variance / T(features) + epsilon);
    for (T& d : deviation) d = std::sqrt(d);
    const Vec<T> factor = T(1) / load(deviation);
    if (factors) store(factors + b, factor);
    for (int64_t f = 0; f < features; f++)
      store(to.data + f * to.width + b, (load(x.data + f * x.width + b) - mean) * factor);
  }
}

// Layer norm with a weight for each feature and no bias; `x` and `to` may be one.
template <class T> void layer_norm(Features<T> x, const T* weight, T epsilon, int64_t features, Features<T> to) {
  normalize(x, epsilon, features, to);
  transform(to, features, [&](Vec<T> y, int64_t f, int64_t) { return y * weight[f]; });
}

// `projections` outputs of each group of features, the first of all groups in front; too small to be a product.
template <class T>
void project_groups(const T* weight, const T* bias, int64_t inner, int64_t group, int64_t projections, Features<T> x,
                    Features<T> to) {
  for (int64_t first = 0; first < inner; first += group)
    for (int64_t o = 0; o < projections * group; o++) {
      const int64_t at = first * projections + o;
      T* out = to.at(o / group * inner + first + o % group).data;
      for (int64_t b = 0; b < to.width; b += WIDTH<T>) {
        Vec<T> y = fill(bias ? bias[at] : T(0));
        for (int64_t i = 0; i < group; i++) y += weight[at * group + i] * load(x.at(first + i).data + b);
        store(out + b, y);
      }
    }
}

// Squash gates into (-cap, cap); zero is no cap.
template <class T> void cap_gates(Features<T> gates, int64_t count, double soft_cap) {
  const T cap = T(soft_cap);
  if (cap > 0) transform(gates, count, [&](Vec<T> g, int64_t, int64_t) { return cap * hyperbolic_tangent<T>(g / cap); });
}

// A sigmoid gate for a cell that takes the exponential of what it is given.
template <class T> void take_log_sigmoid(Features<T> gates, int64_t count) {
  transform(gates, count, [&](Vec<T> g, int64_t, int64_t) { return log_sigmoid<T>(g); });
}

// Causal convolution and SiLU of the newest input; `size` zero means that there is none.
template <class T> struct Convolution {
  int64_t size;
  const T *weight, *bias;  // [features, size], [features]
  const T* window;         // [B, size - 1, features]
  T* new_window;

  // Rows `begin` onwards; `past` is room for (size - 1) * features.
  void step(int64_t begin, int64_t rows, int64_t features, const uint8_t* reset, Features<T> x, Features<T> past,
            Features<T> to) const {
    if (size == 0) {
      std::memcpy(to.data, x.data, features * x.width * sizeof(T));
      return;
    }
    const int64_t length = (size - 1) * features;
    if (length) {
      const T* from = window + begin * length;
      T* next = new_window + begin * length;
      gather(from, length, rows, length, past);
      for (int64_t b = 0; b < rows; b++) {
        const bool starts = reset && reset[begin + b];
        for (int64_t f = 0; f < length && starts; f++) past.data[f * past.width + b] = T(0);
        if (starts)
          std::fill(next + b * length, next + (b + 1) * length, T(0));
        else
          // in place, the two overlap
          std::memmove(next + b * length, from + b * length + features, (length - features) * sizeof(T));
      }
      scatter(x, rows, features, next + length - features, length);
    }
    for (int64_t f = 0; f < features; f++)
      for (int64_t b = 0; b < x.width; b += WIDTH<T>) {
        const T* taps = weight + f * size;
        Vec<T> y = bias[f] + taps[size - 1] * load(x.data + f * x.width + b);
        for (int64_t tap = 0; tap < size - 1; tap++)
          y += taps[tap] * load(past.data + (tap * features + f) * past.width + b);
        store(to.data + f * to.width + b, silu<T>(y));
      }
  }
};

// task(first row, number of rows, padded number of rows) for pieces of the batch that fill two vectors, or one where
// that gives every thread its share.
template <class T, class Task> void for_rows(int64_t B, int64_t threads, const Task& task) {
  const int64_t most = B > WIDTH<T> * 2 * threads || threads == 1 ? 2 * WIDTH<T> : WIDTH<T>;
  for_each((B + most - 1) / most, threads, [&](int64_t u) {
    const int64_t rows = std::min(most, B - u * most);
    task(u * most, rows, padded<T>(rows));
  });
}

}  // namespace xlstm
