// One step of a whole mLSTM or sLSTM block, for acting; the modules in xlstm_rl/memory say what a block is.
#pragma once

#include <limits>

#include "block_layers.h"
#include "mlstm_forward.h"
#include "slstm.h"
#include "tensors.h"

namespace xlstm {

// A step of a block; Plan holds what stays the same from step to step, and the weights.
template <class T, class Plan> struct BlockStep {
  Plan plan;
  int64_t B;
  const T* x;  // [B, D]
  typename Plan::template State<const T> state;
  const uint8_t* reset;  // [B] or null
  T* y;                  // [B, D]
  typename Plan::template State<T> new_state;
};

// All fields eight bytes wide, as kernels/cpp_blocks.py packs them.
struct MlstmConstants {
  int64_t D, inner, H, group, taps;  // group: block size of the projections to q, k, v; taps: zero for no convolution
  double epsilon, soft_cap;          // soft_cap: zero for none
  int64_t exp_forget, sigmoid_input;
};
// As the modules hold them; a bias may be null.
template <class T> struct MlstmWeights {
  const T *norm, *up, *up_bias, *conv, *conv_bias, *query_key, *query_key_bias, *value, *value_bias, *gates, *gates_bias;
  const T *head_norm, *skip, *down, *down_bias;
};
template <class T> struct MlstmPlan : MlstmConstants, MlstmWeights<T> {
  using Constants = MlstmConstants;
  using Weights = MlstmWeights<T>;
  template <class Leaf> struct State { Leaf *cell, *normalizer, *stabilizer, *window; };
};
template <class T> using MlstmBlock = BlockStep<T, MlstmPlan<T>>;

// Turn input and forget gates [2 H] into the weights of `StepWeights` forget, input and bound [3 H].
template <class T>
void weigh_steps(const MlstmBlock<T>& block, int64_t begin, int64_t rows, Features<T> gates, Features<T> stabilizer,
                 Features<T> weights) {
  const MlstmPlan<T>& plan = block.plan;
  const int64_t H = plan.H;
  gather(block.state.stabilizer + begin * H, H, rows, H, stabilizer);
  const Vec<T> zero{};
  for (int64_t h = 0; h < H; h++)
    for (int64_t b = 0; b < gates.width; b += WIDTH<T>) {
      Int<T> starts{};
      for (int e = 0; e < WIDTH<T> && b + e < rows; e++) starts[e] = block.reset && block.reset[begin + b + e] ? -1 : 0;
      Vec<T> f = load(gates.at(H + h).data + b), i = load(gates.at(h).data + b), m = load(stabilizer.at(h).data + b);
      Vec<T> decayed = (plan.exp_forget ? f : log_sigmoid<T>(f)) + (starts ? zero : m);
      m = larger(larger(decayed, i), zero);
      store(stabilizer.at(h).data + b, m);
      store(weights.at(h).data + b, starts ? zero : exponential<T>(decayed - m));
      store(weights.at(H + h).data + b, exponential<T>(i - m));
      store(weights.at(2 * H + h).data + b, exponential<T>(-smaller(m, fill(T(LARGEST_EXPONENT)))));
    }
  scatter(stabilizer, rows, H, block.new_state.stabilizer + begin * H, H);
}

template <class T> void mlstm_block_rows(const MlstmBlock<T>& block, int64_t begin, int64_t rows, int64_t width) {
  const MlstmPlan<T>& plan = block.plan;
  const Convolution<T> convolution{plan.taps, plan.conv, plan.conv_bias, block.state.window, block.new_state.window};
  const int64_t D = plan.D, N = plan.inner, H = plan.H, K = N / H;
  Scratch<T> scratch((2 * D + 7 * N + 6 * H) * width + rows * 4 * N + K + convolution.room(rows, N));
  Features<T> x{scratch.take(D * width), width}, normed{scratch.take(D * width), width};
  Features<T> inner{scratch.take(2 * N * width), width}, mixed{scratch.take(N * width), width};
  Features<T> projected{scratch.take(3 * N * width), width}, hidden{scratch.take(N * width), width};
  Features<T> gates{scratch.take(2 * H * width), width};
  Features<T> stabilizer{scratch.take(H * width), width}, weights{scratch.take(3 * H * width), width};
  T *by_row = scratch.take(rows * 3 * N), *hidden_by_row = scratch.take(rows * N), *write = scratch.take(K);

  gather(block.x + begin * D, D, rows, D, x);
  layer_norm(x, plan.norm, T(plan.epsilon), D, normed);
  linear(plan.up, plan.up_bias, 2 * N, D, normed, inner);
  convolution.step(begin, rows, N, block.reset, inner, scratch, mixed);
  project_groups(plan.query_key, plan.query_key_bias, N, plan.group, 2, mixed, projected);
  project_groups(plan.value, plan.value_bias, N, plan.group, 1, inner, projected.at(2 * N));
  linear(plan.gates, plan.gates_bias, 2 * H, 3 * N, projected, gates);
  cap_gates(gates, 2 * H, plan.soft_cap);
  if (plan.sigmoid_input) take_log_sigmoid(gates, H);

  weigh_steps(block, begin, rows, gates, stabilizer, weights);
  scatter(projected, rows, 3 * N, by_row, 3 * N);
  for (int64_t b = 0; b < rows; b++)
    for (int64_t h = 0; h < H; h++) {
      const int64_t u = (begin + b) * H + h;
      const T* q = by_row + b * 3 * N + h * K;
      const StepWeights<T> step{weights.at(h).data[b], weights.at(H + h).data[b], weights.at(2 * H + h).data[b]};
      mlstm_step<T>(K, K, q, q + N, q + 2 * N, step, block.state.cell + u * K * K, block.state.normalizer + u * K,
                    write, hidden_by_row + b * N + h * K, block.new_state.cell + u * K * K,
                    block.new_state.normalizer + u * K);
    }
  gather(hidden_by_row, N, rows, N, hidden);
  for (int64_t h = 0; h < H; h++)
    layer_norm(hidden.at(h * K), plan.head_norm + h * K, T(plan.epsilon), K, hidden.at(h * K));
  transform(hidden, N, [&](Vec<T> y, int64_t f, int64_t b) {
    Vec<T> open = silu<T>(load(inner.at(N + f).data + b));
    return (y + plan.skip[f] * load(mixed.at(f).data + b)) * open;
  });
  linear(plan.down, plan.down_bias, D, N, hidden, x, true);
  scatter(x, rows, D, block.y + begin * D, D);
}

template <class T> void step_block(const MlstmBlock<T>& block, int64_t threads) {
  for_rows<T>(block.B, threads, [&](int64_t begin, int64_t rows, int64_t width) {
    mlstm_block_rows(block, begin, rows, width);
  });
}

// As above; `ffn` zero means that there is no feed-forward network.
struct SlstmConstants {
  int64_t D, H, ffn, taps;
  double epsilon;
  int64_t exp_forget;
};
template <class T> struct SlstmWeights {
  const T *norm, *conv, *conv_bias, *input_forget, *cell_output, *gate_bias, *recurrent, *head_norm;
  const T *ffn_norm, *ffn_up, *ffn_up_bias, *ffn_down, *ffn_down_bias;
};
template <class T> struct SlstmPlan : SlstmConstants, SlstmWeights<T> {
  using Constants = SlstmConstants;
  using Weights = SlstmWeights<T>;
  template <class Leaf> struct State { Leaf *cell, *normalizer, *hidden, *stabilizer, *window; };
};
template <class T> using SlstmBlock = BlockStep<T, SlstmPlan<T>>;

template <class T> void slstm_block_rows(const SlstmBlock<T>& block, int64_t begin, int64_t rows, int64_t width) {
  const SlstmPlan<T>& plan = block.plan;
  const Convolution<T> convolution{plan.taps, plan.conv, plan.conv_bias, block.state.window, block.new_state.window};
  const int64_t D = plan.D, H = plan.H, K = D / H, F = plan.ffn;
  Scratch<T> scratch((8 * D + 4 * K + 2 * F) * width + convolution.room(rows, D));
  Features<T> x{scratch.take(D * width), width}, normed{scratch.take(D * width), width};
  Features<T> mixed{scratch.take(D * width), width};
  Features<T> cell{scratch.take(D * width), width}, normalizer{scratch.take(D * width), width};
  Features<T> hidden{scratch.take(D * width), width}, stabilizer{scratch.take(D * width), width};
  Features<T> gates{scratch.take(4 * K * width), width}, up{scratch.take(2 * F * width), width};

  gather(block.x + begin * D, D, rows, D, x);
  layer_norm(x, plan.norm, T(plan.epsilon), D, normed);
  convolution.step(begin, rows, D, block.reset, normed, scratch, mixed);
  gather(block.state.cell + begin * D, D, rows, D, cell);
  gather(block.state.normalizer + begin * D, D, rows, D, normalizer);
  gather(block.state.hidden + begin * D, D, rows, D, hidden);
  gather(block.state.stabilizer + begin * D, D, rows, D, stabilizer);
  for (int64_t b = 0; b < rows && block.reset; b++)
    for (int64_t f = 0; f < D && block.reset[begin + b]; f++)
      cell.at(f).data[b] = normalizer.at(f).data[b] = hidden.at(f).data[b] = T(0);
  const Vec<T> empty = fill(-std::numeric_limits<T>::infinity());
  transform(stabilizer, D, [&](Vec<T> m, int64_t f, int64_t b) {
    return load(normalizer.at(f).data + b) == 0 ? empty : m;
  });

  for (int64_t h = 0; h < H; h++) {
    const int64_t first = h * K;
    linear<T>(plan.input_forget + first * 2 * K, nullptr, 2 * K, K, mixed.at(first), gates);
    linear<T>(plan.cell_output + first * 2 * K, nullptr, 2 * K, K, normed.at(first), gates.at(2 * K));
    for (int64_t a = 0; a < 4; a++)
      linear<T>(plan.recurrent + (a * H + h) * K * K, plan.gate_bias + (a * H + h) * K, K, K, hidden.at(first),
                gates.at(a * K), true);
    for (int64_t f = first; f < first + K; f++)
      for (int64_t b = 0; b < width; b += WIDTH<T>) {
        SlstmUnit<T> unit;
        unit.cell = load(cell.at(f).data + b);
        unit.normalizer = load(normalizer.at(f).data + b);
        unit.stabilizer = load(stabilizer.at(f).data + b);
        Vec<T> gate[4];
        for (int a = 0; a < 4; a++) gate[a] = load(gates.at(a * K + f - first).data + b);
        unit.step(gate[0], gate[1], gate[2], gate[3], plan.exp_forget);
        store(cell.at(f).data + b, unit.cell);
        store(normalizer.at(f).data + b, unit.normalizer);
        store(stabilizer.at(f).data + b, unit.stabilizer);
        store(hidden.at(f).data + b, unit.hidden);
      }
    layer_norm(hidden.at(first), plan.head_norm + first, T(plan.epsilon), K, normed.at(first));
  }
  scatter(cell, rows, D, block.new_state.cell + begin * D, D);
  scatter(normalizer, rows, D, block.new_state.normalizer + begin * D, D);
  scatter(hidden, rows, D, block.new_state.hidden + begin * D, D);
  scatter(stabilizer, rows, D, block.new_state.stabilizer + begin * D, D);
  transform(x, D, [&](Vec<T> y, int64_t f, int64_t b) { return y + load(normed.at(f).data + b); });
  if (F > 0) {
    layer_norm(x, plan.ffn_norm, T(plan.epsilon), D, normed);
    linear(plan.ffn_up, plan.ffn_up_bias, 2 * F, D, normed, up);
    transform(up, F, [&](Vec<T> g, int64_t f, int64_t b) { return gelu<T>(g) * load(up.at(F + f).data + b); });
    linear(plan.ffn_down, plan.ffn_down_bias, D, F, up, x, true);
  }
  scatter(x, rows, D, block.y + begin * D, D);
}

template <class T> void step_block(const SlstmBlock<T>& block, int64_t threads) {
  for_rows<T>(block.B, threads, [&](int64_t begin, int64_t rows, int64_t width) {
    slstm_block_rows(block, begin, rows, width);
  });
}

}  // namespace xlstm
