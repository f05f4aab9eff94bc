// The sequence mixer of an mLSTM block: all that lies between its up- and its down-projection, over a sequence.
//
// Around the cell, steps are taken in tiles and turned feature by feature (see block_layers.h): the steps of a tile
// lie in the vector, where convolution, small projections and norms need no sums across it.
#pragma once

#include "block_layers.h"
#include "mlstm_forward.h"

namespace xlstm {

// Weights as the modules hold them; a bias may be null. The state like the kernels'.
template <class T> struct MlstmMixer {
  int64_t B, steps, N, H, group;  // group: block size of the projections to q, k, v
  const T* x;                     // [B, T, 2 N]: what is mixed, and the output gate
  int64_t taps;                   // of the convolution; zero for none
  const T *conv, *conv_bias, *window;  // [N, taps], [N], [B, taps - 1, N]
  const T *query_key, *query_key_bias, *value, *value_bias, *gates, *gates_bias, *head_norm, *skip;
  const T *cell, *normalizer, *stabilizer;
  const uint8_t* reset;  // [B, T] or null
  double epsilon, soft_cap;  // soft_cap: zero for none
  bool exp_forget, sigmoid_input;

  int64_t past() const { return std::max<int64_t>(taps - 1, 0); }
  int64_t tile() const { return std::min<int64_t>(64, padded<T>(steps)); }
  int64_t tiles() const { return (steps + tile() - 1) / tile(); }

  // Row b as a batch of one; what follows is for such a row.
  MlstmMixer row(int64_t b) const {
    const int64_t K = N / H;
    MlstmMixer one = *this;
    one.B = 1;
    one.x += b * steps * 2 * N;
    one.window += b * past() * N;
    one.cell += b * H * K * K;
    one.normalizer += b * H * K;
    one.stabilizer += b * H;
    one.reset = reset ? reset + b * steps : nullptr;
    return one;
  }
  const T* input(int64_t t) const { return t >= 0 ? x + t * 2 * N : window + (t + past()) * N; }
  // How many steps before step t its convolution sees: all of them if no episode starts on the way.
  int64_t seen(int64_t t) const {
    for (int64_t back = 0; reset && back < past() && back <= t; back++)
      if (reset[t - back]) return back;
    return past();
  }
};

// What the backward pass needs of the forward pass of a row.
template <class T> struct MixerTrace {
  T *projected;    // [T, 3 N]: q, k, v
  T *capped;       // [T, 2 H]: gates after the soft cap
  T *gates;        // [T, 2 H]: gates as the cell takes them
  T *hidden;       // [T, N]: output of the cell
  T *before_silu;  // [tiles, N, tile]: output of the convolution
  T *cell;         // trace of the cell
  T *end;

  MixerTrace(const MlstmMixer<T>& x, T* data) {
    projected = data;
    capped = projected + x.steps * 3 * x.N;
    gates = capped + x.steps * 2 * x.H;
    hidden = gates + x.steps * 2 * x.H;
    before_silu = hidden + x.steps * x.N;
    cell = before_silu + x.tiles() * x.N * x.tile();
    MlstmInput<T> input = cell_input(x);
    end = cell + x.H * input.chunks() * input.memory_size();
  }
  static int64_t size(const MlstmMixer<T>& x) {
    MixerTrace<T> layout(x, nullptr);
    return layout.end - layout.projected;
  }

  MlstmInput<T> cell_input(const MlstmMixer<T>& x) const {
    const int64_t N = x.N, H = x.H, K = N / H;
    auto part = [=](int64_t which) { return Strided<T>{projected + which * N, 0, 3 * N, K}; };
    auto gate = [=](int64_t which) { return Strided<T>{gates + which * H, 0, 2 * H, 1}; };
    return {1, x.steps, H, K, K, part(0), part(1), part(2), gate(0), gate(1),
            x.reset, x.exp_forget, x.cell, x.normalizer, x.stabilizer};
  }
};

// Results; the state after the last step is contiguous like the one before the first.
template <class T> struct MixerOutput {
  T *y, *window, *cell, *normalizer, *stabilizer;  // y [B, T, N]

  MixerOutput row(const MlstmMixer<T>& x, int64_t b) const {
    const int64_t N = x.N, H = x.H, K = N / H;
    return {y + b * x.steps * N, window + b * x.past() * N, cell + b * H * K * K, normalizer + b * H * K,
            stabilizer + b * H};
  }
};

// How many steps each step reaches in a convolution: of those before it, or of those after it. Also the least and the
// greatest of a vector, since only between these a mask has to decide.
template <class T> struct Reach {
  T *steps, *least, *most;  // [count], and twice [count / vector width]

  static int64_t room(int64_t count) { return count + 2 * (count / WIDTH<T>); }
  Reach(T* memory, int64_t count)
      : steps(memory), least(memory + count), most(least + count / WIDTH<T>) {}

  void bound(int64_t count) const {
    for (int64_t t = 0; t < count; t += WIDTH<T>) {
      const auto [low, high] = std::minmax_element(steps + t, steps + t + WIDTH<T>);
      least[t / WIDTH<T>] = *low;
      most[t / WIDTH<T>] = *high;
    }
  }
  Int<T> reaches(int64_t t, int64_t distance) const { return load(steps + t) >= T(distance); }

  // For the vector of steps from t on, `first` and the sum over distances of taps[-distance] * from[SIGN * distance], as
  // far as these steps reach; `from` is that of step t. What lies beyond may be anything. Where there are many, four sums
  // take turns, or each addition would wait for the one before.
  template <int SIGN>
  INLINE Vec<T> convolve(int64_t t, int64_t size, const T* taps, const T* from, T first = 0) const {
    const int64_t all = std::min<int64_t>(size, int64_t(least[t / WIDTH<T>]) + 1);
    const int64_t some = std::min<int64_t>(size, int64_t(most[t / WIDTH<T>]) + 1);
    Vec<T> sums[4] = {fill(first)};
    int64_t back = 0;
    for (; all >= 8 && back + 4 <= all; back += 4)
      for (int n = 0; n < 4; n++) sums[n] += taps[-back - n] * load(from + SIGN * (back + n));
    for (; back < all; back++) sums[0] += taps[-back] * load(from + SIGN * back);
    for (; back < some; back++)
      sums[0] += taps[-back] * keep_where<T>(reaches(t, back), load(from + SIGN * back));
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
};

// A tile of a row: `length` steps from `start` on, padded to `width`.
template <class T> struct Tile {
  int64_t index, start, length, width, halo;  // halo: room for the steps before, padded

  Tile(const MlstmMixer<T>& x, int64_t which)
      : index(which), start(which * x.tile()), length(std::min(x.tile(), x.steps - start)), width(x.tile()),
        halo(padded<T>(x.past())) {}

  // From a tensor [T, columns] to features and back.
  void gather_from(const T* tensor, int64_t columns, int64_t features, Features<T> to) const {
    gather(tensor + start * columns, columns, length, features, to);
  }
  void scatter_to(Features<T> from, int64_t features, T* tensor, int64_t columns) const {
    scatter(from, length, features, tensor + start * columns, columns);
  }
  T* before_silu(const MlstmMixer<T>& x, const MixerTrace<T>& trace) const {
    return trace.before_silu + index * x.N * width;
  }

  // What the keys are made of: the inputs after convolution and SiLU, or else as they are.
  void mixed(const MlstmMixer<T>& x, const MixerTrace<T>& trace, Features<T> to) const {
    if (!x.taps) return gather_from(x.x, 2 * x.N, x.N, to);
    const T* from = before_silu(x, trace);
    for (int64_t e = 0; e < x.N * width; e += WIDTH<T>) store(to.data + e, silu<T>(load(from + e)));
  }

  // The inputs [N, halo + width], the steps before the tile in front of it. Rows begin at the halo.
  Features<T> gather_inputs(const MlstmMixer<T>& x, T* memory) const {
    const int64_t row = halo + width;
    Features<T> inputs{memory + halo, row};
    transpose(length, x.N, x.input(start), 2 * x.N, inputs.data, row);
    for (int64_t f = 0; f < x.N; f++) std::fill(inputs.at(f).data + length, inputs.at(f).data + width, T(0));
    // The first tile finds them in the window, and the others, at most once it is longer than a tile, in both.
    if (start == 0 || start >= x.past()) {
      transpose(x.past(), x.N, x.input(start - x.past()), start ? 2 * x.N : x.N, inputs.data - x.past(), row);
      return inputs;
    }
    for (int64_t back = 1; back <= x.past(); back++) {
      const T* from = x.input(start - back);
      for (int64_t f = 0; f < x.N; f++) inputs.at(f).data[-back] = from[f];
    }
    return inputs;
  }

  bool starts_at(const MlstmMixer<T>& x, int64_t t) const {
    return x.reset && t >= 0 && t < x.steps && x.reset[t];
  }
  // seen() of the steps of the tile; padding goes on where they end.
  Reach<T> look_back(const MlstmMixer<T>& x, T* memory) const {
    Reach<T> reach(memory, width);
    int64_t seen = x.seen(start);
    for (int64_t t = 0; t < width; t++) {
      if (t > 0) seen = starts_at(x, start + t) ? 0 : std::min(x.past(), seen + 1);
      reach.steps[t] = T(seen);
    }
    reach.bound(width);
    return reach;
  }
  // By how many steps after them the `before` steps before the tile (a multiple of the vector width) and its own are
  // seen.
  Reach<T> look_ahead(const MlstmMixer<T>& x, int64_t before, T* memory) const {
    Reach<T> reach(memory, before + width);
    int64_t seen_by = x.past();
    for (int64_t t = width + x.past() - 1; t >= -before; t--) {
      seen_by = starts_at(x, start + t + 1) ? 0 : std::min(x.past(), seen_by + 1);
      if (t < width) reach.steps[before + t] = T(seen_by);
    }
    reach.bound(before + width);
    return reach;
  }
};

// Causal convolution of a tile, before its SiLU.
template <class T>
void convolve(const MlstmMixer<T>& x, const Tile<T>& tile, const Reach<T>& seen, Features<T> inputs, Features<T> to) {
  for (int64_t f = 0; f < x.N; f++) {
    const T* taps = x.conv + f * x.taps + x.past();
    for (int64_t t = 0; t < tile.width; t += WIDTH<T>)
      store(to.at(f).data + t,
            seen.template convolve<-1>(t, x.taps, taps, inputs.at(f).data + t, x.conv_bias[f]));
  }
}

// The layers before the cell.
template <class T> void mixer_enter(const MlstmMixer<T>& x, const MixerTrace<T>& trace, const Tile<T>& tile) {
  const int64_t N = x.N, H = x.H, width = tile.width;
  Scratch<T> scratch(N * (tile.halo + width) + Reach<T>::room(width) + (4 * N + 2 * H) * width);
  Features<T> inputs = tile.gather_inputs(x, scratch.take(N * (tile.halo + width)));
  T* reach = scratch.take(Reach<T>::room(width));
  Features<T> mixed{scratch.take(N * width), width}, projected{scratch.take(3 * N * width), width};
  Features<T> gates{scratch.take(2 * H * width), width};

  if (x.taps) {
    Features<T> before_silu{tile.before_silu(x, trace), width};
    convolve(x, tile, tile.look_back(x, reach), inputs, before_silu);
  }
  tile.mixed(x, trace, mixed);
  project_groups(x.query_key, x.query_key_bias, N, x.group, 2, mixed, projected);
  project_groups(x.value, x.value_bias, N, x.group, 1, inputs, projected.at(2 * N));
  linear(x.gates, x.gates_bias, 2 * H, 3 * N, projected, gates);
  cap_gates(gates, 2 * H, x.soft_cap);
  tile.scatter_to(projected, 3 * N, trace.projected, 3 * N);
  tile.scatter_to(gates, 2 * H, trace.capped, 2 * H);
  if (x.sigmoid_input) take_log_sigmoid(gates, H);
  tile.scatter_to(gates, 2 * H, trace.gates, 2 * H);
}

// The layers after the cell.
template <class T>
void mixer_leave(const MlstmMixer<T>& x, const MixerTrace<T>& trace, const MixerOutput<T>& out, const Tile<T>& tile) {
  const int64_t N = x.N, K = N / x.H, width = tile.width;
  Scratch<T> scratch(3 * N * width);
  Features<T> hidden{scratch.take(N * width), width}, gate{scratch.take(N * width), width};
  Features<T> mixed{scratch.take(N * width), width};
  tile.mixed(x, trace, mixed);
  tile.gather_from(trace.hidden, N, N, hidden);
  tile.gather_from(x.x + N, 2 * N, N, gate);
  for (int64_t h = 0; h < x.H; h++)
    layer_norm(hidden.at(h * K), x.head_norm + h * K, T(x.epsilon), K, hidden.at(h * K));
  transform(hidden, N, [&](Vec<T> y, int64_t f, int64_t t) {
    return (y + x.skip[f] * load(mixed.at(f).data + t)) * silu<T>(load(gate.at(f).data + t));
  });
  tile.scatter_to(hidden, N, out.y, N);
}

// The inputs that the next sequence's convolution sees; an episode start among them hides those before.
template <class T> void mixer_window(const MlstmMixer<T>& x, T* window) {
  const int64_t seen = x.seen(x.steps - 1);
  for (int64_t back = 0; back < x.past(); back++) {
    T* to = window + (x.past() - 1 - back) * x.N;
    if (back <= seen)
      std::memcpy(to, x.input(x.steps - 1 - back), x.N * sizeof(T));
    else
      std::fill(to, to + x.N, T(0));
  }
}

template <class T>
void mixer_forward_row(const MlstmMixer<T>& x, const MixerOutput<T>& out, T* memory, int64_t threads) {
  MixerTrace<T> trace(x, memory);
  const MlstmInput<T> cell = trace.cell_input(x);
  for_each(x.tiles(), threads, [&](int64_t tile) { mixer_enter(x, trace, Tile<T>(x, tile)); });
  for_each(x.H, threads, [&](int64_t h) {
    mlstm_forward_head(cell, {trace.hidden, out.cell, out.normalizer, out.stabilizer}, trace.cell, h);
  });
  for_each(x.tiles(), threads, [&](int64_t tile) { mixer_leave(x, trace, out, Tile<T>(x, tile)); });
  mixer_window(x, out.window);
}

// Row by row, so that a stage finds in the cache what the one before it wrote; where there are fewer rows than
// threads, these work together on each.
template <class T>
void mlstm_mixer_forward(const MlstmMixer<T>& x, const MixerOutput<T>& out, T* memory, int64_t threads) {
  const bool apart = x.B >= threads;
  for_each(x.B, apart ? threads : 1, [&](int64_t b) {
    mixer_forward_row(x.row(b), out.row(x, b), memory + b * MixerTrace<T>::size(x), apart ? 1 : threads);
  });
}

}  // namespace xlstm
