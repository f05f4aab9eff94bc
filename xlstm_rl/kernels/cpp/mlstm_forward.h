// The mLSTM forward: a sequence in chunks, and the single step.
#pragma once

#include "mlstm_chunk.h"

namespace xlstm {

// The state after the last step, contiguous like the one before the first, and hidden [B, T, H, V].
template <class T> struct MlstmOutput {
  T *hidden, *cell, *normalizer, *stabilizer;
};

template <class T> INLINE T scalar_log_sigmoid(T x) { return std::min(x, T(0)) - std::log1p(std::exp(-std::abs(x))); }

// N vectors of columns of the memory, updated and read in one pass over its rows; the last of them may be a part if
// not WHOLE. An emptied memory, KEPT false, is not read: it may hold anything.
template <class T, int N, bool WHOLE, bool KEPT>
INLINE void step_columns(int64_t K, int64_t V, int64_t column, const T* q, const T* write, const T* v, T forget,
                         T divisor, const T* before, T* after, T* hidden) {
  constexpr int W = WIDTH<T>;
  const int64_t left = WHOLE ? N * W : V - column;
  // Rows take turns at two sums, or each addition would wait for the one before.
  Vec<T> value[N], read[2][N] = {};
  for (int n = 0; n < N; n++) value[n] = load_part(v + column + n * W, left - n * W);
  auto add_row = [&](int64_t i, Vec<T>* sums) __attribute__((always_inline)) {
    for (int n = 0; n < N; n++) {
      const int64_t at = i * V + column + n * W;
      Vec<T> updated = write[i] * value[n];
      if (KEPT) updated += forget * load_part(before + at, left - n * W);
      store_part(after + at, updated, left - n * W);
      sums[n] += q[i] * updated;
    }
  };
  int64_t i = 0;
  for (; i + 2 <= K; i += 2) {
    add_row(i, read[0]);
    add_row(i + 1, read[1]);
  }
  if (i < K) add_row(i, read[0]);
  for (int n = 0; n < N; n++)
    store_part(hidden + column + n * W, (read[0][n] + read[1][n]) / divisor, left - n * W);
}

template <class T, bool KEPT>
void step_memory(int64_t K, int64_t V, const T* q, const T* write, const T* v, T forget, T divisor, const T* before,
                 T* after, T* hidden) {
  constexpr int W = WIDTH<T>;
  int64_t j = 0;
  for (; j + 4 * W <= V; j += 4 * W)
    step_columns<T, 4, true, KEPT>(K, V, j, q, write, v, forget, divisor, before, after, hidden);
  for (; j + 2 * W <= V; j += 2 * W)
    step_columns<T, 2, true, KEPT>(K, V, j, q, write, v, forget, divisor, before, after, hidden);
  for (; j < V; j += W)
    step_columns<T, 1, false, KEPT>(K, V, j, q, write, v, forget, divisor, before, after, hidden);
}

// What the gates of a step come to: weights of the memory before it and of its input, and the least divisor.
template <class T> struct StepWeights {
  T forget, input, bound;
};

template <class T>
StepWeights<T> weigh_step(T input_gate, T forget_gate, bool exp_forget, bool starts, T stabilizer, T* new_stabilizer) {
  const T log_forget = exp_forget ? forget_gate : scalar_log_sigmoid(forget_gate);
  const T decayed = log_forget + (starts ? T(0) : stabilizer);
  const T m = *new_stabilizer = std::max(std::max(decayed, input_gate), T(0));
  return {starts ? T(0) : std::exp(decayed - m), std::exp(input_gate - m), std::exp(-std::min(m, T(LARGEST_EXPONENT)))};
}

// One step of one row and head; q, k [K], v [V], the state of that row and head; `write` is room for K numbers.
template <class T>
void mlstm_step(int64_t K, int64_t V, const T* q, const T* k, const T* v, StepWeights<T> weights, const T* cell,
                const T* normalizer, T* write, T* hidden, T* new_cell, T* new_normalizer) {
  constexpr int W = WIDTH<T>;
  const T forget = weights.forget, input = weights.input / std::sqrt(T(K));
  Vec<T> total{};
  for (int64_t i = 0; i < K; i += W) {
    Vec<T> written = input * load_part(k + i, K - i), updated = written;
    // An emptied memory is not read: it may hold anything.
    if (forget != 0) updated += forget * load_part(normalizer + i, K - i);
    store_part(write + i, written, K - i);
    store_part(new_normalizer + i, updated, K - i);
    total += updated * load_part(q + i, K - i);
  }
  const T divisor = std::max(std::abs(sum<T>(total)), weights.bound);
  auto step = forget != 0 ? step_memory<T, true> : step_memory<T, false>;
  step(K, V, q, write, v, forget, divisor, cell, new_cell, hidden);
}

// One row and head of a sequence. `trace`, if wanted, receives the memory before every chunk, for the backward pass.
template <class T> void mlstm_forward_head(const MlstmInput<T>& x, const MlstmOutput<T>& out, T* trace, int64_t u) {
  const int64_t b = u / x.H, h = u % x.H, K = x.K, V = x.V, L = x.chunk(), LW = padded<T>(L);
  const int64_t KW = padded<T>(K), VW = padded<T>(V), size = x.memory_size();
  constexpr int W = WIDTH<T>;
  const T scale = x.scale();
  Scratch<T> scratch(K * LW + L * LW + 3 * L * KW + 2 * L * VW + 2 * size);
  T *k_transposed = scratch.take(K * LW), *weights = scratch.take(L * LW), *scaled = scratch.take(L * KW);
  T *q_copy = scratch.take(L * KW), *k_copy = scratch.take(L * KW), *v_copy = scratch.take(L * VW);
  T *read = scratch.take(L * VW), *finish = scratch.take(size), *here = scratch.take(size);
  if (trace) here = trace + u * x.chunks() * size;
  T sums[LONGEST_CHUNK];
  Chunk<T> chunk;

  {
    Memory<T> initial(x, here);
    for (int64_t i = 0; i < K; i++)
      for (int64_t j = 0; j < VW; j++) initial.cell[i * VW + j] = j < V ? x.cell[(u * K + i) * V + j] : T(0);
    for (int64_t i = 0; i < KW; i++) initial.normalizer[i] = i < K ? x.normalizer[u * K + i] : T(0);
    *initial.stabilizer = x.stabilizer[u];
  }
  for (int64_t start = 0; start < x.steps; start += L) {
    // With a trace the memory moves on to the next chunk's place, without it is updated where it is.
    const bool ends = start + L >= x.steps;
    Memory<T> before(x, here), after(x, ends ? finish : trace ? here + size : here);
    chunk.prepare(x, b, h, start, *before.stabilizer);
    const int64_t n = chunk.length;
    Rows<const T> q = tile(x.q, b, start, h, n, K, q_copy), k = tile(x.k, b, start, h, n, K, k_copy);
    Rows<const T> v = tile(x.v, b, start, h, n, V, v_copy);

    transposed_tile(k, n, K, chunk.width, k_transposed);
    multiply<T>(n, chunk.width, K, {q.data, q.row, 1}, {k_transposed, chunk.width}, {weights, chunk.width}, false,
                Triangle::lower_result);
    weigh<T>(chunk, scale, weights, nullptr, sums);
    multiply<T>(n, VW, n, {weights, chunk.width, 1}, v, {read, VW}, false, Triangle::lower_left);
    scale_queries(chunk, q, KW, before.normalizer, scaled, sums);
    multiply<T>(chunk.live, VW, K, {scaled, KW, 1}, {before.cell, VW}, {read, VW}, true);
    for (int64_t t = 0; t < n; t++) {
      T factor = T(1) / std::max(std::abs(sums[t]), chunk.bound[t]);
      T* hidden = out.hidden + ((b * x.steps + start + t) * x.H + h) * V;
      for (int64_t e = 0; e < V; e += W) store_part(hidden + e, load(read + t * VW + e) * factor, V - e);
    }

    // An emptied memory is not read: it may hold anything.
    const bool kept = chunk.over != 0;
    for (int64_t e = 0; e < K * VW; e += W)
      store(after.cell + e, kept ? load(before.cell + e) * chunk.over : Vec<T>{});
    for (int64_t e = 0; e < KW; e += W)
      store(after.normalizer + e, kept ? load(before.normalizer + e) * chunk.over : Vec<T>{});
    for (int64_t t = chunk.last; t < n; t++)
      for (int64_t e = 0; e < KW; e += W) {
        Vec<T> key = load(k.data + t * k.row + e) * (chunk.to_end[t] * scale);
        store(scaled + t * KW + e, key);
        store(after.normalizer + e, load(after.normalizer + e) + key);
      }
    multiply<T>(K, VW, n - chunk.last, {scaled + chunk.last * KW, 1, KW}, {v.data + chunk.last * v.row, v.row},
                {after.cell, VW}, true);
    *after.stabilizer = chunk.stabilizer;
    here = after.cell;
  }
  Memory<T> final(x, finish);
  for (int64_t i = 0; i < K; i++) std::memcpy(out.cell + (u * K + i) * V, final.cell + i * VW, V * sizeof(T));
  std::memcpy(out.normalizer + u * K, final.normalizer, K * sizeof(T));
  out.stabilizer[u] = *final.stabilizer;
}

// A sequence of at least one step.
template <class T>
void mlstm_forward(const MlstmInput<T>& x, const MlstmOutput<T>& out, T* trace, int64_t threads) {
  if (x.steps > 1 || trace)
    return for_each(x.B * x.H, threads, [&](int64_t u) { mlstm_forward_head(x, out, trace, u); });
  for_each(x.B * x.H, threads, [&](int64_t u) {
    const int64_t b = u / x.H, h = u % x.H, K = x.K, V = x.V;
    Scratch<T> scratch(K);
    const StepWeights<T> weights = weigh_step(*x.input_gate.at(b, 0, h), *x.forget_gate.at(b, 0, h), x.exp_forget,
                                              x.starts(b, 0), x.stabilizer[u], out.stabilizer + u);
    mlstm_step(K, V, x.q.at(b, 0, h), x.k.at(b, 0, h), x.v.at(b, 0, h), weights, x.cell + u * K * V,
               x.normalizer + u * K, scratch.take(K), out.hidden + u * V, out.cell + u * K * V,
               out.normalizer + u * K);
  });
}

}  // namespace xlstm
