// The backward pass of the mixer of an mLSTM block: tiles after the cell, the cell, and tiles before it.
#pragma once

#include "mlstm_backward.h"
#include "mlstm_mixer.h"

namespace xlstm {

// Gradients by the outputs.
template <class T> struct MixerOuter {
  const T *y, *window, *cell, *normalizer;

  MixerOuter row(const MlstmMixer<T>& x, int64_t b) const {
    const int64_t N = x.N, H = x.H, K = N / H;
    return {y + b * x.steps * N, window + b * x.past() * N, cell + b * H * K * K, normalizer + b * H * K};
  }
};
// Gradients by the inputs, all contiguous; those of absent biases are null.
template <class T> struct MixerGradient {
  T *x, *window, *conv, *conv_bias, *query_key, *query_key_bias, *value, *value_bias, *gates, *gates_bias;
  T *head_norm, *skip, *cell, *normalizer;

  // Of the tensors that have rows; the others stay as they are.
  MixerGradient row(const MlstmMixer<T>& mixer, int64_t b) const {
    const int64_t N = mixer.N, H = mixer.H, K = N / H;
    MixerGradient one = *this;
    one.x += b * mixer.steps * 2 * N;
    one.window += b * mixer.past() * N;
    one.cell += b * H * K * K;
    one.normalizer += b * H * K;
    return one;
  }
};

// Gradients by the weights from one row of the batch. Rows are added up in order, so that the result does not depend
// on the number of threads.
template <class T> struct MixerWeightGradient {
  int64_t gates_row;  // stride of a row of `gates`, padded
  T *conv, *conv_bias, *query_key, *query_key_bias, *value, *value_bias, *gates, *gates_bias, *head_norm, *skip, *end;

  MixerWeightGradient(const MlstmMixer<T>& x, T* data) {
    const int64_t N = x.N, H = x.H;
    gates_row = padded<T>(3 * N);
    conv = data;
    conv_bias = conv + N * x.taps;
    query_key = conv_bias + N;
    query_key_bias = query_key + 2 * N * x.group;
    value = query_key_bias + 2 * N;
    value_bias = value + N * x.group;
    gates = value_bias + N;
    gates_bias = gates + 2 * H * gates_row;
    head_norm = gates_bias + 2 * H;
    skip = head_norm + N;
    end = skip + N;
  }
  static int64_t size(const MlstmMixer<T>& x) {
    MixerWeightGradient<T> layout(x, nullptr);
    return layout.end - layout.conv;
  }

  void copy_to(const MlstmMixer<T>& x, const MixerGradient<T>& to) const {
    auto copy = [](T* target, const T* from, int64_t count) {
      if (target) std::memcpy(target, from, count * sizeof(T));
    };
    copy(to.conv, conv, x.N * x.taps);
    copy(to.conv_bias, conv_bias, x.N);
    copy(to.query_key, query_key, 2 * x.N * x.group);
    copy(to.query_key_bias, query_key_bias, 2 * x.N);
    copy(to.value, value, x.N * x.group);
    copy(to.value_bias, value_bias, x.N);
    for (int64_t g = 0; g < 2 * x.H; g++) copy(to.gates + g * 3 * x.N, gates + g * gates_row, 3 * x.N);
    copy(to.gates_bias, gates_bias, 2 * x.H);
    copy(to.head_norm, head_norm, x.N);
    copy(to.skip, skip, x.N);
  }
};

// Gradients between the stages of the backward pass, those of one row: what it leaves in the cache the next stage
// reads. Rows of heads lie [T, H, ...] as the cell wants them.
template <class T> struct MixerWork {
  T *hidden, *q, *k, *v;        // [T, N]
  T *input_gate, *forget_gate;  // [T, H]
  T* mixed;                     // by the convolved input after the SiLU [tiles, N, tile]
  T* end;

  MixerWork(const MlstmMixer<T>& x, T* data) {
    hidden = data;
    q = hidden + x.steps * x.N;
    k = q + x.steps * x.N;
    v = k + x.steps * x.N;
    input_gate = v + x.steps * x.N;
    forget_gate = input_gate + x.steps * x.H;
    mixed = forget_gate + x.steps * x.H;
    end = mixed + x.tiles() * x.N * x.tile();
  }
  static int64_t size(const MlstmMixer<T>& x) {
    MixerWork<T> layout(x, nullptr);
    return layout.end - layout.hidden;
  }
  T* mixed_of(const MlstmMixer<T>& x, const Tile<T>& tile) const { return mixed + tile.index * x.N * tile.width; }
};

// Sums over the steps of a tile: of a feature, and of the products of two.
template <class T> INLINE T total(Features<T> a, int64_t width) {
  Vec<T> sums{};
  for (int64_t t = 0; t < width; t += WIDTH<T>) sums += load(a.data + t);
  return sum<T>(sums);
}
template <class T> INLINE T dot(Features<T> a, Features<T> b, int64_t width) { return dot(a.data, b.data, width); }

// Through a norm: `d`, the gradient by its output, becomes the gradient by its input. `normal` are the normalised
// features before the weight, `factors` what they were scaled with.
template <class T>
void layer_norm_backward(Features<T> normal, const T* factors, const T* weight, int64_t features, T* d_weight,
                         Features<T> d) {
  for (int64_t f = 0; f < features; f++) d_weight[f] += dot(d.at(f), normal.at(f), d.width);
  for (int64_t t = 0; t < d.width; t += WIDTH<T>) {
    Vec<T> by_mean{}, by_deviation{};
    for (int64_t f = 0; f < features; f++) {
      Vec<T> by_normal = load(d.at(f).data + t) * weight[f];
      by_mean += by_normal;
      by_deviation += by_normal * load(normal.at(f).data + t);
    }
    by_mean /= T(features);
    by_deviation /= T(features);
    for (int64_t f = 0; f < features; f++) {
      T* at = d.at(f).data + t;
      store(at, (load(at) * weight[f] - by_mean - load(normal.at(f).data + t) * by_deviation) * load(factors + t));
    }
  }
}

// Through project_groups: adds to the gradients by its input and its weights.
template <class T>
void project_groups_backward(const T* weight, int64_t features, int64_t group, int64_t projections, Features<T> x,
                             Features<T> d_y, Features<T> d_x, T* d_weight, T* d_bias) {
  for (int64_t first = 0; first < features; first += group)
    for (int64_t o = 0; o < projections * group; o++) {
      const int64_t at = first * projections + o;
      Features<T> d = d_y.at(o / group * features + first + o % group);
      d_bias[at] += total(d, d_y.width);
      for (int64_t i = 0; i < group; i++) {
        const T *in = x.at(first + i).data, factor = weight[at * group + i];
        T* by_in = d_x.at(first + i).data;
        Vec<T> products{};
        for (int64_t t = 0; t < d_y.width; t += WIDTH<T>) {
          Vec<T> by_y = load(d.data + t);
          products += by_y * load(in + t);
          store(by_in + t, load(by_in + t) + by_y * factor);
        }
        d_weight[at * group + i] += sum<T>(products);
      }
    }
}

// Back through the layers after the cell.
template <class T>
void mixer_leave_backward(const MlstmMixer<T>& x, const MixerTrace<T>& trace, const T* d_y, T* d_x,
                          const MixerWork<T>& work, const MixerWeightGradient<T>& by_weight, const Tile<T>& tile) {
  const int64_t N = x.N, K = N / x.H, width = tile.width;
  Scratch<T> scratch((4 * N + 1) * width);
  Features<T> normal{scratch.take(N * width), width}, gate{scratch.take(N * width), width};
  Features<T> d{scratch.take(N * width), width}, mixed{scratch.take(N * width), width};
  T* factors = scratch.take(width);
  tile.gather_from(trace.hidden, N, N, normal);
  tile.gather_from(x.x + N, 2 * N, N, gate);
  tile.gather_from(d_y, N, N, d);
  tile.mixed(x, trace, mixed);
  T* d_mixed = work.mixed_of(x, tile);
  for (int64_t h = 0; h < x.H; h++) {
    layer_norm<T>(normal.at(h * K), nullptr, T(x.epsilon), K, normal.at(h * K), factors);
    for (int64_t f = h * K; f < (h + 1) * K; f++) {
      Vec<T> by_skip{};
      for (int64_t t = 0; t < width; t += WIDTH<T>) {
        const int64_t at = f * width + t;
        Vec<T> skipped = load(mixed.data + at);
        Vec<T> sum_of_both = x.head_norm[f] * load(normal.data + at) + x.skip[f] * skipped;
        Vec<T> g = load(gate.data + at), open = sigmoid<T>(g), outer = load(d.data + at), by_sum = outer * g * open;
        store(gate.data + at, outer * sum_of_both * silu_slope<T>(g, open));
        store(d.data + at, by_sum);
        store(d_mixed + at, by_sum * x.skip[f]);
        by_skip += by_sum * skipped;
      }
      by_weight.skip[f] += sum<T>(by_skip);
    }
    layer_norm_backward(normal.at(h * K), factors, x.head_norm + h * K, K, by_weight.head_norm + h * K, d.at(h * K));
  }
  tile.scatter_to(gate, N, d_x + N, 2 * N);
  tile.scatter_to(d, N, work.hidden, N);
}

// Gradients by the gates as the cell takes them become those by the gates before cap and sigmoid.
template <class T>
void mixer_gates_backward(const MlstmMixer<T>& x, const MixerTrace<T>& trace, const Tile<T>& tile, Features<T> capped,
                          Features<T> d) {
  if (!x.sigmoid_input && x.soft_cap == 0) return;
  const T cap = T(x.soft_cap);
  tile.gather_from(trace.capped, 2 * x.H, 2 * x.H, capped);
  transform(d, 2 * x.H, [&](Vec<T> by_gate, int64_t g, int64_t t) {
    Vec<T> value = load(capped.at(g).data + t);
    if (x.sigmoid_input && g < x.H) by_gate *= sigmoid<T>(-value);
    if (cap > 0) by_gate *= T(1) - value * value / (cap * cap);
    return by_gate;
  });
}

// Back through the convolution of a tile: `d` by its output, with that of the steps after the tile behind it and zeros
// before it; adds to `d_inputs` and, for the first tile, to the gradient by the window. `memory` is room for two reaches
// and for a row.
template <class T>
void convolve_backward(const MlstmMixer<T>& x, const Tile<T>& tile, Features<T> inputs, Features<T> d,
                       Features<T> d_inputs, T* d_window, const MixerWeightGradient<T>& by_weight, T* memory) {
  constexpr int W = WIDTH<T>;
  const int64_t width = tile.width, before = tile.start == 0 ? tile.halo : 0, past = x.past();
  const Reach<T> seen = tile.look_back(x, memory);
  const Reach<T> seen_by = tile.look_ahead(x, before, memory + Reach<T>::room(width));
  T* by_past = memory + Reach<T>::room(width) + Reach<T>::room(before + width);
  for (int64_t f = 0; f < x.N; f++) {
    const T *taps = x.conv + f * x.taps + past, *by_y = d.at(f).data, *in = inputs.at(f).data;
    T *by_taps = by_weight.conv + f * x.taps + past, *by_in = d_inputs.at(f).data;
    by_weight.conv_bias[f] += total(d.at(f), width);
    for (int64_t back = 0; back < x.taps; back++) {
      Vec<T> products{};
      for (int64_t t = 0; t < width; t += W)
        if (T(back) <= seen.least[t / W])
          products += load(by_y + t) * load(in + t - back);
        else if (T(back) <= seen.most[t / W])
          products += load(by_y + t) * keep_where<T>(seen.reaches(t, back), load(in + t - back));
      by_taps[-back] += sum<T>(products);
    }
    for (int64_t t = 0; t < width; t += W)
      store(by_in + t, load(by_in + t) + seen_by.template convolve<1>(before + t, x.taps, taps, by_y + t));
    for (int64_t t = 0; t < before; t += W)
      store(by_past + t, seen_by.template convolve<1>(t, x.taps, taps, by_y - before + t));
    for (int64_t t = 0; before && t < past; t++) d_window[t * x.N + f] += by_past[before - past + t];
  }
}

// Back through the layers before the cell. `later` [N, halo] is the gradient by the convolution's output of the steps
// after the tile, and becomes that of the first steps of this one.
template <class T>
void mixer_enter_backward(const MlstmMixer<T>& x, const MixerTrace<T>& trace, T* d_x, T* d_window,
                          const MixerWork<T>& work, const MixerWeightGradient<T>& by_weight, const Tile<T>& tile,
                          T* later) {
  const int64_t N = x.N, H = x.H, width = tile.width, halo = tile.halo;
  const int64_t projected_row = padded<T>(3 * N), reach = 2 * Reach<T>::room(halo + width) + halo;
  Scratch<T> scratch(N * (halo + width) + N * (halo + width + halo) + reach + (5 * N + 4 * H) * width +
                     width * projected_row);
  Features<T> inputs = tile.gather_inputs(x, scratch.take(N * (halo + width)));
  // Rows begin behind the zeros.
  Features<T> d_convolved{scratch.take(N * (halo + width + halo)) + halo, halo + width + halo};
  Features<T> mixed{scratch.take(N * width), width};
  Features<T> d_projected{scratch.take(3 * N * width), width}, d_inputs{scratch.take(N * width), width};
  Features<T> d_gates{scratch.take(2 * H * width), width}, capped{scratch.take(2 * H * width), width};
  T *reaches = scratch.take(reach), *copy = scratch.take(width * projected_row);
  Features<T> d_mixed{work.mixed_of(x, tile), width};

  tile.gather_from(work.q, N, N, d_projected);
  tile.gather_from(work.k, N, N, d_projected.at(N));
  tile.gather_from(work.v, N, N, d_projected.at(2 * N));
  tile.gather_from(work.input_gate, H, H, d_gates);
  tile.gather_from(work.forget_gate, H, H, d_gates.at(H));
  mixer_gates_backward(x, trace, tile, capped, d_gates);
  const Strided<T> projected{trace.projected, 0, 3 * N, 0};
  multiply<T>(2 * H, projected_row, tile.length, {d_gates.data, width, 1},
              ::xlstm::tile(projected, 0, tile.start, 0, tile.length, 3 * N, copy),
              {by_weight.gates, by_weight.gates_row}, true);
  for (int64_t g = 0; g < 2 * H; g++) by_weight.gates_bias[g] += total(d_gates.at(g), width);
  multiply<T>(3 * N, width, 2 * H, {x.gates, 1, 3 * N}, d_gates.right(), d_projected, true);

  std::fill(d_inputs.data, d_inputs.data + N * width, T(0));
  project_groups_backward(x.value, N, x.group, 1, inputs, d_projected.at(2 * N), d_inputs, by_weight.value,
                          by_weight.value_bias);
  tile.mixed(x, trace, mixed);
  project_groups_backward(x.query_key, N, x.group, 2, mixed, d_projected, d_mixed, by_weight.query_key,
                          by_weight.query_key_bias);
  if (x.taps) {
    const T* before_silu = tile.before_silu(x, trace);
    for (int64_t f = 0; f < N; f++) {
      std::fill(d_convolved.at(f).data - halo, d_convolved.at(f).data, T(0));
      for (int64_t t = 0; t < width; t += WIDTH<T>) {
        Vec<T> value = load(before_silu + f * width + t);
        store(d_convolved.at(f).data + t, load(d_mixed.at(f).data + t) * silu_slope<T>(value, sigmoid<T>(value)));
      }
      std::memcpy(d_convolved.at(f).data + width, later + f * halo, halo * sizeof(T));
      std::memcpy(later + f * halo, d_convolved.at(f).data, halo * sizeof(T));
    }
    convolve_backward(x, tile, inputs, d_convolved, d_inputs, d_window, by_weight, reaches);
  } else {
    transform(d_inputs, N, [&](Vec<T> d, int64_t f, int64_t t) { return d + load(d_mixed.at(f).data + t); });
  }
  tile.scatter_to(d_inputs, N, d_x, 2 * N);
}

// Through mixer_window: adds to the gradients by the inputs it took, from the sequence or from the window before it.
template <class T>
void mixer_window_backward(const MlstmMixer<T>& x, const T* d_new_window, T* d_x, T* d_window) {
  const int64_t seen = x.seen(x.steps - 1);
  for (int64_t back = 0; back < x.past() && back <= seen; back++) {
    const int64_t t = x.steps - 1 - back;
    const T* from = d_new_window + (x.past() - 1 - back) * x.N;
    T* to = t >= 0 ? d_x + t * 2 * x.N : d_window + (t + x.past()) * x.N;
    for (int64_t f = 0; f < x.N; f++) to[f] += from[f];
  }
}

template <class T>
void mixer_backward_row(const MlstmMixer<T>& x, T* memory, const MixerOuter<T>& outer,
                        const MixerGradient<T>& gradient, const MixerWeightGradient<T>& by_weight, int64_t threads) {
  static thread_local std::vector<T> buffer;
  const int64_t size = MixerWork<T>::size(x), later_size = x.N * padded<T>(x.past());
  if (int64_t(buffer.size()) < size + later_size) buffer.resize(size + later_size);
  MixerTrace<T> trace(x, memory);
  MixerWork<T> work(x, buffer.data());
  T* later = work.end;
  std::fill(later, later + later_size, T(0));
  std::fill(gradient.window, gradient.window + x.past() * x.N, T(0));

  for (int64_t tile = 0; tile < x.tiles(); tile++)
    mixer_leave_backward(x, trace, outer.y, gradient.x, work, by_weight, Tile<T>(x, tile));
  const MlstmInput<T> cell = trace.cell_input(x);
  const MlstmGradient<T> by_cell{work.q, work.k, work.v, work.input_gate, work.forget_gate, gradient.cell,
                                 gradient.normalizer};
  for_each(x.H, threads, [&](int64_t h) {
    mlstm_backward_head(cell, trace.hidden, trace.cell, {work.hidden, outer.cell, outer.normalizer}, by_cell, h);
  });
  for (int64_t tile = x.tiles() - 1; tile >= 0; tile--)
    mixer_enter_backward(x, trace, gradient.x, gradient.window, work, by_weight, Tile<T>(x, tile), later);
  mixer_window_backward(x, outer.window, gradient.x, gradient.window);
}

// `by_weight` is room for the gradients by the weights from every row.
template <class T>
void mlstm_mixer_backward(const MlstmMixer<T>& x, T* memory, const MixerOuter<T>& outer,
                          const MixerGradient<T>& gradient, T* by_weight, int64_t threads) {
  const int64_t weights = MixerWeightGradient<T>::size(x), trace = MixerTrace<T>::size(x);
  const bool apart = x.B >= threads;
  std::fill(by_weight, by_weight + x.B * weights, T(0));
  for_each(x.B, apart ? threads : 1, [&](int64_t b) {
    mixer_backward_row(x.row(b), memory + b * trace, outer.row(x, b), gradient.row(x, b),
                       MixerWeightGradient<T>(x, by_weight + b * weights), apart ? 1 : threads);
  });
  for (int64_t b = 1; b < x.B; b++)
    for (int64_t e = 0; e < weights; e++) by_weight[e] += by_weight[b * weights + e];
  MixerWeightGradient<T>(x, by_weight).copy_to(x, gradient);
}

}  // namespace xlstm
