// Small matrix products: the blocks in registers of a GEMM without the packing that large ones need.
#pragma once

#include <utility>

#include "vectors.h"

namespace xlstm {

// A left factor, row-major or column-major: one of the strides is one.
template <class T> struct Left {
  const T* data;
  int64_t row, column;  // strides
};
// Row-major with a number of columns that is a multiple of the vector width.
template <class T> struct Rows {
  T* data;
  int64_t row;  // stride
};

// What is known to be zero, or not wanted, above or below the diagonal.
enum class Triangle { none, lower_result, lower_left, upper_left };

// How factors lie: `dense`, columns of the left one without gaps; `narrow`, rows of the right one without gaps, and just
// as wide as a block; or neither.
enum class Layout { any, dense, narrow };

// A block of the result that stays in registers. In the dense layout, rows of the left factor have constant addresses
// from one pointer; else three rows share a pointer, as many as addressing reaches. In the narrow one those of the right
// factor have, so that pointers need to be moved but once in four columns.
template <class T, int M, int N, Layout LAYOUT>
INLINE void block_product(int64_t K, Left<T> a, Rows<const T> b, Rows<T> c, bool accumulate) {
  constexpr bool DENSE = LAYOUT == Layout::dense;
  constexpr int W = WIDTH<T>, GROUPS = DENSE ? 1 : (M + 2) / 3;
  Vec<T> total[M][N];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) total[i][j] = accumulate ? load(c.data + i * c.row + j * W) : Vec<T>{};
  const T* left[GROUPS];
  for (int g = 0; g < GROUPS; g++) left[g] = a.data + 3 * g * a.row;
  const T* right = b.data;
  const int64_t right_row = LAYOUT == Layout::narrow ? N * W : b.row;
  auto add_columns = [&](int count) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int k = 0; k < count; k++) {
      Vec<T> columns[N];
      for (int j = 0; j < N; j++) columns[j] = load(right + k * right_row + j * W);
      for (int i = 0; i < M; i++) {
        Vec<T> factor = fill(DENSE ? left[0][i] : left[i / 3][i % 3 * a.row + k]);
        for (int j = 0; j < N; j++) total[i][j] += factor * columns[j];
      }
    }
    for (int g = 0; g < GROUPS; g++) left[g] += DENSE ? a.column : count;
    right += count * right_row;
  };
  int64_t k = 0;
  if (LAYOUT == Layout::narrow)
    for (; k + 4 <= K; k += 4) add_columns(4);
  for (; k < K; k++) add_columns(1);
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) store(c.data + i * c.row + j * W, total[i][j]);
}

template <class T, int M, int N, Layout LAYOUT>
INLINE int64_t block_rows(int64_t i, int64_t first_column, int64_t K, Left<T> a, Rows<const T> b, Rows<T> c,
                          bool accumulate, Triangle triangle) {
  if (triangle == Triangle::lower_result && first_column > i + M - 1) return i + M;
  int64_t begin = triangle == Triangle::upper_left ? i : 0;
  int64_t end = triangle == Triangle::lower_left ? std::min(K, i + M) : K;
  block_product<T, M, N, LAYOUT>(end - begin, {a.data + i * a.row + begin * a.column, a.row, a.column},
                         {b.data + begin * b.row, b.row}, {c.data + i * c.row, c.row}, accumulate);
  return i + M;
}

template <class T, int M, int N, Layout LAYOUT>
void block_columns_of(int64_t rows, int64_t first_column, int64_t K, Left<T> a, Rows<const T> b, Rows<T> c,
                   bool accumulate, Triangle triangle) {
  int64_t i = 0;
  b.data += first_column;
  c.data += first_column;
  while (i + M <= rows) i = block_rows<T, M, N, LAYOUT>(i, first_column, K, a, b, c, accumulate, triangle);
  // Fewer rows at a time would wait for the sums before.
  if (M > 8)
    while (i + 8 <= rows) i = block_rows<T, 8, N, LAYOUT>(i, first_column, K, a, b, c, accumulate, triangle);
  if (M > 4)
    while (i + 4 <= rows) i = block_rows<T, 4, N, LAYOUT>(i, first_column, K, a, b, c, accumulate, triangle);
  while (i + 2 <= rows) i = block_rows<T, 2, N, LAYOUT>(i, first_column, K, a, b, c, accumulate, triangle);
  while (i < rows) i = block_rows<T, 1, N, LAYOUT>(i, first_column, K, a, b, c, accumulate, triangle);
}

template <class T, int M, int N>
void block_columns(int64_t rows, int64_t first_column, int64_t K, Left<T> a, Rows<const T> b, Rows<T> c,
                   bool accumulate, Triangle triangle) {
  auto run = a.row == 1 ? block_columns_of<T, M, N, Layout::dense> : block_columns_of<T, M, N, Layout::any>;
  if constexpr (N <= 2)
    if (a.row != 1 && b.row == N * WIDTH<T>) run = block_columns_of<T, M, N, Layout::narrow>;
  run(rows, first_column, K, a, b, c, accumulate, triangle);
}

// c [M, N] = or += a [M, K] b [K, N]; N is a multiple of the vector width. Of a lower result, the blocks above the
// diagonal are left as they are; the zero half of a triangular left factor is not read.
template <class T>
void multiply(int64_t M, int64_t N, int64_t K, Left<T> a, Rows<const T> b, Rows<T> c, bool accumulate,
              Triangle triangle = Triangle::none) {
  constexpr int W = WIDTH<T>;
  int64_t j = 0;
  if (REGISTERS == 32 && triangle != Triangle::lower_result)
    for (; j + 4 * W <= N; j += 4 * W) block_columns<T, 6, 4>(M, j, K, a, b, c, accumulate, triangle);
  for (; j + 2 * W <= N; j += 2 * W)
    block_columns<T, REGISTERS == 32 ? 12 : 6, 2>(M, j, K, a, b, c, accumulate, triangle);
  for (; j < N; j += W) block_columns<T, REGISTERS == 32 ? 12 : 8, 1>(M, j, K, a, b, c, accumulate, triangle);
}

// Elements of a and b in turn, from `first` on. Compilers make one shuffle of it.
template <class T, size_t... I> INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, int first, std::index_sequence<I...>) {
  return Vec<T>{(I % 2 ? b : a)[first + int(I) / 2]...};
}

// A square of a vector's width, transposed by shuffling the two halves of its rows into each other until all rows
// have met.
template <class T> void transpose_square(const T* from, int64_t from_row, T* to, int64_t to_row) {
  constexpr int W = WIDTH<T>;
  constexpr auto all = std::make_index_sequence<W>{};
  Vec<T> rows[W], next[W];
  for (int i = 0; i < W; i++) rows[i] = load(from + i * from_row);
  for (int met = 1; met < W; met *= 2) {
    for (int i = 0; i < W / 2; i++) {
      next[2 * i] = interleave<T>(rows[i], rows[i + W / 2], 0, all);
      next[2 * i + 1] = interleave<T>(rows[i], rows[i + W / 2], W / 2, all);
    }
    for (int i = 0; i < W; i++) rows[i] = next[i];
  }
  for (int i = 0; i < W; i++) store(to + i * to_row, rows[i]);
}

// Every other element of a and then of b, from `first` on.
template <class T, size_t... I> INLINE Vec<T> every_other(Vec<T> a, Vec<T> b, int first, std::index_sequence<I...>) {
  return Vec<T>{(I < sizeof...(I) / 2 ? a : b)[(2 * int(I) + first) % int(sizeof...(I))]...};
}

// As many rows as a vector holds, of four columns without a gap, as the taps of most convolutions lie.
template <class T> void transpose_four(const T* from, T* to, int64_t to_row) {
  constexpr int W = WIDTH<T>;
  constexpr auto all = std::make_index_sequence<W>{};
  Vec<T> in[4], even[2], odd[2];
  for (int i = 0; i < 4; i++) in[i] = load(from + i * W);
  for (int i = 0; i < 2; i++) {
    even[i] = every_other<T>(in[2 * i], in[2 * i + 1], 0, all);
    odd[i] = every_other<T>(in[2 * i], in[2 * i + 1], 1, all);
  }
  for (int i = 0; i < 2; i++) {
    store(to + 2 * i * to_row, every_other<T>(even[0], even[1], i, all));
    store(to + (2 * i + 1) * to_row, every_other<T>(odd[0], odd[1], i, all));
  }
}

// to [columns, rows] = from [rows, columns], which do not overlap.
template <class T>
void transpose(int64_t rows, int64_t columns, const T* from, int64_t from_row, T* to, int64_t to_row) {
  constexpr int W = WIDTH<T>;
  for (int64_t first = 0; first < rows; first += W) {
    // Rows that do not fill a vector are taken with some before them, which takes less than one by one.
    if (first + W > rows && rows >= W) first = rows - W;
    const int64_t end = std::min(rows, first + W);
    int64_t j = 0;
    if (end == first + W && columns == 4 && from_row == 4) {
      transpose_four(from + first * from_row, to + first, to_row);
      continue;
    }
    if (end == first + W)
      for (; j + W <= columns; j += W)
        transpose_square(from + first * from_row + j, from_row, to + j * to_row + first, to_row);
    for (; j < columns; j++)
      for (int64_t i = first; i < end; i++) to[j * to_row + i] = from[i * from_row + j];
  }
}

// Sum of products over a multiple of the vector width.
template <class T> INLINE T dot(const T* a, const T* b, int64_t n) {
  Vec<T> total{};
  for (int64_t e = 0; e < n; e += WIDTH<T>) total += load(a + e) * load(b + e);
  return sum<T>(total);
}

}  // namespace xlstm
