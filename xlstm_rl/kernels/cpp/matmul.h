// Small matrix products: the blocks in registers of a GEMM without the packing that large ones need.
#pragma once

#include "vectors.h"

namespace xlstm {

// A left factor of any layout.
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

template <class T, int M, int N>
INLINE void block_product(int64_t K, Left<T> a, Rows<const T> b, Rows<T> c, bool accumulate) {
  constexpr int W = WIDTH<T>;
  Vec<T> total[M][N];
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) total[i][j] = accumulate ? load(c.data + i * c.row + j * W) : Vec<T>{};
  for (int64_t k = 0; k < K; k++) {
    Vec<T> right[N];
    for (int j = 0; j < N; j++) right[j] = load(b.data + k * b.row + j * W);
    for (int i = 0; i < M; i++) {
      Vec<T> left = fill(a.data[i * a.row + k * a.column]);
      for (int j = 0; j < N; j++) total[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < M; i++)
    for (int j = 0; j < N; j++) store(c.data + i * c.row + j * W, total[i][j]);
}

template <class T, int M, int N>
INLINE int64_t block_rows(int64_t i, int64_t first_column, int64_t K, Left<T> a, Rows<const T> b, Rows<T> c,
                          bool accumulate, Triangle triangle) {
  if (triangle == Triangle::lower_result && first_column > i + M - 1) return i + M;
  int64_t begin = triangle == Triangle::upper_left ? i : 0;
  int64_t end = triangle == Triangle::lower_left ? std::min(K, i + M) : K;
  block_product<T, M, N>(end - begin, {a.data + i * a.row + begin * a.column, a.row, a.column},
                         {b.data + begin * b.row, b.row}, {c.data + i * c.row, c.row}, accumulate);
  return i + M;
}

template <class T, int M, int N>
void block_columns(int64_t rows, int64_t first_column, int64_t K, Left<T> a, Rows<const T> b, Rows<T> c,
                   bool accumulate, Triangle triangle) {
  int64_t i = 0;
  b.data += first_column;
  c.data += first_column;
  while (i + M <= rows) i = block_rows<T, M, N>(i, first_column, K, a, b, c, accumulate, triangle);
  if (M > 4)
    while (i + 4 <= rows) i = block_rows<T, 4, N>(i, first_column, K, a, b, c, accumulate, triangle);
  while (i + 2 <= rows) i = block_rows<T, 2, N>(i, first_column, K, a, b, c, accumulate, triangle);
  while (i < rows) i = block_rows<T, 1, N>(i, first_column, K, a, b, c, accumulate, triangle);
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

// to [columns, rows] = from [rows, columns], in blocks that stay in the cache.
template <class T>
void transpose(int64_t rows, int64_t columns, const T* from, int64_t from_row, T* to, int64_t to_row) {
  for (int64_t first = 0; first < rows; first += 16) {
    int64_t end = std::min(rows, first + 16);
    for (int64_t j = 0; j < columns; j++)
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
