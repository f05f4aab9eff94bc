// Tensors of torch, read without its headers: through the table of functions that torch publishes for DLPack, which is
// several times as fast as the methods of tensors; or through those, where torch is older.
#pragma once

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace xlstm {

constexpr int MOST_DIMENSIONS = 4;

// What a tensor must look like, as kernels/cpp_blocks.py packs it.
struct Shape {
  int64_t dimensions;  // negative: there must be none
  int64_t optional;    // whether there may be none
  int64_t sizes[MOST_DIMENSIONS];  // negative: that of the batch
};

// The structures of DLPack 1 (dlpack.h) that are needed here.
struct DLTensor {
  void* data;
  int32_t device_type, device_id, dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLExchange {
  uint32_t major, minor;
  DLExchange* previous;
  void (*allocate)();
  void (*managed_from_object)();
  void (*managed_to_object)();
  int (*from_object)(void* object, DLTensor* out);
  void (*stream)();
};

// What is known of torch; kernels/cpp_extension.py tells it. Nothing is read before.
struct Torch {
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  PyObject *float32 = nullptr, *float64 = nullptr, *boolean = nullptr;
  const DLExchange* exchange = nullptr;  // null where torch has none
  // Names of attributes.
  PyObject *is_cpu = nullptr, *dtype = nullptr, *is_contiguous = nullptr, *shape = nullptr, *data_ptr = nullptr;
  PyObject* is_neg = nullptr;
};
inline Torch torch;

enum class Kind { other, float32, float64, boolean };

// A tensor in the memory of the CPU whose elements lie next to each other.
struct Tensor {
  char* data;
  Kind kind;
  int64_t dimensions, sizes[MOST_DIMENSIONS];

  bool empty() const { return std::find(sizes, sizes + dimensions, 0) != sizes + dimensions; }
  bool fits(Kind wanted, const Shape& shape, int64_t batch) const {
    if (kind != wanted || dimensions != shape.dimensions) return false;
    for (int64_t d = 0; d < dimensions; d++)
      if (sizes[d] != (shape.sizes[d] < 0 ? batch : shape.sizes[d])) return false;
    return true;
  }
};

inline bool read_by_exchange(PyObject* object, Tensor& tensor) {
  constexpr int CPU = 1, FLOAT = 2, BOOLEAN = 6;
  DLTensor raw;
  if (torch.exchange->from_object(object, &raw)) {
    PyErr_Clear();
    return false;
  }
  if (raw.device_type != CPU || raw.lanes != 1 || raw.dimensions > MOST_DIMENSIONS) return false;
  tensor.kind = raw.code == BOOLEAN                    ? Kind::boolean
                : raw.code == FLOAT && raw.bits == 32 ? Kind::float32
                : raw.code == FLOAT && raw.bits == 64 ? Kind::float64
                                                      : Kind::other;
  tensor.data = static_cast<char*>(raw.data) + raw.byte_offset;
  tensor.dimensions = raw.dimensions;
  int64_t stride = 1;
  bool dense = true;
  for (int d = raw.dimensions - 1; d >= 0; d--) {
    const int64_t size = tensor.sizes[d] = raw.shape[d];
    dense = dense && (size == 1 || raw.strides[d] == stride);
    stride *= size;
  }
  return dense || tensor.empty();
}

// Owns a reference.
class Object {
  PyObject* held;

 public:
  explicit Object(PyObject* object) : held(object) {}
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  ~Object() { Py_XDECREF(held); }
  PyObject* get() const { return held; }
  bool is(const PyObject* other) const { return held == other; }
};

inline bool read_by_methods(PyObject* object, Tensor& tensor) {
  const auto call = [&](PyObject* name) { return PyObject_CallMethodObjArgs(object, name, nullptr); };
  const Object on_cpu(PyObject_GetAttr(object, torch.is_cpu)), dtype(PyObject_GetAttr(object, torch.dtype));
  const Object dense(call(torch.is_contiguous)), sizes(PyObject_GetAttr(object, torch.shape));
  const Object address(call(torch.data_ptr));
  if (!on_cpu.get() || !dtype.get() || !dense.get() || !sizes.get() || !address.get()) {
    PyErr_Clear();
    return false;
  }
  tensor.kind = dtype.is(torch.float32)   ? Kind::float32
                : dtype.is(torch.float64) ? Kind::float64
                : dtype.is(torch.boolean) ? Kind::boolean
                                          : Kind::other;
  tensor.data = static_cast<char*>(PyLong_AsVoidPtr(address.get()));
  tensor.dimensions = PyTuple_Size(sizes.get());
  if (tensor.dimensions < 0 || tensor.dimensions > MOST_DIMENSIONS) return false;
  for (int64_t d = 0; d < tensor.dimensions; d++) tensor.sizes[d] = PyLong_AsLongLong(PyTuple_GetItem(sizes.get(), d));
  return on_cpu.is(Py_True) && dense.is(Py_True);
}

// Whether the object is a plain tensor or parameter that can be read where it lies.
inline bool read(PyObject* object, Tensor& tensor) {
  const PyTypeObject* type = Py_TYPE(object);
  if (torch.tensor == nullptr || (type != torch.tensor && type != torch.parameter)) return false;
  if (!(torch.exchange ? read_by_exchange(object, tensor) : read_by_methods(object, tensor))) return false;
  // A storage may have been freed under its tensor.
  if (tensor.data == nullptr) return tensor.empty();
  // Views may only note that their numbers are to be negated, which neither way of reading tells.
  if (tensor.kind == Kind::boolean) return true;
  const Object negative(PyObject_CallMethodObjArgs(object, torch.is_neg, nullptr));
  if (!negative.get()) PyErr_Clear();
  return negative.is(Py_False);
}

template <class T> constexpr Kind KIND = sizeof(T) == 4 ? Kind::float32 : Kind::float64;

// The address of a tensor of that shape, null where there is none and may be none. False if it does not fit.
template <class T>
bool find(PyObject* object, const Shape& shape, int64_t batch, T*& address, Kind kind = KIND<std::remove_const_t<T>>) {
  address = nullptr;
  if (object == Py_None) return shape.dimensions < 0 || shape.optional;
  Tensor tensor;
  if (!read(object, tensor) || !tensor.fits(kind, shape, batch)) return false;
  address = reinterpret_cast<T*>(tensor.data);
  return true;
}

// The same for a tuple of tensors.
template <class T, int N> bool find_all(PyObject* tuple, const Shape (&shapes)[N], int64_t batch, T* (&addresses)[N]) {
  if (PyTuple_Size(tuple) != N) return false;
  for (int n = 0; n < N; n++)
    if (!find(PyTuple_GetItem(tuple, n), shapes[n], batch, addresses[n])) return false;
  return true;
}

// The same for tensors each of which is held by a dictionary under a name: a tuple of dictionaries, and one of names.
template <class T, int N>
bool find_held(PyObject* holders, PyObject* names, const Shape (&shapes)[N], const T* (&addresses)[N]) {
  if (PyTuple_Size(holders) != N || PyTuple_Size(names) != N) return false;
  for (int n = 0; n < N; n++) {
    PyObject* held = PyDict_GetItemWithError(PyTuple_GetItem(holders, n), PyTuple_GetItem(names, n));
    if (held == nullptr || !find(held, shapes[n], 0, addresses[n])) return false;
  }
  return true;
}

}  // namespace xlstm
