// The mLSTM backward: the chunks in reverse order, everything inside a chunk recomputed from the memory before it.
#pragma once

#include "mlstm_chunk.h"

namespace xlstm {

// Gradients by the outputs: hidden [B, T, H, V] (contiguous), cell and normalizer like the state.
template <class T> struct MlstmOuter {
  const T *hidden, *cell, *normalizer;
};
// Gradients by the inputs, all contiguous.
template <class T> struct MlstmGradient {
  T *q, *k, *v, *input_gate, *forget_gate, *cell, *normalizer;
};

// Gradients by the gates of one chunk, from those by the log weights. Every sum is of just the terms that belong to it:
// differences of running sums would leave rounding residue where an episode starts.
template <class T> struct GateGradient {
  T input[LONGEST_CHUNK], forget[LONGEST_CHUNK];

  // log_weights [length, width]: gradients by the log weight of input j after step t, zero where j > t.
  // read[t]: by the log weight of the carried memory after step t. written[t]: of the input of step t after the
  // chunk. carried: of the carried memory after the chunk.
  void collect(const Chunk<T>& chunk, const T* log_weights, const T* read, const T* written, T carried) {
    constexpr int W = WIDTH<T>;
    T later[LONGEST_CHUNK] = {};  // by j, summed over the steps from t on
    T reads = 0;
    for (int64_t t = chunk.length - 1; t >= 0; t--) {
      Vec<T> total{};
      for (int64_t j = 0; j <= t; j += W) {
        Vec<T> x = load(later + j) + load(log_weights + t * chunk.width + j);
        store(later + j, x);
        total += keep_where<T>(within<T>(j, 0, t - 1), x);
      }
      if (t < chunk.live) reads += read[t];
      forget[t] = sum<T>(total) + (t < chunk.live ? reads : T(0)) + carried;
      input[t] = later[t] + written[t];
    }
    T writes = 0;
    for (int64_t t = chunk.last; t < chunk.length; t++) {
      forget[t] += writes;
      writes += written[t];
    }
  }
};

// One row and head. The gradient by the memory travels in `d_cell` [K, padded V] and `d_normalizer` [padded K].
template <class T>
void mlstm_backward_head(const MlstmInput<T>& x, const T* hidden, const T* trace, const MlstmOuter<T>& outer,
                         const MlstmGradient<T>& gradient, int64_t u) {
  const int64_t b = u / x.H, h = u % x.H, K = x.K, V = x.V, L = x.chunk(), LW = padded<T>(L);
  const int64_t KW = padded<T>(K), VW = padded<T>(V), size = x.memory_size();
  constexpr int W = WIDTH<T>;
  const T scale = x.scale();
  Scratch<T> scratch((K + V) * LW + 3 * L * LW + 6 * L * KW + 3 * L * VW + K * VW + KW + V * KW);
  T *k_transposed = scratch.take(K * LW), *v_transposed = scratch.take(V * LW), *weights = scratch.take(L * LW);
  T *factors = scratch.take(L * LW), *d_products = scratch.take(L * LW);
  T *q_copy = scratch.take(L * KW), *k_copy = scratch.take(L * KW), *v_copy = scratch.take(L * VW);
  T *scaled_q = scratch.take(L * KW), *scaled_k = scratch.take(L * KW), *d_read = scratch.take(L * VW);
  T *d_q = scratch.take(L * KW), *d_k = scratch.take(L * KW), *d_v = scratch.take(L * VW);
  T *d_cell = scratch.take(K * VW), *d_normalizer = scratch.take(KW), *matrix_transposed = scratch.take(V * KW);
  T sums[LONGEST_CHUNK], d_sums[LONGEST_CHUNK], by_read[LONGEST_CHUNK], by_written[LONGEST_CHUNK];
  Chunk<T> chunk;
  GateGradient<T> by_gates;

  for (int64_t i = 0; i < K; i++)
    for (int64_t j = 0; j < VW; j++) d_cell[i * VW + j] = j < V ? outer.cell[(u * K + i) * V + j] : T(0);
  for (int64_t i = 0; i < KW; i++) d_normalizer[i] = i < K ? outer.normalizer[u * K + i] : T(0);
  if (KW != K) std::fill(matrix_transposed, matrix_transposed + V * KW, T(0));

  for (int64_t c = x.chunks() - 1; c >= 0; c--) {
    const int64_t start = c * L;
    Memory<T> before(x, const_cast<T*>(trace) + (u * x.chunks() + c) * size);
    chunk.prepare(x, b, h, start, *before.stabilizer);
    const int64_t n = chunk.length, live = chunk.live, last = chunk.last;
    Rows<const T> q = tile(x.q, b, start, h, n, K, q_copy), k = tile(x.k, b, start, h, n, K, k_copy);
    Rows<const T> v = tile(x.v, b, start, h, n, V, v_copy);

    // What the forward pass had.
    transposed_tile(k, n, K, chunk.width, k_transposed);
    transposed_tile(v, n, V, chunk.width, v_transposed);
    multiply<T>(n, chunk.width, K, {q.data, q.row, 1}, {k_transposed, chunk.width}, {weights, chunk.width}, false,
                Triangle::lower_result);
    weigh<T>(chunk, scale, weights, factors, sums);
    scale_queries(chunk, q, KW, before.normalizer, scaled_q, sums);

    // Through the division: by what was read, and by the sum of the weights where that was the divisor.
    for (int64_t t = 0; t < n; t++) {
      const T total = std::abs(sums[t]), factor = T(1) / std::max(total, chunk.bound[t]);
      const int64_t at = ((b * x.steps + start + t) * x.H + h) * V;
      Vec<T> product{};
      for (int64_t e = 0; e < VW; e += W) {
        Vec<T> d = load_part(outer.hidden + at + e, V - e) * factor;
        store(d_read + t * VW + e, d);
        product += d * load_part(hidden + at + e, V - e);
      }
      d_sums[t] = total > chunk.bound[t] ? (sums[t] < 0 ? sum<T>(product) : -sum<T>(product)) : T(0);
    }

    // Inside the chunk: d_products become the gradients by the products q . k, and the weights times what they
    // multiply those by the log weights, which take the place of the factors.
    multiply<T>(n, chunk.width, V, {d_read, VW, 1}, {v_transposed, chunk.width}, {d_products, chunk.width}, false,
                Triangle::lower_result);
    for (int64_t t = 0; t < n; t++) {
      int64_t j = t * chunk.width, diagonal = j + t, end = j + chunk.width;
      for (; j <= diagonal; j += W) {
        Vec<T> factor = load(factors + j);
        // Beyond the diagonal the products were never computed.
        Vec<T> d = keep_where<T>(factor != 0, load(d_products + j) + d_sums[t]);
        store(d_products + j, d * factor);
        store(factors + j, d * load(weights + j));
      }
      for (; j < end; j += W) store(d_products + j, Vec<T>{});
    }

    // Queries: from the carried memory, then from inside the chunk.
    if (live > 0) {
      transpose(K, V, before.cell, VW, matrix_transposed, KW);
      multiply<T>(live, KW, V, {d_read, VW, 1}, {matrix_transposed, KW}, {d_q, KW}, false);
    }
    for (int64_t t = 0; t < live; t++) {
      Vec<T> total{};
      for (int64_t e = 0; e < KW; e += W) {
        Vec<T> d = (load(d_q + t * KW + e) + load(before.normalizer + e) * d_sums[t]) * chunk.from_start[t];
        store(d_q + t * KW + e, d);
        total += d * load(q.data + t * q.row + e);
      }
      by_read[t] = sum<T>(total);
    }
    std::fill(d_q + live * KW, d_q + n * KW, T(0));
    multiply<T>(n, KW, n, {d_products, chunk.width, 1}, k, {d_q, KW}, true, Triangle::lower_left);

    // Keys and values: from the memory after the chunk, then from inside the chunk.
    transpose(K, V, d_cell, VW, matrix_transposed, KW);
    std::fill(d_k, d_k + last * KW, T(0));
    std::fill(d_v, d_v + last * VW, T(0));
    std::fill(by_written, by_written + last, T(0));
    multiply<T>(n - last, KW, V, {v.data + last * v.row, v.row, 1}, {matrix_transposed, KW}, {d_k + last * KW, KW},
                false);
    for (int64_t t = last; t < n; t++) {
      Vec<T> total{};
      const T weight = chunk.to_end[t] * scale;
      for (int64_t e = 0; e < KW; e += W) {
        Vec<T> key = load(k.data + t * k.row + e);
        Vec<T> d = (load(d_k + t * KW + e) + load(d_normalizer + e)) * weight;
        store(d_k + t * KW + e, d);
        store(scaled_k + t * KW + e, key * weight);
        total += d * key;
      }
      by_written[t] = sum<T>(total);
    }
    multiply<T>(n - last, VW, K, {scaled_k + last * KW, KW, 1}, {d_cell, VW}, {d_v + last * VW, VW}, false);
    multiply<T>(n, KW, n, {d_products, 1, chunk.width}, q, {d_k, KW}, true, Triangle::upper_left);
    multiply<T>(n, VW, n, {weights, 1, chunk.width}, {d_read, VW}, {d_v, VW}, true, Triangle::upper_left);

    // The memory before the chunk.
    T carried = 0;
    if (chunk.over != 0)
      carried = chunk.over * (dot(before.cell, d_cell, K * VW) + dot(before.normalizer, d_normalizer, KW));
    for (int64_t e = 0; e < K * VW; e += W) store(d_cell + e, load(d_cell + e) * chunk.over);
    for (int64_t e = 0; e < KW; e += W) store(d_normalizer + e, load(d_normalizer + e) * chunk.over);
    multiply<T>(K, VW, live, {scaled_q, 1, KW}, {d_read, VW}, {d_cell, VW}, true);
    for (int64_t t = 0; t < live; t++)
      for (int64_t e = 0; e < KW; e += W)
        store(d_normalizer + e, load(d_normalizer + e) + load(scaled_q + t * KW + e) * d_sums[t]);

    by_gates.collect(chunk, factors, by_read, by_written, carried);
    if (!x.exp_forget)
      // d log f / d gate = sigmoid(-gate)
      for (int64_t t = 0; t < n; t += W)
        store(by_gates.forget + t, load(by_gates.forget + t) * sigmoid<T>(-load(chunk.forget + t)));
    for (int64_t t = 0; t < n; t++) {
      const int64_t at = (b * x.steps + start + t) * x.H + h;
      gradient.input_gate[at] = by_gates.input[t];
      gradient.forget_gate[at] = x.starts(b, start + t) ? T(0) : by_gates.forget[t];
      for (int64_t e = 0; e < K; e += W) {
        store_part(gradient.q + at * K + e, load(d_q + t * KW + e), K - e);
        store_part(gradient.k + at * K + e, load(d_k + t * KW + e), K - e);
      }
      for (int64_t e = 0; e < V; e += W) store_part(gradient.v + at * V + e, load(d_v + t * VW + e), V - e);
    }
  }
  for (int64_t i = 0; i < K; i++) std::memcpy(gradient.cell + (u * K + i) * V, d_cell + i * VW, V * sizeof(T));
  std::memcpy(gradient.normalizer + u * K, d_normalizer, K * sizeof(T));
}

template <class T>
void mlstm_backward(const MlstmInput<T>& x, const T* hidden, const T* trace, const MlstmOuter<T>& outer,
                    const MlstmGradient<T>& gradient, int64_t threads) {
  for_each(x.B * x.H, threads, [&](int64_t u) { mlstm_backward_head(x, hidden, trace, outer, gradient, u); });
}

}  // namespace xlstm
