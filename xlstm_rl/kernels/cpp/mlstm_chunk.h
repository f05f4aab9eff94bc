// What the forward and the backward pass of the mLSTM share: arguments, tiles of a chunk, and its gates.
#pragma once

#include "matmul.h"
#include "parallel.h"

namespace xlstm {

constexpr int LONGEST_CHUNK = 64;
// Divisors below exp(-60) only arise from memories that hold nothing but underflow.
constexpr double LARGEST_EXPONENT = 60.0;
// The exponentials of both are zero in every precision. Sums of as many of the first as a chunk has steps stay above the
// second, which log weights never need to go below, as they only fall from step to step.
constexpr double FORGETS_ALL = -800, NEVER = -1e5;

// A [B, T, H, ...] tensor with any strides but that of the last dimension, which is one.
template <class T> struct Strided {
  const T* data;
  int64_t row, time, head;
  const T* at(int64_t b, int64_t t, int64_t h) const { return data + b * row + t * time + h * head; }
};

// Arguments of the sequence; the state is contiguous: cell [B, H, K, V], normalizer [B, H, K], stabilizer [B, H].
template <class T> struct MlstmInput {
  int64_t B, steps, H, K, V;
  Strided<T> q, k, v, input_gate, forget_gate;
  const uint8_t* reset;  // [B, T] or null
  bool exp_forget;
  const T *cell, *normalizer, *stabilizer;

  int64_t chunk() const { return std::max(K, V) <= 64 ? 32 : 64; }
  int64_t chunks() const { return (steps + chunk() - 1) / chunk(); }
  // The memory as it is kept between chunks: cell [K, padded V], normalizer [padded K], stabilizer.
  int64_t memory_size() const { return K * padded<T>(V) + padded<T>(K) + WIDTH<T>; }
  T scale() const { return T(1) / std::sqrt(T(K)); }
  bool starts(int64_t b, int64_t t) const { return reset && reset[b * steps + t]; }
};

template <class T> struct Memory {
  T *cell, *normalizer, *stabilizer;
  Memory(const MlstmInput<T>& x, T* data)
      : cell(data), normalizer(data + x.K * padded<T>(x.V)), stabilizer(normalizer + padded<T>(x.K)) {}
};

// A difference of two large sums, rounded once: adding the high parts of a row and a column cancels without error.
template <class T> struct Split {
  T high[LONGEST_CHUNK], low[LONGEST_CHUNK];
  void set(int64_t t, double value) {
    high[t] = T(value);
    low[t] = T(value - double(high[t]));
  }
};

// Weights inside one chunk of a row and head; see `_Gates` of mlstm_chunkwise.py for the same in torch.
template <class T> struct Chunk {
  int64_t start, length, width;  // width: length padded for vectors
  int64_t live;                  // steps before the first episode start, which still see the carried memory
  int64_t last;                  // first step of the episode that is running when the chunk ends
  int64_t first[LONGEST_CHUNK];  // first step in the chunk of the episode of each step
  Split<T> row, column;          // log weight of the input of step j in the memory after t: row[t] + column[j]
  T from_start[LONGEST_CHUNK];   // weight of the carried memory after step t
  T to_end[LONGEST_CHUNK];       // weight of the input of step j in the memory after the chunk
  T bound[LONGEST_CHUNK];        // least divisor
  T forget[LONGEST_CHUNK];       // forget gates before activation
  T over, stabilizer;            // weight of the carried memory after the chunk, and the stabilizer there

  void prepare(const MlstmInput<T>& x, int64_t b, int64_t h, int64_t begin, T carried) {
    start = begin;
    length = std::min(x.chunk(), x.steps - start);
    width = padded<T>(length);
    T log_forget[LONGEST_CHUNK];
    double total[LONGEST_CHUNK], input[LONGEST_CHUNK], scale[LONGEST_CHUNK];
    for (int64_t t = 0; t < width; t++) forget[t] = t < length ? *x.forget_gate.at(b, start + t, h) : T(0);
    for (int64_t t = 0; t < width; t += WIDTH<T>)
      store(log_forget + t, x.exp_forget ? load(forget + t) : log_sigmoid<T>(load(forget + t)));

    // What a step adds to the log weight of all before it is `log f + m before - m`, never positive. A step that leaves
    // nothing of the memory counts as an episode start, so that the sums stay small and gates of any size keep the
    // digits of all others. m itself may be as large as the gates and enters no sum. It is rounded at every step as in
    // the recurrence, or gates whose neighbouring numbers are further apart than one would weigh otherwise here.
    double sum = 0;
    T m = carried;
    last = 0;
    live = length;
    for (int64_t t = 0; t < length; t++) {
      const T input_gate = *x.input_gate.at(b, start + t, h);
      const bool starts = x.starts(b, start + t);
      const T decayed = log_forget[t] + (starts ? T(0) : m);
      // Maxima keep a NaN of their first argument.
      m = std::max(std::max(decayed, input_gate), T(0));
      const double kept = decayed - m;
      if (starts || kept < FORGETS_ALL) {
        live = std::min(live, t);
        last = t;
        sum = 0;
      } else {
        sum += kept;
      }
      first[t] = last;
      total[t] = sum;
      input[t] = std::max(double(input_gate - m), NEVER);
      scale[t] = m;
      row.set(t, sum);
      column.set(t, input[t] - sum);
    }
    stabilizer = m;
    for (int64_t t = 0; t < width; t++) {
      const bool carries = t < live, arrives = t >= last && t < length;
      from_start[t] = T(carries ? total[t] : NEVER);
      to_end[t] = T(arrives ? total[length - 1] - total[t] + input[t] : NEVER);
      bound[t] = T(t < length ? -std::min(scale[t], LARGEST_EXPONENT) : 0.0);
      if (t >= length) column.set(t, NEVER);
    }
    for (int64_t t = 0; t < width; t += WIDTH<T>)
      for (T* weights : {from_start, to_end, bound}) store(weights + t, exponential<T>(load(weights + t)));
    over = live == length ? T(std::exp(total[length - 1])) : T(0);
  }
};

// A tile of rows that may be read in whole vectors: the tensor itself where it allows that, or else a padded copy.
template <class T>
Rows<const T> tile(const Strided<T>& x, int64_t b, int64_t t, int64_t h, int64_t rows, int64_t columns, T* copy) {
  const T* from = x.at(b, t, h);
  if (columns % WIDTH<T> == 0) return {from, x.time};
  int64_t width = padded<T>(columns);
  for (int64_t i = 0; i < rows; i++) {
    std::memcpy(copy + i * width, from + i * x.time, columns * sizeof(T));
    std::fill(copy + i * width + columns, copy + (i + 1) * width, T(0));
  }
  return {copy, width};
}

// [columns, width] of a tile [rows, columns], zeros beyond the rows.
template <class T> void transposed_tile(Rows<const T> x, int64_t rows, int64_t columns, int64_t width, T* to) {
  if (width != rows) std::fill(to, to + columns * width, T(0));
  transpose(rows, columns, x.data, x.row, to, width);
}

// Turn products q . k [length, width] into the weights of the values, and give their sums; `factors`, if wanted, are
// what the products were multiplied with.
template <class T> void weigh(const Chunk<T>& chunk, T key_scale, T* products, T* factors, T* sums) {
  constexpr int W = WIDTH<T>;
  for (int64_t t = 0; t < chunk.length; t++) {
    T *row = products + t * chunk.width, high = chunk.row.high[t], low = chunk.row.low[t];
    Vec<T> total{};
    int64_t j = 0;
    for (; j <= t; j += W) {
      Int<T> seen = within<T>(j, chunk.first[t], t);
      Vec<T> log_weight = (load(chunk.column.high + j) + high) + (load(chunk.column.low + j) + low);
      Vec<T> factor = keep_where<T>(seen, exponential<T>(log_weight) * key_scale);
      // Beyond the diagonal the products were never computed.
      Vec<T> weight = keep_where<T>(seen, load(row + j) * factor);
      store(row + j, weight);
      if (factors) store(factors + t * chunk.width + j, factor);
      total += weight;
    }
    for (; j < chunk.width; j += W) {
      store(row + j, Vec<T>{});
      if (factors) store(factors + t * chunk.width + j, Vec<T>{});
    }
    sums[t] = sum<T>(total);
  }
}

// Queries scaled for reading the carried memory, [live, padded K]; adds what they find in the normalizer to `sums`.
template <class T>
void scale_queries(const Chunk<T>& chunk, Rows<const T> q, int64_t width, const T* normalizer, T* scaled, T* sums) {
  for (int64_t t = 0; t < chunk.live; t++) {
    Vec<T> total{};
    for (int64_t e = 0; e < width; e += WIDTH<T>) {
      Vec<T> x = load(q.data + t * q.row + e) * chunk.from_start[t];
      store(scaled + t * width + e, x);
      total += x * load(normalizer + e);
    }
    sums[t] += sum<T>(total);
  }
}

}  // namespace xlstm
