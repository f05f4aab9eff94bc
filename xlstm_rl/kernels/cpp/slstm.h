// The sLSTM as a scan over time, forward and backward; a task is a head and some of the rows.
#pragma once

#include <limits>

#include "matmul.h"
#include "parallel.h"

namespace xlstm {

// Arguments of the sequence. gates and d_gates are [B, T, 4, H, D] with any strides but that of the last dimension,
// recurrent is [4, H, D (out), D (in)], the state [B, H, D] each, the latter contiguous.
template <class T> struct SlstmInput {
  int64_t B, steps, H, D;
  const T* gates;
  int64_t row, time, gate, head;  // strides of gates
  const T* recurrent;
  const uint8_t* reset;  // [B, T] or null
  bool exp_forget;
  const T *cell, *normalizer, *hidden, *stabilizer;

  bool starts(int64_t b, int64_t t) const { return reset && reset[b * steps + t]; }
  const T* gates_at(int64_t b, int64_t t, int64_t h) const { return gates + b * row + t * time + h * head; }
};

// All contiguous; output [B, T, H, D], the rest like the state.
template <class T> struct SlstmOutput {
  T *output, *cell, *normalizer, *hidden, *stabilizer;
};

// Numbers per unit and step that the backward pass needs, laid out [H, T, B, field, padded D].
enum Field { WRITE, FORGET, FORGET_SLOPE, CELL_INPUT, OUTPUT_GATE, CELL, NORMALIZER, FIELDS };

// The elementwise part of a step.
template <class T> struct SlstmUnit {
  Vec<T> cell, normalizer, stabilizer, hidden, write, forget, forget_slope, cell_input, output_gate;

  // cell, normalizer and stabilizer are those before the step; empty units have the stabilizer minus infinity.
  INLINE void step(Vec<T> i, Vec<T> f, Vec<T> z, Vec<T> o, bool exp_forget) {
    // Divisions take longest, so two quotients share one: 1 / a = b / (a b).
    Vec<T> small = exponential<T>(-magnitude<T>(f)), one_more = T(1) + small, two_more = T(2) + small;
    Vec<T> inverse = T(1) / (one_more * two_more);
    Vec<T> log_forget = smaller(f, fill(T(0))) - log1p_series<T>(small * one_more * inverse);
    Vec<T> decayed = (exp_forget ? f : log_forget) + stabilizer;
    stabilizer = larger(decayed, i);
    write = exponential<T>(i - stabilizer);
    forget = exponential<T>(decayed - stabilizer);
    cell_input = hyperbolic_tangent<T>(z);
    // d log f / d gate = sigmoid(-gate)
    Vec<T> slope = (f > 0 ? small : fill(T(1))) * two_more * inverse;
    forget_slope = exp_forget ? forget : forget * slope;
    cell = forget * cell + write * cell_input;
    normalizer = forget * normalizer + write;
    inverse = T(1) / ((T(1) + exponential<T>(-o)) * normalizer);
    output_gate = normalizer * inverse;
    hidden = cell * inverse;
  }
};

// Heads are split into parts of the rows until every thread has the same number of tasks.
inline int64_t parts_of_rows(int64_t B, int64_t H, int64_t threads) {
  int64_t parts = 1;
  while (parts < threads && H * parts % threads) parts++;
  return std::max<int64_t>(1, std::min(parts, B));
}

// [D (in), 4 * padded D (out)] of one head, so that a row of hidden times it gives all four gates.
template <class T> void pack_recurrent(const SlstmInput<T>& x, int64_t h, T* packed) {
  const int64_t D = x.D, DW = padded<T>(D);
  if (DW != D) std::fill(packed, packed + D * 4 * DW, T(0));
  for (int64_t a = 0; a < 4; a++) transpose(D, D, x.recurrent + (a * x.H + h) * D * D, D, packed + a * DW, 4 * DW);
}

template <class T> void copy_units(const T* from, int64_t D, T* to) {
  std::memcpy(to, from, D * sizeof(T));
  std::fill(to + D, to + padded<T>(D), T(0));
}

template <class T, bool TRACE>
void slstm_forward_part(const SlstmInput<T>& x, const SlstmOutput<T>& out, T* trace, int64_t h, int64_t begin,
                        int64_t end) {
  const int64_t B = x.B, H = x.H, D = x.D, DW = padded<T>(D), rows = end - begin;
  constexpr int W = WIDTH<T>;
  Scratch<T> scratch(D * 4 * DW + rows * 8 * DW);
  T *recurrent = scratch.take(D * 4 * DW), *feedback = scratch.take(rows * 4 * DW), *cell = scratch.take(rows * DW);
  T *normalizer = scratch.take(rows * DW), *hidden = scratch.take(rows * DW), *stabilizer = scratch.take(rows * DW);
  const Vec<T> empty = fill(-std::numeric_limits<T>::infinity());
  pack_recurrent(x, h, recurrent);
  for (int64_t b = 0; b < rows; b++) {
    const int64_t from = ((begin + b) * H + h) * D, to = b * DW;
    copy_units(x.cell + from, D, cell + to);
    copy_units(x.normalizer + from, D, normalizer + to);
    copy_units(x.hidden + from, D, hidden + to);
    copy_units(x.stabilizer + from, D, stabilizer + to);
    for (int64_t e = to; e < to + DW; e += W)
      store(stabilizer + e, load(normalizer + e) == 0 ? empty : load(stabilizer + e));
  }
  for (int64_t t = 0; t < x.steps; t++) {
    for (int64_t b = 0; b < rows; b++)
      if (x.starts(begin + b, t))
        for (int64_t e = b * DW; e < (b + 1) * DW; e += W) {
          for (T* leaf : {cell, normalizer, hidden}) store(leaf + e, Vec<T>{});
          store(stabilizer + e, empty);
        }
    multiply<T>(rows, 4 * DW, D, {hidden, DW, 1}, {recurrent, 4 * DW}, {feedback, 4 * DW}, false);
    for (int64_t b = 0; b < rows; b++) {
      const T *gates = x.gates_at(begin + b, t, h), *fed = feedback + b * 4 * DW;
      T* output = out.output + (((begin + b) * x.steps + t) * H + h) * D;
      T* kept = TRACE ? trace + ((h * x.steps + t) * B + begin + b) * FIELDS * DW : nullptr;
      for (int64_t e = 0; e < D; e += W) {
        const int64_t at = b * DW + e;
        Vec<T> gate[4];
        for (int a = 0; a < 4; a++) gate[a] = load_part(gates + a * x.gate + e, D - e) + load(fed + a * DW + e);
        SlstmUnit<T> unit;
        unit.cell = load(cell + at);
        unit.normalizer = load(normalizer + at);
        unit.stabilizer = load(stabilizer + at);
        unit.step(gate[0], gate[1], gate[2], gate[3], x.exp_forget);
        store(cell + at, unit.cell);
        store(normalizer + at, unit.normalizer);
        store(stabilizer + at, unit.stabilizer);
        store(hidden + at, unit.hidden);
        store_part(output + e, unit.hidden, D - e);
        if (TRACE) {
          store(kept + WRITE * DW + e, unit.write);
          store(kept + FORGET * DW + e, unit.forget);
          store(kept + FORGET_SLOPE * DW + e, unit.forget_slope);
          store(kept + CELL_INPUT * DW + e, unit.cell_input);
          store(kept + OUTPUT_GATE * DW + e, unit.output_gate);
          store(kept + CELL * DW + e, unit.cell);
          store(kept + NORMALIZER * DW + e, unit.normalizer);
        }
      }
    }
  }
  for (int64_t b = 0; b < rows; b++) {
    const int64_t to = ((begin + b) * H + h) * D, from = b * DW;
    std::memcpy(out.cell + to, cell + from, D * sizeof(T));
    std::memcpy(out.normalizer + to, normalizer + from, D * sizeof(T));
    std::memcpy(out.hidden + to, hidden + from, D * sizeof(T));
    std::memcpy(out.stabilizer + to, stabilizer + from, D * sizeof(T));
  }
}

// A sequence of at least one step; `trace`, if wanted, is for the backward pass.
template <class T>
void slstm_forward(const SlstmInput<T>& x, const SlstmOutput<T>& out, T* trace, int64_t threads) {
  const int64_t parts = parts_of_rows(x.B, x.H, threads);
  for_each(x.H * parts, threads, [&](int64_t u) {
    const int64_t h = u / parts, begin = x.B * (u % parts) / parts, end = x.B * (u % parts + 1) / parts;
    if (trace)
      slstm_forward_part<T, true>(x, out, trace, h, begin, end);
    else
      slstm_forward_part<T, false>(x, out, nullptr, h, begin, end);
  });
}

// Gradients by the outputs, contiguous.
template <class T> struct SlstmOuter {
  const T *output, *cell, *normalizer, *hidden;
};
// Gradients by the inputs; those by the gates have the strides of the gates, the rest is contiguous.
template <class T> struct SlstmGradient {
  T *gates, *recurrent, *cell, *normalizer, *hidden;
};

// `d_recurrent` [D (in), 4 * padded D] is that of these rows alone.
template <class T>
void slstm_backward_part(const SlstmInput<T>& x, const T* output, const T* trace, const SlstmOuter<T>& outer,
                         const SlstmGradient<T>& gradient, T* d_recurrent, int64_t h, int64_t begin, int64_t end) {
  const int64_t B = x.B, H = x.H, D = x.D, DW = padded<T>(D), rows = end - begin;
  constexpr int W = WIDTH<T>;
  // The product for the recurrent weights waits until there are enough steps to make it worth while.
  const int64_t batch = std::max<int64_t>(1, 128 / std::max<int64_t>(rows, 1));
  Scratch<T> scratch(8 * D * DW + 4 * DW * DW + rows * 5 * DW + batch * rows * 5 * DW + DW);
  T *packed = scratch.take(D * 4 * DW), *recurrent = scratch.take(4 * DW * DW), *zeros = scratch.take(DW);
  T *d_cell = scratch.take(rows * DW), *d_normalizer = scratch.take(rows * DW), *d_hidden = scratch.take(rows * DW);
  T *d_gates = scratch.take(batch * rows * 4 * DW), *hiddens = scratch.take(batch * rows * DW);
  T *cells = scratch.take(DW), *normalizers = scratch.take(DW);
  std::fill(zeros, zeros + DW, T(0));
  std::fill(d_recurrent, d_recurrent + D * 4 * DW, T(0));
  pack_recurrent(x, h, packed);
  std::fill(recurrent, recurrent + 4 * DW * DW, T(0));
  transpose(D, 4 * DW, packed, 4 * DW, recurrent, DW);
  for (int64_t b = 0; b < rows; b++) {
    const int64_t from = ((begin + b) * H + h) * D, to = b * DW;
    copy_units(outer.cell + from, D, d_cell + to);
    copy_units(outer.normalizer + from, D, d_normalizer + to);
    copy_units(outer.hidden + from, D, d_hidden + to);
  }
  int64_t waiting = 0;
  for (int64_t t = x.steps - 1; t >= 0; t--) {
    T *d_gates_now = d_gates + waiting * rows * 4 * DW, *hiddens_now = hiddens + waiting * rows * DW;
    for (int64_t b = 0; b < rows; b++) {
      const int64_t row = begin + b, initial = (row * H + h) * D;
      const T *now = trace + ((h * x.steps + t) * B + row) * FIELDS * DW, *past = now - B * FIELDS * DW;
      const T *cell = past + CELL * DW, *normalizer = past + NORMALIZER * DW;
      const T* hidden = output + ((row * x.steps + t - 1) * H + h) * D;
      if (x.starts(row, t)) {
        cell = normalizer = hidden = zeros;
      } else if (t == 0) {
        copy_units(x.cell + initial, D, cells);
        copy_units(x.normalizer + initial, D, normalizers);
        cell = cells;
        normalizer = normalizers;
        hidden = x.hidden + initial;
      }
      const T* d_output = outer.output + ((row * x.steps + t) * H + h) * D;
      T* d_gate = gradient.gates + (x.gates_at(row, t, h) - x.gates);
      for (int64_t e = 0; e < D; e += W) {
        const int64_t at = b * DW + e;
        Vec<T> write = load(now + WRITE * DW + e), z = load(now + CELL_INPUT * DW + e);
        Vec<T> o = load(now + OUTPUT_GATE * DW + e), forget = load(now + FORGET * DW + e);
        Vec<T> by_output = load_part(d_output + e, D - e) + load(d_hidden + at);
        Vec<T> inverse = T(1) / load(now + NORMALIZER * DW + e), ratio = load(now + CELL * DW + e) * inverse;
        Vec<T> through = by_output * o * inverse;
        Vec<T> by_cell = load(d_cell + at) + through, by_normalizer = load(d_normalizer + at) - through * ratio;
        Vec<T> d[4];
        d[0] = (by_cell * z + by_normalizer) * write;
        d[1] = (by_cell * load(cell + e) + by_normalizer * load(normalizer + e)) * load(now + FORGET_SLOPE * DW + e);
        d[2] = by_cell * write * (T(1) - z * z);
        d[3] = by_output * ratio * o * (T(1) - o);
        // The forget factor of an emptied unit is zero: nothing crosses an episode start.
        store(d_cell + at, by_cell * forget);
        store(d_normalizer + at, by_normalizer * forget);
        for (int a = 0; a < 4; a++) {
          store(d_gates_now + (b * 4 + a) * DW + e, d[a]);
          store_part(d_gate + a * x.gate + e, d[a], D - e);
        }
        store(hiddens_now + at, load_part(hidden + e, D - e));
      }
    }
    multiply<T>(rows, DW, 4 * DW, {d_gates_now, 4 * DW, 1}, {recurrent, DW}, {d_hidden, DW}, false);
    for (int64_t b = 0; b < rows; b++)
      if (x.starts(begin + b, t)) std::fill(d_hidden + b * DW, d_hidden + (b + 1) * DW, T(0));
    if (++waiting == batch || t == 0) {
      multiply<T>(D, 4 * DW, waiting * rows, {hiddens, 1, DW}, {d_gates, 4 * DW}, {d_recurrent, 4 * DW}, true);
      waiting = 0;
    }
  }
  for (int64_t b = 0; b < rows; b++) {
    const int64_t to = ((begin + b) * H + h) * D, from = b * DW;
    std::memcpy(gradient.cell + to, d_cell + from, D * sizeof(T));
    std::memcpy(gradient.normalizer + to, d_normalizer + from, D * sizeof(T));
    std::memcpy(gradient.hidden + to, d_hidden + from, D * sizeof(T));
  }
}

template <class T>
void slstm_backward(const SlstmInput<T>& x, const T* output, const T* trace, const SlstmOuter<T>& outer,
                    const SlstmGradient<T>& gradient, int64_t threads) {
  const int64_t parts = parts_of_rows(x.B, x.H, threads), D = x.D, DW = padded<T>(D), size = D * 4 * DW;
  std::vector<T> d_recurrent(x.H * parts * size);
  for_each(x.H * parts, threads, [&](int64_t u) {
    const int64_t h = u / parts, begin = x.B * (u % parts) / parts, end = x.B * (u % parts + 1) / parts;
    slstm_backward_part(x, output, trace, outer, gradient, d_recurrent.data() + u * size, h, begin, end);
  });
  // Always in the same order, so that a run can be repeated to the last bit.
  for (int64_t h = 0; h < x.H; h++) {
    T* total = d_recurrent.data() + h * parts * size;
    for (int64_t e = size; e < parts * size; e++) total[e % size] += total[e];
    for (int64_t a = 0; a < 4; a++)
      transpose(D, D, total + a * DW, 4 * DW, gradient.recurrent + (a * x.H + h) * D * D, D);
  }
}

}  // namespace xlstm
