// One step of a whole mLSTM or sLSTM block, for acting; the modules in xlstm_rl/memory say what a block is.
#pragma once

#include <limits>

#include "block_layers.h"
#include "mlstm_forward.h"
#include "slstm.h"

namespace xlstm {

// Weights as the modules hold them; a bias may be null. x and y [B, D]; the state like the kernels'.
template <class T> struct MlstmBlock {
  int64_t B, D, inner, H, group;  // group: block size of the projections to q, k, v
  const T *x, *norm, *up, *up_bias;
  Convolution<T> convolution;
  const T *query_key, *query_key_bias, *value, *value_bias, *gates, *gates_bias, *head_norm, *skip, *down, *down_bias;
  const T *cell, *normalizer, *stabilizer;
  const uint8_t* reset;  // [B] or null
  T *y, *new_cell, *new_normalizer, *new_stabilizer;
  double epsilon, soft_cap;  // soft_cap: zero for none
  bool exp_forget, sigmoid_input;
};

// Turn input and forget gates [2 H] into the weights of `StepWeights` forget, input and bound [3 H].
template <class T>
void weigh_steps(const MlstmBlock<T>& block, int64_t begin, int64_t rows, Features<T> gates, Features<T> stabilizer,
                 Features<T> weights) {
  const int64_t H = block.H;
  gather(block.stabilizer + begin * H, H, rows, H, stabilizer);
  const Vec<T> zero{};
  for (int64_t h = 0; h < H; h++)
    for (int64_t b = 0; b < gates.width; b += WIDTH<T>) {
      Int<T> starts{};
      for (int e = 0; e < WIDTH<T> && b + e < rows; e++) starts[e] = block.reset && block.reset[begin + b + e] ? -1 : 0;
      Vec<T> f = load(gates.at(H + h).data + b), i = load(gates.at(h).data + b), m = load(stabilizer.at(h).data + b);
      Vec<T> decayed = (block.exp_forget ? f : log_sigmoid<T>(f)) + (starts ? zero : m);
      m = larger(larger(decayed, i), zero);
      store(stabilizer.at(h).data + b, m);
      store(weights.at(h).data + b, starts ? zero : exponential<T>(decayed - m));
      store(weights.at(H + h).data + b, exponential<T>(i - m));
      store(weights.at(2 * H + h).data + b, exponential<T>(-smaller(m, fill(T(LARGEST_EXPONENT)))));
    }
  scatter(stabilizer, rows, H, block.new_stabilizer + begin * H, H);
}

template <class T> void mlstm_block_rows(const MlstmBlock<T>& block, int64_t begin, int64_t rows, int64_t width) {
  const int64_t D = block.D, N = block.inner, H = block.H, K = N / H;
  const int64_t window = std::max<int64_t>(block.convolution.size - 1, 0) * N;
  Scratch<T> scratch((2 * D + 7 * N + 6 * H + window) * width + rows * 4 * N + K);
  Features<T> x{scratch.take(D * width), width}, normed{scratch.take(D * width), width};
  Features<T> inner{scratch.take(2 * N * width), width}, mixed{scratch.take(N * width), width};
  Features<T> past{scratch.take(window * width), width}, projected{scratch.take(3 * N * width), width};
  Features<T> gates{scratch.take(2 * H * width), width}, hidden{scratch.take(N * width), width};
  Features<T> stabilizer{scratch.take(H * width), width}, weights{scratch.take(3 * H * width), width};
  T *by_row = scratch.take(rows * 3 * N), *hidden_by_row = scratch.take(rows * N), *write = scratch.take(K);

  gather(block.x + begin * D, D, rows, D, x);
  layer_norm(x, block.norm, T(block.epsilon), D, normed);
  linear(block.up, block.up_bias, 2 * N, D, normed, inner);
  block.convolution.step(begin, rows, N, block.reset, inner, past, mixed);
  project_groups(block.query_key, block.query_key_bias, N, block.group, 2, mixed, projected);
  project_groups(block.value, block.value_bias, N, block.group, 1, inner, projected.at(2 * N));
  linear(block.gates, block.gates_bias, 2 * H, 3 * N, projected, gates);
  cap_gates(gates, 2 * H, block.soft_cap);
  if (block.sigmoid_input) take_log_sigmoid(gates, H);

  weigh_steps(block, begin, rows, gates, stabilizer, weights);
  scatter(projected, rows, 3 * N, by_row, 3 * N);
  for (int64_t b = 0; b < rows; b++)
    for (int64_t h = 0; h < H; h++) {
      const int64_t u = (begin + b) * H + h;
      const T* q = by_row + b * 3 * N + h * K;
      const StepWeights<T> step{weights.at(h).data[b], weights.at(H + h).data[b], weights.at(2 * H + h).data[b]};
      mlstm_step<T>(K, K, q, q + N, q + 2 * N, step, block.cell + u * K * K, block.normalizer + u * K, write,
                    hidden_by_row + b * N + h * K, block.new_cell + u * K * K, block.new_normalizer + u * K);
    }
  gather(hidden_by_row, N, rows, N, hidden);
  for (int64_t h = 0; h < H; h++)
    layer_norm(hidden.at(h * K), block.head_norm + h * K, T(block.epsilon), K, hidden.at(h * K));
  transform(hidden, N, [&](Vec<T> y, int64_t f, int64_t b) {
    Vec<T> open = silu<T>(load(inner.at(N + f).data + b));
    return (y + block.skip[f] * load(mixed.at(f).data + b)) * open;
  });
  linear(block.down, block.down_bias, D, N, hidden, x, true);
  scatter(x, rows, D, block.y + begin * D, D);
}

template <class T> void mlstm_block_step(const MlstmBlock<T>& block, int64_t threads) {
  for_rows<T>(block.B, threads, [&](int64_t begin, int64_t rows, int64_t width) {
    mlstm_block_rows(block, begin, rows, width);
  });
}

// As above; `ffn` zero means that there is no feed-forward network.
template <class T> struct SlstmBlock {
  int64_t B, D, H, ffn;
  const T *x, *norm;
  Convolution<T> convolution;
  const T *input_forget, *cell_output, *gate_bias, *recurrent, *head_norm, *ffn_norm, *ffn_up, *ffn_up_bias;
  const T *ffn_down, *ffn_down_bias;
  const T *cell, *normalizer, *hidden, *stabilizer;
  const uint8_t* reset;  // [B] or null
  T *y, *new_cell, *new_normalizer, *new_hidden, *new_stabilizer;
  double epsilon;
  bool exp_forget;
};

template <class T> void slstm_block_rows(const SlstmBlock<T>& block, int64_t begin, int64_t rows, int64_t width) {
  const int64_t D = block.D, H = block.H, K = D / H, F = block.ffn;
  const int64_t window = std::max<int64_t>(block.convolution.size - 1, 0) * D;
  Scratch<T> scratch((7 * D + 4 * K + 2 * F + window) * width);
  Features<T> x{scratch.take(D * width), width}, normed{scratch.take(D * width), width};
  Features<T> mixed{scratch.take(D * width), width}, past{scratch.take(window * width), width};
  Features<T> cell{scratch.take(D * width), width}, normalizer{scratch.take(D * width), width};
  Features<T> hidden{scratch.take(D * width), width}, stabilizer{scratch.take(D * width), width};
  Features<T> gates{scratch.take(4 * K * width), width}, up{scratch.take(2 * F * width), width};

  gather(block.x + begin * D, D, rows, D, x);
  layer_norm(x, block.norm, T(block.epsilon), D, normed);
  block.convolution.step(begin, rows, D, block.reset, normed, past, mixed);
  gather(block.cell + begin * D, D, rows, D, cell);
  gather(block.normalizer + begin * D, D, rows, D, normalizer);
  gather(block.hidden + begin * D, D, rows, D, hidden);
  gather(block.stabilizer + begin * D, D, rows, D, stabilizer);
  for (int64_t b = 0; b < rows && block.reset; b++)
    for (int64_t f = 0; f < D && block.reset[begin + b]; f++)
      cell.at(f).data[b] = normalizer.at(f).data[b] = hidden.at(f).data[b] = T(0);
  const Vec<T> empty = fill(-std::numeric_limits<T>::infinity());
  transform(stabilizer, D, [&](Vec<T> m, int64_t f, int64_t b) {
    return load(normalizer.at(f).data + b) == 0 ? empty : m;
  });

  for (int64_t h = 0; h < H; h++) {
    const int64_t first = h * K;
    linear<T>(block.input_forget + first * 2 * K, nullptr, 2 * K, K, mixed.at(first), gates);
    linear<T>(block.cell_output + first * 2 * K, nullptr, 2 * K, K, normed.at(first), gates.at(2 * K));
    for (int64_t a = 0; a < 4; a++)
      linear<T>(block.recurrent + (a * H + h) * K * K, block.gate_bias + (a * H + h) * K, K, K, hidden.at(first),
                gates.at(a * K), true);
    for (int64_t f = first; f < first + K; f++)
      for (int64_t b = 0; b < width; b += WIDTH<T>) {
        SlstmUnit<T> unit;
        unit.cell = load(cell.at(f).data + b);
        unit.normalizer = load(normalizer.at(f).data + b);
        unit.stabilizer = load(stabilizer.at(f).data + b);
        Vec<T> gate[4];
        for (int a = 0; a < 4; a++) gate[a] = load(gates.at(a * K + f - first).data + b);
        unit.step(gate[0], gate[1], gate[2], gate[3], block.exp_forget);
        store(cell.at(f).data + b, unit.cell);
        store(normalizer.at(f).data + b, unit.normalizer);
        store(stabilizer.at(f).data + b, unit.stabilizer);
        store(hidden.at(f).data + b, unit.hidden);
      }
    layer_norm(hidden.at(first), block.head_norm + first, T(block.epsilon), K, normed.at(first));
  }
  scatter(cell, rows, D, block.new_cell + begin * D, D);
  scatter(normalizer, rows, D, block.new_normalizer + begin * D, D);
  scatter(hidden, rows, D, block.new_hidden + begin * D, D);
  scatter(stabilizer, rows, D, block.new_stabilizer + begin * D, D);
  transform(x, D, [&](Vec<T> y, int64_t f, int64_t b) { return y + load(normed.at(f).data + b); });
  if (F > 0) {
    layer_norm(x, block.ffn_norm, T(block.epsilon), D, normed);
    linear(block.ffn_up, block.ffn_up_bias, 2 * F, D, normed, up);
    transform(up, F, [&](Vec<T> g, int64_t f, int64_t b) { return gelu<T>(g) * load(up.at(F + f).data + b); });
    linear(block.ffn_down, block.ffn_down_bias, D, F, up, x, true);
  }
  scatter(x, rows, D, block.y + begin * D, D);
}

template <class T> void slstm_block_step(const SlstmBlock<T>& block, int64_t threads) {
  for_rows<T>(block.B, threads, [&](int64_t begin, int64_t rows, int64_t width) {
    slstm_block_rows(block, begin, rows, width);
  });
}

}  // namespace xlstm
