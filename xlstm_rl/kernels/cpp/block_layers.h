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

// The sum of term(feature) over features; four sums take turns, or each addition would wait for the one before.
template <class T, class Term> INLINE Vec<T> sum_features(int64_t features, const Term& term) {
  Vec<T> sums[4] = {};
  int64_t f = 0;
  for (; f + 4 <= features; f += 4)
    for (int n = 0; n < 4; n++) sums[n] += term(f + n);
  for (; f < features; f++) sums[0] += term(f);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Layer norm over `features` features, with a weight for each or none, and no bias. `factors`, if wanted, are what the
// centred features were scaled with. `x` and `to` may be one.
template <class T>
void layer_norm(Features<T> x, const T* weight, T epsilon, int64_t features, Features<T> to, T* factors = nullptr) {
  for (int64_t b = 0; b < x.width; b += WIDTH<T>) {
    const auto feature = [&](int64_t f) { return load(x.data + f * x.width + b); };
    const Vec<T> mean = sum_features<T>(features, feature) / T(features);
    const Vec<T> variance = sum_features<T>(features, [&](int64_t f) {
      const Vec<T> d = feature(f) - mean;
      return d * d;
    });
    T deviation[WIDTH<T>];
    store(deviation, variance / T(features) + epsilon);
    for (T& d : deviation) d = std::sqrt(d);
    const Vec<T> factor = T(1) / load(deviation);
    if (factors) store(factors + b, factor);
    for (int64_t f = 0; f < features; f++) {
      const Vec<T> normal = (feature(f) - mean) * factor;
      store(to.data + f * to.width + b, weight ? normal * weight[f] : normal);
    }
  }
}

// Outputs of one group of SIZE features, which are held in registers; `next`: distance of the outputs of two projections.
template <class T, int SIZE>
INLINE void project_group(const T* weight, const T* bias, int64_t outputs, int64_t next, const T* x, int64_t x_width,
                          T* to, int64_t to_width) {
  Vec<T> features[SIZE];
  for (int i = 0; i < SIZE; i++) features[i] = load(x + i * x_width);
  for (int64_t o = 0; o < outputs; o++) {
    Vec<T> y = fill(bias ? bias[o] : T(0));
    for (int i = 0; i < SIZE; i++) y += weight[o * SIZE + i] * features[i];
    store(to + (o / SIZE * next + o % SIZE) * to_width, y);
  }
}

// `projections` outputs of each group of features, the first of all groups in front; too small to be a product.
template <class T>
void project_groups(const T* weight, const T* bias, int64_t inner, int64_t group, int64_t projections, Features<T> x,
                    Features<T> to) {
  const int64_t outputs = projections * group;
  for (int64_t first = 0; first < inner; first += group) {
    const T *w = weight + first * outputs, *offset = bias ? bias + first * projections : nullptr;
    for (int64_t b = 0; b < to.width; b += WIDTH<T>) {
      const T* from = x.at(first).data + b;
      T* out = to.at(first).data + b;
      if (group == 4) {
        project_group<T, 4>(w, offset, outputs, inner, from, x.width, out, to.width);
        continue;
      }
      for (int64_t o = 0; o < outputs; o++) {
        Vec<T> y = fill(offset ? offset[o] : T(0));
        for (int64_t i = 0; i < group; i++) y += w[o * group + i] * load(from + i * x.width);
        store(out + (o / group * inner + o % group) * to.width, y);
      }
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

  int64_t room(int64_t rows, int64_t features) const { return size ? (size + 2 * rows) * features + 2 * 64 : 0; }

  // Rows `begin` onwards, row by row, as the window lies; `scratch` has `room` numbers.
  void step(int64_t begin, int64_t rows, int64_t features, const uint8_t* reset, Features<T> x, Scratch<T>& scratch,
            Features<T> to) const {
    if (size == 0) {
      std::memcpy(to.data, x.data, features * x.width * sizeof(T));
      return;
    }
    T *taps = scratch.take(size * features), *newest = scratch.take(rows * features);
    T* mixed = scratch.take(rows * features);
    transpose(features, size, weight, size, taps, features);
    scatter(x, rows, features, newest, features);
    const int64_t length = (size - 1) * features;
    for (int64_t b = 0; b < rows; b++) {
      const bool starts = reset && reset[begin + b];
      const T* from = starts ? nullptr : window + (begin + b) * length;
      T* next = new_window + (begin + b) * length;
      int64_t f = 0;
      for (; f + 4 * WIDTH<T> <= features; f += 4 * WIDTH<T>)
        mix<4>(features, f, taps, newest + b * features, from, next, mixed + b * features);
      for (; f < features; f += WIDTH<T>)
        mix<1>(features, f, taps, newest + b * features, from, next, mixed + b * features);
    }
    gather(mixed, features, rows, features, to);
  }

 private:
  // N vectors of features of a row, and its window moved on; windows may be one, as a step is read before the one
  // before it is written. An emptied window is null.
  template <int N>
  INLINE void mix(int64_t features, int64_t f, const T* taps, const T* newest, const T* from, T* next, T* to) const {
    constexpr int W = WIDTH<T>;
    const int64_t left = N > 1 ? N * W : features - f, last = size - 1;
    Vec<T> y[N], now[N];
    for (int n = 0; n < N; n++) {
      now[n] = load_part(newest + f + n * W, left - n * W);
      y[n] = load_part(bias + f + n * W, left - n * W) +
             load_part(taps + last * features + f + n * W, left - n * W) * now[n];
    }
    for (int64_t tap = 0; tap < last; tap++)
      for (int n = 0; n < N; n++) {
        const int64_t at = tap * features + f + n * W;
        Vec<T> past{};
        if (from) {
          past = load_part(from + at, left - n * W);
          y[n] += load_part(taps + at, left - n * W) * past;
        }
        if (tap > 0) store_part(next + at - features, past, left - n * W);
      }
    for (int n = 0; n < N; n++) {
      if (last) store_part(next + (last - 1) * features + f + n * W, now[n], left - n * W);
      store_part(to + f + n * W, silu<T>(y[n]), left - n * W);
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
